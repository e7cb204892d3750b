"""What every way to judge a student by prompts shares: the same prompts for both models, their masks compared."""

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
    """Prompts of one kind, and the masks that are right for them."""

    kind: str
    prompts: Prompts
    masks: MaskOf


@dataclass(frozen=True)
class Comparison:
    """One prompt's outcome. `iou` is NaN if the right mask is empty. Points and areas are in original pixels.

    prompt: x and y of each of its points, and SAM's label of each; a box is its two corners.
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
    """A comparison, and what makes its masks, [H, W] bool, once more for those who want to draw it."""

    comparison: Comparison
    teacher: Callable[[], Tensor]
    student: Callable[[], Tensor]


class Protocol(ABC):
    """How a student is judged.

    kinds: of prompts, each with a score of its own, `miou/KIND`.
    reference: whose masks count as right: the teacher's, or the annotations', by which the teacher is judged as well.
    token: which of the decoder's masks counts, for both sides; see `SamView`.
    seed: of the points, together with the image's key.
    """

    kinds: Sequence[str]
    reference: str = "teacher"
    token: Token
    seed: int

    @property
    def description(self) -> dict[str, str | int]:
        """What must be known to compare two numbers."""
        return {"token": self.token, "averaging": "per prompt", "prompt_seed": self.seed}

    def see(self, sam: Sam, embedding: Tensor, batch: Batch) -> SamView:
        return SamView(sam, embedding, batch, self.token)

    @abstractmethod
    def ask(self, teacher: SamView) -> list[Target]:
        """Draw the prompts for the images that the teacher sees, and take down the right answers."""

    def compare(self, student: View, target: Target) -> Iterator[Outcome]:
        """The student's answers to the same prompts, compared at each image's original size."""
        yield from outcomes(student, target, student.masks(target.prompts))


def outcomes(student: View, target: Target, answers: MaskOf) -> Iterator[Outcome]:
    """answers: the student's. All pixels are counted before the first number is looked at, so a GPU is seldom idle."""
    prompts = replace(target.prompts, masks=None).to("cpu")
    points, labels, places = prompts.points, prompts.labels, prompts.valid.nonzero().tolist()
    if not places:
        return
    counted = torch.stack([overlap(answers(i, p), target.masks(i, p)) for i, p in places]).cpu()
    for (i, p), iou, (area, right_area, _) in zip(places, iou_of(counted).tolist(), counted.tolist(), strict=True):
        (_, width), (_, original_width) = student.sizes[i]
        scale, real = original_width / width, labels[i, p] >= BACKGROUND
        comparison = Comparison(
            image=student.batch.keys[i],
            kind=target.kind,
            prompt=tuple(round(value * scale, 1) for value in points[i, p][real].flatten().tolist()),
            labels=tuple(labels[i, p][real].tolist()),
            iou=iou,
            teacher_area=right_area,
            student_area=area,
        )
        yield Outcome(comparison, partial(target.masks, i, p), partial(answers, i, p))


COLUMNS = list(Comparison.__dataclass_fields__)  # of prompts.csv


def write_prompts(path: Path, comparisons: Sequence[Comparison]) -> None:
    """A row per prompt: image, kind, prompt (original pixels), SAM's labels, IoU, areas (original pixels)."""
    write_csv(path, COLUMNS, prompt_rows(comparisons))


def prompt_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """By COLUMNS; prompt and labels as text."""
    rows = [asdict(comparison) for comparison in comparisons]
    for row in rows:
        row |= {key: " ".join(f"{value:g}" for value in row[key]) for key in ("prompt", "labels")}
    return rows
