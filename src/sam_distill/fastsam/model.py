"""FastSAM (Zhao et al., arXiv 2306.12156), which the paper compares MobileSAM with: Tables 6 and 7.

A YOLOv8 that segments everything in one go; `mappings.py` makes that an answer to a prompt. It runs in ultralytics'
package, which is under the AGPL-3.0: nothing imports it, or anything of it, unless a FastSAM is to be judged.
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

from sam_distill.evaluate.views import MaskOf, OtherModel, View
from sam_distill.fastsam.mappings import RULES, MappingName, best_for_box
from sam_distill.files import file_sha256
from sam_distill.models import weights
from sam_distill.models.checkpoints import Checkpoint
from sam_distill.types import BACKGROUND, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND, FRAME, Batch, Prompts, UserError

_ENVIRONMENT = {  # of ultralytics, which reads them when it is imported
    "YOLO_OFFLINE": "1",  # don't look for a network, nor report on the user
    "YOLO_AUTOINSTALL": "0",  # don't call pip
    "YOLO_VERBOSE": "0",
}


def is_fastsam(checkpoint: str) -> bool:
    """Whether it is one of our names, FastSAM's own (`FastSAM-s.pt`), or a file that ultralytics has written."""
    return _name(checkpoint) is not None or _is_pickled_by_ultralytics(Path(checkpoint).expanduser())


def _or_fastsam(checkpoint: Any, as_sam: ValidatorFunctionWrapHandler) -> Any:
    return checkpoint if isinstance(checkpoint, str) and is_fastsam(checkpoint) else as_sam(checkpoint)


Judged = Annotated[Checkpoint, WrapValidator(_or_fastsam)]  # a SAM, or a FastSAM


class FastSam(OtherModel):
    """A FastSAM, or any other YOLO of ultralytics' that makes masks.

    checkpoint: as `is_fastsam` knows it. Such a file is a pickle, which can run code when it is loaded: in full only if
        its sha256 is that of a name of ours, any other as `weights_only`, limited to ultralytics' own classes.
    mapping, conf, iou: conf/evaluate.yaml says what they mean.
    """

    def __init__(
        self,
        checkpoint: str,
        mapping: MappingName = "official",
        conf: Annotated[float, Field(ge=0, le=1)] = 0.4,
        iou: Annotated[float, Field(ge=0, le=1)] = 0.9,
    ) -> None:
        self.mapping, self.conf, self.iou = mapping, conf, iou
        package = _ultralytics()  # before anything is downloaded for it
        name = _name(checkpoint)
        path = weights.fetch(name) if name else Path(checkpoint).expanduser()
        self.network = _load(package, path)
        self.description = {"parameters/model": sum(p.numel() for p in self.network.model.parameters())}
        self.description |= {"fastsam/mapping": mapping, "fastsam/conf": conf, "fastsam/iou": iou}

    def see(self, batch: Batch) -> View:
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
    """everything: the masks [N, h, w] bool of each image in `batch`, in the frame."""

    everything: list[Tensor]
    batch: Batch
    mapping: MappingName
    embedding = None

    def masks(self, prompts: Prompts) -> MaskOf:
        """A prompt is one box or some points."""

        def mask(image: int, prompt: int) -> Tensor:
            answer = self._answer(self.everything[image], prompts.points[image, prompt], prompts.labels[image, prompt])
            return F.interpolate(answer[None, None].byte(), self.sizes[image][1], mode="nearest-exact")[0, 0].bool()

        return mask

    def _answer(self, masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """points: [K, 2] (x, y) in the frame, labels: [K] as in `Prompts`, with others than points among them."""
        is_corner = (labels == BOX_TOP_LEFT) | (labels == BOX_BOTTOM_RIGHT)
        if is_corner.any():
            return best_for_box(masks, points[is_corner].flatten())
        is_point = (labels == FOREGROUND) | (labels == BACKGROUND)
        return RULES[self.mapping](masks, points[is_point].long(), labels[is_point])


def _name(checkpoint: str) -> str | None:
    """Of our table, unless there is a file called so."""
    name = checkpoint if Path(checkpoint).exists() else weights.named(checkpoint) or checkpoint
    return name if name in weights.names("fastsam") else None


def _is_pickled_by_ultralytics(path: Path) -> bool:
    """Looks without unpickling."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(b"ultralytics.nn" in archive.read(n) for n in archive.namelist() if n.endswith("/data.pkl"))


def _ultralytics() -> Any:
    """The package, imported so that nothing else notices: it changes torch.save, Image.open, warnings and more."""
    settings = {"YOLO_CONFIG_DIR": str(weights.home())}
    try:
        with (
            patch.dict(os.environ, _ENVIRONMENT | settings),
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
    package.nn.tasks.SAFE_LOAD = not trusted  # its switch for weights_only, with a list of classes that may be built
    try:
        network = package.models.FastSAM(str(path))
    except Exception as error:  # whatever a broken or foreign file makes it raise
        reason = re.split(r"\.\s|\n", str(error).removeprefix("ERROR ❌️ "))[0]  # the others are ultralytics' advice
        raise UserError(f"{path} is no YOLO that loads safely ({reason})") from error
    if network.task != "segment":
        raise UserError(f"{path} is a YOLO for the task {network.task}: it makes no masks")
    return network
