"""What every data source offers: an endless, resumable training stream and a small fixed validation set.

A source with random access subclasses `IndexedSource` and says how to load one item.
"""

from __future__ import annotations

import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count, islice
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from sam_distill.data.annotations import run_lengths
from sam_distill.data.selection import digest, fingerprint
from sam_distill.types import FRAME, Batch, Sample, UserError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

Split = Literal["all", "val"]  # what to evaluate on: everything there is, or what training holds out


class SkippedSamples:
    """What could not be read: a warning and a count for each, once, whichever process of a loader comes across it.

    unreadable: [images] bool in shared memory, a flag per training image. Ranks put theirs together now and then.
    """

    def __init__(self, train_images: int) -> None:
        with torch.inference_mode(False):  # the first to ask may be a validation, whose tensors training can't change
            self.unreadable = torch.zeros(train_images, dtype=torch.bool).share_memory_()
        self.others: set[str] = set()

    def report(self, reason: str, *indices: int) -> None:
        """Training images are skipped; when none is left to train on, that is the end."""
        if not self.unreadable[list(indices)].all():
            self.unreadable[list(indices)] = True
            logger.warning("skipped: %s", reason)
        if self.unreadable.all():
            raise UserError(f"not one of {len(self.unreadable)} training images can be read; for one, {reason}")

    def note(self, reason: str) -> None:
        """Anything else is skipped: a validation or evaluation image, the end of a truncated tar."""
        if reason not in self.others:
            self.others.add(reason)
            logger.warning("skipped: %s", reason)

    def __len__(self) -> int:
        return int(self.unreadable.sum()) + len(self.others)


@dataclass(frozen=True)
class Block:
    """Images that are read together, in this order: what `sam-distill cache` makes one tar of. images: how many."""

    images: int
    keys: Callable[[], list[str]]
    loads: Callable[[], Iterator[Callable[[], Sample]]]


class DataSource(ABC):
    """Images to train on and, disjoint from them, a few to validate on.

    shortage: a line for those who train, where fewer images are held out than were asked for; else empty.
    """

    shortage: str = ""

    @property
    @abstractmethod
    def num_train_images(self) -> int:
        """Images in one epoch, over all ranks, damaged ones included."""

    @property
    @abstractmethod
    def val_images(self) -> int:
        """How many are held out for validation, which may be fewer than were asked for."""

    @abstractmethod
    def train_stream(
        self, start: int, seed: int, rank: int, world_size: int, batch_size: int
    ) -> IterableDataset[Sample]:
        """Samples without end, epoch after epoch, each in an order of its own that (seed, epoch) decides.

        Ranks and loader workers share the images out. start: images that this rank has consumed already, where a
        resumed run goes on. batch_size: per rank; the loader takes batches of it from its workers in turn.
        """

    def annotate(self, count: int, seed: int) -> None:
        """Have every training image come with `count` of its annotations; without effect on streams made before."""
        raise UserError("these data have no annotations: take data=sa1b, or a cache of it")

    @abstractmethod
    def val_samples(self) -> list[Sample]:
        """The validation images, the same ones in every run, decoded and held in memory (2 MB each)."""

    @abstractmethod
    def eval_loads(self, split: Split) -> Iterator[Callable[[], Sample]]:
        """Each image to evaluate on, not yet decoded; data.images or data.fraction choose among `all`."""

    @abstractmethod
    def num_eval_images(self, split: Split) -> int:
        """How many of them there are, damaged ones included."""

    @property
    def has_annotations(self) -> bool:
        """Whether any image comes with annotations."""
        return False

    def load_json(self) -> None:
        """Have every image come with the JSON that holds its annotations; without effect on streams made before."""
        raise UserError(
            "these data have no annotations: take data=sa1b, a cache of it, or data.annotations of a folder"
        )

    @abstractmethod
    def blocks(self, size: int) -> list[Block]:
        """The images held out and those to train on, `size` of them or fewer at a time."""

    @property
    @abstractmethod
    def val_keys(self) -> list[str]:
        """Keys of the images held out."""

    @property
    @abstractmethod
    def train_keys(self) -> list[str]:
        """Keys of the images to train on."""

    @property
    def fingerprint(self) -> str:
        """Of the set of images to train on: equal for the same keys."""
        return fingerprint([np.array([digest(key) for key in self.train_keys], np.uint64)])

    @cached_property
    def skipped_samples(self) -> SkippedSamples:
        """What had to be skipped so far."""
        return SkippedSamples(self.num_train_images)

    @property
    def skipped(self) -> int:
        """How many damaged images and tars were found so far."""
        return len(self.skipped_samples)

    @property
    def skipped_by_tar(self) -> dict[str, int]:
        """How many damaged training images were found in each tar, where images come in tars."""
        return {}


