"""Data sources with random access: a subclass implements only `keys` and `load`."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count

import numpy as np
from torch.utils.data import IterableDataset

from sam_distill.data.base import DataSource, T, loader_worker
from sam_distill.errors import UserError
from sam_distill.types import Sample


class IndexedSource(DataSource[T]):
    """Data source with images that can be loaded one by one in any order. A subclass sets `train` and `val`."""

    @abstractmethod
    def load(self, item: T) -> Sample:
        """Decode one image; raise UserError if it is damaged."""

    def loads(self, items: Sequence[T]) -> Iterator[Callable[[], Sample]]:
        return (partial(self.load, item) for item in items)

    def blocks(self, size: int) -> list[Sequence[T]]:
        items = [*self.val, *self.train]
        return [items[first : first + size] for first in range(0, len(items), size)]

    def train_stream(self, start: int, seed: int, rank: int, world_size: int, batch_size: int) -> "IndexedStream":
        return IndexedStream(self, start, seed, rank, world_size, batch_size)


class IndexedStream(IterableDataset[Sample]):
    """Training stream of an `IndexedSource`.

    Epochs, each a permutation, follow one another in one endless sequence; ranks take its images in turn. Batch b
    of a rank therefore has the same images for any number of workers, before and after a resume. A damaged image is
    replaced by the next one of the epoch that can be read.
    """

    def __init__(
        self, source: IndexedSource, start: int, seed: int, rank: int, world_size: int, batch_size: int
    ) -> None:
        self.source = source
        self.skipped_samples = source.skipped_samples  # created before the workers start, so that they share it
        self.start, self.seed, self.batch_size = start, seed, batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples of this worker's batches."""
        worker, workers = loader_worker()
        images, order, order_epoch = len(self.source.train), np.empty(0, np.int64), -1
        for batch in count(worker, workers):
            first = self.start + batch * self.batch_size
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position * self.world_size + self.rank, images)
                if epoch != order_epoch:
                    order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(images), epoch
                yield replace(self._load(chain(order[place:], order[:place])), epoch=epoch)

    def _load(self, indices: Iterable[np.int64]) -> Sample:
        """Return the first of these images that can be read."""
        for index in indices:
            try:
                return self.source.load(self.source.train[int(index)])
            except UserError as error:
                self.skipped_samples.report(str(error), int(index))  # raises UserError when none is left
        raise AssertionError
