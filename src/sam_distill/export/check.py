"""An export in its runtime against PyTorch, by values: the same photographs, the same prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_distill.export.runner import Prompt, Runner, in_frame
from sam_distill.images import upscale_masks
from sam_distill.models.sam import Sam
from sam_distill.types import ALL, BACKGROUND, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND, Sample

LEAST_IOU = {None: 0.999, "fp16": 0.995, "int8": 0.97}  # by `quantize`


@dataclass(frozen=True)
class Agreement:
    """How near an export comes to PyTorch over `images` photographs and `prompts` prompts.

    embedding: the largest difference. cosine: the least, of the embeddings. mask_iou: mean and worst, of the masks that
    an app would take, at the picture's own size. predicted_iou: the largest difference.
    Seconds are medians for one picture and one prompt.
    """

    images: int
    prompts: int
    embedding: float
    cosine: float
    mask_iou: float
    worst_mask_iou: float
    predicted_iou: float
    encoder_seconds: float
    decoder_seconds: float
    pytorch_encoder_seconds: float
    pytorch_decoder_seconds: float

    def good(self, least_iou: float) -> bool:
        return self.mask_iou >= least_iou and self.cosine >= least_iou  # not if one is NaN

    def as_json(self) -> dict[str, float]:
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()}


@torch.no_grad()
def compare(sam: Sam, runner: Runner, samples: Sequence[Sample]) -> Agreement:
    """Both from the picture to the mask: `runner` decodes what it has encoded itself."""
    embeddings, cosines, ious, estimates = [], [], [], []
    seconds: list[list[float]] = [[], [], [], []]

    def timed(which: int, run: Callable[..., Any], *arguments: Any) -> Any:
        started = perf_counter()
        answer = run(*arguments)
        seconds[which].append(perf_counter() - started)
        return answer

    for sample in samples:
        expected = timed(2, sam.encode, *in_frame(sample))
        found = torch.from_numpy(timed(0, runner.encode, sample))
        embeddings.append(float((found - expected).abs().max()))
        cosines.append(float(F.cosine_similarity(found.flatten().double(), expected.flatten().double(), dim=0)))
        for prompt in prompts(sam, expected, sample):
            right = timed(3, sam.decode, expected, prompt.as_sam_has_it(), ALL)
            low_res, iou = timed(1, runner.decode, found.numpy(), prompt)
            best = 1 + int(right.iou[0, 0, 1:].argmax()) if prompt.ambiguous else 0
            ious.append(_iou(torch.from_numpy(low_res[best]), right.low_res[0, 0, best], sample))
            estimates.append(float(np.abs(iou - right.iou[0, 0].numpy()).max()))
    agreement = np.max(embeddings), np.min(cosines), np.mean(ious), np.min(ious), np.max(estimates)  # keep NaN
    medians = [np.median(times) for times in seconds]
    return Agreement(len(samples), len(ious), *map(float, [*agreement, *medians]))


def prompts(sam: Sam, embedding: Tensor, sample: Sample) -> Iterator[Prompt]:
    """Two clicks, a click with one beside the thing, a box, and three clicks that go on from a mask."""
    height, width = sample.image.shape[-2:]
    low, middle, high = torch.tensor([[0.25], [0.5], [0.75]]) * torch.tensor([width, height])
    yield Prompt(middle[None], torch.tensor([FOREGROUND]))
    yield Prompt(low[None], torch.tensor([FOREGROUND]))
    yield Prompt(torch.stack([middle, high]), torch.tensor([FOREGROUND, BACKGROUND]))
    box = Prompt(torch.stack([low, high]), torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]))
    yield box
    earlier = sam.decode(embedding, box.as_sam_has_it(), ALL).low_res[0, 0, :1]
    yield Prompt(torch.stack([low, middle, high]), torch.tensor([FOREGROUND, BACKGROUND, FOREGROUND]), earlier)


def _iou(logits: Tensor, right: Tensor, sample: Sample) -> float:
    """Of two low-res masks at the picture's own size; 1 if both are empty."""
    height, width = sample.image.shape[-2:]
    a, b = (upscale_masks(x, (height, width), sample.original_size) > 0 for x in (logits, right))
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0
