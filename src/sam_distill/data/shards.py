"""Tars in SA-1B's layout: what their headers say is in them, and reading the members that are wanted."""

from __future__ import annotations

import glob
import logging
import random
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, compress, islice, repeat, zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tar_file_iterator

from sam_distill.data.local_copy import Kept
from sam_distill.data.selection import digest, how_many
from sam_distill.data.tar_index import Contents, companion, short_key
from sam_distill.data.tars import HttpTar, LocalTar, PipedTar, Tar
from sam_distill.types import UserError

log = logging.getLogger(__name__)

CONNECTIONS = 16  # at a time, while indices are read


@dataclass(frozen=True, eq=False)
class Shard:
    """A tar, or a choice of its images; never empty.

    rows: which of its contents' images, ascending; None: all.
    shared: short keys that several images of the data set have, which are told apart by their tars' names.
    """

    tar: Tar
    contents: Contents
    shared: Collection[str] = frozenset()
    rows: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return self.contents.images if self.rows is None else len(self.rows)

    def members(self) -> list[str]:
        """Names of its images, in the order of the tar."""
        names = self.contents.names()
        return names if self.rows is None else [names[row] for row in self.rows]

    def key(self, member: str) -> str:
        short = short_key(member)
        return f"{self.tar.stem}/{member}" if short in self.shared else short

    def image_keys(self) -> list[str]:
        return [self.key(member) for member in self.members()]

    def digests(self) -> NDArray[np.uint64]:
        """Of the keys."""
        if self.shared:
            return np.array([digest(key) for key in self.image_keys()], np.uint64)
        return self._of_mine(self.contents.digests())

    def beside(self, kind: str) -> NDArray[np.bool_]:
        """Which of the images have that companion."""
        return self._of_mine(self.contents.beside(kind))

    def only(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Shard:
        """A part of it: numbers of its images, ascending, or a flag for each."""
        rows = self._of_mine(np.arange(self.contents.images, dtype=np.int32))[which]
        return self if len(rows) == len(self) else replace(self, rows=rows)

    def _of_mine(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self.rows is None else values[self.rows]

    def read(self, members: Collection[str], kinds: Sequence[str] = ()) -> Iterator[tuple[str, list[bytes]]]:
        """(member, its content and those of its companions) in the tar's order, up to where the tar is damaged.

        A companion that a member does not have is empty.
        """
        having = {kind: set(compress(self.members(), self.beside(kind))) for kind in kinds}
        names = {m: [m, *(companion(m, kind) for kind in kinds if m in having[kind])] for m in members}
        owners: dict[str, list[str]] = {}  # several, where a.jpg and a.png share a.json
        for member, its in names.items():
            for name in its:
                owners.setdefault(name, []).append(member)
        parts: dict[str, dict[str, bytes]] = {}  # of members that are not complete yet
        for name, content in self._read(owners.keys()):
            for member in owners[name]:
                whole = parts.setdefault(member, {})
                whole[name] = content
                if len(whole) == len(names[member]):
                    yield member, [whole[member], *(whole.get(companion(member, kind), b"") for kind in kinds)]
                    del parts[member]

    def _read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        left = set(names)
        try:
            with self.tar.stream() as file:
                for found in tar_file_iterator(file, skip_meta=None, select_files=left.__contains__):
                    left.remove(found["fname"])
                    yield found["fname"], found["data"]
                    if not left:
                        break
                if isinstance(self.tar, Kept):
                    self.tar.finish(file)
        except (tarfile.TarError, OSError, UserError) as error:  # hours into a run, too: the other tars are still there
            log.warning("%s: %s", self.tar, " ".join(str(error).split()))


def index_tars(path: str | list[str], option: str, local: str | None = None) -> tuple[list[Shard], list[str]]:
    """The tars that `path` names, those without images left out, and a line for each that is damaged.

    local: a folder for copies of those that lie elsewhere.
    """
    paths = [tar for pattern in ([path] if isinstance(path, str) else path) for tar in _expand(pattern, option)]
    paths = list(dict.fromkeys(paths))  # patterns may overlap
    if local is not None:
        paths = _kept(paths, Path(local).expanduser())
    if not paths:
        raise UserError(f"{option}={path} names no tar")
    contents = _contents(paths)
    problems = [c.problem for c in contents if c.problem]
    found = [Shard(tar, held) for tar, held in zip(paths, contents, strict=True) if held.images]
    if not found:
        reason = next(iter(problems), "none of them holds a jpg or png")
        raise UserError(f"{option}={path}: no image in {len(paths)} tars ({reason})")
    shared = _shared(found)
    long = Counter((shard.tar.stem, name) for shard in found if shared for name in _named(shard, shared))
    if any(uses > 1 for uses in long.values()):
        raise UserError(f"{option}={path}: two tars of the same name hold images of the same name; rename one of them")
    return [replace(shard, shared=shared) for shard in found], problems


def _shared(shards: list[Shard]) -> frozenset[str]:
    """The short keys that several images have."""
    digests = _gathered(shards)
    digests.sort()
    twice = np.unique(digests[1:][digests[1:] == digests[:-1]])
    if not len(twice):
        return frozenset()
    alike = (compress(shard.members(), np.isin(shard.digests(), twice)) for shard in shards)
    uses = Counter(map(short_key, chain.from_iterable(alike)))
    return frozenset(key for key, times in uses.items() if times > 1)


def _named(shard: Shard, shared: Collection[str]) -> Iterator[str]:
    return (member for member in shard.members() if short_key(member) in shared)


def _gathered(shards: Sequence[Shard]) -> NDArray[np.uint64]:
    """The digests of all keys: the one thing that is ever held in memory for each image, and not for long."""
    ends = np.cumsum([len(shard) for shard in shards])
    digests = np.empty(int(ends[-1]), np.uint64)
    for shard, end in zip(shards, ends, strict=True):
        digests[end - len(shard) : end] = shard.digests()
    return digests


def _expand(pattern: str, option: str) -> list[Tar]:
    if pattern.startswith("pipe:"):
        return [PipedTar(pattern)]
    is_remote = urlsplit(pattern).scheme in ("http", "https")
    there = Path(pattern).expanduser()
    if not is_remote and there.exists():  # no pattern, whatever brackets and braces it may have
        named = sorted(there.glob("*.tar")) if there.is_dir() else [there]
        if not named:
            raise UserError(f"{option}={pattern}: there is no .tar in that folder")
        return [LocalTar(str(tar)) for tar in named]
    try:
        names = expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"{option}={pattern}: {error}") from None
    if is_remote:
        return [HttpTar(name) for name in names]
    tars = [tar for name in names for tar in sorted(glob.glob(str(Path(name).expanduser()))) or [name]]
    missing = next((tar for tar in tars if not Path(tar).is_file()), None)
    if missing:
        hint = "; http(s) addresses and pipe: commands can be read, too" if "://" in missing else ""
        raise UserError(
            f"{option}={pattern}: there is no {missing}; expected a folder of tars, a tar, or a pattern{hint}"
        )
    return [LocalTar(tar) for tar in tars]


def _kept(tars: list[Tar], folder: Path) -> list[Tar]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.local={folder}: {error.strerror}") from None
    return [tar if isinstance(tar, LocalTar) else Kept(tar.where, tar, folder) for tar in tars]


def _contents(tars: list[Tar]) -> list[Contents]:
    """What each holds; several at a time, since those that lie elsewhere answer slowly.

    In an order of this process's own, so that ranks which start together do not all read the same headers.
    """
    order = random.Random().sample(range(len(tars)), len(tars))
    with ThreadPoolExecutor(1 if all(isinstance(tar, LocalTar) for tar in tars) else CONNECTIONS) as pool:
        found = dict(zip(order, pool.map(lambda number: tars[number].contents(), order), strict=True))
    return [found[number] for number in range(len(tars))]


def _rows(shard: Shard, keys: Collection[str], digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Which of its images have one of these keys. digests: of the keys."""
    near = np.flatnonzero(np.isin(shard.digests(), digests))
    if not len(near):
        return near
    members = shard.members()
    return np.array([row for row in near if shard.key(members[row]) in keys], np.int64)


def subset(shards: Iterable[Shard], keys: Collection[str]) -> list[Shard]:
    """The images that have one of these keys."""
    digests = np.array([digest(key) for key in keys], np.uint64)
    parts = ((shard, _rows(shard, keys, digests)) for shard in shards)
    return [shard.only(rows) for shard, rows in parts if len(rows)]


def without(shards: Iterable[Shard], keys: Collection[str]) -> list[Shard]:
    """The other images."""
    digests = np.array([digest(key) for key in keys], np.uint64)
    parts = ((shard, _rows(shard, keys, digests)) for shard in shards)
    left = (shard.only(np.delete(np.arange(len(shard)), rows)) if len(rows) else shard for shard, rows in parts)
    return [shard for shard in left if len(shard)]


def chosen(shards: list[Shard], images: int | None, fraction: float | None) -> list[Shard]:
    """What data.images or data.fraction keeps, as `choose` does: the images whose digests are lowest."""
    wanted = how_many(sum(map(len, shards)), images, fraction)
    if wanted == sum(map(len, shards)):
        return shards
    digests = _gathered(shards)
    digests.partition(wanted - 1)
    limit = digests[wanted - 1]
    at_limit = int((digests[:wanted] == limit).sum())  # of several images with that very digest, the first
    kept = []
    for shard in shards:
        own = shard.digests()
        wins = own < limit
        ties = np.flatnonzero(own == limit)[:at_limit]
        wins[ties], at_limit = True, at_limit - len(ties)
        kept.append(shard.only(wins))
    return [shard for shard in kept if len(shard)]


def spread(shards: list[Shard], images: int) -> list[Shard]:
    """The first images of evenly spaced shards, so many in all."""
    used = min(images, len(shards))
    spaced = [shards[number * len(shards) // used] for number in range(used)]
    in_turn = chain.from_iterable(zip_longest(*(repeat(place, len(shard)) for place, shard in enumerate(spaced))))
    counts = Counter(islice((place for place in in_turn if place is not None), images))
    return [shard.only(np.arange(counts[place])) for place, shard in enumerate(spaced)]
