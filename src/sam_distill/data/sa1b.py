"""SA-1B as it is published: tars of sa_N.jpg and sa_N.json, streamed as they are.

When a source is made, the headers of its tars are read (seeks, no image data), unless they have been before: they tell
what is there, what to hold out, and where a resumed run goes on. Training then reads each tar from front to back
through WebDataset.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from typing import Annotated

import numpy as np
from pydantic import Field
from torch.utils.data import IterableDataset

from sam_distill.data.annotations import draw_annotations
from sam_distill.data.base import Block, DataSource, SkippedSamples, Split, loader_worker
from sam_distill.data.selection import Fraction, Images, ValImages, affordable_val, fingerprint
from sam_distill.data.shards import Shard, chosen, index_tars, spread, without
from sam_distill.data.tar_index import companion
from sam_distill.images import decode, to_frame
from sam_distill.types import Sample, UserError

log = logging.getLogger(__name__)


NOT_TRAINED_ON = -1


@dataclass(frozen=True)
class Encoded:
    """An image as it lies in its tar, with the companions that are wanted.

    index: among all training images, or NOT_TRAINED_ON.
    """

    index: int
    epoch: int
    shard: Shard
    member: str
    contents: list[bytes]


class Sa1b(DataSource):
    """Tars in SA-1B's layout.

    path, val_path: a folder, a tar, a glob, a brace pattern, an http(s) address (also with braces), a `pipe:` command
    that writes a tar, or a list of these.

    Validation takes the first images of several tars, evenly spaced, out of `path`, unless it has its own `val_path`.
    images, fraction: train on so many of the rest, chosen by hash; tars without a chosen image are not read.
    shuffle_buffer: images, still encoded, that a loader worker shuffles at a time (1.1 MB each in SA-1B).
    local: a folder where tars from elsewhere are kept once they have been read.
    """

    kinds: tuple[str, ...] = ()  # companions that are read with every image

    def __init__(
        self,
        path: str | list[str],
        val_images: ValImages = 16,
        val_path: str | list[str] | None = None,
        images: Images = None,
        fraction: Fraction = None,
        shuffle_buffer: Annotated[int, Field(ge=1)] = 100,
        local: str | None = None,
    ) -> None:
        shards, problems = index_tars(path, "data.path", local)
        total = sum(map(len, shards))
        if val_path is None:
            held, self.shortage = affordable_val(total, val_images, f"data.path={path}")
            val = spread(shards, held)
        else:
            val_shards, val_problems = index_tars(val_path, "data.val_path", local)
            val = spread(val_shards, val_images)
            problems += val_problems
        self.images, self.fraction, self.shuffle_buffer = images, fraction, shuffle_buffer
        self._share_out(shards, val, f"data.path={path} leaves nothing to train on: all {total} images are held out")
        for problem in problems:
            self.skipped_samples.note(problem)

    def _share_out(self, shards: list[Shard], val: list[Shard], none_left: str) -> None:
        """Validation takes `val`; training what `images` or `fraction` choose of the rest."""
        self.shards, self.val = shards, val
        self.annotations: tuple[int, int] | None = None  # how many per image, and the seed to draw them with
        rest = without(shards, set(self.val_keys))
        if not rest:
            raise UserError(none_left)
        self.train = chosen(rest, self.images, self.fraction)

    @property
    def num_train_images(self) -> int:
        return sum(map(len, self.train))

    @property
    def val_images(self) -> int:
        return sum(map(len, self.val))

    def eval_shards(self, split: Split) -> list[Shard]:
        return self.val if split == "val" else chosen(self.shards, self.images, self.fraction)

    def eval_loads(self, split: Split) -> Iterator[Callable[[], Sample]]:
        return chain.from_iterable(self._loads(shard) for shard in self.eval_shards(split))

    def num_eval_images(self, split: Split) -> int:
        return sum(map(len, self.eval_shards(split)))

    def annotate(self, count: int, seed: int) -> None:
        annotated = [part for part in (shard.only(shard.beside(".json")) for shard in self.train) if len(part)]
        if not annotated:
            raise UserError("not one training image has annotations: a JSON of the same name beside it in its tar")
        before, self.train, self.annotations = self.num_train_images, annotated, (count, seed)
        self._read_json()
        problems, self.skipped_samples = self.skipped_samples.others, SkippedSamples(self.num_train_images)
        self.skipped_samples.others |= problems
        if before > self.num_train_images:
            log.warning("%d training images have no annotations: left out", before - self.num_train_images)

    @property
    def has_annotations(self) -> bool:
        return any(shard.beside(".json").any() for shard in self.shards)

    def train_stream(self, start: int, seed: int, rank: int, world_size: int, batch_size: int) -> TarStream:
        return TarStream(self, start, seed, rank, world_size, batch_size)

    def decode(self, image: Encoded) -> Sample:
        """A UserError says that it is damaged."""
        key = image.shard.key(image.member)
        picture, original_size = decode(image.contents[0], f"{key} in {image.shard.tar}")
        sample = Sample(key, to_frame(picture, original_size), original_size, image.epoch)
        return self.annotated(sample, image, image.contents[-1]) if ".json" in self.kinds else sample

    def annotated(self, sample: Sample, image: Encoded, json: bytes) -> Sample:
        """With its JSON, and, in training, with masks drawn from it if they are wanted."""
        if self.annotations is None or image.index == NOT_TRAINED_ON:
            return replace(sample, json=json)
        name, (count, seed) = f"{companion(image.member, '.json')} in {image.shard.tar}", self.annotations
        drawn = draw_annotations(json, sample.key, name, count, seed, image.epoch)
        return replace(sample, annotations=drawn, json=json)

    def blocks(self, size: int) -> list[Block]:
        self._read_json()
        blocks = []
        for shard in [*self.val, *self.train]:
            numbers = np.arange(len(shard))
            parts = [shard.only(numbers[first : first + size]) for first in range(0, len(shard), size)]
            blocks += [Block(len(part), part.image_keys, partial(self._loads, part)) for part in parts]
        return blocks

    @property
    def val_keys(self) -> list[str]:
        return [key for shard in self.val for key in shard.image_keys()]

    @property
    def train_keys(self) -> list[str]:
        return [key for shard in self.train for key in shard.image_keys()]

    @property
    def fingerprint(self) -> str:
        return fingerprint(shard.digests() for shard in self.train)

    @property
    def skipped_by_tar(self) -> dict[str, int]:
        flags = self.skipped_samples.unreadable.split([len(shard) for shard in self.train])
        return {str(s.tar): int(own.sum()) for s, own in zip(self.train, flags, strict=True) if own.any()}

    def load_json(self) -> None:
        if not self.has_annotations:
            raise UserError("not one image has annotations: a JSON of the same name beside it in its tar")
        self._read_json()

    def _read_json(self) -> None:
        self.kinds = tuple(dict.fromkeys([*self.kinds, ".json"]))

    def _loads(self, shard: Shard) -> Iterator[Callable[[], Sample]]:
        found = dict.fromkeys(shard.members())
        for member, contents in shard.read(list(found), self.kinds):
            del found[member]
            yield partial(self.decode, Encoded(NOT_TRAINED_ON, 0, shard, member, contents))
        for member in found:
            yield partial(self._lost, shard, member)

    def _lost(self, shard: Shard, member: str) -> Sample:
        raise UserError(f"{shard.key(member)} in {shard.tar}: the tar has changed or broken")

    def val_samples(self) -> list[Sample]:
        samples = []
        for load in self.eval_loads("val"):
            try:
                samples.append(load())
            except UserError as error:
                self.skipped_samples.note(str(error))
        return samples


class TarStream(IterableDataset[Sample]):
    """The training stream of tars: shards in a new order each epoch, shared out, shuffled block by block, decoded.

    With at least as many shards as loader workers on all ranks, shards are dealt out in turn, else each worker reads
    every shard and images are dealt out. A worker shuffles `shuffle_buffer` images at a time. Blocks, unlike a
    reservoir, have no memory: a resumed run with the same ranks, workers and batch size goes on exactly where the
    first one stopped, opening only tars it needs (damaged images aside, which shift what follows).
    """

    def __init__(self, source: Sa1b, start: int, seed: int, rank: int, world_size: int, batch_size: int) -> None:
        self.source = source
        self.shards = source.train
        self.first = np.cumsum([0, *map(len, self.shards)])  # of each shard, among all images
        self.skipped_samples = source.skipped_samples  # made here, before there are workers, so that they share it
        self.shuffle_buffer = source.shuffle_buffer
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
        for image in images:
            try:
                yield self.source.decode(image)
            except UserError as error:
                self.skipped_samples.report(str(error), image.index)

    def _images(self, place: int, places: int, skip: int) -> Iterator[Encoded]:
        """Endless images for one of so many places, without its first `skip`; blocks end where an epoch ends."""
        for epoch in count():
            dealt = self._deal(epoch, place, places)
            size = sum(len(images) for _, images in dealt)
            if skip < size:
                block, done = divmod(skip, self.shuffle_buffer)
                images = self._read(_after(dealt, block * self.shuffle_buffer), epoch)
                yield from islice(self._shuffled(images, (self.seed, epoch, place), block), done, None)
            skip = max(0, skip - size)

    def _deal(self, epoch: int, place: int, places: int) -> list[tuple[int, range]]:
        """(number of a shard, which of its images), in this epoch's order, for one of so many places.

        The deal goes on round the places from epoch to epoch, so that none gets more than the others in the long run.
        """
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        if len(order) >= places:
            mine = order[(place - epoch * len(order)) % places :: places]
            return [(number, range(len(self.shards[number]))) for number in mine]
        dealt, turn = [], epoch * int(self.first[-1])
        for number in order:
            size = len(self.shards[number])
            dealt.append((number, range((place - turn) % places, size, places)))
            turn += size
        return dealt

    def _read(self, dealt: Iterable[tuple[int, range]], epoch: int) -> Iterator[Encoded]:
        for number, images in dealt:
            if not images:
                continue
            shard, first = self.shards[number], int(self.first[number])
            members = shard.members()
            missing = {members[image]: first + image for image in images}
            for member, contents in shard.read(missing, self.source.kinds):
                yield Encoded(missing.pop(member), epoch, shard, member, contents)
            if missing:
                message = f"{len(missing)} images of {shard.tar} from {shard.key(next(iter(missing)))} on"
                self.skipped_samples.report(f"{message}: the tar has changed or broken", *missing.values())

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
