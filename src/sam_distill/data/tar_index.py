"""What tars hold, read off their headers once and remembered in $SAM_DISTILL_HOME/index, a file for each.

SA-1B has eleven million names. They stay in those files, and are looked up when a tar's turn comes: memory does not
grow with the data set, and all ranks and loader workers share what the system caches of the files.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sam_distill.data.selection import digest, is_image_member
from sam_distill.files import atomic_write
from sam_distill.models.weights import home

log = logging.getLogger(__name__)

COMPANIONS = (".json", ".embedding")  # what may lie beside an image: its annotations, its teacher's embedding
FEW = 100  # files in a tar on a disk, whose headers are read as fast as what was remembered of them


def companion(member: str, kind: str) -> str:
    """The name of what lies beside an image: sa_1.jpg and .json make sa_1.json."""
    return short_key(member) + kind


def short_key(member: str) -> str:
    """The key of an image, unless another has the same."""
    return member.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Contents:
    """The images of a tar, in its order. images: how many. problem: what is wrong with the tar, if anything.

    arrays: `names`, `digests` (of short keys) and `beside`, or the file that holds them.
    """

    images: int
    arrays: Path | Mapping[str, NDArray[np.generic]]
    problem: str | None = None

    @classmethod
    def of(cls, files: Sequence[str], problem: str | None = None) -> Contents:
        """files: those that the tar holds whole."""
        images, there = [name for name in files if is_image_member(name)], set(files)
        beside = [
            sum((companion(name, kind) in there) << bit for bit, kind in enumerate(COMPANIONS)) for name in images
        ]
        arrays: dict[str, NDArray[np.generic]] = {
            "names": np.frombuffer("\0".join(images).encode(errors="surrogateescape"), np.uint8),
            "digests": np.array([digest(short_key(name)) for name in images], np.uint64),
            "beside": np.array(beside, np.uint8),  # a bit for each of COMPANIONS
        }
        return cls(len(images), arrays, problem)

    def names(self) -> list[str]:
        """Of its members, with their folders."""
        text = self._array("names").tobytes().decode(errors="surrogateescape")
        return text.split("\0") if text else []

    def digests(self) -> NDArray[np.uint64]:
        """[images], of their short keys."""
        return self._array("digests").astype(np.uint64, copy=False)

    def beside(self, kind: str) -> NDArray[np.bool_]:
        """[images]: which have that companion."""
        return (self._array("beside").astype(np.uint8, copy=False) >> COMPANIONS.index(kind) & 1).astype(bool)

    def _array(self, name: str) -> NDArray[np.generic]:
        if not isinstance(self.arrays, Path):
            return self.arrays[name]
        with safe_open(self.arrays, "numpy") as file:
            found: NDArray[np.generic] = file.get_tensor(name)
        return found


def remembered(identity: str, stamp: str, read: Callable[[], Contents], least: int = 0) -> Contents:
    """What `read` said of a tar when its stamp was the same as now; where it is new or has changed, it is read.

    stamp: its size, and what else changes with it. least: tars with fewer images are not worth it. Damaged ones are
    read each time.
    """
    file = (
        home() / "index" / f"{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:32]}.safetensors"
    )
    known = _recall(file, stamp)
    if known is not None:
        return known
    contents = read()
    if contents.problem is not None or contents.images < least:
        return contents
    try:
        remember(contents, file, stamp)
    except OSError as error:
        _complain(str(file.parent), error.strerror)
        return contents
    return Contents(contents.images, file)


def remember(contents: Contents, file: Path, stamp: str) -> None:
    assert not isinstance(contents.arrays, Path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as draft:
        save_file(dict(contents.arrays), draft, {"stamp": stamp})


def stamp_of(stat: os.stat_result) -> str:
    """Of a file."""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _recall(file: Path, stamp: str) -> Contents | None:
    try:
        with safe_open(file, "numpy") as held:
            same = held.metadata()["stamp"] == stamp
            return Contents(held.get_slice("digests").get_shape()[0], file) if same else None
    except (OSError, SafetensorError):  # there is none
        return None


@cache
def _complain(folder: str, why: str) -> None:
    log.warning("what tars hold can't be remembered in %s (%s): their headers are read at every start", folder, why)
