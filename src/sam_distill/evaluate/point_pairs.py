"""Point pairs protocol: a foreground point and a background point, at growing distances (paper, Table 7).

The paper does not say how points are chosen, in which pixels distances are measured, and whether the second point may
lie on the object as well. These are options here; the defaults are the simplest reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from sam_distill.evaluate.protocol import Protocol, Target
from sam_distill.evaluate.views import SamView, Token
from sam_distill.prompts.forms import point_prompts
from sam_distill.prompts.sampling import PromptRng, distant_points, uniform_points, values_at
from sam_distill.types import ABSENT, BACKGROUND, FOREGROUND, upload


@dataclass
class PointPairs(Protocol):
    """Protocol with a foreground point, uniform over the image, and a background point in a random direction."""

    distances: Annotated[Sequence[Annotated[int, Field(gt=0)]], Field(min_length=1)] = (100, 200, 300, 400, 500)
    pairs: Annotated[int, Field(gt=0)] = 1
    pixels: Literal["original", "frame"] = "original"
    outside: bool = False
    token: Token = "single"
    seed: int = 0

    def __post_init__(self) -> None:
        self.distances = tuple(dict.fromkeys(self.distances))
        self.kinds = [f"pair_{distance}" for distance in self.distances]

    @property
    def description(self) -> dict[str, str | int]:
        return super().description | {"pairs_per_image": self.pairs, "pixels": self.pixels, "outside": self.outside}

    def make_targets(self, teacher: SamView) -> list[Target]:
        batch = teacher.batch
        scale = torch.ones(len(batch), device=batch.sizes.device)
        if self.pixels == "original":
            scale = batch.sizes.amax(1) / batch.original_sizes.amax(1)
        targets = []
        for kind, distance in zip(self.kinds, self.distances, strict=True):
            draw = PromptRng(batch.keys, [0] * len(batch), self.seed, kind)
            points = uniform_points(draw, batch.sizes, self.pairs)
            wanted = (distance * scale)[:, None, None]
            others = distant_points(draw, points, batch.sizes, wanted, wanted)
            fits = ((others - points).norm(dim=-1, keepdim=True) - wanted).abs()[..., 0] < 2
            if self.outside:
                first_masks = teacher.low_res(point_prompts(points.unsqueeze(2))) > 0
                fits &= ~values_at(first_masks, others)
            signs = upload([FOREGROUND, BACKGROUND], points.device).expand(*points.shape[:2], 2)
            labels = signs.masked_fill(~fits[..., None], ABSENT)
            prompts = point_prompts(torch.stack([points, others], 2), labels)
            targets.append(Target(kind, prompts, teacher.masks(prompts)))
        return targets
