"""Agreement protocol: IoU between the masks of student and teacher for the same prompts (paper, section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sam_distill.evaluate.protocol import Protocol, Target
from sam_distill.evaluate.views import SamView, Token
from sam_distill.prompts.forms import box_prompts, boxes_of, point_prompts
from sam_distill.prompts.sampling import PromptRng, uniform_points
from sam_distill.types import LOW_RES, valid_area


@dataclass
class Agreement(Protocol):
    """Protocol with points, uniform over the image, and the tight boxes of the teacher's masks for those points."""

    points: Annotated[int, Field(gt=0)] = 4
    kinds: Annotated[Sequence[Literal["point", "box"]], Field(min_length=1)] = ("point", "box")
    token: Token = "single"
    seed: int = 0

    def __post_init__(self) -> None:
        self.kinds = tuple(dict.fromkeys(self.kinds))

    @property
    def description(self) -> dict[str, str | int]:
        return super().description | {"points_per_image": self.points}

    def make_targets(self, teacher: SamView) -> list[Target]:
        batch = teacher.batch
        draw = PromptRng(batch.keys, [0] * len(batch), self.seed)  # always epoch 0: the same points in every evaluation
        at_points = point_prompts(uniform_points(draw, batch.sizes, self.points).unsqueeze(2))
        low_res = teacher.low_res(at_points)
        in_boxes = box_prompts(boxes_of(low_res > 0, valid_area(batch.sizes, LOW_RES)))
        targets = []
        if "point" in self.kinds:
            targets.append(Target("point", at_points, teacher.upscaled(low_res)))
        if "box" in self.kinds:
            targets.append(Target("box", in_boxes, teacher.masks(in_boxes)))
        return targets
