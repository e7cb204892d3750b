"""Comparison of an export in its runtime with the PyTorch model, on the same photographs and prompts."""

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

LEAST_IOU = {None: 0.999, "fp16": 0.995, "int8": 0.97}  # of mean mask IoU and of cosine, by `quantize`


@dataclass(frozen=True)
class ExportCheck:
    """Agreement of an export with PyTorch over `images` photographs and `prompts` prompts.

    embedding: largest absolute difference of the embeddings.
    cosine: lowest cosine similarity of the two embeddings of a photograph.
    mask_iou, worst_mask_iou: mean and lowest IoU of the masks that an app would choose, at the picture's own size.
    predicted_iou: largest absolute difference of the predicted IoUs.
    encoder_seconds, decoder_seconds, pytorch_encoder_seconds, pytorch_decoder_seconds: medians, per picture or prompt.
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
        return self.mask_iou >= least_iou and self.cosine >= least_iou  # False if one is NaN

    def as_json(self) -> dict[str, float]:
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()}


@torch.no_grad()
def compare(sam: Sam, runner: Runner, samples: Sequence[Sample], points: int | None = None) -> ExportCheck:
    """Compare the two from the picture to the mask: each decodes the embedding that it computed itself.

    points: leave out prompts with more points, which the graphs can't take.
    """
    embeddings, cosines, ious, iou_errors = [], [], [], []
    seconds: list[list[float]] = [[], [], [], []]

    def timed(which: int, run: Callable[..., Any], *arguments: Any) -> Any:
        started = perf_counter()
        result = run(*arguments)
        seconds[which].append(perf_counter() - started)
        return result

    for sample in samples:
        expected = timed(2, sam.encode, *in_frame(sample))
        found = torch.from_numpy(timed(0, runner.encode, sample))
        embeddings.append(float((found - expected).abs().max()))
        cosines.append(float(F.cosine_similarity(found.flatten().double(), expected.flatten().double(), dim=0)))
        for prompt in prompts(sam, expected, sample):
            if points is not None and len(prompt.labels) > points:
                continue
            reference = timed(3, sam.decode, expected, prompt.to_prompts(), ALL)
            low_res, iou = timed(1, runner.decode, found.numpy(), prompt)
            best = 1 + int(reference.iou[0, 0, 1:].argmax()) if prompt.ambiguous else 0
            ious.append(_iou(torch.from_numpy(low_res[best]), reference.low_res[0, 0, best], sample))
            iou_errors.append(float(np.abs(iou - reference.iou[0, 0].numpy()).max()))
    agreement = np.max(embeddings), np.min(cosines), np.mean(ious), np.min(ious), np.max(iou_errors)  # NaN stays NaN
    medians = [np.median(times) for times in seconds]
    return ExportCheck(len(samples), len(ious), *map(float, [*agreement, *medians]))


def prompts(sam: Sam, embedding: Tensor, sample: Sample) -> Iterator[Prompt]:
    """Yield two single clicks, a click with a background click, a box, and three clicks with the box's mask."""
    height, width = sample.image.shape[-2:]
    low, middle, high = torch.tensor([[0.25], [0.5], [0.75]]) * torch.tensor([width, height])
    yield Prompt(middle[None], torch.tensor([FOREGROUND]))
    yield Prompt(low[None], torch.tensor([FOREGROUND]))
    yield Prompt(torch.stack([middle, high]), torch.tensor([FOREGROUND, BACKGROUND]))
    box = Prompt(torch.stack([low, high]), torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]))
    yield box
    earlier = sam.decode(embedding, box.to_prompts(), ALL).low_res[0, 0, :1]
    yield Prompt(torch.stack([low, middle, high]), torch.tensor([FOREGROUND, BACKGROUND, FOREGROUND]), earlier)


def _iou(logits: Tensor, reference: Tensor, sample: Sample) -> float:
    """Return the IoU of two low-res masks, upscaled to the picture's own size; 1 if both are empty."""
    height, width = sample.image.shape[-2:]
    a, b = (upscale_masks(x, (height, width), sample.original_size) > 0 for x in (logits, reference))
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0
