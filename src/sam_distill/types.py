"""Values passed between the parts of the package, with the shape, dtype and frame of every tensor.

Legend, used in every docstring of this package:

    B  images in a batch            P  prompts per image (missing ones are labelled ABSENT)
    N  points per prompt            M  masks per prompt: SINGLE, MULTI or ALL
    S  side of the student's input  H, W  height and width of an original image, in its own pixels

    "the frame" is SAM's 1024 x 1024 square: the image, resized so that its long side is 1024, lies in the
    top-left corner; the rest is padding. Prompts and low-res masks live in the frame whatever S is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

FRAME = 1024  # side of the frame, pixels
GRID = 64  # side of an image embedding; one cell is 16 x 16 pixels of the frame
EMBED_DIM = 256  # channels of an image embedding
LOW_RES = 256  # side of the mask decoder's low-res logits
CELL = FRAME // LOW_RES  # side of one low-res cell: 4 pixels of the frame

BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 0, 1, 2, 3  # SAM's point labels
NOT_A_POINT = -1  # SAM's padding token: it takes part in attention, as in the official code
ABSENT = -2  # ours: no token, so that prompts may differ in the number of points, and images in that of prompts

# SAM's mask tokens: token 0 for unambiguous prompts; tokens 1-3 for whole, part and sub-part of ambiguous ones
SINGLE, MULTI, ALL = slice(0, 1), slice(1, 4), slice(0, 4)

T = TypeVar("T")
RunLengths = dict[str, Any]  # a mask as COCO compresses it: {"size": [H, W], "counts": bytes}


@dataclass(frozen=True)
class Prompts:
    """Prompts as labelled points, SAM's own form: a box is its two corners.

    points: [B, P, N, 2] float32, (x, y) in frame pixels.
    labels: [B, P, N] int64, one of the constants above.
    masks:  [B, P, 1, 256, 256] float32 logits of an earlier prediction, or None.
    """

    points: Tensor
    labels: Tensor
    masks: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """Return [B, P] bool: False where an image has fewer prompts than P."""
        return (self.labels != ABSENT).any(-1)

    def __getitem__(self, images: slice) -> "Prompts":
        """Return the prompts of some of the images."""
        return _map_tensors(self, lambda tensor: tensor[images])

    def to(self, device: torch.device | str) -> "Prompts":
        return _map_tensors(self, lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class Masks:
    """Output of the mask decoder.

    low_res: [B, P, M, 256, 256] float32 logits in the frame (one cell = 4 pixels); foreground is > 0 after up-sampling.
    iou:     [B, P, M] float32, the decoder's own estimate of each mask's IoU.
    """

    low_res: Tensor
    iou: Tensor


@dataclass(frozen=True)
class Sample:
    """One decoded image.

    key: unique within its source and stable between runs.
    image: [3, h, w] uint8 RGB, resized to the frame (long side 1024), not padded.
    original_size: (H, W) of the image before that resize, after EXIF rotation.
    epoch: how many times training has passed this image before.
    annotations: [A, 256, 256] bool in the frame, A masks drawn from the image's annotations; the last ones are empty
        if the image has fewer. None unless a strategy or prompts require them.
    teacher_embedding: [256, 64, 64] float32, zero in the padding; None unless the data come with it.
    truth: the image's annotations as COCO run lengths at original size, the ground truth for evaluation.
    json: content of the JSON file beside the image in SA-1B's layout; empty unless it was requested.
    """

    key: str
    image: Tensor
    original_size: tuple[int, int]
    epoch: int = 0
    annotations: Tensor | None = None
    teacher_embedding: Tensor | None = None
    truth: Sequence[RunLengths] = ()
    json: bytes = b""


@dataclass(frozen=True)
class Batch:
    """Input of a strategy's step. Strategies name the optional fields that they require.

    keys: B image keys.
    images: [B, 3, 1024, 1024] uint8 RGB, padded with zeros at the bottom and right.
    sizes: [B, 2] int64, (h, w) of the valid area in frame pixels.
    original_sizes: [B, 2] int64, (H, W).
    epochs: B numbers, see `Sample`. Random draws for an image depend on (seed, key, epoch) alone.
    checksums: B numbers that tell images of the same key apart, without reading pixels back from a GPU.
    annotations: [B, A, 256, 256] bool, see `Sample`.
    teacher_embedding: [B, 256, 64, 64] float32, filled in by a teacher unless the data come with it.
    ask_teacher: returns the teacher's masks, all four tokens, for any prompts on these images: one light decoder call.
    prompts: filled in by a prompt sampler.
    truth: B lists, see `Sample`.
    """

    keys: list[str]
    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    epochs: list[int]
    annotations: Tensor | None = None
    teacher_embedding: Tensor | None = None
    ask_teacher: Callable[[Prompts], Masks] | None = None
    prompts: Prompts | None = None
    truth: Sequence[Sequence[RunLengths]] = ()
    checksums: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return _map_tensors(self, Tensor.pin_memory)


def _map_tensors(values: T, change: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of the dataclass `values` with `change` applied to all its tensors."""
    tensors: dict[str, Any] = {n: change(v) for n, v in vars(values).items() if isinstance(v, Tensor)}
    return replace(values, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True)
class StepOutput:
    """Result of a training step: the loss to minimise (scalar, float32) and named scalars to log with it."""

    loss: Tensor
    logs: dict[str, Any] = field(default_factory=dict)


def upload(values: Tensor | Sequence[float], device: torch.device | str) -> Tensor:
    """Return a CPU tensor, or numbers, as a tensor on `device`.

    `.to(device)` and `torch.tensor(..., device=device)` wait until a GPU has done all queued work; this does not.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def valid_area(sizes: Tensor, side: int) -> Tensor:
    """Return [B, 1, side, side] bool: True for cells with their centre in the valid area of a frame.

    sizes: [B, 2] (h, w). At least one row and one column are True, even if the image is thinner than a cell.
    """
    sizes = sizes.clamp_min(FRAME // side)
    centres = (torch.arange(side, device=sizes.device) + 0.5) * (FRAME / side)
    rows = centres < sizes[:, 0, None]
    columns = centres < sizes[:, 1, None]
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
