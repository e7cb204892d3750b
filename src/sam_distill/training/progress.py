"""Progress bar of training. Lightning's own bars count the batches of an epoch, which has no end here."""

import time
from typing import Any

import pytorch_lightning as pl

from sam_distill.runs.progress import new_bar

INTERVAL = 0.2  # seconds between updates


class TrainingBar(pl.Callback):
    """Callback that shows steps done, the last loss and the time left in a bar below the log, removed at the end."""

    def __init__(self) -> None:
        self._bar = new_bar(transient=True)
        self._task = self._bar.add_task("training", note="")
        self._drawn_at = 0.0

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            self._bar.start()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._draw(total=trainer.max_steps, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        loss = trainer.callback_metrics.get("train/loss")  # none before the first step is complete
        if loss is not None and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._bar.update(self._task, note=f"loss {float(loss):.4f}")
        if time.perf_counter() - self._drawn_at > INTERVAL:
            self._draw(completed=trainer.global_step, description="training")

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._draw(completed=trainer.global_step, description="validating")

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._bar.stop()

    def _draw(self, **changes: Any) -> None:
        self._bar.update(self._task, refresh=True, **changes)
        self._drawn_at = time.perf_counter()
