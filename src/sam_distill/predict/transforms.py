"""`ResizeLongestSide` for scripts that use segment-anything's: resize images and scale prompts to the frame."""

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sam_distill.images import Size, frame_size, scale_points, to_frame


class ResizeLongestSide:
    """Transform to the frame. Sizes are (H, W) of the original image; points are (x, y), boxes (x0, y0, x1, y1)."""

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resize [H, W, 3] uint8 -> [h, w, 3] uint8, long side 1024."""
        return to_frame(Image.fromarray(image)).permute(1, 2, 0).numpy()

    def apply_coords(self, coords: np.ndarray, original_size: Size) -> np.ndarray:
        """Scale points [..., 2] in pixels of the original -> pixels of the frame, float64."""
        (height, width), (frame_height, frame_width) = original_size, frame_size(original_size)
        return np.asarray(coords, np.float64) * (frame_width / width, frame_height / height)

    def apply_boxes(self, boxes: np.ndarray, original_size: Size) -> np.ndarray:
        """Scale boxes [..., 4] -> [n, 4], float64."""
        return self.apply_coords(np.asarray(boxes).reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def apply_image_torch(self, image: Tensor) -> Tensor:
        """Resize [B, 3, H, W] float -> [B, 3, h, w]; not bit for bit the result of `apply_image`."""
        height, width = image.shape[-2:]
        return F.interpolate(image, frame_size((height, width)), mode="bilinear", antialias=True)

    def apply_coords_torch(self, coords: Tensor, original_size: Size) -> Tensor:
        """Scale points [..., 2] -> float32."""
        return scale_points(coords.float(), original_size)

    def apply_boxes_torch(self, boxes: Tensor, original_size: Size) -> Tensor:
        """Scale boxes [..., 4] -> [n, 4] float32."""
        return self.apply_coords_torch(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)
