"""Ground truth: how close do masks come to the dataset's own annotations, and what would the teacher have scored?

Clicks follow SAM's own evaluation (Kirillov et al., 2023, section 7.1 and appendix D.1): the first one at the point of
the mask that is farthest from its border, each further one likewise in the largest error. The earlier mask is not fed
back, so that models without such an input can be judged alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pycocotools import mask as coco
from pydantic import Field
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from sam_distill.evaluate.protocol import Outcome, Protocol, Target, outcome
from sam_distill.evaluate.views import MaskOf, SamView, Token, View
from sam_distill.images import scale_points
from sam_distill.prompts.draws import generator
from sam_distill.prompts.forms import add_points, box_prompts, point_prompts
from sam_distill.types import ABSENT, BACKGROUND, FOREGROUND, Batch


class GroundTruth(Protocol):
    """annotations: so many per image, drawn by (seed, image key); null: all of them.

    clicks: the numbers of clicks after which the mask is judged.
    """

    right = "annotation"

    def __init__(
        self,
        annotations: Annotated[int, Field(gt=0)] | None = 8,
        clicks: Sequence[Annotated[int, Field(gt=0)]] = (1, 3),
        token: Token = "single",
        seed: int = 0,
    ) -> None:
        super().__init__(token, seed)
        self.annotations, self.clicks = annotations, tuple(sorted(set(clicks)))
        self.kinds = (*(f"click_{number}" for number in self.clicks), "box")

    @property
    def description(self) -> dict[str, str | int]:
        return super().description | {"annotations_per_image": self.annotations or "all"}

    def ask(self, teacher: SamView) -> list[Target]:
        batch = teacher.batch
        chosen = [self._chosen(key, truth) for key, truth in zip(batch.keys, batch.truth, strict=True)]
        most, device = max(map(len, chosen)), batch.images.device

        def masks(image: int, prompt: int) -> Tensor:
            return torch.from_numpy(coco.decode(chosen[image][prompt])).to(device, torch.bool)

        points, boxes = torch.zeros(len(batch), most, 1, 2), torch.full((len(batch), most, 4), torch.nan)
        labels = torch.full((len(batch), most, 1), ABSENT)
        for i, truth in enumerate(chosen):
            for p, run_lengths in enumerate(truth):
                x, y, width, height = coco.toBbox(run_lengths).tolist()
                corners = torch.tensor([[x, y], [x + width, y + height]])
                boxes[i, p] = _in_frame(batch, i, corners).flatten()
                points[i, p, 0] = _in_frame(batch, i, torch.tensor([_deepest(coco.decode(run_lengths))[1]]))[0]
                labels[i, p, 0] = FOREGROUND
        clicks = point_prompts(points.to(device), labels.to(device))
        return [Target("click_1", clicks, masks), Target("box", box_prompts(boxes.to(device)), masks)]

    def compare(self, student: View, target: Target) -> Iterator[Outcome]:
        if target.kind == "box":
            yield from super().compare(student, target)
            return
        for number in range(1, self.clicks[-1] + 1):
            answers, kind = student.masks(target.prompts), f"click_{number}"
            if number in self.clicks:
                for i, p in target.prompts.valid.nonzero().tolist():
                    told = Target(kind, target.prompts, target.masks)
                    yield outcome(student.batch, told, i, p, target.masks(i, p), answers(i, p))
            if number < self.clicks[-1]:
                target = _corrected(student.batch, target, answers)

    def _chosen(self, key: str, truth: Sequence[Any]) -> list[Any]:
        order = generator(self.seed, key, 0, "ground truth").permutation(len(truth))
        return [truth[index] for index in order[: self.annotations]]


def _corrected(batch: Batch, target: Target, answers: MaskOf) -> Target:
    """With one more click for every prompt, unless its mask is right to the last pixel."""
    shape = target.prompts.labels.shape[:2]
    points, labels = torch.zeros(*shape, 2), torch.full(shape, ABSENT)
    for i, p in target.prompts.valid.nonzero().tolist():
        right, answer = (mask.cpu().numpy() for mask in (target.masks(i, p), answers(i, p)))
        missed, too_much = _deepest(right & ~answer), _deepest(answer & ~right)
        depth, place = max(missed, too_much)
        if depth > 0:
            points[i, p] = _in_frame(batch, i, torch.tensor([place]))[0]
            labels[i, p] = FOREGROUND if missed >= too_much else BACKGROUND
    device = target.prompts.points.device
    return Target(target.kind, add_points(target.prompts, points.to(device), labels.to(device)), target.masks)


def _deepest(mask: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The point (x, y) of [H, W] that is farthest from the outside of the mask, and how far that is."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return float(depth[y, x]), (float(x), float(y))


def _in_frame(batch: Batch, image: int, points: Tensor) -> Tensor:
    """points: [N, 2] (x, y) in original pixels."""
    height, width = batch.original_sizes[image].tolist()
    return scale_points(points, (height, width))
