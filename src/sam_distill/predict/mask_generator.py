"""Segment everything, with segment-anything's signature and results: a mask for each thing in an image.

A grid of points is asked for three masks each; what the decoder trusts, what is stable, and what no better mask
overlaps is kept. The results are segment-anything's; the work is not. Masks that the decoder does not trust are not
even drawn, stability and boxes are computed where a mask is and nowhere else, and only the masks kept become runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torchvision.ops import nms

from sam_distill.models.sam import Sam
from sam_distill.predict.crops import Box, checked_grids, coarse_to_fine, crop_boxes, is_cut_off, point_grid
from sam_distill.predict.full_size import FullSize, Patch, box_of
from sam_distill.predict.predictor import ImageLike, SamPredictor, to_pil
from sam_distill.predict.regions import without_small_regions
from sam_distill.predict.run_lengths import Runs, runs_of
from sam_distill.predict.similar_points import SimilarPoints
from sam_distill.prompts.forms import point_prompts
from sam_distill.types import MULTI

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A mask. box: of its pixels, in the image; point: that it was asked with, in the image; crop: where that was."""

    canvas: FullSize
    patch: Patch
    box: Box
    iou: float
    stability: float
    point: tuple[float, float]

    @property
    def crop(self) -> Box:
        return self.canvas.crop


