"""The training stream of tars, as a pipeline of WebDataset's: its own stages neither split exactly nor resume."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from webdataset import DataPipeline

from sam_distill.data.base import loader_worker
from sam_distill.tars.shards import Shard
from sam_distill.types import Sample, UserError

if TYPE_CHECKING:
    from sam_distill.data.sa1b import Sa1b

NOT_TRAINED_ON = -1


@dataclass(frozen=True)
class EncodedSample:
    """An image as it lies in its tar, with the companions that are wanted.

    index: among all training images, or NOT_TRAINED_ON.
    """

    index: int
    epoch: int
    shard: Shard
    member: str
    contents: list[bytes]


@dataclass(frozen=True)
class Share:
    """What a loader worker reads in an epoch.

    parts: (number of a shard, which of its images), in this order. consumed: images that the run had before it stopped.
    """

    epoch: int
    parts: list[tuple[int, range]]
    consumed: int = 0

    def __len__(self) -> int:
        return sum(len(images) for _, images in self.parts)


class TarStream(DataPipeline):
    """Shards in a new order each epoch, shared out, read, shuffled block by block, decoded.

    With at least as many shards as loader workers on all ranks, shards are dealt out in turn, else each worker reads
    every shard and images are dealt out. A worker shuffles `shuffle_buffer` images at a time. Blocks, unlike a
    reservoir, have no memory: a resumed run with the same ranks, workers and batch size goes on exactly where the
    first one stopped, opening only tars it needs (damaged images aside, which shift what follows).
    """

    def __init__(self, source: "Sa1b", start: int, seed: int, rank: int, world_size: int, batch_size: int) -> None:
        super().__init__(
            self.shuffle_shards,
            self.split_by_node_and_worker,
            self.resume,
            self.tar_to_samples,
            self.shuffle,
            self.decode,
        )
        self.source = source
        self.shards = source.train
        self.first = np.cumsum([0, *map(len, self.shards)])  # of each shard, among all images
        self.skipped_samples = source.skipped_samples  # made here, before there are workers, so that they share it
        self.shuffle_buffer = source.shuffle_buffer
        self.batches_done, self.batch_size, self.seed = start // batch_size, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def _worker(self) -> tuple[int, int, int]:
        """(number among the loader workers of all ranks, how many those are, images it gave before the run stopped)."""
        worker, workers = loader_worker()
        worker = (self.batches_done + worker) % workers  # whose turn it was when the run stopped
        consumed = len(range(worker, self.batches_done, workers)) * self.batch_size
        return self.rank * workers + worker, self.world_size * workers, consumed

    def shuffle_shards(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Epochs without end, each with an order of the shards."""
        for epoch in count():
            yield epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))

    def split_by_node_and_worker(self, epochs: Iterable[tuple[int, NDArray[np.int64]]]) -> Iterator[Share]:
        """The deal goes on round the workers from epoch to epoch: none gets more than the others in the long run."""
        worker, workers, _ = self._worker()
        for epoch, order in epochs:
            if len(order) >= workers:
                share = order[(worker - epoch * len(order)) % workers :: workers]
                yield Share(epoch, [(number, range(len(self.shards[number]))) for number in share])
                continue
            parts, turn = [], epoch * int(self.first[-1])
            for number in order:
                size = len(self.shards[number])
                parts.append((number, range((worker - turn) % workers, size, workers)))
                turn += size
            yield Share(epoch, parts)

    def resume(self, shares: Iterable[Share]) -> Iterator[Share]:
        """Without what this worker read before the run stopped."""
        _, _, consumed = self._worker()
        for share in shares:
            if consumed < len(share):
                yield replace(share, consumed=consumed)
            consumed = max(0, consumed - len(share))

    def tar_to_samples(self, shares: Iterable[Share]) -> Iterator[tuple[Share, Iterator[EncodedSample]]]:
        """Each share with its images, from the beginning of the block in which the run stopped."""
        for share in shares:
            yield share, self._read(share, share.consumed - share.consumed % self.shuffle_buffer)

    def _read(self, share: Share, skip: int) -> Iterator[EncodedSample]:
        for number, images in share.parts:
            unread = images[skip:]
            skip = max(0, skip - len(images))
            if not unread:
                continue
            shard, first = self.shards[number], int(self.first[number])
            members = shard.members()
            missing = {members[image]: first + image for image in unread}
            for member, contents in shard.read(missing, self.source.kinds):
                yield EncodedSample(missing.pop(member), share.epoch, shard, member, contents)
            if missing:
                message = f"{len(missing)} images of {shard.tar} from {shard.key(next(iter(missing)))} on"
                self.skipped_samples.report(f"{message}: the tar has changed or broken", *missing.values())

    def shuffle(self, shares: Iterable[tuple[Share, Iterator[EncodedSample]]]) -> Iterator[EncodedSample]:
        """Block by block; the last of an epoch is shorter."""
        worker, _, _ = self._worker()
        for share, images in shares:
            first_block, consumed = divmod(share.consumed, self.shuffle_buffer)
            for number in count(first_block):
                read = list(islice(images, self.shuffle_buffer))
                if not read:
                    break
                order = np.random.default_rng((self.seed, share.epoch, worker, number)).permutation(len(read))
                block = [read[index] for index in order]
                del read, block[max(0, len(block) - consumed) :]
                consumed = 0
                while block:
                    yield block.pop()  # and free its memory

    def decode(self, images: Iterable[EncodedSample]) -> Iterator[Sample]:
        for image in images:
            try:
                yield self.source.decode(image)
            except UserError as error:
                self.skipped_samples.report(str(error), image.index)
