"""Which images: what counts as one, its key, and which of many to train on or to hold out.

Images are chosen by a hash of their keys, so that a choice depends neither on the order of files nor on the machine,
and images=100 is part of images=1000.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sam_distill.types import UserError

log = logging.getLogger(__name__)

# the options that all sources share, as their signatures name them
ValImages = Annotated[int, Field(ge=0)]
Images = Annotated[int, Field(ge=1)] | None
Fraction = Annotated[float, Field(gt=0, le=1)] | None

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def is_image(name: str) -> bool:
    """Whether a file's name, without its folders, is that of an image; hidden files are not."""
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and not stem.startswith(".") and (dot + suffix).lower() in IMAGE_SUFFIXES


def is_image_member(name: str) -> bool:
    """Whether a member of a tar is an image; what lies in hidden folders is not."""
    *folders, last = PurePosixPath(name).parts or ("",)
    return is_image(last) and not any(folder.startswith(".") for folder in folders)


def unique_keys(names: Sequence[str]) -> list[str]:
    """The key of each image: its name without the suffix, or in full where several images would have the same key.

    Also where it is another's name: of a.jpg.png, beside a.jpg.
    """
    short = [name.rpartition(".")[0] for name in names]
    uses = Counter([*short, *names])
    return [brief if uses[brief] == 1 else name for brief, name in zip(short, names, strict=True)]


def limit_val_images(images: int, val_images: int, where: str) -> tuple[int, str]:
    """How many of all images to hold out, at most a fifth, and the `shortage` if that is not what was asked for."""
    most = max(1, images // 5) if images > 1 else 0
    if val_images <= most:
        return val_images, ""
    return most, f"{where} has only {images} images: {most}, not {val_images}, are held out for validation (a fifth)"


def digests(keys: Iterable[str]) -> NDArray[np.uint64]:
    """[keys]: of each, 64 bits that look random and never change."""
    hashes = (hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8) for key in keys)
    return np.array([int.from_bytes(each.digest(), "big") for each in hashes], np.uint64)


def lowest(digests: NDArray[np.uint64], number: int) -> NDArray[np.bool_]:
    """[images]: which have the `number` lowest digests; of those that share the last place, the first."""
    limit = np.partition(digests, number - 1)[number - 1]
    wins = digests < limit
    wins[np.flatnonzero(digests == limit)[: number - int(wins.sum())]] = True
    return wins


def fingerprint(digests: NDArray[np.uint64]) -> str:
    """The same for the same keys, whatever their order."""
    return hashlib.sha256(f"{len(digests)} {digests.sum(dtype=np.uint64)}".encode()).hexdigest()


def first_fingerprint(keys: Iterable[str]) -> str:
    """What runs of the first days have in place of `fingerprint`."""
    return hashlib.sha256("\n".join(sorted(keys)).encode(errors="surrogateescape")).hexdigest()


def how_many(available: int, images: int | None, fraction: float | None) -> int:
    """How many of so many images data.images or data.fraction keeps for training."""
    if images is not None and fraction is not None:
        raise UserError("data.images and data.fraction exclude each other: give one of them")
    if fraction is not None:
        return max(1, round(fraction * available))
    if images is not None and images > available:
        log.warning("data.images=%d, but there are only %d to train on: all are used", images, available)
    return available if images is None else min(images, available)


def choose(keys: Sequence[str], images: int | None, fraction: float | None) -> list[int]:
    """Indices, in their order, of the training images that data.images or data.fraction keeps."""
    wanted = how_many(len(keys), images, fraction)
    return list(range(len(keys))) if wanted == len(keys) else np.flatnonzero(lowest(digests(keys), wanted)).tolist()
