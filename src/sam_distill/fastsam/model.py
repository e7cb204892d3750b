"""FastSAM (Zhao et al., arXiv 2306.12156), with which the paper compares MobileSAM in Tables 6 and 7.

It is a YOLOv8 that segments everything at once; `mappings.py` turns its masks into the mask of a prompt. It runs in the
package ultralytics, which is under the AGPL-3.0 and is only imported when a FastSAM is evaluated.
"""

import os
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator
from torch import Tensor
from torch.nn import functional as F

from sam_distill.errors import UserError
from sam_distill.evaluate.views import MaskOf, OtherModel, View
from sam_distill.fastsam.mappings import RULES, MappingName, best_for_box
from sam_distill.files import file_sha256
from sam_distill.models import weights
from sam_distill.models.checkpoints import Checkpoint
from sam_distill.types import BACKGROUND, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND, FRAME, Batch, Prompts

_ENVIRONMENT = {  # variables that ultralytics reads when it is imported
    "YOLO_OFFLINE": "1",  # don't check for a network, don't report usage
    "YOLO_AUTOINSTALL": "0",  # don't call pip
    "YOLO_VERBOSE": "0",
}


def is_fastsam(checkpoint: str) -> bool:
    """Whether it is a name in our weights table, FastSAM's file name (`FastSAM-s.pt`), or a file from ultralytics."""
    return _name(checkpoint) is not None or _is_pickled_by_ultralytics(Path(checkpoint).expanduser())


def _or_fastsam(checkpoint: Any, as_sam: ValidatorFunctionWrapHandler) -> Any:
    return checkpoint if isinstance(checkpoint, str) and is_fastsam(checkpoint) else as_sam(checkpoint)


SamOrFastSam = Annotated[Checkpoint, WrapValidator(_or_fastsam)]  # checkpoint of a SAM or a FastSAM


class FastSam(OtherModel):
    """FastSAM, or any other YOLO segmentation model of ultralytics.

    checkpoint: see `is_fastsam`. The file is a pickle, which can run code when it is loaded. It is loaded in full only
        if its sha256 is in our weights table, any other file as `weights_only`, limited to ultralytics' own classes.
    mapping, conf, iou: see conf/evaluate.yaml.
    """

    def __init__(
        self,
        checkpoint: str,
        mapping: MappingName = "official",
        conf: Annotated[float, Field(ge=0, le=1)] = 0.4,
        iou: Annotated[float, Field(ge=0, le=1)] = 0.9,
    ) -> None:
        self.mapping, self.conf, self.iou = mapping, conf, iou
        package = _ultralytics()  # first, so that nothing is downloaded if the package is missing
        name = _name(checkpoint)
        path = weights.fetch(name) if name else Path(checkpoint).expanduser()
        self.network = _load(package, path)
        self.description = {"parameters/model": sum(p.numel() for p in self.network.model.parameters())}
        self.description |= {"fastsam/mapping": mapping, "fastsam/conf": conf, "fastsam/iou": iou}

    def view(self, batch: Batch) -> View:
        areas = zip(batch.images, batch.sizes.tolist(), strict=True)
        return FastSamView([self.everything(image[:, :h, :w]) for image, (h, w) in areas], batch, self.mapping)

    def everything(self, image: Tensor) -> Tensor:
        bgr = image.permute(1, 2, 0).flip(-1).cpu().contiguous().numpy()
        options: dict[str, Any] = {"conf": self.conf, "iou": self.iou, "device": image.device, "verbose": False}
        (found,) = self.network.predict(bgr, imgsz=FRAME, retina_masks=True, **options)
        if found.masks is None:
            return torch.zeros(0, *image.shape[1:], dtype=torch.bool, device=image.device)
        return found.masks.data.bool()


@dataclass(eq=False)
class FastSamView(View):
    """View by a FastSAM. everything: the masks [N, h, w] bool of each image in `batch`, in the frame."""

    everything: list[Tensor]
    batch: Batch
    mapping: MappingName
    embedding = None

    def masks(self, prompts: Prompts) -> MaskOf:
        """Return a function that computes the mask of a prompt, which is one box or some points."""

        def mask(image: int, prompt: int) -> Tensor:
            answer = self._answer(self.everything[image], prompts.points[image, prompt], prompts.labels[image, prompt])
            return F.interpolate(answer[None, None].byte(), self.sizes[image][1], mode="nearest-exact")[0, 0].bool()

        return mask

    def _answer(self, masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """Return a prompt's mask. points: [K, 2] (x, y) in the frame; labels: [K] as in `Prompts`, with padding."""
        is_corner = (labels == BOX_TOP_LEFT) | (labels == BOX_BOTTOM_RIGHT)
        if is_corner.any():
            return best_for_box(masks, points[is_corner].flatten())
        is_point = (labels == FOREGROUND) | (labels == BACKGROUND)
        return RULES[self.mapping](masks, points[is_point].long(), labels[is_point])


def _name(checkpoint: str) -> str | None:
    """Return the name in our weights table, also for its published file name unless such a file exists; else None."""
    name = checkpoint if Path(checkpoint).exists() else weights.name_of_file(checkpoint) or checkpoint
    return name if name in weights.names("fastsam") else None


def _is_pickled_by_ultralytics(path: Path) -> bool:
    """Whether the file was written by ultralytics; it is searched without unpickling."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(b"ultralytics.nn" in archive.read(n) for n in archive.namelist() if n.endswith("/data.pkl"))


def _ultralytics() -> Any:
    """Import the package, and undo what it changes globally: torch.save, Image.open, warnings and more."""
    try:
        with (
            patch.dict(os.environ, _ENVIRONMENT, YOLO_CONFIG_DIR=str(weights.home())),
            patch.object(torch, "save", torch.save),
            patch.object(Image, "open", Image.open),
            np.printoptions(),
            warnings.catch_warnings(),
        ):
            import ultralytics.models
            import ultralytics.nn.tasks
    except ImportError as error:
        needed = "FastSAM needs ultralytics, which is under the AGPL-3.0: pip install 'sam-distill[fastsam]'"
        raise UserError(f"{needed} ({error})") from error
    torch.set_printoptions(profile="default")
    return ultralytics


def _load(package: Any, path: Path) -> Any:
    trusted = file_sha256(path) in map(weights.sha256, weights.names("fastsam"))
    package.nn.tasks.SAFE_LOAD = not trusted  # ultralytics' switch for weights_only, with its list of allowed classes
    try:
        network = package.models.FastSAM(str(path))
    except Exception as error:  # a broken or foreign file can make it raise anything
        reason = re.split(r"\.\s|\n", str(error).removeprefix("ERROR ❌️ "))[0]  # the rest is ultralytics' advice
        raise UserError(f"{path} is no YOLO that loads safely ({reason})") from error
    if network.task != "segment":
        raise UserError(f"{path} is a YOLO for the task {network.task}: it makes no masks")
    return network
