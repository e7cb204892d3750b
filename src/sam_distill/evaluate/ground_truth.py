"""Ground truth protocol: IoU of the masks of student and teacher with the dataset's own annotations.

Clicks follow SAM's own evaluation (Kirillov et al., 2023, section 7.1 and appendix D.1): the first click is the pixel
of the mask farthest from its border, each further click the farthest in the missed or the surplus area, whichever is
deeper. The earlier mask is not fed back, so that models without such an input can be evaluated in the same way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from pycocotools import mask as coco
from pydantic import Field
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from sam_distill.evaluate.protocol import Outcome, Protocol, Target, outcomes
from sam_distill.evaluate.views import MaskOf, SamView, Token, View
from sam_distill.images import scale_points
from sam_distill.prompts.forms import add_points, box_prompts, point_prompts
from sam_distill.prompts.sampling import generator
from sam_distill.types import ABSENT, BACKGROUND, FOREGROUND, upload


@dataclass
class GroundTruth(Protocol):
    """Protocol with clicks and boxes. annotations: number per image (None: all), drawn by (seed, image key)."""

    reference = "annotation"
    annotations: Annotated[int, Field(gt=0)] | None = 8
    clicks: Annotated[Sequence[Annotated[int, Field(gt=0)]], Field(min_length=1)] = (1, 3)
    token: Token = "single"
    seed: int = 0

    def __post_init__(self) -> None:
        self.clicks = sorted(set(self.clicks))
        self.kinds = [*(f"click_{number}" for number in self.clicks), "box"]

    @property
    def description(self) -> dict[str, str | int]:
        return super().description | {"annotations_per_image": self.annotations or "all"}

    def make_targets(self, teacher: SamView) -> list[Target]:
        batch = teacher.batch
        chosen = [self._chosen(key, truth) for key, truth in zip(batch.keys, batch.truth, strict=True)]
        most, device = max(map(len, chosen)), batch.images.device

        def masks(image: int, prompt: int) -> Tensor:
            return upload(torch.from_numpy(coco.decode(chosen[image][prompt])), device).bool()

        points, boxes = torch.zeros(len(batch), most, 1, 2), torch.full((len(batch), most, 4), torch.nan)
        labels = torch.full((len(batch), most, 1), ABSENT)
        for i, truth in enumerate(chosen):
            for p, run_lengths in enumerate(truth):
                x, y, width, height = coco.toBbox(run_lengths).tolist()
                corners = torch.tensor([[x, y], [x + width, y + height]])
                boxes[i, p] = scale_points(corners, teacher.sizes[i][1]).flatten()
                middle = torch.tensor(_deepest(coco.decode(run_lengths))[1])
                points[i, p, 0] = scale_points(middle, teacher.sizes[i][1])
                labels[i, p, 0] = FOREGROUND
        clicks = point_prompts(upload(points, device), upload(labels, device))
        return [Target("click_1", clicks, masks), Target("box", box_prompts(upload(boxes, device)), masks)]

    def compare(self, student: View, target: Target) -> Iterator[Outcome]:
        if target.kind == "box":
            yield from super().compare(student, target)
            return
        for number in range(1, self.clicks[-1] + 1):
            answers = student.masks(target.prompts)
            if number in self.clicks:
                yield from outcomes(student, replace(target, kind=f"click_{number}"), answers)
            if number < self.clicks[-1]:
                target = _corrected(student, target, answers)

    def _chosen(self, key: str, truth: Sequence[Any]) -> list[Any]:
        order = generator(self.seed, key, 0, "ground truth").permutation(len(truth))
        return [truth[index] for index in order[: self.annotations]]


def _corrected(student: View, target: Target, answers: MaskOf) -> Target:
    """Return the target with one more click per prompt, except where the student's mask has no wrong pixel."""
    valid, device = target.prompts.valid.cpu(), target.prompts.points.device
    points, labels = torch.zeros(*valid.shape, 2), torch.full(valid.shape, ABSENT)
    for i, (_, original_size) in enumerate(student.sizes):
        asked = valid[i].nonzero().flatten().tolist()
        if not asked:
            continue
        truth, answer = (torch.stack([masks(i, p) for p in asked]) for masks in (target.masks, answers))
        errors = torch.stack([truth & ~answer, answer & ~truth], dim=1).cpu().numpy()  # one transfer per image
        for p, (missing, surplus) in zip(asked, errors, strict=True):
            missed, too_much = _deepest(missing), _deepest(surplus)
            depth, place = max(missed, too_much)
            if depth > 0:
                points[i, p] = scale_points(torch.tensor(place), original_size)
                labels[i, p] = FOREGROUND if missed >= too_much else BACKGROUND
    more = add_points(target.prompts, upload(points, device), upload(labels, device))
    return replace(target, prompts=more)


def _deepest(mask: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return (distance, (x, y)) of the pixel of `mask`, [H, W], that is farthest from its outside; 0 if it is empty."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return float(depth[y, x]), (float(x), float(y))
