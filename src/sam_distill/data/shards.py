"""Tars in SA-1B's layout: what their headers say is in them, and reading the members that are wanted."""

from __future__ import annotations

import glob
import logging
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from urllib.parse import urlsplit

from webdataset.shardlists import expand_urls
from webdataset.tariterators import tar_file_iterator

from sam_distill.data.choice import is_image_member, unique_keys
from sam_distill.data.kept import Kept
from sam_distill.data.tars import Contents, HttpTar, LocalTar, PipedTar, Tar
from sam_distill.types import UserError

log = logging.getLogger(__name__)

CONNECTIONS = 16  # at a time, while indices are read
COMPANIONS = (".json", ".embedding")  # what may lie beside an image: its annotations, its teacher's embedding


@dataclass(frozen=True)
class Shard:
    """A tar, or a choice of its images. keys: member name -> key, in the order of the tar; never empty.

    beside: for each kind of COMPANIONS, the members that have one.
    """

    tar: Tar
    keys: dict[str, str]
    beside: dict[str, frozenset[str]]

    def read(self, members: Collection[str], kinds: Sequence[str] = ()) -> Iterator[tuple[str, list[bytes]]]:
        """(member, its content and those of its companions) in the tar's order, up to where the tar is damaged.

        A companion that a member does not have is empty.
        """
        names = {m: [m, *(companion(m, kind) for kind in kinds if m in self.beside[kind])] for m in members}
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


def companion(member: str, kind: str) -> str:
    """The name of what lies beside an image: sa_1.jpg and .json make sa_1.json."""
    return member.rpartition(".")[0] + kind


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
    members = [[n for n in c.names if is_image_member(n)] for c in contents]
    problems = [c.problem for c in contents if c.problem]
    names = [(tar, name) for tar, found in zip(paths, members, strict=True) for name in found]
    if not names:
        reason = next(iter(problems), "none of them holds a jpg or png")
        raise UserError(f"{option}={path}: no image in {len(paths)} tars ({reason})")
    keys = unique_keys([name.rpartition(".")[0] for _, name in names], [f"{tar.stem}/{name}" for tar, name in names])
    if len(set(keys)) < len(keys):
        raise UserError(f"{option}={path}: two tars of the same name hold images of the same name; rename one of them")
    left = iter(keys)
    shards = [
        Shard(tar, dict(zip(found, left)), _beside(found, set(held.names)))  # noqa: B905
        for tar, found, held in zip(paths, members, contents, strict=True)
    ]
    return [shard for shard in shards if shard.keys], problems


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
    """What each holds; several at a time, since those that lie elsewhere answer slowly."""
    with ThreadPoolExecutor(1 if all(isinstance(tar, LocalTar) for tar in tars) else CONNECTIONS) as pool:
        return list(pool.map(lambda tar: tar.contents(), tars))


def _beside(members: Iterable[str], others: Collection[str]) -> dict[str, frozenset[str]]:
    return {kind: frozenset(m for m in members if companion(m, kind) in others) for kind in COMPANIONS}


def subset(shards: Iterable[Shard], keys: Collection[str]) -> list[Shard]:
    chosen = (replace(s, keys={name: key for name, key in s.keys.items() if key in keys}) for s in shards)
    return [shard for shard in chosen if shard.keys]


def spread(shards: list[Shard], images: int) -> list[Shard]:
    """The first images of evenly spaced shards, so many in all."""
    used = min(images, len(shards))
    spaced = [shards[number * len(shards) // used].keys.values() for number in range(used)]
    in_turn = (key for key in chain.from_iterable(zip_longest(*spaced)) if key is not None)
    return subset(shards, set(islice(in_turn, images)))
