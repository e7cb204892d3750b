"""Segment everything in an image, with segment-anything's signature and results.

Each point of a grid prompts three masks; those with a high predicted IoU and a high stability score that no better
mask overlaps are kept. The results are segment-anything's, the computation is cheaper: masks with a low predicted IoU
are not up-sampled, stability and boxes are computed only where a mask is, and only the masks kept become runs.
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
from sam_distill.predict.full_size import Patch, PatchUpsampler, box_of
from sam_distill.predict.predictor import ImageLike, SamPredictor, to_pil
from sam_distill.predict.regions import remove_small_regions
from sam_distill.predict.run_lengths import Runs, runs_of
from sam_distill.predict.similar_points import SimilarPoints
from sam_distill.prompts.forms import point_prompts
from sam_distill.types import MULTI

T = TypeVar("T")


@dataclass(frozen=True)
class FoundMask:
    """Mask found in a crop of an image. box: of its pixels; point: its prompt; all in pixels of the image."""

    upsampler: PatchUpsampler
    patch: Patch
    box: Box
    iou: float
    stability: float
    point: tuple[float, float]


@dataclass(eq=False, repr=False)
class SamAutomaticMaskGenerator:
    """Generator of masks for everything in an image.

    points_per_side: points per side of the grid; or instead point_grids: [n, 2] (x, y) in 0..1 for each layer of crops.
    points_per_batch: number of points decoded at a time.
    pred_iou_thresh: drop masks whose predicted IoU is not above this.
    stability_score_thresh: drop masks that change too much when the cutoff moves by +-stability_score_offset: the
        score is the IoU of the masks at the two cutoffs.
    box_nms_thresh, crop_nms_thresh: of two masks whose boxes have a higher IoU than this, drop the one with the lower
        predicted IoU (within a crop), or the one from the larger crop (between crops).
    crop_n_layers: also segment 2^i x 2^i crops for i = 1 .. crop_n_layers, which finds small objects. They overlap by
        crop_overlap_ratio; each layer has crop_n_points_downscale_factor times fewer points per side, at least one.
    min_mask_region_area: fill holes and remove islands of fewer pixels.
    output_mode: format of `segmentation`: binary_mask ([H, W] bool), uncompressed_rle or coco_rle, which is small.
    fast: prompt every fourth row and column first, then the points between; skip points whose image embedding is like
        an earlier point's and that lie in that point's smallest good mask (if any): they would get the same masks.
        (TinySAM skips all points in a confident mask, and so misses objects inside it.) Not in segment-anything.
    """

    model: Sam
    points_per_side: Annotated[int, Field(ge=1)] | None = 32
    points_per_batch: Annotated[int, Field(ge=1)] = 64
    pred_iou_thresh: Annotated[float, Field(le=1)] = 0.88
    stability_score_thresh: Annotated[float, Field(le=1)] = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: Annotated[float, Field(ge=0)] = 0.7
    crop_n_layers: Annotated[int, Field(ge=0)] = 0
    crop_nms_thresh: Annotated[float, Field(ge=0)] = 0.7
    crop_overlap_ratio: Annotated[float, Field(ge=0, lt=1)] = 512 / 1500
    crop_n_points_downscale_factor: Annotated[int, Field(ge=1)] = 1
    point_grids: list[np.ndarray] | None = None
    min_mask_region_area: int = 0
    output_mode: Literal["binary_mask", "uncompressed_rle", "coco_rle"] = "binary_mask"
    fast: bool = False

    def __post_init__(self) -> None:
        if self.output_mode not in ("binary_mask", "uncompressed_rle", "coco_rle"):
            raise ValueError(f"output_mode must be binary_mask, uncompressed_rle or coco_rle, not {self.output_mode}")
        limits = {"points_per_side": 1, "points_per_batch": 1, "crop_n_layers": 0, "crop_n_points_downscale_factor": 1}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {least} at least, not {value}")
        if not 0 <= self.crop_overlap_ratio < 1:
            raise ValueError(f"crop_overlap_ratio is a share, from 0 to below 1, not {self.crop_overlap_ratio}")
        if self.points_per_side is not None and self.point_grids is None:
            shrinking = [self.crop_n_points_downscale_factor**layer for layer in range(self.crop_n_layers + 1)]
            self.point_grids = [point_grid(max(1, int(self.points_per_side / times))) for times in shrinking]
        elif self.points_per_side is None and self.point_grids is not None:
            self.point_grids = checked_grids(self.point_grids, self.crop_n_layers)
        else:
            raise ValueError("give points_per_side or point_grids, and None for the other")
        self.predictor = SamPredictor(self.model)

    @torch.no_grad()
    def generate(self, image: ImageLike) -> list[dict[str, Any]]:
        """Return a record for each mask in an image (see `SamPredictor`), those with the highest predicted IoU first.

        With several crops, masks of small crops come first; with min_mask_region_area, masks that it left unchanged.
        segmentation: see `output_mode`; area: in pixels; bbox: [x, y, width, height]; predicted_iou, stability_score;
        point_coords: [[x, y]] of its prompt; crop_box: [x, y, width, height] of the crop where it was found.
        """
        assert self.point_grids is not None
        image = to_pil(image)
        crops = crop_boxes((image.height, image.width), self.crop_n_layers, self.crop_overlap_ratio)
        found = [mask for layer, crop in crops for mask in self._masks_in_crop(image, crop, self.point_grids[layer])]
        self.predictor.reset_image()
        if len(crops) > 1:
            sizes = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (mask.upsampler.crop for mask in found)]
            found = _nms(found, [mask.box for mask in found], [1 / size for size in sizes], self.crop_nms_thresh)
        with torch.autocast(self.predictor.device.type, enabled=False):
            masks = [(mask, mask.upsampler.runs(mask.patch)) for mask in found]
        if self.min_mask_region_area > 0:
            masks = self._without_small_regions(masks)
        return [self._record(mask, runs) for mask, runs in masks]

    def _masks_in_crop(self, image: Image.Image, crop: Box, grid: np.ndarray) -> list[FoundMask]:
        """Return the masks of one crop."""
        size = image.height, image.width
        predictor = self.predictor
        predictor.set_image(image.crop(crop))
        upsampler = PatchUpsampler(predictor.input_size, crop, size, predictor.device)
        points = grid * predictor.original_size[::-1]
        framed = predictor.transform.apply_coords(points, predictor.original_size)
        similar = SimilarPoints(predictor.get_image_embedding(), framed) if self.fast else None
        to_ask = coarse_to_fine(grid) if self.fast else np.arange(len(grid))
        found: list[FoundMask] = []
        while len(to_ask):
            asked, to_ask = to_ask[: self.points_per_batch], to_ask[self.points_per_batch :]
            for point, masks in zip(asked, self._masks_at_points(points[asked], framed[asked], upsampler), strict=True):
                found += masks
                if similar is not None:
                    to_ask = to_ask[~similar.redundant_points(point, [mask.patch for mask in masks])[to_ask]]
        return _nms(found, [mask.box for mask in found], [mask.iou for mask in found], self.box_nms_thresh)

    def _masks_at_points(
        self, points: np.ndarray, framed: np.ndarray, upsampler: PatchUpsampler
    ) -> list[list[FoundMask]]:
        """Return the good ones of the three masks of each point. points: [n, 2] in the crop; framed: in the frame."""
        predictor, least = self.predictor, self.pred_iou_thresh if self.pred_iou_thresh > 0 else None
        prompts = point_prompts(torch.from_numpy(framed.astype(np.float32))[None, :, None].to(predictor.device))
        masks = predictor.model.decode(predictor.get_image_embedding(), prompts, MULTI, least)
        trusted = masks.iou[0] > (-torch.inf if least is None else least)
        indices, ious = trusted.nonzero()[:, 0].tolist(), masks.iou[0][trusted].tolist()
        with torch.autocast(predictor.device.type, enabled=False):
            patches = upsampler.patches(masks.low_res[0][trusted], min(0.0, -self.stability_score_offset))
            measured = [upsampler.measure(patch, self.stability_score_offset) for patch in patches]
        corner = np.array(upsampler.crop[:2])
        good: list[list[FoundMask]] = [[] for _ in points]
        for index, iou, patch, (stability, box) in zip(indices, ious, patches, measured, strict=True):
            x0, y0, x1, y1 = (int(side) for side in box + np.tile(corner, 2))
            unstable = self.stability_score_thresh > 0 and not stability >= self.stability_score_thresh
            if not unstable and not is_cut_off((x0, y0, x1, y1), upsampler.crop, upsampler.image_size):
                x, y = (points[index] + corner).tolist()
                good[index].append(FoundMask(upsampler, patch, (x0, y0, x1, y1), iou, stability, (x, y)))
        return good

    def _without_small_regions(self, masks: Sequence[tuple[FoundMask, Runs]]) -> list[tuple[FoundMask, Runs]]:
        """Remove small regions, then masks that have become duplicates; masks that did not change are preferred."""
        mended, unchanged = [], []
        for mask, runs in masks:
            before = runs.mask()
            after: np.ndarray = remove_small_regions(before, self.min_mask_region_area)
            if changed := bool((before != after).any()):
                runs = runs_of([(0, after.T)], 0, runs.size)
                mask = replace(mask, box=box_of(np.asarray(after.any(0)), np.asarray(after.any(1))))
            mended.append((mask, runs))
            unchanged.append(float(not changed))
        boxes, threshold = [mask.box for mask, _ in mended], max(self.box_nms_thresh, self.crop_nms_thresh)
        return _nms(mended, boxes, unchanged, threshold)

    def _record(self, mask: FoundMask, runs: Runs) -> dict[str, Any]:
        draw = {"binary_mask": runs.mask, "uncompressed_rle": runs.uncompressed, "coco_rle": runs.compressed}
        return {
            "segmentation": draw[self.output_mode](),
            "area": runs.area,
            "bbox": _xywh(mask.box),
            "predicted_iou": mask.iou,
            "point_coords": [list(mask.point)],
            "stability_score": mask.stability,
            "crop_box": _xywh(mask.upsampler.crop),
        }


def _nms(masks: Sequence[T], boxes: Sequence[Box], scores: Sequence[float], threshold: float) -> list[T]:
    """Return the masks, best first, without those whose box has an IoU above the threshold with a better one's."""
    if not masks:
        return []
    chosen = nms(torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores), threshold)
    return [masks[index] for index in chosen.tolist()]


def _xywh(box: Box) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
