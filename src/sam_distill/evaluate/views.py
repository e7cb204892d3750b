"""Who is judged: a model that looks at a batch of images, and can then be asked for masks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from sam_distill.images import Size, upscale_masks
from sam_distill.models.sam import Sam
from sam_distill.types import MULTI, SINGLE, Batch, Prompts

Token = Literal["single", "best"]
MaskOf = Callable[[int, int], Tensor]  # (image, prompt) -> [H, W] bool, at the image's original size


class View(ABC):
    """embedding: [B, 256, 64, 64], or None of a model that has none to compare."""

    batch: Batch
    embedding: Tensor | None

    @cached_property
    def sizes(self) -> list[tuple[Size, Size]]:
        """Of each image: (h, w) within the frame, and the original's (H, W)."""
        both = torch.cat([self.batch.sizes, self.batch.original_sizes], dim=1).tolist()
        return [((h, w), (height, width)) for h, w, height, width in both]

    @abstractmethod
    def masks(self, prompts: Prompts) -> MaskOf:
        """One mask for each prompt."""


class OtherModel(ABC):
    """A model that is judged, but is no SAM. description: its size and options, for metrics.json."""

    description: dict[str, Any]

    @abstractmethod
    def see(self, batch: Batch) -> View:
        """Look at these images."""

    @abstractmethod
    def everything(self, image: Tensor) -> Tensor:
        """image: [3, h, w] uint8 RGB, its long side 1024 -> [N, h, w] bool, the surest first; N may be 0."""


@dataclass(eq=False)
class SamView(View):
    """A SAM's. token: which of the decoder's masks counts: `single` = token 0; `best` = of tokens 1-3 the one with the
    highest predicted IoU.
    """

    sam: Sam
    embedding: Tensor
    batch: Batch
    token: Token

    @torch.no_grad()
    def low_res(self, prompts: Prompts) -> Tensor:
        """[B, P, 256, 256] logits, in float32 whatever precision training uses: all are judged alike."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            masks = self.sam.decode(self.embedding.float(), prompts, MULTI if self.token == "best" else SINGLE)
        if self.token == "single":
            return masks.low_res[:, :, 0]
        return masks.low_res.take_along_dim(masks.iou.argmax(-1)[..., None, None, None], 2).squeeze(2)

    def masks(self, prompts: Prompts) -> MaskOf:
        return self.upscaled(self.low_res(prompts))

    def upscaled(self, low_res: Tensor) -> MaskOf:
        """low_res: as above."""
        sizes = self.sizes
        return lambda image, prompt: upscale_masks(low_res[image, prompt], *sizes[image]) > 0
