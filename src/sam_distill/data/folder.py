"""Data source for the images in a folder and its subfolders."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sam_distill.data.annotations import AnnotatedImage, annotations_by_file, coco_json
from sam_distill.data.base import Split
from sam_distill.data.indexed import IndexedSource
from sam_distill.errors import UserError
from sam_distill.images import decode, to_frame
from sam_distill.selection import Fraction, Images, ValImages, choose, digests, is_image, limit_val_images, unique_keys
from sam_distill.types import Sample

RUN_IMAGE_FOLDERS = ("pictures", "wandb")  # subfolders of a run folder with images that the run has drawn


@dataclass(frozen=True)
class ImageFile:
    """Image in a folder. key: its path below the folder, without the suffix unless two images differ only in that."""

    key: str
    path: Path


class Folder(IndexedSource[ImageFile]):
    """Every jpg, png, webp, bmp and tif below `path`; images with the lowest key hashes are held out for validation."""

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
        self.train = [rest[index] for index in choose(self.keys(rest), images, fraction)]

    def eval_items(self, split: Split) -> Sequence[ImageFile]:
        if split == "val":
            return self.val
        return [self.files[i] for i in choose(self.keys(self.files), self.images, self.fraction)]

    def keys(self, items: Sequence[ImageFile]) -> list[str]:
        return [file.key for file in items]

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
    """Return the images at any depth, without hidden files and folders. Follow links, but enter no folder twice.

    Images that a run has drawn are left out, too, because outputs/ may lie in the folder that runs are trained on.
    """
    found, entered, tops = [], set(), [str(folder)]
    for top in tops:  # links come last, so that a file inside `folder` is found under its own path first
        for parent, subfolders, names in os.walk(top):
            stat = os.stat(parent)
            if (stat.st_dev, stat.st_ino) in entered:
                subfolders.clear()
                continue
            entered.add((stat.st_dev, stat.st_ino))
            drawn = RUN_IMAGE_FOLDERS if "status.json" in names and "config.yaml" in names else ()
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in drawn)
            tops += [path for name in subfolders if os.path.islink(path := os.path.join(parent, name))]
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
