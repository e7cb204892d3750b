"""Views: a batch of images as seen by one model, which returns a mask for each prompt."""

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
    """Batch of images, seen by one model. embedding: [B, 256, 64, 64]; None if the model has none to compare."""

    batch: Batch
    embedding: Tensor | None

    @cached_property
    def sizes(self) -> list[tuple[Size, Size]]:
        """Return for each image its size (h, w) within the frame and its original size (H, W)."""
        both = torch.cat([self.batch.sizes, self.batch.original_sizes], dim=1).tolist()
        return [((h, w), (height, width)) for h, w, height, width in both]

    @abstractmethod
    def masks(self, prompts: Prompts) -> MaskOf:
        """Return a function that computes the mask of a prompt, one mask per prompt."""


class OtherModel(ABC):
    """Model that is evaluated but is no SAM. description: its size and options, for metrics.json."""

    description: dict[str, Any]

    @abstractmethod
    def view(self, batch: Batch) -> View:
        """Return the model's view of the batch."""

    @abstractmethod
    def everything(self, image: Tensor) -> Tensor:
        """Return all masks: [3, h, w] uint8 RGB, long side 1024 -> [N, h, w] bool, most confident first; N may be 0."""


@dataclass(eq=False)
class SamView(View):
    """View by a SAM.

    token: which of the decoder's masks counts: `single` = token 0; `best` = the highest predicted IoU of tokens 1-3.
    """

    sam: Sam
    embedding: Tensor
    batch: Batch
    token: Token

    @torch.no_grad()
    def low_res(self, prompts: Prompts) -> Tensor:
        """Return logits [B, P, 256, 256], decoded in float32 whatever precision training uses, to be comparable."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            masks = self.sam.decode(self.embedding.float(), prompts, MULTI if self.token == "best" else SINGLE)
        if self.token == "single":
            return masks.low_res[:, :, 0]
        return masks.low_res.take_along_dim(masks.iou.argmax(-1)[..., None, None, None], 2).squeeze(2)

    def masks(self, prompts: Prompts) -> MaskOf:
        return self.upscaled(self.low_res(prompts))

    def upscaled(self, low_res: Tensor) -> MaskOf:
        """Return a function that computes a mask at original size from the logits `low_res`, [B, P, 256, 256]."""
        sizes = self.sizes
        return lambda image, prompt: upscale_masks(low_res[image, prompt], *sizes[image]) > 0
