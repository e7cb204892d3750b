"""Tars in SA-1B's layout: what their headers say is in them, and reading the members that are wanted."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path, PurePosixPath

from webdataset.shardlists import expand_urls
from webdataset.tariterators import tar_file_iterator

from sam_distill.data.annotations import draw_annotations
from sam_distill.data.base import is_image, unique_keys
from sam_distill.images import decode, to_frame
from sam_distill.types import Sample, UserError


@dataclass(frozen=True)
class Shard:
    """A tar, or a choice of its images. keys: member name -> key, in the order of the tar; never empty.

    annotated: the members that have a JSON of the same name beside them.
    """

    path: Path
    keys: dict[str, str]
    annotated: frozenset[str]

    def read(self, members: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """(member, content) of the named members, in the tar's order, up to where the tar is damaged."""
        left = set(members)
        try:
            with self.path.open("rb") as file:
                for found in tar_file_iterator(file, skip_meta=None, select_files=left.__contains__):
                    left.remove(found["fname"])
                    yield found["fname"], found["data"]
                    if not left:
                        return
        except (tarfile.TarError, OSError):
            return

    def read_pairs(self, members: Collection[str]) -> Iterator[tuple[str, bytes, bytes]]:
        """(member, content, content of its JSON) of the named members that have both."""
        images = {_json_of(member): member for member in members}
        halves: dict[str, bytes] = {}  # by the image's name
        for found, content in self.read({*images.keys(), *images.values()}):
            member = images.get(found, found)
            if member not in halves:
                halves[member] = content
            elif found == member:
                yield member, content, halves.pop(member)
            else:
                yield member, halves.pop(member), content

    def decode(self, member: str, content: bytes) -> Sample:
        image, original_size = decode(content, f"{self.keys[member]} in {self.path}")
        return Sample(self.keys[member], to_frame(image, original_size), original_size)


@dataclass(frozen=True)
class Encoded:
    """A training image as it lies in its tar. index: among all training images. annotations: its JSON, if wanted."""

    index: int
    epoch: int
    shard: Shard
    member: str
    content: bytes
    annotations: bytes | None

    def decode(self, wanted: tuple[int, int] | None) -> Sample:
        """wanted: how many annotations, and the seed to draw them with."""
        sample = replace(self.shard.decode(self.member, self.content), epoch=self.epoch)
        if self.annotations is None or wanted is None:
            return sample
        name, (count, seed) = f"{_json_of(self.member)} in {self.shard.path}", wanted
        drawn = draw_annotations(self.annotations, sample.key, name, count, seed, self.epoch)
        return replace(sample, annotations=drawn)


def index_tars(path: str | list[str], option: str) -> tuple[list[Shard], list[str]]:
    """The tars that `path` names, those without images left out, and a line for each that is damaged."""
    paths = [tar for pattern in ([path] if isinstance(path, str) else path) for tar in _expand(pattern, option)]
    paths = list(dict.fromkeys(paths))  # patterns may overlap
    if not paths:
        raise UserError(f"{option}={path} names no tar")
    members, jsons, problems = zip(*map(_headers, paths), strict=True)
    names = [(tar, name) for tar, found in zip(paths, members, strict=True) for name in found]
    if not names:
        reason = next(filter(None, problems), "none of them holds a jpg or png")
        raise UserError(f"{option}={path}: no image in {len(paths)} tars ({reason})")
    keys = unique_keys([name.rpartition(".")[0] for _, name in names], [f"{tar.stem}/{name}" for tar, name in names])
    if len(set(keys)) < len(keys):
        raise UserError(f"{option}={path}: two tars of the same name hold images of the same name; rename one of them")
    left = iter(keys)
    shards = [
        Shard(tar, dict(zip(found, left)), frozenset(name for name in found if _json_of(name) in beside))  # noqa: B905
        for tar, found, beside in zip(paths, members, jsons, strict=True)
    ]
    return [shard for shard in shards if shard.keys], [problem for problem in problems if problem]


def _expand(pattern: str, option: str) -> list[Path]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UserError(f"{option}={pattern}: only local tars can be read so far; download them first")
    if Path(pattern).expanduser().is_dir():
        pattern = f"{glob.escape(pattern)}/*.tar"
    tars = []
    try:
        names = expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"{option}={pattern}: {error}") from None
    for name in names:
        tars += sorted(glob.glob(str(Path(name).expanduser()))) or [name]
    missing = next((tar for tar in tars if not Path(tar).is_file()), None)
    if missing:
        raise UserError(f"{option}={pattern}: there is no {missing}; expected a folder of tars, a tar, or a pattern")
    return [Path(tar) for tar in tars]


def _headers(path: Path) -> tuple[list[str], set[str], str | None]:
    """Names of the images that a tar holds whole, in its order, of its JSONs, and what is wrong, if anything."""
    names: dict[str, None] = {}  # an ordered set
    jsons: set[str] = set()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = path.stat().st_size
            for member in tar:
                if member.isreg() and member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"truncated in {member.name}")
                if member.isreg() and is_image(PurePosixPath(member.name).name):
                    names[member.name] = None
                elif member.name.endswith(".json"):
                    jsons.add(member.name)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # neither the end of the archive nor that of the file
                raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, OSError) as error:
        return list(names), jsons, f"the rest of {path} after {len(names)} images ({error})"
    return list(names), jsons, None


def _json_of(member: str) -> str:
    return member.rpartition(".")[0] + ".json"


def subset(shards: Iterable[Shard], keys: Collection[str]) -> list[Shard]:
    chosen = (replace(s, keys={name: key for name, key in s.keys.items() if key in keys}) for s in shards)
    return [shard for shard in chosen if shard.keys]


def spread(shards: list[Shard], images: int) -> list[Shard]:
    """The first images of evenly spaced shards, so many in all."""
    used = min(images, len(shards))
    spaced = [shards[number * len(shards) // used].keys.values() for number in range(used)]
    in_turn = (key for key in chain.from_iterable(zip_longest(*spaced)) if key is not None)
    return subset(shards, set(islice(in_turn, images)))
