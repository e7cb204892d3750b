"""What every data source offers: an endless, resumable training stream and a small fixed validation set."""

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
from sam_distill.selection import digests, fingerprint
from sam_distill.types import FRAME, Batch, Sample, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")  # what a source keeps its images in: files, keys, or tars of them

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
            log.warning("skipped: %s", reason)
        if self.unreadable.all():
            raise UserError(f"not one of {len(self.unreadable)} training images can be read; for one, {reason}")

    def note(self, reason: str) -> None:
        """Anything else is skipped: a validation or evaluation image, the end of a truncated tar."""
        if reason not in self.others:
            self.others.add(reason)
            log.warning("skipped: %s", reason)

    def __len__(self) -> int:
        return int(self.unreadable.sum()) + len(self.others)


class DataSource(ABC, Generic[T]):
    """Images to train on and, disjoint from them, a few to validate on. A subclass sets `train` and `val`.

    shortage: a line for those who train, where fewer images are held out than were asked for; else empty.
    """

    train: Sequence[T]
    val: Sequence[T]
    shortage: str = ""

    @abstractmethod
    def keys(self, items: Sequence[T]) -> list[str]:
        """The key of each image."""

    @abstractmethod
    def loads(self, items: Sequence[T]) -> Iterator[Callable[[], Sample]]:
        """Each image, not yet decoded; a UserError from the call says that it is damaged."""

    @abstractmethod
    def train_stream(
        self, start: int, seed: int, rank: int, world_size: int, batch_size: int
    ) -> IterableDataset[Sample]:
        """Samples without end, epoch after epoch, each in an order of its own that (seed, epoch) decides.

        Ranks and loader workers share the images out. start: images that this rank has consumed already, where a
        resumed run goes on. batch_size: per rank; the loader takes batches of it from its workers in turn.
        """

    @abstractmethod
    def blocks(self, size: int) -> list[Sequence[T]]:
        """The images held out, then those to train on, `size` or fewer in each: a tar of `sam-distill cache`."""

    def count(self, items: Sequence[T]) -> int:
        """How many images, damaged ones included."""
        return len(items)

    def eval_items(self, split: Split) -> Sequence[T]:
        """What to evaluate on; data.images or data.fraction choose among `all`. Here the held-out images alone."""
        return self.val

    @property
    def has_annotations(self) -> bool:
        """Whether any image comes with annotations."""
        return False

    def annotate(self, count: int, seed: int) -> None:
        """Have every training image come with `count` of its annotations; without effect on streams made before."""
        raise UserError("these data have no annotations: take data=sa1b, or a cache of it")

    def load_json(self) -> None:
        """Have every image come with the JSON that holds its annotations; without effect on streams made before."""
        raise UserError(
            "these data have no annotations: take data=sa1b, a cache of it, or data.annotations of a folder"
        )

    @property
    def num_train_images(self) -> int:
        """Images in one epoch, over all ranks."""
        return self.count(self.train)

    @property
    def val_images(self) -> int:
        """How many are held out for validation, which may be fewer than were asked for."""
        return self.count(self.val)

    @property
    def fingerprint(self) -> str:
        """Of the set of images to train on: equal for the same keys."""
        return fingerprint(digests(self.keys(self.train)))

    def val_samples(self) -> list[Sample]:
        """The validation images, the same ones in every run, decoded and held in memory (2 MB each)."""
        return list(self.readable(self.loads(self.val)))

    def readable(self, loads: Iterable[Callable[[], Sample]]) -> Iterator[Sample]:
        """What these give; damaged images are told and left out."""
        for load in loads:
            try:
                yield load()
            except UserError as error:
                self.skipped_samples.note(str(error))

    @cached_property
    def skipped_samples(self) -> SkippedSamples:
        return SkippedSamples(self.num_train_images)

    @property
    def skipped(self) -> int:
        """How many damaged images and tars were found so far."""
        return len(self.skipped_samples)

    @property
    def skipped_by_tar(self) -> dict[str, int]:
        """How many damaged training images were found in each tar, where images come in tars."""
        return {}


@dataclass(eq=False)
class EvalStream(IterableDataset[Sample]):
    """Every readable image to evaluate on, once, shared out to loader workers.

    truth: those with annotations, which they bring along.
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
        # Of every eighth row, which is enough to tell two pictures apart.
        checksums=[zlib.crc32(sample.image[:, ::8].contiguous().numpy().data) for sample in samples],
        annotations=_stacked(sample.annotations for sample in samples),
        teacher_embedding=_stacked(sample.teacher_embedding for sample in samples),
        truth=[sample.truth for sample in samples],
    )


def _stacked(values: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """One tensor for the batch, where every sample has one."""
    tensors = [value for value in values if value is not None]
    return torch.stack(tensors) if tensors else None
