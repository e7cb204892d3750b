"""What every way to judge a student shares: ask both models the same prompts, and compare their masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sam_distill.images import upscale_masks
from sam_distill.metrics import mask_iou
from sam_distill.models.sam import Sam
from sam_distill.types import ABSENT, LOW_RES, MULTI, SINGLE, Batch, Masks, Prompts

Token = Literal["single", "best"]


@dataclass(frozen=True)
class Target:
    """The teacher's answers to one kind of prompts. low_res: [B, P, 256, 256] float32 logits."""

    kind: str
    prompts: Prompts
    low_res: Tensor


@dataclass(frozen=True)
class Comparison:
    """One prompt's outcome. `iou` is NaN if the teacher's mask is empty. Points and areas are in original pixels."""

    image: str
    kind: str
    prompt: tuple[float, ...]
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
    token: which of the decoder's masks counts, for both sides: `single` = token 0; `best` = of tokens 1-3 the one with
        the highest predicted IoU.
    seed: of the points, together with the image's key.
    """

    kinds: tuple[str, ...]

    def __init__(self, token: Token, seed: int) -> None:
        self.token = token
        self.seed = seed

    @property
    def description(self) -> dict[str, str | int]:
        """What must be known to compare two numbers."""
        return {"token": self.token, "averaging": "per prompt", "prompt_seed": self.seed}

    @abstractmethod
    def ask(self, teacher: Sam, embedding: Tensor, batch: Batch) -> list[Target]:
        """Draw the prompts and take down the teacher's answers. embedding: the teacher's, [B, 256, 64, 64]."""

    def compare(self, student: Sam, embedding: Tensor, batch: Batch, target: Target) -> Iterator[Outcome]:
        """The student's answers to the same prompts, compared at each image's original size."""
        with torch.no_grad():
            answers = self.decode(student, embedding, target.prompts)
        for i, key in enumerate(batch.keys):
            size, original_size = tuple(batch.sizes[i].tolist()), tuple(batch.original_sizes[i].tolist())
            for p in torch.nonzero(target.prompts.valid[i]).flatten().tolist():
                theirs, ours = (upscale_masks(m[i, p], size, original_size) > 0 for m in (target.low_res, answers))
                comparison = Comparison(
                    image=key,
                    kind=target.kind,
                    prompt=_in_original_pixels(target.prompts, i, p, original_size[1] / size[1]),
                    iou=mask_iou(ours, theirs).item(),
                    teacher_area=int(theirs.sum()),
                    student_area=int(ours.sum()),
                )
                yield Outcome(comparison, theirs, ours)

    def decode(self, sam: Sam, embedding: Tensor, prompts: Prompts) -> Tensor:
        """[B, P, 256, 256] logits, in float32 whatever precision training uses: both sides are judged alike."""
        with torch.autocast(embedding.device.type, enabled=False):
            masks = sam.decode(embedding.float(), prompts, MULTI if self.token == "best" else SINGLE)
        return _best(masks) if self.token == "best" else masks.low_res[:, :, 0]


def _best(masks: Masks) -> Tensor:
    index = masks.iou.argmax(-1)[..., None, None, None].expand(-1, -1, 1, LOW_RES, LOW_RES)
    return masks.low_res.gather(2, index).squeeze(2)


def _in_original_pixels(prompts: Prompts, image: int, prompt: int, scale: float) -> tuple[float, ...]:
    labels = prompts.labels[image, prompt]
    points = prompts.points[image, prompt][(labels >= 0) & (labels != ABSENT)]
    return tuple(round(float(v) * scale, 1) for v in points.flatten())
