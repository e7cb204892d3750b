"""Masks for prompts on images, with segment-anything's signatures: moving over is changing one import."""

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
Answer = tuple[np.ndarray, np.ndarray, np.ndarray]
_PROMPT = ("point_coords", "point_labels", "box", "mask_input")


class SamPredictor:
    """Encode an image once with `set_image`, then ask for masks with `predict` as often as needed.

    An image is [H, W, 3] uint8 (numpy), [3, H, W] uint8 (torch), a Pillow image or a file's path; arrays may also be
    gray, [H, W] or of one channel, or have alpha, a fourth. All are seen as their file would be. Everything runs where
    the model is, in fp32, or in bf16 within `torch.autocast`.
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
        self.original_sizes: list[Size] = []  # B times (H, W)
        self.input_sizes: list[Size] = []  # B times (h, w), in the frame

    @property
    def is_image_set(self) -> bool:
        return self.features is not None

    @property
    def original_size(self) -> Size:
        """(H, W) of the one image that is set."""
        return self.original_sizes[self._only("original_size")]

    @property
    def input_size(self) -> Size:
        """(h, w) that the one image takes up in the frame."""
        return self.input_sizes[self._only("input_size")]

    def set_image(self, image: ImageLike, image_format: str = "RGB") -> None:
        """image_format: RGB or BGR, the order of an array's or a tensor's channels."""
        self.set_images([image], image_format)

    def set_images(self, images: Sequence[ImageLike], image_format: str = "RGB") -> None:
        """Encode several images, whatever their sizes, together; `predict_batch` answers for them."""
        self.reset_image()  # should this one fail, no earlier one is to answer in its place
        if isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", 4) < 4:
            raise TypeError("set_images takes several images, such as [image, other]; set_image takes one")
        pictures = [to_pil(image, image_format) for image in images]
        if not pictures:
            raise ValueError("no image: give one at least")
        self._encode([to_frame(p).to(self.device) for p in pictures], [(p.height, p.width) for p in pictures])

    def set_torch_image(self, transformed_image: Tensor, original_image_size: Size) -> None:
        """transformed_image: [1, 3, h, w], RGB in 0..255, resized by `transform` so that its long side is 1024."""
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
    ) -> Answer:
        """Masks for one prompt, which may be several points, a box, a mask, or all of them together.

        A prompt that is none, such as NaN or two boxes, is a ValueError; one outside the image is warned of.

        point_coords: [N, 2] (x, y); point_labels: [N], 1 foreground, 0 background; box: [4] (x0, y0, x1, y1), all in
        pixels of the image. mask_input: [1, 256, 256] logits of an earlier prediction.
        Returns masks [C, H, W] bool (float32 logits if return_logits), predicted IoUs [C], and low-res logits
        [C, 256, 256], with C = 3 if multimask_output, else 1.
        """
        self._only("predict")
        prompt = zip(_PROMPT, (point_coords, point_labels, box, mask_input), strict=True)
        return self.predict_batch([dict(prompt)], multimask_output, return_logits)[0]

    def predict_best(
        self, points: Sequence[Sequence[float]], labels: Sequence[int], box: Sequence[float] | None
    ) -> tuple[np.ndarray, float]:
        """The mask to show for some clicks (perhaps none) or a box, [H, W] bool, and its predicted IoU.

        SAM's advice: a single click is ambiguous, so three masks are asked for and the best is taken; else one.
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
    ) -> list[Answer]:
        """What `predict` returns, for each of `set_images`: one prompt for each, as the arguments of `predict`.

        For example [{"box": box}, {"point_coords": points, "point_labels": labels}].
        """
        if len(prompts) != len(self.original_sizes):
            raise ValueError(f"{len(prompts)} prompts for {len(self.original_sizes)} images: give one for each")
        options = {"multimask_output": multimask_output, "return_logits": return_logits}
        known = {*_PROMPT, *options}
        if unknown := {name for prompt in prompts for name in prompt} - known:
            raise ValueError(f"a prompt has no {', '.join(sorted(unknown))}; it may have {', '.join(sorted(known))}")
        return [self._answer(index, {**options, **prompt}) for index, prompt in enumerate(prompts)]

    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks for P prompts at once, given in pixels of the frame (see `transform`).

        point_coords: [P, N, 2]; point_labels: [P, N]; boxes: [P, 4]; mask_input: [P, 1, 256, 256].
        Returns masks [P, C, H, W], predicted IoUs [P, C] and low-res logits [P, C, 256, 256], as `predict` does.
        """
        check_several(point_coords, point_labels, boxes, mask_input)
        index = self._only("predict_torch")
        given = [
            None if part is None else part.to(self.device) for part in (point_coords, point_labels, boxes, mask_input)
        ]
        return self._decode(index, given, multimask_output, return_logits)

    def get_image_embedding(self) -> Tensor:
        """[1, 256, 64, 64]; of several images [B, 256, 64, 64]."""
        return self._features("get_image_embedding")

    @torch.no_grad()
    def _encode(self, frames: Sequence[Tensor], original_sizes: list[Size]) -> None:
        """frames: of each image [3, h, w] in 0..255."""
        if any(parameter.dtype != torch.float32 for parameter in self.model.parameters()):
            raise TypeError("the weights are no longer float32: .float() mends it; torch.autocast computes in bf16")
        sizes = [(frame.shape[1], frame.shape[2]) for frame in frames]
        padded = [
            F.pad(frame, (0, FRAME - width, 0, FRAME - height))
            for frame, (height, width) in zip(frames, sizes, strict=True)
        ]
        self.features = self.model.encode(torch.stack(padded), torch.tensor(sizes, device=self.device))
        self.original_sizes, self.input_sizes = original_sizes, sizes

    def _answer(self, index: int, asked: Mapping[str, Any]) -> Answer:
        """`predict` for one of the images. asked: its arguments."""
        point_coords, point_labels, box, mask_input = (asked.get(name) for name in _PROMPT)
        check_one(point_coords, point_labels, box, mask_input)
        size = self.original_sizes[index]
        points = None if point_coords is None else self.transform.apply_coords(point_coords, size)[None]
        labels = None if point_labels is None else np.asarray(point_labels)[None]
        boxes = None if box is None else self.transform.apply_boxes(box, size)
        masks = None if mask_input is None else np.asarray(mask_input).reshape(1, 1, LOW_RES, LOW_RES)
        given = [
            None if part is None else torch.as_tensor(part.astype(np.float32), device=self.device)
            for part in (points, labels, boxes, masks)
        ]
        answer = self._decode(index, given, asked["multimask_output"], asked["return_logits"])
        found, iou, low_res = (tensor[0].cpu().numpy() for tensor in answer)
        return found, iou, low_res

    @torch.no_grad()
    def _decode(
        self, index: int, given: Sequence[Tensor | None], multimask_output: bool, return_logits: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`predict_torch` for one of the images; given: its points, labels, boxes and masks."""
        points, labels, boxes, masks = given
        check_values(points, labels, boxes, masks, self.input_sizes[index])
        prompts = _prompts(points, labels, boxes, masks)
        embedding = self._features("predict")[index : index + 1]
        sizes = self.input_sizes[index], self.original_sizes[index]
        if not prompts.labels.shape[1]:  # such as the boxes of a detector that has found nothing
            low_res = embedding.new_zeros(0, 3 if multimask_output else 1, LOW_RES, LOW_RES)
            masks_of_none = torch.zeros(*low_res.shape[:2], *sizes[1], device=self.device)
            return masks_of_none if return_logits else masks_of_none.bool(), low_res[:, :, 0, 0], low_res
        found = self.model.decode(embedding, prompts.to(self.device), MULTI if multimask_output else SINGLE)
        low_res, iou = found.low_res[0], found.iou[0]
        logits = (upscale_masks(each, *sizes) for each in low_res)  # one by one: they are large
        return torch.stack([each if return_logits else each > 0 for each in logits]), iou, low_res

    def _features(self, caller: str) -> Tensor:
        if self.features is None:
            raise RuntimeError(f"set_image(...) comes before {caller}(...)")
        return self.features

    def _only(self, caller: str) -> int:
        """The index of the one image that is set."""
        if len(self._features(caller)) != 1:
            raise RuntimeError(f"{caller} is for one image, but {len(self.original_sizes)} are set: use predict_batch")
        return 0


def to_pil(image: ImageLike, image_format: str = "RGB") -> Image.Image:
    """Any kind of image that `SamPredictor` takes, as Pillow's, in RGB."""
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
    """P prompts for one image; without points and boxes SAM is asked with masks alone, or with nothing at all."""
    given = next((part for part in (points, boxes, masks) if part is not None), torch.zeros(1))
    coordinates = given.new_zeros(1, len(given), 0, 2) if points is None else points[None]
    signs = given.new_zeros(1, len(given), 0) if labels is None else labels[None]
    coordinates, signs = coordinates.float(), signs.to(given.device, torch.int64)
    logits = None if masks is None else masks.float()[None]
    if boxes is not None:
        return box_prompts(boxes.reshape(1, -1, 4), coordinates, signs, logits)
    return point_prompts(coordinates, signs, logits) if points is not None else Prompts(coordinates, signs, logits)
