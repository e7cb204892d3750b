"""Checkpoints and clean stops: on Ctrl-C, SIGTERM or SIGHUP all ranks finish the current step and save a checkpoint.

Lightning (2.6) stops on SIGTERM only, after any batch, even within a step that accumulates gradients. It saves no
checkpoint then, and makes a GPU wait at every step to check for the signal.
"""

import logging
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from sam_distill.runs.processes import STOP_SIGNALS
from sam_distill.training.lightning_module import ends_step
from sam_distill.types import upload

log = logging.getLogger(__name__)

REPEAT_SECONDS = 3.0  # seconds in which a repeat is ignored: torchrun forwards a Ctrl-C that its processes also receive


class Checkpoint(ModelCheckpoint):
    """Callback that saves checkpoints only between optimizer steps: accumulated gradients are not in a checkpoint."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class Stopping(pl.Callback):
    """Callback that stops all ranks after the same step, since each may receive a signal at a different time or never.

    Outside of training steps, as in validation, nothing is lost: a signal exits at once. So does a second signal.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._signal, self._agreed, self._received_at = 0, 0, 0.0
        self._pending: tuple[Tensor, torch.Event | None] | None = None
        self._stepping = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._install_handlers()
        self._stepping = True

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._install_handlers()
        self._stepping = False
        if self._agreed or self._signal:
            raise SystemExit(128 + (self._agreed or self._signal))

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stepping = trainer.state.fn == TrainerFn.FITTING

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stepping = False
        trainer.save_checkpoint(self.checkpoint)  # the number of steps need not be a multiple of the interval

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Exchange signals between ranks at every step and read them at the next, so that no GPU runs out of work."""
        if not torch.distributed.is_initialized():
            self._agreed = self._signal
            return
        if self._pending is not None:
            highest, copied = self._pending
            if copied is not None:
                copied.synchronize()
            self._agreed = int(highest)
        received = upload([self._signal], module.device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        self._pending = received.to("cpu", non_blocking=True), torch.Event("cuda") if received.is_cuda else None
        if self._pending[1] is not None:
            self._pending[1].record()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self._agreed and ends_step(trainer, index):
            trainer.save_checkpoint(self.checkpoint)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        """Exit if the last step was the one to stop after: by now its metrics are written, too."""
        if self._agreed and index % trainer.accumulate_grad_batches == 0:
            raise SystemExit(128 + self._agreed)

    def _install_handlers(self) -> None:
        """Replace Lightning's signal handlers. When it ends, Lightning restores those from before it started."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._stepping or (self._signal and now - self._received_at > REPEAT_SECONDS):
            raise SystemExit(128 + number)
        if not self._signal:
            self._signal, self._received_at = number, now
            log.info("Stopping after this step (once more: at once)")
