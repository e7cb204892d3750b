"""Base of the protocols with prompts: both models get the same prompts, and their masks are compared."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_distill.evaluate.views import MaskOf, SamView, Token, View
from sam_distill.files import write_csv
from sam_distill.metrics import iou_of, overlap
from sam_distill.models.sam import Sam
from sam_distill.types import BACKGROUND, Batch, Prompts


@dataclass(frozen=True)
class Target:
    """Prompts of one kind and their reference masks."""

    kind: str
    prompts: Prompts
    masks: MaskOf


@dataclass(frozen=True)
class Comparison:
    """Result of one prompt. `iou` is NaN if the reference mask is empty. Points and areas are in original pixels.

    prompt: x and y of each of its points; labels: SAM's label of each; a box is its two corners.
    teacher_area: of the reference mask, also where that is an annotation.
    """

    image: str
    kind: str
    prompt: tuple[float, ...]
    labels: tuple[int, ...]
    iou: float
    teacher_area: int
    student_area: int


@dataclass(frozen=True)
class Outcome:
    """Comparison, with functions that compute its two masks again for drawing: [H, W] bool."""

    comparison: Comparison
    teacher: Callable[[], Tensor]
    student: Callable[[], Tensor]


class Protocol(ABC):
    """Way to evaluate a student by prompts.

    kinds: the kinds of prompts, each with a score of its own, `miou/KIND`.
    reference: source of the reference masks: `teacher`, or `annotation`, where the teacher is evaluated as well.
    token: which of the decoder's masks counts, for student and teacher; see `SamView`.
    seed: of all random draws, together with the image's key.
    """

    kinds: Sequence[str]
    reference: str = "teacher"
    token: Token
    seed: int

    @property
    def description(self) -> dict[str, str | int]:
        """Return the settings that must be equal for two scores to be comparable."""
        return {"token": self.token, "averaging": "per prompt", "prompt_seed": self.seed}

    def view(self, sam: Sam, embedding: Tensor, batch: Batch) -> SamView:
        return SamView(sam, embedding, batch, self.token)

    @abstractmethod
    def make_targets(self, teacher: SamView) -> list[Target]:
        """Draw prompts for the images of the teacher's view, and return them with their reference masks."""

    def compare(self, student: View, target: Target) -> Iterator[Outcome]:
        """Yield, for each prompt, the comparison of student mask and reference mask, at the image's original size."""
        yield from outcomes(student, target, student.masks(target.prompts))


def outcomes(student: View, target: Target, answers: MaskOf) -> Iterator[Outcome]:
    """Yield an outcome per prompt. answers: the student's masks. Counts are copied together: a GPU is seldom idle."""
    prompts = replace(target.prompts, masks=None).to("cpu")
    points, labels, places = prompts.points, prompts.labels, prompts.valid.nonzero().tolist()
    if not places:
        return
    counted = torch.stack([overlap(answers(i, p), target.masks(i, p)) for i, p in places]).cpu()
    for (i, p), iou, (area, target_area, _) in zip(places, iou_of(counted).tolist(), counted.tolist(), strict=True):
        (_, width), (_, original_width) = student.sizes[i]
        scale, real = original_width / width, labels[i, p] >= BACKGROUND
        comparison = Comparison(
            image=student.batch.keys[i],
            kind=target.kind,
            prompt=tuple(round(value * scale, 1) for value in points[i, p][real].flatten().tolist()),
            labels=tuple(labels[i, p][real].tolist()),
            iou=iou,
            teacher_area=target_area,
            student_area=area,
        )
        yield Outcome(comparison, partial(target.masks, i, p), partial(answers, i, p))


COLUMNS = list(Comparison.__dataclass_fields__)  # the columns of prompts.csv


def write_prompts(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write a row per prompt: image, kind, prompt (original pixels), SAM's labels, IoU, areas (original pixels)."""
    write_csv(path, COLUMNS, prompt_rows(comparisons))


def prompt_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return a dict per comparison, with the keys COLUMNS; prompt and labels as text, numbers separated by spaces."""
    rows = [asdict(comparison) for comparison in comparisons]
    for row in rows:
        row |= {key: " ".join(f"{value:g}" for value in row[key]) for key in ("prompt", "labels")}
    return rows
