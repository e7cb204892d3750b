"""Progress bars, on a terminal. Elsewhere there are log lines."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

INTERVAL = 0.2  # seconds between updates


class TrainingBar(pl.Callback):
    """Steps done of all, the loss last logged and the time left, in a line that disappears; the log goes on above it.

    It is drawn between steps, not by a thread of its own: loader workers are forked while it is on screen, and would
    inherit that thread's locks.
    """

    def __init__(self) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
        self._bar = Progress(
            "{task.description}", *columns, transient=True, auto_refresh=False, speed_estimate_period=120
        )
        self._task = self._bar.add_task("training", loss="")
        self._drawn = 0.0

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            self._bar.start()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._draw(total=trainer.max_steps, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        loss = trainer.callback_metrics.get("train/loss")  # none before the first step is complete
        if loss is not None and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._bar.update(self._task, loss=f"loss {float(loss):.4f}")
        if time.perf_counter() - self._drawn > INTERVAL:
            self._draw(completed=trainer.global_step, description="training")

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._draw(completed=trainer.global_step, description="validating")

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._bar.stop()

    def _draw(self, **changes: Any) -> None:
        self._bar.update(self._task, refresh=True, **changes)
        self._drawn = time.perf_counter()


class Tally:
    """Things done of all, their rate and the time left: a bar on a terminal, else a log line every half minute.

    Drawn by hand, for the reason above.
    """

    every = 30.0  # seconds between log lines

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.completed = total, what, 0
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self._bar = Progress("{task.description}", *columns, auto_refresh=False, speed_estimate_period=120)
        self._task = self._bar.add_task(what, total=total, note="")
        self._is_terminal = Console().is_terminal
        self._started = self._told = time.perf_counter()

    def __enter__(self) -> Tally:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            self._bar.stop()

    def add(self, number: int, note: str = "") -> None:
        self.completed += number
        now = time.perf_counter()
        rate = self.completed / (now - self._started)
        said = f"{rate:.1f}/s  {note}"
        if self._is_terminal:
            self._bar.update(self._task, completed=self.completed, note=said, refresh=True)
        elif now - self._told > self.every:
            self._told = now
            left = (self.total - self.completed) / rate / 60
            log.info("%s %d/%d  %s  %.0f minutes left", self.what, self.completed, self.total, said, left)
