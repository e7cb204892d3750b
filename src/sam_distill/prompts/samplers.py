"""Prompt samplers for training: each draws `count` prompts for every image of a batch, never in the padding."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from sam_distill.prompts.forms import box_prompts, boxes_of, join, point_prompts
from sam_distill.prompts.sampling import PromptRng, distant_points, jitter, points_in, uniform_points
from sam_distill.types import ABSENT, BACKGROUND, FOREGROUND, LOW_RES, Batch, Prompts, upload, valid_area

Count = Annotated[int, Field(gt=0)]


@dataclass
class PromptSampler(ABC):
    """Sampler of prompts for a batch. count: prompts per image. seed: of the draws, with an image's key and epoch.

    requires: the fields of `Batch` that a draw reads.
    """

    requires = frozenset[str]()
    of_annotations = False  # whether each prompt p of an image is made from its annotation p
    count: Count
    seed: int

    @abstractmethod
    def draw(self, batch: Batch, first: int = 0) -> Prompts:
        """Return `count` prompts per image. first: number of prompts of the samplers before this one in a mixture."""

    def rng(self, batch: Batch, first: int, purpose: str = "") -> PromptRng:
        return PromptRng(batch.keys, batch.epochs, self.seed, f"+{first}{purpose}" if first or purpose else "")


class Points(PromptSampler):
    """Sampler of one foreground point, uniform over the image: the paper's prompt (section 3.2)."""

    def draw(self, batch: Batch, first: int = 0) -> Prompts:
        return point_prompts(uniform_points(self.rng(batch, first), batch.sizes, self.count).unsqueeze(2))


@dataclass
class PointPairs(PromptSampler):
    """Sampler of a foreground point, uniform over the image, and a background point at a distance (paper, Table 7).

    distance: minimum and maximum, in frame pixels.
    """

    distance: tuple[float, float] = (100, 500)

    def draw(self, batch: Batch, first: int = 0) -> Prompts:
        rng = self.rng(batch, first)
        points = uniform_points(rng, batch.sizes, self.count)
        others = distant_points(rng, points, batch.sizes, *self.distance)
        pairs = torch.stack([points, others], dim=2)
        labels = upload([FOREGROUND, BACKGROUND], pairs.device).expand(pairs.shape[:3])
        return point_prompts(pairs, labels)


class Grid(PromptSampler):
    """Sampler of `side` x `side` foreground points on a regular grid over the image."""

    def __init__(self, side: Count) -> None:
        super().__init__(side * side, seed=0)
        self.side = side

    def draw(self, batch: Batch, first: int = 0) -> Prompts:
        steps = (torch.arange(self.side, device=batch.sizes.device) + 0.5) / self.side
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        grid = torch.stack([x, y], dim=-1).view(1, -1, 1, 2)
        return point_prompts((grid * batch.sizes.flip(-1)[:, None, None]).floor())


@dataclass
class MaskSampler(PromptSampler):
    """Sampler of prompts made from masks.

    masks: the teacher's masks at points uniform over the image, or the image's annotations.
    """

    masks: Literal["teacher", "annotations"] = "teacher"

    def __post_init__(self) -> None:
        self.of_annotations = self.masks == "annotations"
        self.requires = frozenset({"annotations" if self.of_annotations else "ask_teacher"})

    def masks_of(self, batch: Batch, first: int) -> Tensor:
        """Return masks [B, count, 256, 256] bool, False in the padding; all False where there is no mask."""
        area = valid_area(batch.sizes, LOW_RES)
        if self.of_annotations:
            assert batch.annotations is not None
            return batch.annotations[:, first : first + self.count] & area
        assert batch.ask_teacher is not None
        points = uniform_points(self.rng(batch, first, "mask"), batch.sizes, self.count)
        return (batch.ask_teacher(point_prompts(points.unsqueeze(2))).low_res[:, :, 0] > 0) & area


class MaskPoints(MaskSampler):
    """Sampler of one foreground point, uniform over a mask."""

    def draw(self, batch: Batch, first: int = 0) -> Prompts:
        points, found = points_in(self.rng(batch, first), self.masks_of(batch, first), batch.sizes)
        return point_prompts(points.unsqueeze(2), torch.where(found, FOREGROUND, ABSENT).unsqueeze(2))


@dataclass
class Boxes(MaskSampler):
    """Sampler of a mask's box, with the noise that SAM adds (its appendix A, "Training algorithm").

    noise: standard deviation as a share of the side, clipped to +-`most` frame pixels. 0 and 0: tight boxes.
    """

    noise: Annotated[float, Field(ge=0)] = 0.1
    most: Annotated[float, Field(ge=0)] = 20

    def draw(self, batch: Batch, first: int = 0) -> Prompts:
        boxes = boxes_of(self.masks_of(batch, first), valid_area(batch.sizes, LOW_RES))
        return box_prompts(jitter(self.rng(batch, first), boxes, batch.sizes, self.noise, self.most))


class Mixture(PromptSampler):
    """Sampler that joins the prompts of several samplers for every image. parts: the samplers, under any names."""

    def __init__(self, parts: Annotated[Mapping[str, PromptSampler], Field(min_length=1)]) -> None:
        self.parts = list(parts.values())
        super().__init__(sum(part.count for part in self.parts), seed=0)
        self.of_annotations = all(part.of_annotations for part in self.parts)
        self.requires = frozenset[str]().union(*(part.requires for part in self.parts))

    def draw(self, batch: Batch, first: int = 0) -> Prompts:
        drawn = []
        for part in self.parts:
            drawn.append(part.draw(batch, first))
            first += part.count
        return join(drawn)