class SamAutomaticMaskGenerator:
    """Masks for a whole image.

    points_per_side: of the grid of points, or point_grids: for each layer of crops [n, 2] (x, y) in 0..1.
    points_per_batch: points to decode at a time.
    pred_iou_thresh: masks whose predicted IoU is not above it are dropped.
    stability_score_thresh: masks are dropped that change too much when the cutoff moves by +-stability_score_offset:
        the score is the IoU between the two.
    box_nms_thresh, crop_nms_thresh: of two masks whose boxes have a higher IoU the worse one is dropped, within a crop
        and between crops, where the smaller crop is the better one.
    crop_n_layers: also look at 2^i x 2^i crops for i = 1 .. crop_n_layers, which finds small things. They overlap by
        crop_overlap_ratio; each layer has crop_n_points_downscale_factor times fewer points per side,
        but one at least.
    min_mask_region_area: fill holes and remove islands of fewer pixels.
    output_mode: of a record's `segmentation`: binary_mask ([H, W] bool), uncompressed_rle or coco_rle, which is small.
    fast: ask every fourth row and column first, then between them, and leave out points whose image embedding is like
        that of a point before them and that lie in its smallest good mask, if it has any: they get what that one got.
        (TinySAM leaves out all that lie in a confident mask, and so loses what is within it.) Not segment-anything's.
    """

    def __init__(
        self,
        model: Sam,
        points_per_side: Annotated[int, Field(ge=1)] | None = 32,
        points_per_batch: Annotated[int, Field(ge=1)] = 64,
        pred_iou_thresh: Annotated[float, Field(le=1)] = 0.88,
        stability_score_thresh: Annotated[float, Field(le=1)] = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: Annotated[float, Field(ge=0)] = 0.7,
        crop_n_layers: Annotated[int, Field(ge=0)] = 0,
        crop_nms_thresh: Annotated[float, Field(ge=0)] = 0.7,
        crop_overlap_ratio: Annotated[float, Field(ge=0, lt=1)] = 512 / 1500,
        crop_n_points_downscale_factor: Annotated[int, Field(ge=1)] = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: Literal["binary_mask", "uncompressed_rle", "coco_rle"] = "binary_mask",
        fast: bool = False,
    ) -> None:
        if output_mode not in ("binary_mask", "uncompressed_rle", "coco_rle"):
            raise ValueError(f"output_mode must be binary_mask, uncompressed_rle or coco_rle, not {output_mode}")
        for name, value, least in (
            ("points_per_side", points_per_side, 1),
            ("points_per_batch", points_per_batch, 1),
            ("crop_n_layers", crop_n_layers, 0),
            ("crop_n_points_downscale_factor", crop_n_points_downscale_factor, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {least} at least, not {value}")
        if not 0 <= crop_overlap_ratio < 1:
            raise ValueError(f"crop_overlap_ratio is a share, from 0 to below 1, not {crop_overlap_ratio}")
        if points_per_side is not None and point_grids is None:
            sides = [max(1, int(points_per_side / crop_n_points_downscale_factor**i)) for i in range(crop_n_layers + 1)]
            self.point_grids = [point_grid(side) for side in sides]
        elif points_per_side is None and point_grids is not None:
            self.point_grids = checked_grids(point_grids, crop_n_layers)
        else:
            raise ValueError("give points_per_side or point_grids, and None for the other")
        self.predictor = SamPredictor(model)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self.fast = fast

    @torch.no_grad()
    def generate(self, image: ImageLike) -> list[dict[str, Any]]:
        """image: as for `SamPredictor`. A record for each mask, the most trusted first:

        segmentation: see `output_mode`; area: in pixels; bbox: [x, y, width, height]; predicted_iou, stability_score;
        point_coords: [[x, y]] that it was asked with; crop_box: [x, y, width, height] where that was.
        """
        image = to_pil(image)
        crops = crop_boxes((image.height, image.width), self.crop_n_layers, self.crop_overlap_ratio)
        found = [mask for layer, crop in crops for mask in self._look(image, crop, self.point_grids[layer])]
        self.predictor.reset_image()
        if len(crops) > 1:
            sizes = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (mask.crop for mask in found)]
            found = _distinct(found, [mask.box for mask in found], [1 / size for size in sizes], self.crop_nms_thresh)
        with torch.autocast(self.predictor.device.type, enabled=False):
            masks = [(mask, mask.canvas.runs(mask.patch)) for mask in found]
        if self.min_mask_region_area > 0:
            masks = self._without_small_regions(masks)
        return [self._record(mask, runs) for mask, runs in masks]

    def _look(self, image: Image.Image, crop: Box, grid: np.ndarray) -> list[Found]:
        """The masks of one crop."""
        size = image.height, image.width
        predictor = self.predictor
        predictor.set_image(image.crop(crop))
        canvas = FullSize(predictor.input_size, crop, size, predictor.device)
        points = grid * predictor.original_size[::-1]
        framed = predictor.transform.apply_coords(points, predictor.original_size)
        similar = SimilarPoints(predictor.get_image_embedding(), framed) if self.fast else None
        to_ask = coarse_to_fine(grid) if self.fast else np.arange(len(grid))
        found: list[Found] = []
        while len(to_ask):
            asked, to_ask = to_ask[: self.points_per_batch], to_ask[self.points_per_batch :]
            for point, masks in zip(asked, self._ask(points[asked], framed[asked], canvas), strict=True):
                found += masks
                if similar is not None:
                    to_ask = to_ask[~similar.answered_alike(point, [mask.patch for mask in masks])[to_ask]]
        return _distinct(found, [mask.box for mask in found], [mask.iou for mask in found], self.box_nms_thresh)

    def _ask(self, points: np.ndarray, framed: np.ndarray, canvas: FullSize) -> list[list[Found]]:
        """For each point, [n, 2] in the crop and in the frame, those of its three masks that are good."""
        predictor, least = self.predictor, self.pred_iou_thresh if self.pred_iou_thresh > 0 else None
        prompts = point_prompts(torch.from_numpy(framed.astype(np.float32))[None, :, None].to(predictor.device))
        masks = predictor.model.decode(predictor.get_image_embedding(), prompts, MULTI, least)
        trusted = masks.iou[0] > (-torch.inf if least is None else least)
        indices, ious = trusted.nonzero()[:, 0].tolist(), masks.iou[0][trusted].tolist()
        with torch.autocast(predictor.device.type, enabled=False):
            patches = canvas.patches(masks.low_res[0][trusted], min(0.0, -self.stability_score_offset))
            measured = [canvas.measure(patch, self.stability_score_offset) for patch in patches]
        corner = np.array(canvas.crop[:2])
        good: list[list[Found]] = [[] for _ in points]
        for index, iou, patch, (stability, box) in zip(indices, ious, patches, measured, strict=True):
            x0, y0, x1, y1 = (int(side) for side in box + np.tile(corner, 2))
            unstable = self.stability_score_thresh > 0 and not stability >= self.stability_score_thresh
            if not unstable and not is_cut_off((x0, y0, x1, y1), canvas.crop, canvas.image_size):
                x, y = (points[index] + corner).tolist()
                good[index].append(Found(canvas, patch, (x0, y0, x1, y1), iou, stability, (x, y)))
        return good

    def _without_small_regions(self, masks: Sequence[tuple[Found, Runs]]) -> list[tuple[Found, Runs]]:
        """Without small regions, and without what is now a duplicate; masks that needed no mending are preferred."""
        mended, unchanged = [], []
        for mask, runs in masks:
            before = runs.mask()
            after: np.ndarray = without_small_regions(before, self.min_mask_region_area)
            if changed := bool((before != after).any()):
                runs = runs_of([(0, after.T)], 0, runs.size)
                mask = replace(mask, box=box_of(np.asarray(after.any(0)), np.asarray(after.any(1))))
            mended.append((mask, runs))
            unchanged.append(float(not changed))
        boxes, threshold = [mask.box for mask, _ in mended], max(self.box_nms_thresh, self.crop_nms_thresh)
        return _distinct(mended, boxes, unchanged, threshold)

    def _record(self, mask: Found, runs: Runs) -> dict[str, Any]:
        draw = {"binary_mask": runs.mask, "uncompressed_rle": runs.uncompressed, "coco_rle": runs.compressed}
        return {
            "segmentation": draw[self.output_mode](),
            "area": runs.area,
            "bbox": _xywh(mask.box),
            "predicted_iou": mask.iou,
            "point_coords": [list(mask.point)],
            "stability_score": mask.stability,
            "crop_box": _xywh(mask.crop),
        }


def _distinct(masks: Sequence[T], boxes: Sequence[Box], scores: Sequence[float], threshold: float) -> list[T]:
    """The masks that no better one overlaps by its box, best first."""
    if not masks:
        return []
    chosen = nms(torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores), threshold)
    return [masks[index] for index in chosen.tolist()]


def _xywh(box: Box) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