class IndexedSource(DataSource, Generic[Item]):
    """A source whose images can be loaded one by one, in any order. A subclass sets `train` and `val`."""

    train: Sequence[Item]
    val: Sequence[Item]

    @abstractmethod
    def key(self, item: Item) -> str:
        """The key that the item's sample will have."""

    @abstractmethod
    def load(self, item: Item) -> Sample:
        """Decode one image; a UserError says that it is damaged."""

    @property
    def num_train_images(self) -> int:
        return len(self.train)

    @property
    def val_images(self) -> int:
        return len(self.val)

    def eval_items(self, split: Split) -> Sequence[Item]:
        """The held-out images, where the others are of no interest; a subclass may know better."""
        return self.val

    def eval_loads(self, split: Split) -> Iterator[Callable[[], Sample]]:
        return self._loads(self.eval_items(split))

    def num_eval_images(self, split: Split) -> int:
        return len(self.eval_items(split))

    def blocks(self, size: int) -> list[Block]:
        items = [*self.val, *self.train]
        parts = [items[first : first + size] for first in range(0, len(items), size)]
        return [Block(len(part), partial(self._keys, part), partial(self._loads, part)) for part in parts]

    @property
    def val_keys(self) -> list[str]:
        return self._keys(self.val)

    @property
    def train_keys(self) -> list[str]:
        return self._keys(self.train)

    def _keys(self, items: Sequence[Item]) -> list[str]:
        return [self.key(item) for item in items]

    def _loads(self, items: Sequence[Item]) -> Iterator[Callable[[], Sample]]:
        return (partial(self.load, item) for item in items)

    def train_stream(self, start: int, seed: int, rank: int, world_size: int, batch_size: int) -> IndexedStream[Item]:
        return IndexedStream(self, start, seed, rank, world_size, batch_size)

    def val_samples(self) -> list[Sample]:
        samples = []
        for item in self.val:
            try:
                samples.append(self.load(item))
            except UserError as error:
                self.skipped_samples.note(str(error))
        return samples


class IndexedStream(IterableDataset[Sample], Generic[Item]):
    """The training stream of an `IndexedSource`.

    Epochs, each a permutation, follow one another in one endless sequence; ranks take its images in turn. Batch b
    of a rank is therefore the same set of images whatever the number of workers, before and after a resume. A
    damaged image is left out, and the batches after it move up by one.
    """

    def __init__(
        self, source: IndexedSource[Item], start: int, seed: int, rank: int, world_size: int, batch_size: int
    ) -> None:
        self.source = source
        self.skipped_samples = source.skipped_samples  # made here, before there are workers, so that they share it
        self.start = start
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Sample]:
        for epoch, index in self._indices():
            try:
                yield replace(self.source.load(self.source.train[index]), epoch=epoch)
            except UserError as error:
                self.skipped_samples.report(str(error), index)

    def _indices(self) -> Iterator[tuple[int, int]]:
        """Epochs and indices into `source.train`, for the batches that fall to this worker."""
        worker, workers = loader_worker()
        images, order, order_epoch = len(self.source.train), np.empty(0, np.int64), -1
        for batch in count(worker, workers):
            first = self.start + batch * self.batch_size
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position * self.world_size + self.rank, images)
                if epoch != order_epoch:
                    order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(images), epoch
                yield epoch, int(order[place])


class EvalStream(IterableDataset[Sample]):
    """Every image to evaluate on, once, shared out to loader workers; damaged ones are told and left out.

    truth: those with annotations, which they bring along.
    """

    def __init__(self, source: DataSource, split: Split, truth: bool = False) -> None:
        self.source = source
        self.split = split
        self.truth = truth

    def __iter__(self) -> Iterator[Sample]:
        worker, workers = loader_worker()
        for load in islice(self.source.eval_loads(self.split), worker, None, workers):
            try:
                sample = load()
                yield replace(sample, truth=run_lengths(sample)) if self.truth else sample
            except UserError as error:
                self.source.skipped_samples.note(str(error))


def loader_worker() -> tuple[int, int]:
    """(number of this loader worker, how many there are); (0, 1) where the loader has none."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def collate(samples: list[Sample]) -> Batch:
    """Lay each image into the top-left corner of a black frame: B samples -> images [B, 3, 1024, 1024] uint8."""
    images = torch.zeros(len(samples), 3, FRAME, FRAME, dtype=torch.uint8)
    for frame, sample in zip(images, samples, strict=True):
        height, width = sample.image.shape[-2:]
        frame[:, :height, :width] = sample.image
    return Batch(
        keys=[sample.key for sample in samples],
        images=images,
        sizes=torch.tensor([sample.image.shape[-2:] for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        epochs=[sample.epoch for sample in samples],
        checksums=[_checksum(sample.image) for sample in samples],
        annotations=_stacked(sample.annotations for sample in samples),
        teacher_embedding=_stacked(sample.teacher_embedding for sample in samples),
        truth=[sample.truth for sample in samples],
    )


def _checksum(image: torch.Tensor) -> int:
    """Of every eighth row, which is enough to tell two pictures apart."""
    return zlib.crc32(image[:, ::8].contiguous().numpy().tobytes())


def _stacked(values: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """One tensor for the batch, where every sample has one."""
    tensors = [value for value in values if value is not None]
    return torch.stack(tensors) if tensors else None
