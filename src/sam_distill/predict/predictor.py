"""Masks for prompts on one image, with segment-anything's signatures: moving over is changing one import."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sam_distill.images import Size, scale_points, to_frame, upscale_masks
from sam_distill.models.sam import Sam
from sam_distill.prompts.forms import box_prompts, point_prompts
from sam_distill.types import FRAME, MULTI, SINGLE, Prompts


class SamPredictor:
    """Encode an image once with `set_image`, then ask for masks with `predict` as often as needed."""

    def __init__(self, sam_model: Sam) -> None:
        self.model = sam_model.eval()
        self.reset_image()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def reset_image(self) -> None:
        self.is_image_set = False
        self.features: Tensor | None = None  # [1, 256, 64, 64]
        self.original_size: Size | None = None  # (H, W)
        self.input_size: Size | None = None  # (h, w) in the frame

    @torch.no_grad()
    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """image: [H, W, 3] uint8, RGB or BGR as image_format says."""
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be RGB or BGR, not {image_format}")
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image is [H, W, 3] uint8, not {list(image.shape)} {image.dtype}")
        rgb = Image.fromarray(image if image_format == "RGB" else np.ascontiguousarray(image[..., ::-1]))
        frame = to_frame(rgb).to(self.device)
        height, width = frame.shape[-2:]
        padded = F.pad(frame, (0, FRAME - width, 0, FRAME - height)).unsqueeze(0)
        self.features = self.model.encode(padded, torch.tensor([[height, width]], device=self.device))
        self.original_size, self.input_size = (image.shape[0], image.shape[1]), (height, width)
        self.is_image_set = True

    @torch.no_grad()
    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt, which may be several points, a box, a mask, or all of them together.

        point_coords: [N, 2] (x, y); point_labels: [N], 1 foreground, 0 background; box: [4] (x0, y0, x1, y1), all in
        pixels of the image. mask_input: [1, 256, 256] logits of an earlier prediction.
        Returns masks [C, H, W] bool (float32 logits if return_logits), predicted IoUs [C], and low-res logits
        [C, 256, 256], with C = 3 if multimask_output, else 1.
        """
        if self.features is None or self.original_size is None or self.input_size is None:
            raise RuntimeError("set_image(...) comes before predict(...)")
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels belong together: give both or neither")
        prompts = self._prompts(self.original_size, point_coords, point_labels, box, mask_input)
        masks = self.model.decode(self.features, prompts, MULTI if multimask_output else SINGLE)
        low_res, iou = masks.low_res[0, 0], masks.iou[0, 0]
        logits = upscale_masks(low_res, self.input_size, self.original_size)
        result = logits if return_logits else logits > 0
        return result.cpu().numpy(), iou.cpu().numpy(), low_res.cpu().numpy()

    def get_image_embedding(self) -> Tensor:
        """[1, 256, 64, 64]."""
        if self.features is None:
            raise RuntimeError("set_image(...) comes before get_image_embedding()")
        return self.features

    def _prompts(
        self,
        original_size: Size,
        point_coords: np.ndarray | None,
        point_labels: np.ndarray | None,
        box: np.ndarray | None,
        mask_input: np.ndarray | None,
    ) -> Prompts:
        """One image, one prompt. Without any, SAM is asked with a mask alone, or with nothing at all."""
        points = self._coordinates(point_coords if point_coords is not None else np.zeros((0, 2)), original_size)
        given = point_labels if point_labels is not None else np.zeros(0)
        labels = torch.as_tensor(np.asarray(given), dtype=torch.int64, device=self.device).view(1, 1, -1)
        masks = None
        if mask_input is not None:
            masks = torch.as_tensor(mask_input, dtype=torch.float32, device=self.device).view(
                1, 1, 1, *mask_input.shape[-2:]
            )
        if box is not None:
            corners = self._coordinates(np.asarray(box).reshape(2, 2), original_size)
            return box_prompts(corners.flatten(2), points, labels, masks)
        return point_prompts(points, labels, masks) if point_coords is not None else Prompts(points, labels, masks)

    def _coordinates(self, points: np.ndarray, original_size: Size) -> Tensor:
        """[N, 2] in pixels of the image -> [1, 1, N, 2] in the frame."""
        tensor = torch.as_tensor(np.asarray(points), dtype=torch.float64, device=self.device)
        return scale_points(tensor, original_size).float()[None, None]
