"""Training stream of tars, a WebDataset pipeline of our own stages: WebDataset's neither split exactly nor resume."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from webdataset import DataPipeline

from sam_distill.data.base import loader_worker
from sam_distill.errors import UserError
from sam_distill.tars.shards import Shard
from sam_distill.types import Sample

if TYPE_CHECKING:
    from sam_distill.data.sa1b import Sa1b

NOT_TRAINED_ON = -1


@dataclass(frozen=True)
class EncodedSample:
    """Image still encoded, as stored in its tar. contents: its bytes, then those of its companions, empty if absent.

    index: position among all training images, or NOT_TRAINED_ON.
    """

    index: int
    epoch: int
    shard: Shard
    member: str
    contents: list[bytes]


@dataclass(frozen=True)
class Share:
    """Images that one loader worker reads in one epoch.

    parts: (shard index, indices of images in that shard), in reading order.
    consumed: number of images of this share that were already used when the run stopped.
    """

    epoch: int
    parts: list[tuple[int, range]]
    consumed: int = 0

    def __len__(self) -> int:
        return sum(len(images) for _, images in self.parts)


class TarStream(DataPipeline):
    """Pipeline that orders shards anew each epoch, divides them among workers, reads, shuffles in blocks and decodes.

    With at least as many shards as loader workers on all ranks, workers take whole shards in turn; otherwise each one
    reads every shard, and they take its images in turn. A worker shuffles `shuffle_buffer` images at a time. Such a
    block, unlike a reservoir, depends on no earlier images: a resumed run with the same ranks, workers and batch size
    continues exactly where the first one stopped, opening only tars it needs (but damaged images shift what follows).
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
        self.first = np.cumsum([0, *map(len, self.shards)])  # index of each shard's first image among all images
        self.skipped_samples = source.skipped_samples  # created before the workers start, so that they share it
        self.shuffle_buffer = source.shuffle_buffer
        self.batches_done, self.batch_size, self.seed = start // batch_size, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def _worker(self) -> tuple[int, int, int]:
        """Return (index among the loader workers of all ranks, their number, images it gave before the run stopped)."""
        worker, workers = loader_worker()
        worker = (self.batches_done + worker) % workers  # worker 0 takes over from the one that was next
        consumed = len(range(worker, self.batches_done, workers)) * self.batch_size
        return self.rank * workers + worker, self.world_size * workers, consumed

    def shuffle_shards(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (epoch, order of the shards) without end."""
        for epoch in count():
            yield epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))

    def split_by_node_and_worker(self, epochs: Iterable[tuple[int, NDArray[np.int64]]]) -> Iterator[Share]:
        """Yield this worker's share of each epoch. Turns go on across epochs: over time, all get equally many."""
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
        """Drop the shares that this worker finished before the run stopped; set `consumed` of the first one left."""
        _, _, consumed = self._worker()
        for share in shares:
            if consumed < len(share):
                yield replace(share, consumed=consumed)
            consumed = max(0, consumed - len(share))

    def tar_to_samples(self, shares: Iterable[Share]) -> Iterator[tuple[Share, Iterator[EncodedSample]]]:
        """Yield each share with its images, from the beginning of the block in which the run stopped."""
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
        """Yield the images shuffled block by block; the last block of an epoch may be shorter."""
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
                    yield block.pop()  # pop, to free its memory

    def decode(self, images: Iterable[EncodedSample]) -> Iterator[Sample]:
        for image in images:
            try:
                yield self.source.decode(image)
            except UserError as error:
                self.skipped_samples.report(str(error), image.index)
