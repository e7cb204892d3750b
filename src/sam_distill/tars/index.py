"""Indices of tars: image names, read from the headers once and kept in $SAM_DISTILL_HOME/index, one file per tar.

SA-1B has eleven million names. They are looked up there when a tar is read, so that they are not all held in memory.
"""

import hashlib
import logging
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sam_distill.errors import one_line
from sam_distill.files import atomic_write, compression
from sam_distill.models.weights import home
from sam_distill.selection import digests, is_image_member

log = logging.getLogger(__name__)

COMPANIONS = (".json", ".embedding")  # members that belong to an image: its annotations, its teacher embedding


def companion(member: str, kind: str) -> str:
    """Return the member name of an image's companion: sa_1.jpg and .json give sa_1.json."""
    return short_key(member) + kind


def short_key(member: str) -> str:
    """Return the member name without its suffix: the key of an image, unless another image has the same."""
    return member.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Index of the images in a tar, in its order. images: their number. problem: message if anything is wrong.

    arrays: `names`, `digests` (of short keys) and `beside` (bits), or the safetensors file that holds them.
    """

    images: int
    arrays: Path | Mapping[str, NDArray[Any]]
    problem: str | None = None

    @classmethod
    def from_members(cls, files: Sequence[str], problem: str | None = None) -> "TarIndex":
        """Return the index of a tar. files: the members that it contains completely."""
        images, present = [name for name in files if is_image_member(name)], set(files)
        beside = [
            sum((companion(name, kind) in present) << bit for bit, kind in enumerate(COMPANIONS)) for name in images
        ]
        arrays: dict[str, NDArray[Any]] = {
            "names": np.frombuffer("\0".join(images).encode(errors="surrogateescape"), np.uint8),
            "digests": digests(map(short_key, images)),
            "beside": np.array(beside, np.uint8),  # one bit for each of COMPANIONS
        }
        return cls(len(images), arrays, problem)

    def names(self) -> list[str]:
        """Return the member names of the images, with their folders."""
        text = self._array("names").tobytes().decode(errors="surrogateescape")
        return text.split("\0") if text else []

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of the short keys: [images] uint64."""
        return self._array("digests")

    def has_companion(self, kind: str) -> NDArray[np.bool_]:
        """Return which images have that companion: [images] bool."""
        return (self._array("beside") >> COMPANIONS.index(kind) & 1).astype(bool)

    def _array(self, name: str) -> NDArray[Any]:
        if not isinstance(self.arrays, Path):
            return self.arrays[name]
        with safe_open(self.arrays, "numpy") as file:
            return file.get_tensor(name)


def read_headers(file: IO[bytes], size: int | None, address: str) -> TarIndex:
    """Index a tar, and close its file. size: of the file; None if it can only be read from front to back."""
    names: dict[str, None] = {}  # an ordered set
    links = 0
    with file:
        try:
            with tarfile.open(fileobj=file, mode="r|" if size is None else "r:") as tar:
                for member in tar:
                    if not member.isreg():
                        links += (member.issym() or member.islnk()) and is_image_member(member.name)
                        continue
                    if size is not None and member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"truncated in {member.name}")
                    names[member.name] = None
                if size is not None:
                    file.seek(tar.offset)
                    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # neither end of archive nor of file
                        raise tarfile.ReadError("damaged header")
        except (tarfile.TarError, OSError) as error:
            problem = f"the rest of {address} after {len(names)} files ({one_line(error)})"
            if size and not names:
                file.seek(0)
                if packed := compression(file.read(8)):
                    problem = f"{address} is compressed with {packed}: unpack it, or read it by a command, pipe:..."
            return TarIndex.from_members(list(names), problem)
    skipped = f"{links} images of {address}, which are links: tar --dereference --hard-dereference takes what they mean"
    return TarIndex.from_members(list(names), skipped if links else None)


def sha256_of(address: str) -> str:
    """Return the SHA-256 of an address in hexadecimal digits. The address need not be UTF-8."""
    return hashlib.sha256(address.encode(errors="surrogateescape")).hexdigest()


def cached_index(identity: str, stamp: str, read: Callable[[], TarIndex], min_images: int = 0) -> TarIndex:
    """Return the stored index of a tar; if there is none, or its stamp has changed, call `read` and store the result.

    stamp: the tar's size, and anything else that changes with its content. Tars with a problem or with fewer than
    `min_images` images are not stored, but read each time.
    """
    name = sha256_of(identity)[:32]
    file = home() / "index" / f"{name}.safetensors"
    with suppress(OSError, SafetensorError), safe_open(file, "numpy") as held:  # the file may not exist
        if held.metadata()["stamp"] == stamp:
            return TarIndex(held.get_slice("digests").get_shape()[0], file)
    index = read()
    if index.problem is not None or index.images < min_images:
        return index
    assert not isinstance(index.arrays, Path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as draft:
            save_file(dict(index.arrays), draft, {"stamp": stamp})
    except OSError as error:
        _warn_once(str(file.parent), error.strerror)
        return index
    return TarIndex(index.images, file)


def file_stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns}"


@cache
def _warn_once(folder: str, why: str) -> None:
    log.warning("what tars hold can't be remembered in %s (%s): their headers are read at every start", folder, why)
