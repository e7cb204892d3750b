"""Shards, i.e. tars in SA-1B's layout: find them, choose images by their indices, and read the chosen members."""

import glob
import logging
import random
import tarfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, compress, islice, repeat, zip_longest
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tar_file_iterator

from sam_distill.errors import UserError, one_line
from sam_distill.selection import digests, how_many, lowest
from sam_distill.tars.index import TarIndex, companion, short_key
from sam_distill.tars.local_copy import LocalCopy, finish_copy
from sam_distill.tars.tar import HttpTar, LocalTar, PipedTar, RemoteTar, Tar

log = logging.getLogger(__name__)

CONNECTIONS = 16  # simultaneous connections while indices are read


@dataclass(frozen=True, eq=False)
class Shard:
    """Tar, or a selection of its images; never empty.

    rows: the selected rows of the index, ascending; None: all.
    ambiguous_keys: short keys that several images of the dataset have; these images have the key "tar name/member".
    """

    tar: Tar
    index: TarIndex
    ambiguous_keys: Collection[str] = frozenset()
    rows: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return self.index.images if self.rows is None else len(self.rows)

    def members(self) -> list[str]:
        """Return the member names of its images, in the order of the tar."""
        names = self.index.names()
        return names if self.rows is None else [names[row] for row in self.rows]

    def key(self, member: str) -> str:
        short = short_key(member)
        return f"{self.tar.stem}/{member}" if short in self.ambiguous_keys else short

    def image_keys(self) -> list[str]:
        return [self.key(member) for member in self.members()]

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of the keys: [images] uint64."""
        return digests(self.image_keys()) if self.ambiguous_keys else self._chosen(self.index.digests())

    def has_companion(self, kind: str) -> NDArray[np.bool_]:
        """Return which images have that companion: [images] bool."""
        return self._chosen(self.index.has_companion(kind))

    def select(self, which: slice | NDArray[np.bool_]) -> "Shard":
        """Return a shard with only these of its images. which: a slice, or flags [images]."""
        rows = self._chosen(np.arange(self.index.images, dtype=np.int32))[which]
        return self if len(rows) == len(self) else replace(self, rows=rows)

    def _chosen(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self.rows is None else values[self.rows]

    def read(self, members: Collection[str], kinds: Sequence[str] = ()) -> Iterator[tuple[str, list[bytes]]]:
        """Yield (member, [its content, those of its companions]) in the tar's order, up to where the tar is damaged.

        The content of a companion that a member does not have is b"".
        """
        with_companion = {kind: set(compress(self.members(), self.has_companion(kind))) for kind in kinds}
        files = {m: [m, *(companion(m, kind) for kind in kinds if m in with_companion[kind])] for m in members}
        members_of: dict[str, list[str]] = defaultdict(list)  # several if a.jpg and a.png share a.json
        for member, names in files.items():
            for name in names:
                members_of[name].append(member)
        found: dict[str, dict[str, bytes]] = defaultdict(dict)  # contents of members that are not complete yet
        for name, content in self._read(members_of):
            for member in members_of[name]:
                found[member][name] = content
                if len(found[member]) == len(files[member]):
                    contents = found.pop(member)
                    yield member, [contents[member], *(contents.get(companion(member, kind), b"") for kind in kinds)]

    def _read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        unread = set(names)
        try:
            with self.tar.stream() as file:
                for found in tar_file_iterator(file, skip_meta=None, select_files=unread.__contains__):
                    unread.remove(found["fname"])
                    yield found["fname"], found["data"]
                    if not unread:
                        break
                finish_copy(file)
        except (tarfile.TarError, OSError, UserError) as error:  # hours into a run, too: other tars can still be read
            log.warning("%s: %s", self.tar, one_line(error))


def index_tars(path: str | list[str], option: str, local: str | None = None) -> tuple[list[Shard], list[str]]:
    """Return a shard for each tar of `path` that has images, and a line for each damaged tar.

    Raise UserError if none has. option: the option's name in messages. local: folder for copies of remote tars.
    """
    tars = [tar for pattern in ([path] if isinstance(path, str) else path) for tar in _expand(pattern, option)]
    tars = list(dict.fromkeys(tars))  # patterns may overlap
    if local is not None:
        tars = _with_copies(tars, Path(local).expanduser())
    if not tars:
        raise UserError(f"{option}={path} names no tar")
    indices = _indices(tars)
    problems = [index.problem for index in indices if index.problem]
    shards = [Shard(tar, index) for tar, index in zip(tars, indices, strict=True) if index.images]
    if not shards:
        reason = next(iter(problems), "none of them holds a jpg or png")
        raise UserError(f"{option}={path}: no image in {len(tars)} tars ({reason})")
    ambiguous_keys = _ambiguous_keys(shards)
    shards = [replace(shard, ambiguous_keys=ambiguous_keys) for shard in shards]
    long_keys = Counter(
        shard.key(m) for shard in shards if ambiguous_keys for m in shard.members() if short_key(m) in ambiguous_keys
    )
    if any(uses > 1 for uses in long_keys.values()):
        raise UserError(f"{option}={path}: two tars of the same name hold images of the same name; rename one of them")
    return shards, problems


def _expand(pattern: str, option: str) -> list[Tar]:
    if pattern.startswith("pipe:"):
        return [PipedTar(pattern)]
    local = Path(pattern).expanduser()
    is_remote = "://" in pattern
    if not is_remote and local.exists():  # a path, not a pattern, even with brackets or braces
        found = sorted(local.glob("*.tar")) if local.is_dir() else [local]
        if not found:
            raise UserError(f"{option}={pattern}: there is no .tar in that folder")
        return [LocalTar(str(tar)) for tar in found]
    try:
        names = expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"{option}={pattern}: {error}") from None
    if pattern.startswith(("http://", "https://")):
        return [HttpTar(name) for name in names]
    if is_remote:
        return [RemoteTar(address) for name in names for address in _expand_address(name, option)]
    tars = [tar for name in names for tar in sorted(glob.glob(str(Path(name).expanduser()))) or [name]]
    missing = next((tar for tar in tars if not Path(tar).is_file()), None)
    if missing:
        raise UserError(f"{option}={pattern}: there is no {missing}; expected a folder of tars, a tar, or a pattern")
    return [LocalTar(tar) for tar in tars]


def _expand_address(address: str, option: str) -> list[str]:
    """Return the tars at an fsspec address: that of a tar or of a folder of tars, or a glob."""
    pattern = address if address.endswith(".tar") else f"{address.rstrip('/')}/*.tar"
    try:
        system, path = fsspec.url_to_fs(pattern)
        found = [system.unstrip_protocol(tar) for tar in sorted(system.glob(path))] if "*" in pattern else [pattern]
    except Exception as error:  # unknown protocol, missing package, or an error of the package
        hint = "http(s), s3, gs and hf addresses and pipe: commands can be read"
        raise UserError(f"{option}={address}: {one_line(error)}; {hint}") from error
    if not found:
        raise UserError(f"{option}={address}: there is no .tar")
    return found


def _with_copies(tars: list[Tar], folder: Path) -> list[Tar]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.local={folder}: {error.strerror}") from None
    return [tar if isinstance(tar, LocalTar) else LocalCopy(tar.address, tar, folder) for tar in tars]


def _indices(tars: list[Tar]) -> list[TarIndex]:
    """Return the index of each tar. Remote tars are read CONNECTIONS at a time, because they answer slowly.

    Each process reads in its own random order, so that ranks that start together do not all read the same headers.
    """
    order = random.Random().sample(range(len(tars)), len(tars))
    with ThreadPoolExecutor(1 if all(isinstance(tar, LocalTar) for tar in tars) else CONNECTIONS) as pool:
        found = dict(zip(order, pool.map(lambda number: tars[number].index(), order), strict=True))
    return [found[number] for number in range(len(tars))]


def _ambiguous_keys(shards: list[Shard]) -> frozenset[str]:
    """Return the short keys that several images have."""
    digests = all_digests(shards)
    digests.sort()
    twice = np.unique(digests[1:][digests[1:] == digests[:-1]])
    if not len(twice):
        return frozenset()
    alike = (compress(shard.members(), np.isin(shard.digests(), twice)) for shard in shards)
    uses = Counter(map(short_key, chain.from_iterable(alike)))
    return frozenset(key for key, times in uses.items() if times > 1)


def all_digests(shards: Sequence[Shard]) -> NDArray[np.uint64]:
    """Return the digests of all keys: [images] uint64, eight bytes per image that are held in memory only briefly."""
    ends = np.cumsum([len(shard) for shard in shards])
    digests = np.empty(int(ends[-1]), np.uint64)
    for shard, end in zip(shards, ends, strict=True):
        digests[end - len(shard) : end] = shard.digests()
    return digests


def filter_shards(shards: Sequence[Shard], flags: Iterable[NDArray[np.bool_]]) -> list[Shard]:
    """Return the shards with only the images that their flags choose, without shards that would be empty."""
    return [shard.select(which) for shard, which in zip(shards, flags, strict=True) if which.any()]


def split_by_keys(shards: Sequence[Shard], keys: Collection[str]) -> tuple[list[Shard], list[Shard]]:
    """Return (images that have one of these keys, the others), both as shards."""
    wanted = digests(keys)
    flags = [np.isin(shard.digests(), wanted) for shard in shards]
    for shard, which in zip(shards, flags, strict=True):
        if which.any():  # another key may have the same digest
            which[which] = [key in keys for key in compress(shard.image_keys(), which)]
    return filter_shards(shards, flags), filter_shards(shards, (~which for which in flags))


def choose_images(shards: list[Shard], images: int | None, fraction: float | None) -> list[Shard]:
    """Return the images that data.images or data.fraction keeps: like `choose`, those with the lowest digests."""
    ends = np.cumsum([len(shard) for shard in shards])
    wanted = how_many(int(ends[-1]), images, fraction)
    if wanted == ends[-1]:
        return shards
    return filter_shards(shards, np.split(lowest(all_digests(shards), wanted), ends[:-1]))


def first_images(shards: list[Shard], images: int) -> list[Shard]:
    """Return the first images of evenly spaced shards, `images` in total."""
    used = min(images, len(shards))
    spaced = [shards[number * len(shards) // used] for number in range(used)]
    in_turn = chain.from_iterable(zip_longest(*(repeat(number, len(shard)) for number, shard in enumerate(spaced))))
    counts = Counter(islice((number for number in in_turn if number is not None), images))
    return [shard.select(slice(counts[number])) for number, shard in enumerate(spaced)]
