"""Fixtures that write run folders like those of real trainings."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return the folder in which `make_run` creates run folders."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


@pytest.fixture
def make_run(runs: Path) -> Callable[..., Path]:
    """make_run(name, ...) writes a run folder and returns its path; config: values in config.yaml."""

    def make(
        name: str,
        score: float = 0.5,
        experiment: str | None = None,
        status: str = "finished",
        why: str | None = None,
        encoder: dict[str, Any] | None = None,
        words: Sequence[str] = (),
        **config: Any,
    ) -> Path:
        folder = runs / name
        (folder / "pictures").mkdir(parents=True)
        choices = {"strategy": "decoupled", "encoder": "tinyvit"} | ({"experiment": experiment} if experiment else {})
        choices |= {key: config.pop(key) for key in ("strategy", "teacher") if key in config}
        record = {
            "status": status,
            "why": why,
            "command": ["train", *words],
            "choices": choices,
            "version": "0.1.0+abc",
        }
        record["started"] = f"2026-11-20T10:00:{len(list(runs.iterdir())):02d}+00:00"
        (folder / "status.json").write_text(json.dumps(record))
        node = {"_target_": "sam_distill.strategies.decoupled.Decoupled", "loss": "mse"}
        tiny = {"_target_": "sam_distill.models.encoders.TinyViT", "size": "5m"}
        asked = {
            "seed": 0,
            "batch_size": 8,
            "budget": "8 epochs",
            "strategy": node,
            "encoder": encoder or tiny,
            **config,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(asked))
        measured = {"miou/point": score, "blind/miou/point": 0.2, "steps": 4, "images": 32, "precision": "bf16"}
        (folder / "metrics.json").write_text(json.dumps(measured))
        lines = [f"0,,{score / 2}", "2,0.4,", f"4,0.2,{score}"]
        (folder / "history.csv").write_text("\n".join(["step,train/loss,val/miou/point", *lines]) + "\n")
        Image.new("RGB", (60, 40), "red").save(folder / "pictures" / "masks_0000004.png")
        return folder

    return make
