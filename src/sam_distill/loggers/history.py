"""history.csv, and the learning curves drawn from it."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from sam_distill.files import write_csv

Rows = Mapping[int, Mapping[str, float]]  # metrics by step


class CsvOnly:
    """Logger option that adds no logger: history.csv alone."""

    def build(self, run_dir: Path, facts: Mapping[str, Any]) -> list[Logger]:
        return []


class History(Logger):
    """Logger that writes every metric to history.csv, a row per step. A resumed run continues the existing file."""

    name = "history"
    version = 0

    def __init__(self, path: Path, resume: bool) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, float]] = {}
        if resume and path.is_file():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    step = int(row.pop("step"))
                    self.rows[step] = {name: float(value) for name, value in row.items() if value != ""}

    def forget_after(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again."""
        self.rows = {s: row for s, row in self.rows.items() if s <= step}

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: config.yaml has the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = self.rows.setdefault(int(step or 0), {})
        row.update({name: float(value) for name, value in metrics.items() if name != "epoch"})
        columns = sorted({name for row in self.rows.values() for name in row})
        lines = [{"step": s, **self.rows[s]} for s in sorted(self.rows)]
        write_csv(self.path, ["step", *columns], lines)


def write_curves(rows: Rows, path: Path) -> None:
    """Draw training loss, validation embedding MSE and validation mIoU against steps."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, miou = figure.subplots(1, 2)
    _plot(loss, rows, {"train/loss": "training", "val/embedding_mse": "validation, embedding MSE"})
    loss.set(title="loss", yscale="log", xlabel="step")
    _plot(miou, rows, {"val/miou/point": "point", "val/miou/box": "box"})
    miou.set(title="mIoU between teacher and student", ylim=(0, 1), xlabel="step")
    figure.savefig(path, dpi=110)


def _plot(axes: Any, rows: Rows, curves: Mapping[str, str]) -> None:
    for name, label in curves.items():
        points = [(step, row[name]) for step, row in sorted(rows.items()) if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
