"""Logged contents of W&B runs, read back from the files of offline runs."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from sam_distill.cli import app
from sam_distill.loggers.wandb import WandB, close
from sam_distill.models import weights

TINY = ["data=photos", "data.images=4", "data.val_images=2", "image_size=64", "batch_size=2", "budget=4 steps",
        "validate_every=2 steps", "trainer=cpu", "trainer.workers=0", "protocol.points=1",
        "encoder.pretrained=false"]  # fmt: skip


def records(file: Path) -> Iterator[Record]:
    """Yield the records of a .wandb file: 7 bytes of header, then LevelDB's log format, in blocks of 32 KiB."""
    data, place, whole = file.read_bytes(), 7, b""
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, part = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # the only part of a record, or its last
            yield Record.FromString(whole)
            whole = b""


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class LoggedRun:
    """Contents of the .wandb file of a run."""

    def __init__(self, run_dir: Path) -> None:
        (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
        found = list(records(file))
        (self.run,) = (record.run for record in found if record.HasField("run"))
        self.config = values(self.run.config.update)
        self.history = [values(record.history.item) for record in found if record.HasField("history")]
        self.metrics = {record.metric.name: record.metric for record in found if record.HasField("metric")}
        self.artifacts = [record.artifact for record in found if record.HasField("artifact")]
        self.summary: dict[str, Any] = {}
        for record in found:
            self.summary |= values(record.summary.update)

    def curve(self, name: str) -> dict[int, Any]:
        return {row["trainer/global_step"]: row[name] for row in self.history if name in row}

    def table(self, name: str) -> tuple[list[str], list[list[Any]], dict[str, Path]]:
        """Return columns and rows of the last table of that name, and the local paths of the files it refers to."""
        entry = f"{name}.table.json"
        files = [{e.path: Path(e.local_path) for e in artifact.manifest.contents} for artifact in self.artifacts]
        last = [named for named in files if entry in named][-1]
        content = json.loads(last[entry].read_text())
        return content["columns"], content["data"], last


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of two offline runs: without a key W&B never asks for one, not even with WANDB_MODE=online."""
    tmp_path = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SAM_DISTILL_HOME", str(weights.fetch("mobile_sam").parents[1]))
        monkeypatch.setenv("HOME", str(tmp_path))  # the real home might hold a .netrc with a key
        monkeypatch.setenv("WANDB_MODE", "online")
        for name in ("WANDB_API_KEY", "WANDB_DATA_DIR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
        sweep = ["seed=0", "encoder=tinyvit", "strategy.padding=0,1"]
        options = ["experiment=padding_mask", "scale=small", *sweep, "logger.tags=[first]"]
        assert app.main(["train", "-m", *options, f"hydra.sweep.dir={tmp_path / 'sweep'}", *TINY]) == 0
        yield tmp_path / "sweep"


def test_steps_go_on_in_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B by itself would count each part from 0, and while syncing drop the steps that it already has."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in ((1, 2, 3), (3, 4)):
        (logger,) = WandB().build(tmp_path, {})
        for step in steps:
            logger.log_metrics({"train/loss": 1.0}, step)
        close([logger])
    seen, deadline = [], time.monotonic() + 300  # W&B's own process may take a moment to write the last of it
    while seen != [[1, 2, 3], [3, 4]] and time.monotonic() < deadline:
        files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        seen = [[r.history.step.num for r in records(file) if r.HasField("history")] for file in files]
    assert seen == [[1, 2, 3], [3, 4]]


def test_config_curves_and_summary_of_a_sweep(sweep: Path) -> None:
    folders = [sweep / "tinyvit_0_seed0", sweep / "tinyvit_1_seed0"]
    runs = [LoggedRun(folder) for folder in folders]
    for run_dir, logged, padding in zip(folders, runs, (0, 1), strict=True):
        assert logged.run.display_name.startswith(f"decoupled-tinyvit-64px-strategy.padding={padding}-")
        assert logged.run.display_name.endswith("-budget=4 steps-encoder.pretrained=False-seed0")
        assert logged.run.run_group == "padding_mask"
        assert [*logged.run.tags] == ["padding_mask", "decoupled", "tinyvit", "mobile_sam", "photos", "small", "first"]
        assert logged.config["strategy"]["padding"] == padding
        assert logged.config["choices"]["encoder"] == "tinyvit"
        assert logged.config["version"] == json.loads((run_dir / "status.json").read_text())["version"]
        assert logged.config["teacher_sha256"] == weights.sha256("mobile_sam")
        metrics = json.loads((run_dir / "metrics.json").read_text())
        for fact in ("teacher_sha256", "data_keys", "parameters", "token"):
            assert logged.config[fact] == metrics[fact]

        curve, losses = logged.curve("val/miou/point"), logged.curve("train/loss")
        assert sorted(curve) == [0, 2, 4]
        assert sorted(losses) == [1, 2, 3, 4]
        assert curve[4] == pytest.approx(metrics["miou/point"])
        for name, best in {
            "val/miou/point": max,
            "val/miou/box": max,
            "val/embedding_mse": min,
            "train/loss": min,
        }.items():
            assert getattr(logged.metrics[name].summary, best.__name__)
            assert logged.metrics[name].step_metric == "trainer/global_step"
            measured = logged.curve(name)
            assert logged.summary[name] == {best.__name__: best(measured.values()), "last": measured[4]}
    assert runs[0].config["data_keys"] == runs[1].config["data_keys"]


def test_masks_over_pictures(sweep: Path) -> None:
    run_dir = sweep / "tinyvit_0_seed0"
    logged = LoggedRun(run_dir)
    columns, rows, files = logged.table("val/pictures")
    assert columns[:4] == ["picture", "image", "kind", "prompt"]
    assert [row[columns.index("kind")] for row in rows] == ["point", "box"]
    for row in rows:
        picture = row[0]
        image = Image.open(files[picture["path"]])
        assert max(image.size) <= 512
        masks = [np.asarray(Image.open(files[picture["masks"][who]["path"]])) for who in ("teacher", "student")]
        assert [mask.shape for mask in masks] == [image.size[::-1]] * 2
        assert [set(np.unique(mask)) for mask in masks] == [{0, 1}, {0, 2}]
        teacher, student = (mask > 0 for mask in masks)
        assert (teacher & student).sum() / (teacher | student).sum() == pytest.approx(
            row[columns.index("iou")], abs=0.02
        )
        labels = json.loads(files[picture["classes"]["path"]].read_text())["class_set"]
        assert [(one["id"], one["name"]) for one in labels] == [(1, "teacher"), (2, "student")]
    assert all(file.is_relative_to(run_dir) for file in files.values()), "uploaded later, from the run's own folder"
    last = [row for row in logged.history if "val/masks/captions" in row][-1]
    assert last["val/masks/captions"] == [row[0]["caption"] for row in rows]
    assert sum(file.stat().st_size for file in files.values()) < 100_000 * len(rows)
