"""Images in a folder and its subfolders."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sam_distill.data.annotations import AnnotatedImage, annotations_by_file, coco_json
from sam_distill.data.base import Split
from sam_distill.data.indexed import IndexedSource
from sam_distill.images import decode, to_frame
from sam_distill.selection import Fraction, Images, ValImages, choose, digests, is_image, limit_val_images, unique_keys
from sam_distill.types import Sample, UserError

DRAWN = ("pictures", "wandb")  # in a run folder


@dataclass(frozen=True)
class ImageFile:
    """key: the path below the folder, without its suffix unless two images differ in nothing else."""

    key: str
    path: Path


class Folder(IndexedSource[ImageFile]):
    """Every jpg, png, webp, bmp and tif below `path`; those whose keys hash lowest are held out for validation."""

    def __init__(
        self,
        path: str,
        val_images: ValImages = 16,
        images: Images = None,
        fraction: Fraction = None,
        annotations: str | None = None,
    ) -> None:
        self.path, self.annotations = path, annotations
        self._truth: dict[Path, AnnotatedImage] = {}
        files = _find(Path(path).expanduser())
        order = digests(file.key for file in files).argsort(kind="stable").tolist()
        held_out, self.shortage = limit_val_images(len(files), val_images, path)
        rest = [files[index] for index in sorted(order[held_out:])]
        self.files, self.images, self.fraction = files, images, fraction
        self.val = [files[index] for index in order[:held_out]]
        self.train = [rest[index] for index in choose([file.key for file in rest], images, fraction)]

    def eval_items(self, split: Split) -> Sequence[ImageFile]:
        if split == "val":
            return self.val
        return [self.files[i] for i in choose([file.key for file in self.files], self.images, self.fraction)]

    def key(self, item: ImageFile) -> str:
        return item.key

    def load(self, item: ImageFile) -> Sample:
        image, original_size = decode(item.path)
        truth = self._truth.get(item.path.absolute())
        if truth and truth.size not in (None, original_size):
            raise UserError(
                f"{item.path} has {original_size} pixels (H, W), but the annotations are of an image of {truth.size}"
            )
        content = json.dumps({"annotations": truth.annotations}).encode() if truth else b""
        return Sample(item.key, to_frame(image, original_size), original_size, json=content)

    def load_json(self) -> None:
        if self.annotations is None:
            super().load_json()
            return
        annotated, files = coco_json(Path(self.annotations).expanduser()), [file.path.absolute() for file in self.files]
        try:
            self._truth = annotations_by_file(files, annotated)
        except ValueError as error:
            raise UserError(f"data.annotations={self.annotations}: {error}") from None
        if not self._truth:
            raise UserError(f"data.annotations={self.annotations}: it names not one of the images in {self.path}")


def image_files(folder: Path) -> list[Path]:
    """Images at any depth, hidden files and folders left out. Links are followed, but no folder is entered twice.

    What a run has drawn is left out, too: outputs/ may lie in the folder that runs are trained on.
    """
    found, entered, tops = [], set(), [str(folder)]
    for top in tops:  # links wait their turn, so that what lies below has its own name rather than a link's
        for parent, below, names in os.walk(top):
            about = os.stat(parent)
            if (about.st_dev, about.st_ino) in entered:
                below.clear()
                continue
            entered.add((about.st_dev, about.st_ino))
            drawn = DRAWN if "status.json" in names and "config.yaml" in names else ()
            below[:] = sorted(name for name in below if not name.startswith(".") and name not in drawn)
            tops += [path for name in below if os.path.islink(path := os.path.join(parent, name))]
            found += [Path(parent, name) for name in names if is_image(name)]
    return sorted(found)


def _find(folder: Path) -> list[ImageFile]:
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.path={folder} {reason}; expected a folder of images")
    paths = image_files(folder)
    if not paths:
        raise UserError(f"data.path={folder} holds no image; expected jpg, png, webp, bmp or tif files, at any depth")
    names = [path.relative_to(folder).as_posix() for path in paths]
    keys = unique_keys(names)
    return [ImageFile(key, path) for key, path in zip(keys, paths, strict=True)]
