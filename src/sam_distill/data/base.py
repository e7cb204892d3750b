"""Base class of the data sources: an endless, resumable training stream and a small fixed validation set."""

import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Generic, Literal, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from sam_distill.data.annotations import run_lengths
from sam_distill.errors import UserError
from sam_distill.selection import digests, fingerprint
from sam_distill.types import FRAME, Batch, Sample

log = logging.getLogger(__name__)

T = TypeVar("T")  # item of a source: an image file, a key, or a shard with many images

Split = Literal["all", "val"]  # evaluate on all images, or on those held out for validation


class SkippedSamples:
    """Record of what could not be read: each is counted and logged once.

    unreadable: [training images] bool in shared memory, seen by all loader workers. Ranks merge theirs now and then.
    other_reasons: reasons for everything else, known to this process only.
    """

    def __init__(self, train_images: int) -> None:
        with torch.inference_mode(False):  # training can't modify inference tensors, and validation may be first here
            self.unreadable = torch.zeros(train_images, dtype=torch.bool).share_memory_()
        self.other_reasons: set[str] = set()

    def report(self, reason: str, *indices: int) -> None:
        """Mark the training images with these indices as unreadable; raise UserError when no readable one is left."""
        if not self.unreadable[list(indices)].all():
            self.unreadable[list(indices)] = True
            log.warning("skipped: %s", reason)
        if self.unreadable.all():
            raise UserError(f"not one of {len(self.unreadable)} training images can be read; for one, {reason}")

    def report_other(self, reason: str) -> None:
        """Record that anything else is skipped: a validation or evaluation image, the end of a truncated tar."""
        if reason not in self.other_reasons:
            self.other_reasons.add(reason)
            log.warning("skipped: %s", reason)

    def __len__(self) -> int:
        return int(self.unreadable.sum()) + len(self.other_reasons)


class DataSource(ABC, Generic[T]):
    """Images to train on and, disjoint from them, a few to validate on. A subclass sets `train` and `val`.

    shortage: a warning, shown when training, if fewer images are held out than requested; else empty.
    """

    train: Sequence[T]
    val: Sequence[T]
    shortage: str = ""

    @abstractmethod
    def keys(self, items: Sequence[T]) -> list[str]:
        """Return the key of each image."""

    @abstractmethod
    def loads(self, items: Sequence[T]) -> Iterator[Callable[[], Sample]]:
        """Yield a function for each image that decodes it, or raises UserError if it is damaged."""

    @abstractmethod
    def train_stream(
        self, start: int, seed: int, rank: int, world_size: int, batch_size: int
    ) -> IterableDataset[Sample]:
        """Return an endless stream of samples, epoch after epoch, each in its own order given by (seed, epoch).

        Ranks and loader workers divide the images among them. start: images that this rank has already consumed; a
        resumed run continues there. batch_size: per rank; the loader takes such batches from its workers in turn.
        """

    @abstractmethod
    def blocks(self, size: int) -> list[Sequence[T]]:
        """Return blocks of at most `size` images, held-out ones first: each becomes a tar of `sam-distill cache`."""

    def count(self, items: Sequence[T]) -> int:
        """Return the number of images in the items, including damaged ones."""
        return len(items)

    def eval_items(self, split: Split) -> Sequence[T]:
        """Return the items to evaluate on (default: held-out ones); data.images or data.fraction choose among `all`."""
        return self.val

    @property
    def has_annotations(self) -> bool:
        """Whether any image has annotations."""
        return False

    def load_annotations(self, count: int, seed: int) -> None:
        """Add `count` annotations, drawn with `seed`, to every training sample; existing streams are not affected."""
        raise UserError("these data have no annotations: take data=sa1b, or a cache of it")

    def load_json(self) -> None:
        """Add the JSON that holds an image's annotations to every sample; existing streams are not affected."""
        raise UserError(
            "these data have no annotations: take data=sa1b, a cache of it, or data.annotations of a folder"
        )

    @property
    def num_train_images(self) -> int:
        """Number of images in one epoch, summed over all ranks."""
        return self.count(self.train)

    @property
    def val_images(self) -> int:
        """Number of images held out for validation, possibly fewer than requested."""
        return self.count(self.val)

    @property
    def fingerprint(self) -> str:
        """Hash of the set of training image keys: equal for the same keys in any order."""
        return fingerprint(digests(self.keys(self.train)))

    def val_samples(self) -> list[Sample]:
        """Return the validation images, the same in every run, decoded and held in memory (2 MB each)."""
        return list(self.readable(self.loads(self.val)))

    def readable(self, loads: Iterable[Callable[[], Sample]]) -> Iterator[Sample]:
        """Yield the decoded images; record damaged ones in `skipped_samples` and leave them out."""
        for load in loads:
            try:
                yield load()
            except UserError as error:
                self.skipped_samples.report_other(str(error))

    @cached_property
    def skipped_samples(self) -> SkippedSamples:
        return SkippedSamples(self.num_train_images)

    @property
    def skipped(self) -> int:
        """Number of damaged images and tars found so far."""
        return len(self.skipped_samples)

    @property
    def skipped_by_tar(self) -> dict[str, int]:
        """Number of damaged training images found in each tar; empty if the images are not in tars."""
        return {}


@dataclass(eq=False)
class EvalStream(IterableDataset[Sample]):
    """Stream of every readable image to evaluate on, each once, divided among the loader workers.

    truth: add each image's annotations as ground truth, and skip images without any.
    """

    source: DataSource
    split: Split
    truth: bool = False

    def __iter__(self) -> Iterator[Sample]:
        worker, workers = loader_worker()
        loads = islice(self.source.loads(self.source.eval_items(self.split)), worker, None, workers)
        yield from self.source.readable((partial(_with_truth, load) for load in loads) if self.truth else loads)


def _with_truth(load: Callable[[], Sample]) -> Sample:
    sample = load()
    return replace(sample, truth=run_lengths(sample))


def loader_worker() -> tuple[int, int]:
    """Return (index of this loader worker, number of workers); (0, 1) if the loader has none."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def collate(samples: list[Sample]) -> Batch:
    """Return the batch with each image top-left in a black frame: B samples -> images [B, 3, 1024, 1024] uint8."""
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
        # Every eighth row is enough to tell two images apart.
        checksums=[zlib.crc32(sample.image[:, ::8].contiguous().numpy().data) for sample in samples],
        annotations=_stacked(sample.annotations for sample in samples),
        teacher_embedding=_stacked(sample.teacher_embedding for sample in samples),
        truth=[sample.truth for sample in samples],
    )


def _stacked(values: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the tensors of the samples stacked, or None if they have none."""
    tensors = [value for value in values if value is not None]
    return torch.stack(tensors) if tensors else None
