"""Write tars with random crops of the images in other tars, as further images for the teacher and its cache.

usage: python experiments/pocket/crops.py OUT_DIR TAR ...

Three crops per image, 55% to 100% of each side; the first and third are mirrored. They depend on the image's name only.
"""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

VIEWS = (1, 2, 3)
MIRRORED = (1, 3)


def crop(image: Image.Image, view: int, name: str) -> Image.Image:
    rng = np.random.default_rng([view, *name.encode()])
    scale, aspect = rng.uniform(0.55, 1), np.exp(rng.uniform(-0.15, 0.15))
    width, height = (
        min(image.width, round(image.width * scale * aspect)),
        min(image.height, round(image.height * scale / aspect)),
    )
    x, y = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
    part = image.crop((x, y, x + width, y + height))
    return ImageOps.mirror(part) if view in MIRRORED else part


def main(folder: Path, tars: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for view in VIEWS:
        for path in tars:
            with tarfile.open(path) as tar, tarfile.open(folder / f"view{view}-{path.name}", "w") as out:
                for member in (member for member in tar if member.name.endswith(".jpg")):
                    image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                    jpeg = io.BytesIO()
                    crop(image, view, member.name).save(jpeg, "JPEG", quality=95)
                    info = tarfile.TarInfo(f"view{view}_{Path(member.name).name}")
                    info.size = jpeg.tell()
                    jpeg.seek(0)
                    out.addfile(info, jpeg)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(tar) for tar in sys.argv[2:]])
