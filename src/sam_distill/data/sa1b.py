"""SA-1B as it is published: tars of sa_N.jpg and sa_N.json, streamed as they are.

When a source is made, the headers of its tars are read once (seeks, no image data): they tell what is there, what to
hold out, and where a resumed run goes on. Training then reads each tar from front to back through WebDataset.
"""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice, zip_longest
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
from pydantic import Field
from torch.utils.data import IterableDataset
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tar_file_iterator

from sam_distill.data.base import (
    Damage,
    DataSource,
    Fraction,
    Images,
    Split,
    ValImages,
    affordable_val,
    choose,
    is_image,
    loader_worker,
    unique_keys,
)
from sam_distill.images import decode, to_frame
from sam_distill.types import Sample, UserError


@dataclass(frozen=True)
class Shard:
    """A tar, or a choice of its images. keys: member name -> key, in the order of the tar; never empty."""

    path: Path
    keys: dict[str, str]

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

    def decode(self, member: str, content: bytes) -> Sample:
        image, original_size = decode(content, f"{self.keys[member]} in {self.path}")
        return Sample(self.keys[member], to_frame(image, original_size), original_size)


Encoded = tuple[int, Shard, str, bytes]  # index among the training images, shard, member, the encoded image


class Sa1b(DataSource):
    """Local tars in SA-1B's layout. path, val_path: a folder, a tar, a glob, a brace pattern, or a list of these.

    Validation takes the first images of several tars, evenly spaced, out of `path`, unless it has its own `val_path`.
    images, fraction: train on so many of the rest, chosen by hash; tars without a chosen image are not read.
    shuffle_buffer: images, still encoded, that a loader worker shuffles at a time (1.1 MB each in SA-1B).
    """

    def __init__(
        self,
        path: str | list[str],
        val_images: ValImages = 16,
        val_path: str | list[str] | None = None,
        images: Images = None,
        fraction: Fraction = None,
        shuffle_buffer: Annotated[int, Field(ge=1)] = 100,
    ) -> None:
        shards, problems = _index(path, "data.path")
        total = sum(len(shard.keys) for shard in shards)
        if val_path is None:
            held, self.shortage = affordable_val(total, val_images, f"data.path={path}")
            self.val = _spread(shards, held)
        else:
            val_shards, val_problems = _index(val_path, "data.val_path")
            self.val = _spread(val_shards, val_images)
            problems += val_problems
        held_out = {key for shard in self.val for key in shard.keys.values()}
        rest = [key for shard in shards for key in shard.keys.values() if key not in held_out]
        if not rest:
            raise UserError(f"data.path={path} leaves nothing to train on: all {total} images are in data.val_path")
        self.shards, self.images, self.fraction = shards, images, fraction
        self.train = _subset(shards, {rest[index] for index in choose(rest, images, fraction)})
        self.shuffle_buffer = shuffle_buffer
        for problem in problems:
            self.damage.note(problem)

    @property
    def num_train_images(self) -> int:
        return sum(len(shard.keys) for shard in self.train)

    @property
    def val_images(self) -> int:
        return sum(len(shard.keys) for shard in self.val)

    def eval_shards(self, split: Split) -> list[Shard]:
        if split == "val":
            return self.val
        keys = [key for shard in self.shards for key in shard.keys.values()]
        return _subset(self.shards, {keys[index] for index in choose(keys, self.images, self.fraction)})

    def eval_loads(self, split: Split) -> Iterator[Callable[[], Sample]]:
        for shard in self.eval_shards(split):
            for member, content in shard.read(shard.keys):
                yield partial(shard.decode, member, content)

    def num_eval_images(self, split: Split) -> int:
        return sum(len(shard.keys) for shard in self.eval_shards(split))

    def train_stream(self, start: int, seed: int, rank: int, world_size: int, batch_size: int) -> TarStream:
        return TarStream(self.train, self.damage, self.shuffle_buffer, start, seed, rank, world_size, batch_size)

    def val_samples(self) -> list[Sample]:
        samples = []
        for shard in self.val:
            for member, content in shard.read(shard.keys):
                try:
                    samples.append(shard.decode(member, content))
                except UserError as error:
                    self.damage.note(str(error))
        return samples


