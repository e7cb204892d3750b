"""Checkpoints, and a clean stop: on Ctrl-C, SIGTERM or SIGHUP all ranks finish the step in hand and save a checkpoint.

Lightning (2.6) stops after a batch, be it in the midst of a step that accumulates gradients, on SIGTERM only, and for
that makes a GPU wait at every step; it saves nothing then.
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

REPEATS = 3.0  # seconds: torchrun passes on a Ctrl-C that its processes have received themselves


class Checkpoint(ModelCheckpoint):
    """Only between two steps: gradients that accumulate are not part of a checkpoint."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class Stopping(pl.Callback):
    """Ranks agree on the step after which to stop, since each hears of a signal at a time of its own, or never.

    Outside of training steps there is nothing to lose: a signal ends validation at once. So does a second one.
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
        trainer.save_checkpoint(self.checkpoint)  # the budget need not be a multiple of the interval

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Signals are exchanged at every step and read at the next one, so that no GPU runs out of work."""
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
        """By now that step's metrics are written, too."""
        if self._agreed and index % trainer.accumulate_grad_batches == 0:
            raise SystemExit(128 + self._agreed)

    def _install_handlers(self) -> None:
        """In place of Lightning's handlers, which it puts back to what they were when it ends."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._stepping or (self._signal and now - self._received_at > REPEATS):
            raise SystemExit(128 + number)
        if not self._signal:
            self._signal, self._received_at = number, now
            log.info("Stopping after this step (once more: at once)")
