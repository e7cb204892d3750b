import numpy as np
import torch
from segment_anything.utils.transforms import ResizeLongestSide as Reference

from sam_distill.predict.transforms import ResizeLongestSide


def test_resize_longest_side_matches_segment_anything() -> None:
    ours, theirs, size = ResizeLongestSide(), Reference(1024), (333, 517)
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(ours.apply_image(image), theirs.apply_image(image))
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(ours.apply_image_torch(batch), theirs.apply_image_torch(batch))
    points, boxes = random.uniform(0, 300, (5, 2)), random.uniform(0, 300, (5, 4))
    np.testing.assert_array_equal(ours.apply_coords(points, size), theirs.apply_coords(points, size))
    np.testing.assert_array_equal(ours.apply_boxes(boxes, size), theirs.apply_boxes(boxes, size))
    for name, value in (("apply_coords_torch", points), ("apply_boxes_torch", boxes)):
        tensor = torch.from_numpy(value)
        torch.testing.assert_close(getattr(ours, name)(tensor, size), getattr(theirs, name)(tensor, size))
