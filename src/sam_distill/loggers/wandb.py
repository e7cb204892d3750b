"""Weights & Biases, in addition to history.csv, which every run writes."""

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from requests.utils import get_netrc_auth

from sam_distill.errors import UserError, one_line
from sam_distill.evaluate.evaluator import Evaluator, Picture
from sam_distill.evaluate.protocol import COLUMNS, prompt_rows
from sam_distill.predict.overlays import prompt_overlay, resize_long_side
from sam_distill.runs import status

STEP = "trainer/global_step"  # the x-axis, as Lightning's W&B logger names it
SUMMARIES = {  # the value that summarizes a run's history, in addition to the last one
    "val/miou/point": "max",
    "val/miou/box": "max",
    "val/embedding_mse": "min",
    "val/embedding_cosine": "max",
    "train/loss": "min",
}
SIDE = 512  # side of a picture, pixels

_TAGS = ("experiment", "strategy", "encoder", "teacher", "data")  # config groups whose choices are tags
_NAMED = (*_TAGS, "scale", "image_size", "seed")  # already in a run's name, or left out
_UNNAMED = ("hydra", "logger", "trainer", "protocol", "resume", "validate_every", "step_times")  # left out of a name
_DATA_DIR = os.environ.get("WANDB_DATA_DIR")  # the user's own setting


class ByStep(WandbLogger):
    """W&B logger that numbers rows by the optimizer step.

    W&B's own number begins at 0 again in each part of an offline run that was resumed, and `wandb sync` drops rows
    if their number is not higher than those before.
    """

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.log({**metrics, STEP: step}, step=step)


@dataclass(frozen=True)
class WandB:
    """Weights & Biases: online if there is a key, else offline into the run folder (`wandb sync` uploads it later).

    It never asks anything on stdin. name: None: built from the run's choices. tags: in addition to those choices.
    """

    project: str = "sam-distill"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: Sequence[str] = ()

    def build(self, run_dir: Path, facts: Mapping[str, Any]) -> list[Logger]:
        """Start the W&B run; raise UserError if W&B refuses. facts: of the run, stored with its configuration."""
        config, record = status.config(run_dir), status.read(run_dir)
        choices = record.get("choices", {})
        described = {"choices": choices, "version": record.get("version"), **facts}
        wandb.setup(wandb.Settings(silent=True))
        os.environ["WANDB_DATA_DIR"] = _DATA_DIR or str(run_dir.absolute() / "wandb")  # holds tables until synced
        logger = ByStep(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=self.name or _name(config, choices, record.get("command", [])),
            tags=list(dict.fromkeys([*_tags(config, choices), *self.tags])),
            save_dir=str(run_dir),
            id=_run_id(run_dir),
            resume="allow",
            config=config | described,
            mode=_mode(),
            settings=wandb.Settings(console="off"),
        )
        try:
            run = logger.experiment
        except wandb.Error as error:
            advice = "WANDB_MODE=offline keeps the run here, to be synced later"
            raise UserError(f"W&B: {one_line(error)}; {advice}") from error
        for metric, best in SUMMARIES.items():
            run.define_metric(metric, step_metric=STEP, summary=f"{best},last")
        return [logger]


def validation_media(evaluator: Evaluator, skipped_by_tar: Mapping[str, int]) -> dict[str, Any]:
    """Return a validation's results for W&B: images with masks that can be switched on and off, and tables."""
    images = [_image(picture, evaluator.protocol.reference) for picture in evaluator.pictures]
    rows = prompt_rows([picture.comparison for picture in evaluator.pictures])
    pictures = [[image, *row.values()] for image, row in zip(images, rows, strict=True)]
    prompts = [list(row.values()) for row in prompt_rows(evaluator.comparisons)]
    content = {
        "val/masks": images,
        "val/pictures": wandb.Table(columns=["picture", *COLUMNS], data=pictures),
        "val/comparisons": wandb.Table(columns=[*COLUMNS], data=prompts),
    }
    if skipped_by_tar:
        skipped = [list(row) for row in skipped_by_tar.items()]
        content["images_skipped_by_tar"] = wandb.Table(columns=["tar", "images"], data=skipped)
    return content


def close(loggers: Iterable[Logger]) -> None:
    """End the W&B run, or else the next job of a sweep would write into it."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        wandb.finish()


def _image(picture: Picture, reference: str) -> wandb.Image:
    """Return the image with prompt and both masks, at the top left of a square, because W&B wants equal sizes."""
    row = picture.comparison
    masks = {
        who: {"mask_data": label * np.asarray(_squared(Image.fromarray(mask)), np.uint8), "class_labels": {label: who}}
        for label, (who, mask) in enumerate({reference: picture.reference, "student": picture.student}.items(), 1)
    }
    image = _squared(prompt_overlay(picture.image, row.prompt, row.labels))
    return wandb.Image(image, caption=f"{row.image}, {row.kind}: IoU {row.iou:.2f}", masks=masks, file_type="jpg")


def _squared(image: Image.Image) -> Image.Image:
    """Return the image scaled into a SIDE x SIDE square; Pillow keeps the values of a mask, mode 1, at 0 and 1."""
    square = Image.new(image.mode, (SIDE, SIDE))
    square.paste(resize_long_side(image, SIDE, Image.Resampling.BILINEAR))
    return square


def _name(config: Mapping[str, Any], choices: Mapping[str, str], command: Sequence[str]) -> str | None:
    """Return the choices without paths: decoupled-tinyvit-1024px-optim.lr=1e-3-seed0. None if none are recorded."""
    if not choices:
        return None
    words = [(word.lstrip("+").partition("=")[0], word) for word in command[1:] if "=" in word and "/" not in word]
    rest = [word for key, word in words if key not in _NAMED and key.partition(".")[0] not in _UNNAMED]
    rest = [word.replace("\\", "") for word in rest]  # Hydra escapes spaces
    start = [choices["strategy"], choices["encoder"], f"{config['image_size']}px"]
    return "-".join([*start, *rest, f"seed{config['seed']}"])


def _tags(config: Mapping[str, Any], choices: Mapping[str, str]) -> list[str]:
    """Return the choices by which users search for runs."""
    chosen = [choices[group] for group in _TAGS if group in choices]
    return chosen + ([str(config["scale"])] if "experiment" in choices else [])  # only experiments read it


def _mode() -> str:
    """Return WANDB_MODE, but offline instead of online if there is no key: W&B would ask for one."""
    mode = os.environ.get("WANDB_MODE", "online")
    return mode if mode != "online" or has_key() else "offline"


def has_key() -> bool:
    """Whether there is a key where wandb itself would look for it; unlike wandb, never ask for one."""
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(address))


def _run_id(run_dir: Path) -> str:
    """Return the id of the W&B run: one per run folder, also when it is resumed."""
    file = run_dir / "wandb" / "id.txt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return file.read_text()
