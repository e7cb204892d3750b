"""Predict masks for prompts on images, with segment-anything's signatures: to switch, change one import."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sam_distill.images import Size, decode, to_frame, to_rgb, upscale_masks
from sam_distill.models.sam import Sam
from sam_distill.predict.checks import check_one, check_several, check_transformed, check_values
from sam_distill.predict.transforms import ResizeLongestSide
from sam_distill.prompts.forms import box_prompts, point_prompts
from sam_distill.types import FRAME, LOW_RES, MULTI, SINGLE, Prompts

ImageLike = np.ndarray | Tensor | Image.Image | str | Path
Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]
_PROMPT = ("point_coords", "point_labels", "box", "mask_input")


class SamPredictor:
    """Predictor that encodes an image once with `set_image`, then returns masks for any number of `predict` calls.

    An image is [H, W, 3] uint8 (numpy), [3, H, W] uint8 (torch), a Pillow image or a file's path; arrays may also be
    gray ([H, W] or one channel) or have a fourth channel, alpha. All are treated as if read from an image file.
    Everything runs on the model's device, in fp32, or in bf16 within `torch.autocast`.
    """

    def __init__(self, sam_model: Sam) -> None:
        if not isinstance(sam_model, Sam):
            raise TypeError(f"a model of sam_distill is expected, such as load_sam({str(sam_model)[:60]!r})")
        self.model = sam_model.eval()
        self.transform = ResizeLongestSide()
        self.reset_image()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def reset_image(self) -> None:
        self.features: Tensor | None = None  # [B, 256, 64, 64]
        self.original_sizes: list[Size] = []  # (H, W) of each image
        self.input_sizes: list[Size] = []  # (h, w) of each image in the frame

    @property
    def is_image_set(self) -> bool:
        return self.features is not None

    @property
    def original_size(self) -> Size:
        """Return (H, W) of the one image that is set."""
        return self.original_sizes[self._single_index("original_size")]

    @property
    def input_size(self) -> Size:
        """Return (h, w) of the one image in the frame."""
        return self.input_sizes[self._single_index("input_size")]

    def set_image(self, image: ImageLike, image_format: str = "RGB") -> None:
        """Encode an image. image_format: RGB or BGR, the channel order of an array or tensor."""
        self.set_images([image], image_format)

    def set_images(self, images: Sequence[ImageLike], image_format: str = "RGB") -> None:
        """Encode several images of any sizes together, for `predict_batch`."""
        self.reset_image()  # if encoding fails, no earlier image may be used instead
        if isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", 4) < 4:
            raise TypeError("set_images takes several images, such as [image, other]; set_image takes one")
        pictures = [to_pil(image, image_format) for image in images]
        if not pictures:
            raise ValueError("no image: give one at least")
        self._encode([to_frame(p).to(self.device) for p in pictures], [(p.height, p.width) for p in pictures])

    def set_torch_image(self, transformed_image: Tensor, original_image_size: Size) -> None:
        """Encode an image [1, 3, h, w], RGB in 0..255, resized by `transform` so that its long side is 1024."""
        self.reset_image()
        height, width = original_image_size
        check_transformed(transformed_image, (height, width))
        self._encode([transformed_image[0].to(self.device)], [(height, width)])

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Prediction:
        """Return masks, predicted IoUs and logits for one prompt: one or more points, a box, a mask, or all together.

        Raise ValueError for an invalid prompt, such as NaN or two boxes; warn of a prompt outside the image.

        point_coords: [N, 2] (x, y); point_labels: [N], 1 foreground, 0 background; box: [4] (x0, y0, x1, y1), all in
        pixels of the image. mask_input: [1, 256, 256] logits of an earlier prediction.
        The masks are [C, H, W] bool (float32 logits if return_logits), the predicted IoUs [C], the low-res logits
        [C, 256, 256], with C = 3 if multimask_output, else 1.
        """
        self._single_index("predict")
        prompt = zip(_PROMPT, (point_coords, point_labels, box, mask_input), strict=True)
        return self.predict_batch([dict(prompt)], multimask_output, return_logits)[0]

    def predict_best(
        self, points: Sequence[Sequence[float]], labels: Sequence[int], box: Sequence[float] | None
    ) -> tuple[np.ndarray, float]:
        """Return the best mask for some points (perhaps none) or a box, [H, W] bool, and its predicted IoU.

        SAM's advice: a single point is ambiguous, so predict three masks and take the best; otherwise predict one.
        """
        masks, iou, _ = self.predict(
            np.array(points) if points else None,
            np.array(labels) if points else None,
            None if box is None else np.array(box),
            multimask_output=box is None and len(points) == 1,
        )
        return masks[iou.argmax()], float(iou.max())

    def predict_batch(
        self, prompts: Sequence[Mapping[str, Any]], multimask_output: bool = True, return_logits: bool = False
    ) -> list[Prediction]:
        """Return what `predict` returns, for each image of `set_images`. prompts: arguments of `predict`, one set each.

        For example [{"box": box}, {"point_coords": points, "point_labels": labels}].
        """
        if len(prompts) != len(self.original_sizes):
            raise ValueError(f"{len(prompts)} prompts for {len(self.original_sizes)} images: give one for each")
        options = {"multimask_output": multimask_output, "return_logits": return_logits}
        known = {*_PROMPT, *options}
        if unknown := {name for prompt in prompts for name in prompt} - known:
            raise ValueError(f"a prompt has no {', '.join(sorted(unknown))}; it may have {', '.join(sorted(known))}")
        return [self._predict_one(index, {**options, **prompt}) for index, prompt in enumerate(prompts)]

    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return masks, predicted IoUs and logits for P prompts at once, in pixels of the frame (see `transform`).

        point_coords: [P, N, 2]; point_labels: [P, N]; boxes: [P, 4]; mask_input: [P, 1, 256, 256].
        The masks are [P, C, H, W], the predicted IoUs [P, C], the low-res logits [P, C, 256, 256]; see `predict`.
        """
        check_several(point_coords, point_labels, boxes, mask_input)
        index = self._single_index("predict_torch")
        return self._decode(index, (point_coords, point_labels, boxes, mask_input), multimask_output, return_logits)

    def get_image_embedding(self) -> Tensor:
        """Return the image embedding, [1, 256, 64, 64]; [B, 256, 64, 64] for several images."""
        return self._require_features("get_image_embedding")

    @torch.no_grad()
    def _encode(self, frames: Sequence[Tensor], original_sizes: list[Size]) -> None:
        """Encode images and keep their sizes. frames: [3, h, w] in 0..255 for each image."""
        if any(parameter.dtype != torch.float32 for parameter in self.model.parameters()):
            raise TypeError("the weights are no longer float32: .float() mends it; torch.autocast computes in bf16")
        sizes = [(frame.shape[1], frame.shape[2]) for frame in frames]
        padded = [F.pad(frame, (0, FRAME - frame.shape[2], 0, FRAME - frame.shape[1])) for frame in frames]
        self.features = self.model.encode(torch.stack(padded), torch.tensor(sizes, device=self.device))
        self.original_sizes, self.input_sizes = original_sizes, sizes

    def _predict_one(self, index: int, arguments: Mapping[str, Any]) -> Prediction:
        """Return the result of `predict` for one of the images. arguments: those of `predict`."""
        point_coords, point_labels, box, mask_input = (arguments.get(name) for name in _PROMPT)
        check_one(point_coords, point_labels, box, mask_input)
        size = self.original_sizes[index]
        points = None if point_coords is None else self.transform.apply_coords(point_coords, size)[None]
        labels = None if point_labels is None else np.asarray(point_labels)[None]
        boxes = None if box is None else self.transform.apply_boxes(box, size)
        masks = None if mask_input is None else np.asarray(mask_input).reshape(1, 1, LOW_RES, LOW_RES)
        given = [
            None if part is None else torch.from_numpy(part.astype(np.float32))
            for part in (points, labels, boxes, masks)
        ]
        answer = self._decode(index, given, arguments["multimask_output"], arguments["return_logits"])
        found, iou, low_res = (tensor[0].cpu().numpy() for tensor in answer)
        return found, iou, low_res

    @torch.no_grad()
    def _decode(
        self, index: int, given: Sequence[Tensor | None], multimask_output: bool, return_logits: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result of `predict_torch` for one of the images. given: its points, labels, boxes and masks."""
        points, labels, boxes, masks = (None if part is None else part.to(self.device) for part in given)
        check_values(points, labels, boxes, masks, self.input_sizes[index])
        prompts = _prompts(points, labels, boxes, masks)
        embedding = self._require_features("predict")[index : index + 1]
        sizes = self.input_sizes[index], self.original_sizes[index]
        if not prompts.labels.shape[1]:  # no prompts, such as the boxes of a detector that found nothing
            low_res = embedding.new_zeros(0, 3 if multimask_output else 1, LOW_RES, LOW_RES)
            no_masks = torch.zeros(*low_res.shape[:2], *sizes[1], device=self.device)
            return no_masks if return_logits else no_masks.bool(), low_res[:, :, 0, 0], low_res
        found = self.model.decode(embedding, prompts.to(self.device), MULTI if multimask_output else SINGLE)
        low_res, iou = found.low_res[0], found.iou[0]
        logits = (upscale_masks(each, *sizes) for each in low_res)  # one prompt at a time: full-size logits are large
        return torch.stack([each if return_logits else each > 0 for each in logits]), iou, low_res

    def _require_features(self, caller: str) -> Tensor:
        if self.features is None:
            raise RuntimeError(f"set_image(...) comes before {caller}(...)")
        return self.features

    def _single_index(self, caller: str) -> int:
        """Return the index of the one image that is set; raise RuntimeError if none or several are."""
        if len(self._require_features(caller)) != 1:
            raise RuntimeError(f"{caller} is for one image, but {len(self.original_sizes)} are set: use predict_batch")
        return 0


def to_pil(image: ImageLike, image_format: str = "RGB") -> Image.Image:
    """Return any kind of image that `SamPredictor` takes as a Pillow image in RGB."""
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"image_format must be RGB or BGR, not {image_format}")
    if isinstance(image, str | Path):
        return decode(Path(image).expanduser(), full=True)[0]
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"an image has pixels, but this one is {image.width} x {image.height}")
        return to_rgb(image)
    if not isinstance(image, np.ndarray | Tensor):
        raise TypeError(f"an image is an array, a tensor, a Pillow image or a path, not a {type(image).__name__}")
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if isinstance(image, Tensor) and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.dtype != np.uint8 or not array.size:
        kind = "[3, H, W]" if isinstance(image, Tensor) else "[H, W, 3]"
        raise ValueError(f"an image is {kind} uint8 (or gray, or with alpha), not {list(image.shape)} {image.dtype}")
    if image_format == "BGR" and array.shape[-1] > 1:
        array = array[..., [2, 1, 0, 3][: array.shape[-1]]]
    return to_rgb(Image.fromarray(np.ascontiguousarray(array.squeeze(-1) if array.shape[-1] == 1 else array)))


def _prompts(points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None) -> Prompts:
    """Return P prompts for one image; without points and boxes a prompt is a mask alone, or nothing at all."""
    given = next((part for part in (points, boxes, masks) if part is not None), torch.zeros(1))
    coordinates = given.new_zeros(1, len(given), 0, 2) if points is None else points[None]
    signs = given.new_zeros(1, len(given), 0) if labels is None else labels[None]
    coordinates, signs = coordinates.float(), signs.to(given.device, torch.int64)
    logits = None if masks is None else masks.float()[None]
    if boxes is not None:
        return box_prompts(boxes.reshape(1, -1, 4), coordinates, signs, logits)
    return point_prompts(coordinates, signs, logits) if points is not None else Prompts(coordinates, signs, logits)
