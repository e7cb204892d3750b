"""What every way to judge a student by prompts shares: the same prompts for both models, their masks compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_distill.evaluate.views import MaskOf, SamView, Token, View
from sam_distill.metrics import mask_iou
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
    """A comparison with its masks, [H, W] bool, for those who want to draw it."""

    comparison: Comparison
    teacher: Tensor
    student: Tensor


class Protocol(ABC):
    """How a student is judged.

    kinds: of prompts, each with a score of its own, `miou/KIND`.
    right: whose masks count as right: the teacher's, or the annotations', by which the teacher is judged as well.
    token: which of the decoder's masks counts, for both sides; see `SamView`.
    seed: of the points, together with the image's key.
    """

    kinds: tuple[str, ...]
    right: str = "teacher"

    def __init__(self, token: Token, seed: int) -> None:
        self.token = token
        self.seed = seed

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
        answers = student.masks(target.prompts)
        for i in range(len(student.batch)):
            for p in torch.nonzero(target.prompts.valid[i]).flatten().tolist():
                yield outcome(student.batch, target, i, p, target.masks(i, p), answers(i, p))


def outcome(batch: Batch, target: Target, image: int, prompt: int, right: Tensor, answer: Tensor) -> Outcome:
    """right, answer: [H, W] bool."""
    scale = int(batch.original_sizes[image, 1]) / int(batch.sizes[image, 1])
    labels = target.prompts.labels[image, prompt]
    real = labels >= BACKGROUND
    points = target.prompts.points[image, prompt][real].flatten().tolist()
    comparison = Comparison(
        image=batch.keys[image],
        kind=target.kind,
        prompt=tuple(round(value * scale, 1) for value in points),
        labels=tuple(labels[real].tolist()),
        iou=mask_iou(answer, right).item(),
        teacher_area=int(right.sum()),
        student_area=int(answer.sum()),
    )
    return Outcome(comparison, right, answer)