class TarStream(IterableDataset[Sample]):
    """The training stream of tars: shards in a new order each epoch, shared out, shuffled block by block, decoded.

    With at least as many shards as loader workers on all ranks, shards are dealt out in turn, else each worker reads
    every shard and images are dealt out. A worker shuffles `shuffle_buffer` images at a time. Blocks, unlike a
    reservoir, have no memory: a resumed run with the same ranks, workers and batch size goes on exactly where the
    first one stopped, opening only tars it needs (damaged images aside, which shift what follows).
    """

    def __init__(
        self,
        shards: list[Shard],
        damage: Damage,
        shuffle_buffer: int,
        start: int,
        seed: int,
        rank: int,
        world_size: int,
        batch_size: int,
    ) -> None:
        self.shards = shards
        self.first = np.cumsum([0, *(len(shard.keys) for shard in shards)])  # of each shard, among all images
        self.damage = damage
        self.shuffle_buffer = shuffle_buffer
        self.start = start
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Sample]:
        worker, workers = loader_worker()
        batches = self.start // self.batch_size
        worker = (batches + worker) % workers  # whose turn it was when the run stopped
        consumed = len(range(worker, batches, workers)) * self.batch_size
        images = self._images(self.rank * workers + worker, self.world_size * workers, consumed)
        for index, shard, member, content in images:
            try:
                yield shard.decode(member, content)
            except UserError as error:
                self.damage.report(index, str(error))

    def _images(self, place: int, places: int, skip: int) -> Iterator[Encoded]:
        """Endless images for one of so many places, without its first `skip`; blocks end where an epoch ends."""
        for epoch in count():
            dealt = self._deal(epoch, place, places)
            size = sum(len(images) for _, images in dealt)
            if skip < size:
                block, done = divmod(skip, self.shuffle_buffer)
                images = self._read(_after(dealt, block * self.shuffle_buffer))
                yield from islice(self._shuffled(images, (self.seed, epoch, place), block), done, None)
            skip = max(0, skip - size)

    def _deal(self, epoch: int, place: int, places: int) -> list[tuple[int, range]]:
        """(number of a shard, which of its images), in this epoch's order, for one of so many places.

        The deal goes on round the places from epoch to epoch, so that none gets more than the others in the long run.
        """
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        if len(order) >= places:
            mine = order[(place - epoch * len(order)) % places :: places]
            return [(number, range(len(self.shards[number].keys))) for number in mine]
        dealt, turn = [], epoch * int(self.first[-1])
        for number in order:
            size = len(self.shards[number].keys)
            dealt.append((number, range((place - turn) % places, size, places)))
            turn += size
        return dealt

    def _read(self, dealt: Iterable[tuple[int, range]]) -> Iterator[Encoded]:
        for number, images in dealt:
            if not images:
                continue
            shard, first = self.shards[number], int(self.first[number])
            members = list(shard.keys)
            missing = {members[image]: first + image for image in images}
            for member, content in shard.read(missing):
                yield missing.pop(member), shard, member, content
            for member, index in missing.items():
                self.damage.report(index, f"{shard.keys[member]} in {shard.path}: the tar has changed or broken")

    def _shuffled(self, images: Iterator[Encoded], seed: tuple[int, ...], first_block: int) -> Iterator[Encoded]:
        for number in count(first_block):
            read = list(islice(images, self.shuffle_buffer))
            if not read:
                return
            block = [read[index] for index in np.random.default_rng((*seed, number)).permutation(len(read))]
            del read
            while block:
                yield block.pop()  # and free its memory


def _after(dealt: Iterable[tuple[int, range]], skip: int) -> Iterator[tuple[int, range]]:
    """What is left of the deal when its first `skip` images are gone."""
    for number, images in dealt:
        yield number, images[skip:]
        skip = max(0, skip - len(images))


def _index(path: str | list[str], option: str) -> tuple[list[Shard], list[str]]:
    """The tars that `path` names, those without images left out, and a line for each that is damaged."""
    paths = [tar for pattern in ([path] if isinstance(path, str) else path) for tar in _expand(pattern, option)]
    paths = list(dict.fromkeys(paths))  # patterns may overlap
    if not paths:
        raise UserError(f"{option}={path} names no tar")
    members, problems = zip(*map(_headers, paths), strict=True)
    names = [(tar, name) for tar, found in zip(paths, members, strict=True) for name in found]
    if not names:
        reason = next(filter(None, problems), "none of them holds a jpg or png")
        raise UserError(f"{option}={path}: no image in {len(paths)} tars ({reason})")
    keys = unique_keys([name.rpartition(".")[0] for _, name in names], [f"{tar.stem}/{name}" for tar, name in names])
    if len(set(keys)) < len(keys):
        raise UserError(f"{option}={path}: two tars of the same name hold images of the same name; rename one of them")
    left = iter(keys)
    shards = [Shard(tar, dict(zip(found, left))) for tar, found in zip(paths, members, strict=True)]  # noqa: B905
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


def _headers(path: Path) -> tuple[list[str], str | None]:
    """Names of the images that a tar holds whole, in its order, and what is wrong with it, if anything."""
    names: dict[str, None] = {}  # an ordered set
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = path.stat().st_size
            for member in tar:
                if member.isreg() and member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"truncated in {member.name}")
                if member.isreg() and is_image(PurePosixPath(member.name).name):
                    names[member.name] = None
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # neither the end of the archive nor that of the file
                raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, OSError) as error:
        return list(names), f"the rest of {path} after {len(names)} images ({error})"
    return list(names), None


def _subset(shards: Iterable[Shard], keys: Collection[str]) -> list[Shard]:
    chosen = (Shard(shard.path, {name: key for name, key in shard.keys.items() if key in keys}) for shard in shards)
    return [shard for shard in chosen if shard.keys]


def _spread(shards: list[Shard], images: int) -> list[Shard]:
    """The first images of evenly spaced shards, so many in all."""
    used = min(images, len(shards))
    spaced = [shards[number * len(shards) // used].keys.values() for number in range(used)]
    in_turn = (key for key in chain.from_iterable(zip_longest(*spaced)) if key is not None)
    return _subset(shards, set(islice(in_turn, images)))
