"""Where metrics go beside history.csv, which every run writes."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger


@dataclass(frozen=True)
class CsvOnly:
    """Nothing beside history.csv."""

    def build(self, run_dir: Path, name: str, config: dict[str, Any]) -> list[Logger]:
        return []


@dataclass(frozen=True)
class WandB:
    """Weights & Biases: online if there is a key, else offline into the run folder (`wandb sync` uploads it later).

    Never asks anything on stdin. name: made of the run's choices if null.
    """

    project: str = "sam-distill"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: Sequence[str] = ()

    def build(self, run_dir: Path, name: str, config: dict[str, Any]) -> list[Logger]:
        wandb.setup(wandb.Settings(silent=True))
        logger = WandbLogger(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=self.name or name,
            tags=list(self.tags),
            save_dir=str(run_dir),
            id=_run_id(run_dir),
            resume="allow",
            config=config,
            mode=os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline"),
            settings=wandb.Settings(console="off"),
        )
        return [logger]


def close(loggers: Iterable[Logger]) -> None:
    """End the run at W&B: the next job of a sweep would write into it."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        wandb.finish()


def _has_key() -> bool:
    """Where wandb itself would look, without the question it asks when there is none."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path) -> str:
    """One W&B run per run folder, also when it is resumed."""
    file = run_dir / "wandb" / "id.txt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return file.read_text()
