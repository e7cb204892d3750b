"""The two graphs of format=onnx: segment-anything's own layout, for images and prompts of any size and number.

The decoder's tensors are named as in segment-anything's export, so that code written for that export can run it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_distill.export.contract import (
    COORDINATES,
    EMBEDDING,
    HAS_MASK_INPUT,
    LABELS,
    MASK_INPUT,
    MASK_ORDER,
    TensorSpec,
)
from sam_distill.export.graphs import Encoder, dense_prompt
from sam_distill.models.sam import Sam
from sam_distill.types import ALL, BOX_BOTTOM_RIGHT, FRAME, LOW_RES, NOT_A_POINT, Prompts

PICTURE = "RGB, 0 to 255, resized so that the long side is 1024, not padded"
ENDING = "points without a box end with a point (0, 0) labelled -1"


class FailIf(nn.Module):
    """Layer that makes the runtime fail if the graph's input is wrong, and otherwise returns a tensor unchanged."""

    nothing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor, wrong: Tensor) -> Tensor:
        """Return x, or fail if `wrong` (bool) is true: index 1 is out of range, a graph's only way to raise errors."""
        return x + self.nothing.index_select(0, wrong.long().reshape(1))


class AnySizeEncoder(nn.Module):
    """Image encoder with all preprocessing but the resize to the frame: fails if the image's long side is not 1024."""

    reduce: Tensor

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.refuse = FailIf()
        self.encoder = Encoder(sam, "outside")
        # The reduction to S is a matrix product, because runtimes differ in how they resize with antialiasing.
        unit = torch.eye(FRAME).view(1, 1, FRAME, FRAME)
        rows = F.interpolate(unit, size=(sam.image_size, FRAME), mode="bilinear", antialias=True)
        self.register_buffer("reduce", rows[0], persistent=False)  # [1, S, 1024], not quantised by int8
        self.inputs = [TensorSpec("image", ("height", "width", 3), PICTURE, "uint8", (FRAME // 2, FRAME - 1, 3))]
        self.outputs = [EMBEDDING]

    def forward(self, image: Tensor) -> Tensor:
        """image [h, w, 3] uint8 RGB, resized to the frame (long side 1024) -> image_embeddings [1, 256, 64, 64]."""
        height, width = image.shape[:2]
        longest = torch.maximum(torch.full((), height), torch.full((), width))
        x = self.refuse(image.float().permute(2, 0, 1).unsqueeze(0), longest != FRAME)
        x = F.pad((x - self.encoder.mean) / self.encoder.std, (0, FRAME - width, 0, FRAME - height))
        x = x.reshape(1, 3, FRAME, FRAME)
        if self.reduce.shape[1] != FRAME:
            x = self.reduce @ x @ self.reduce.mT
        return self.encoder(x)


class UpscalingDecoder(nn.Module):
    """Prompt encoder and mask decoder, whose masks are up-sampled to the size of the original image.

    It fails if a label is not one of SAM's.
    """

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.refuse = FailIf()
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.inputs = [
            EMBEDDING,
            TensorSpec("point_coords", ("prompts", "points", 2), COORDINATES, example=(2, 3, 2)),
            TensorSpec("point_labels", ("prompts", "points"), f"{LABELS}; {ENDING}", example=(2, 3)),
            MASK_INPUT,
            HAS_MASK_INPUT,
            TensorSpec("orig_im_size", (2,), "height and width of the picture before it was resized"),
        ]
        self.outputs = [
            TensorSpec("masks", ("prompts", 4, "H", "W"), f"logits; a mask is where they are above 0; {MASK_ORDER}"),
            TensorSpec("iou_predictions", ("prompts", 4), "the model's own estimate of each mask's IoU, about 0 to 1"),
            TensorSpec("low_res_masks", ("prompts", 4, LOW_RES, LOW_RES), "logits, before they were up-sampled"),
        ]

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode P prompts of N >= 1 points each on one image; all tensors are float32.

        image_embeddings: [1, 256, 64, 64].
        point_coords: [P, N, 2], (x, y) in frame pixels; point_labels: [P, N], SAM's labels -1 to 3, see `types`.
        mask_input: [1, 1, 256, 256] logits of an earlier prediction, for all prompts; has_mask_input: [1], 1 or 0.
        orig_im_size: [2], (H, W).
        Return masks [P, 4, H, W] (logits; a mask is where they are > 0), iou_predictions [P, 4] and
        low_res_masks [P, 4, 256, 256]. Mask 0 is for unambiguous prompts, 1 to 3 for ambiguous ones.
        """
        unknown = (
            (point_labels < NOT_A_POINT) | (point_labels > BOX_BOTTOM_RIGHT) | (point_labels != point_labels.round())
        )
        labels = self.refuse(point_labels, unknown.any())
        tokens, _ = self.prompt_encoder(Prompts(point_coords.unsqueeze(0), labels.unsqueeze(0)))
        dense = dense_prompt(self.prompt_encoder, mask_input, has_mask_input)
        image_pe = self.prompt_encoder.dense_positions()
        masks = self.mask_decoder(image_embeddings, image_pe, tokens, dense, None, ALL)  # no point is absent
        return _upscale(masks.low_res[0], orig_im_size), masks.iou[0], masks.low_res[0]


def _upscale(low_res: Tensor, original_size: Tensor) -> Tensor:
    """Do the same as `images.upscale_masks`, with sizes as tensors: [P, 4, 256, 256], [2] (H, W) -> [P, 4, H, W]."""
    exact = original_size.double()  # same float64 arithmetic as `images.frame_size`
    framed = (FRAME / exact.max() * exact + 0.5).long().clamp(min=1)
    (h, w), (height, width) = framed.tolist(), original_size.long().tolist()
    for side in (h, w, height, width):  # bounds for the exporter, which can't see values
        torch._check(side >= 1)
    for side in (h, w):
        torch._check(side <= FRAME)
    masks = F.interpolate(low_res, size=(FRAME, FRAME), mode="bilinear")
    return F.interpolate(masks[..., :h, :w], size=(height, width), mode="bilinear")
