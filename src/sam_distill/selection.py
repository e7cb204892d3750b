"""Selection of images: which files are images, their keys, and which images to train on or to hold out.

Images are selected by a hash of their keys. So the selection depends neither on the order of files nor on the machine,
and images=100 selects a subset of images=1000.
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

from sam_distill.errors import UserError

log = logging.getLogger(__name__)

# annotations of the options that all data sources share
ValImages = Annotated[int, Field(ge=0)]
Images = Annotated[int, Field(ge=1)] | None
Fraction = Annotated[float, Field(gt=0, le=1)] | None

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def is_image(name: str) -> bool:
    """Whether a file name, given without folders, is that of an image; hidden files are not images."""
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and not stem.startswith(".") and (dot + suffix).lower() in IMAGE_SUFFIXES


def is_image_member(name: str) -> bool:
    """Whether a member of a tar is an image; files in hidden folders are not."""
    *folders, last = PurePosixPath(name).parts or ("",)
    return is_image(last) and not any(folder.startswith(".") for folder in folders)


def unique_keys(names: Sequence[str]) -> list[str]:
    """Return each image's key: its name without the suffix, or the full name if several would have the same key.

    The full name is also the key if the short one is another image's name, as for a.jpg.png beside a.jpg.
    """
    short = [name.rpartition(".")[0] for name in names]
    uses = Counter([*short, *names])
    return [brief if uses[brief] == 1 else name for brief, name in zip(short, names, strict=True)]


def limit_val_images(images: int, val_images: int, where: str) -> tuple[int, str]:
    """Return how many images to hold out, at most a fifth, and the `shortage` message if that is below val_images."""
    most = max(1, images // 5) if images > 1 else 0
    if val_images <= most:
        return val_images, ""
    return most, f"{where} has only {images} images: {most}, not {val_images}, are held out for validation (a fifth)"


def digests(keys: Iterable[str]) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each key, which looks random and never changes: [keys] uint64."""
    hashes = (hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8) for key in keys)
    return np.array([int.from_bytes(each.digest(), "big") for each in hashes], np.uint64)


def lowest(digests: NDArray[np.uint64], number: int) -> NDArray[np.bool_]:
    """Return which images have the `number` lowest digests: [images] -> [images] bool. Of equal ones, the first win."""
    limit = np.partition(digests, number - 1)[number - 1]
    wins = digests < limit
    wins[np.flatnonzero(digests == limit)[: number - int(wins.sum())]] = True
    return wins


def fingerprint(digests: NDArray[np.uint64]) -> str:
    """Return a hash of a set of keys, given by their digests, that does not depend on their order."""
    return hashlib.sha256(f"{len(digests)} {digests.sum(dtype=np.uint64)}".encode()).hexdigest()


def legacy_fingerprint(keys: Iterable[str]) -> str:
    """Return the hash that runs of the first versions recorded instead of `fingerprint`."""
    return hashlib.sha256("\n".join(sorted(keys)).encode(errors="surrogateescape")).hexdigest()


def how_many(available: int, images: int | None, fraction: float | None) -> int:
    """Return how many of `available` images to train on, by data.images or data.fraction; UserError if both are set."""
    if images is not None and fraction is not None:
        raise UserError("data.images and data.fraction exclude each other: give one of them")
    if fraction is not None:
        return max(1, round(fraction * available))
    if images is not None and images > available:
        log.warning("data.images=%d, but there are only %d to train on: all are used", images, available)
    return available if images is None else min(images, available)


def choose(keys: Sequence[str], images: int | None, fraction: float | None) -> list[int]:
    """Return the indices, in ascending order, of the images to train on, by data.images or data.fraction."""
    wanted = how_many(len(keys), images, fraction)
    return list(range(len(keys))) if wanted == len(keys) else np.flatnonzero(lowest(digests(keys), wanted)).tolist()
