"""Runners: exports opened in their runtimes, with one interface for the check and the benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_distill.export.contract import Settings
from sam_distill.models.sam import PIXEL_MEAN, PIXEL_STD, preprocess
from sam_distill.prompts.forms import point_prompts
from sam_distill.types import BOX_TOP_LEFT, FRAME, LOW_RES, NOT_A_POINT, Prompts, Sample

Run = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]  # runs a graph; arrays in the contract's order


@dataclass(frozen=True)
class Prompt:
    """Prompt. points: [n, 2] (x, y) in frame pixels; labels: [n], SAM's 0 to 3; mask: [1, 256, 256] logits or None."""

    points: Tensor
    labels: Tensor
    mask: Tensor | None = None

    @property
    def ambiguous(self) -> bool:
        return len(self.labels) == 1 and self.mask is None

    def to_prompts(self) -> Prompts:
        form = Prompts if (self.labels >= BOX_TOP_LEFT).any() else point_prompts
        mask = None if self.mask is None else self.mask[None, None]
        return form(self.points[None, None], self.labels[None, None], mask)


class Runner(Protocol):
    """Exported model, opened in its runtime."""

    def encode(self, sample: Sample) -> np.ndarray:
        """Return the embedding, [1, 256, 64, 64]."""

    def decode(self, embedding: np.ndarray, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        """Return low-res logits [4, 256, 256] and predicted IoUs [4]."""


@dataclass(frozen=True)
class ContractRunner:
    """Runner of the two graphs of `export.graphs`, in any runtime."""

    encoder: Run
    decoder: Run
    settings: Settings

    def encode(self, sample: Sample) -> np.ndarray:
        image = preprocess(*in_frame(sample), self.settings.image_size)  # the values that PyTorch's encoder gets
        if self.settings.normalize == "inside":
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
            image = image * std + mean
        return self.encoder([image.contiguous(memory_format=torch.contiguous_format).numpy()])[0]

    def decode(self, embedding: np.ndarray, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        free = self.settings.points - len(prompt.labels)
        points = F.pad(prompt.points, (0, 0, 0, free)).unsqueeze(0).numpy()
        labels = F.pad(prompt.labels.float(), (0, free), value=NOT_A_POINT).unsqueeze(0).numpy()
        masks, iou = self.decoder([embedding, points, labels, *mask_inputs(prompt)])
        return masks[0], iou[0]


def in_frame(sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the image padded to the frame, [1, 3, 1024, 1024] uint8, and its size (h, w) without padding, [1, 2]."""
    height, width = sample.image.shape[-2:]
    return F.pad(sample.image, (0, FRAME - width, 0, FRAME - height)).unsqueeze(0), torch.tensor([[height, width]])


def mask_inputs(prompt: Prompt) -> list[np.ndarray]:
    """Return mask_input [1, 1, 256, 256] and has_mask_input [1], both float32."""
    mask = torch.zeros(1, LOW_RES, LOW_RES) if prompt.mask is None else prompt.mask
    return [mask.unsqueeze(0).numpy(), np.array([prompt.mask is not None], np.float32)]
