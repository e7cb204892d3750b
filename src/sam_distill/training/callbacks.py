"""Training callbacks: throughput, progressive resizing, weight averaging, and the run folder with its log lines."""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from sam_distill.data.base import DataSource
from sam_distill.errors import UserError
from sam_distill.files import write_json
from sam_distill.loggers.history import History, write_curves
from sam_distill.loggers.wandb import validation_media
from sam_distill.models.checkpoints import save_sam
from sam_distill.training.lightning_module import Distillation, ends_logged_step
from sam_distill.training.optimizers import NOT_DECAYED
from sam_distill.types import Batch

log = logging.getLogger(__name__)


class Throughput(pl.Callback):
    """Callback that logs images/s over all devices, the share of time spent waiting for data, and the learning rate.

    Time from here at the end of a batch to the start of the next counts as waiting, so `Averaged`, which works at the
    end of every step, has to come before. Saving a checkpoint every ten minutes still counts as waiting.
    """

    def _reset(self) -> None:
        self._images, self._waited, self._worked = 0, 0.0, 0.0
        self._mark = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._reset()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()  # validation counts neither as waiting nor as work

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        now = time.perf_counter()
        self._waited += now - self._mark
        self._mark = now

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        now = time.perf_counter()
        self._worked += now - self._mark
        self._mark = now
        self._images += len(batch) * trainer.world_size
        if ends_logged_step(trainer, index):
            seconds = self._waited + self._worked
            module.log("train/images_per_second", self._images / seconds)
            module.log("train/data_wait", self._waited / seconds)
            groups = trainer.optimizers[0].param_groups
            rates = {g["name"]: g["lr"] for g in groups if not g["name"].endswith(NOT_DECAYED)}
            module.log("train/lr", max(rates.values()))
            if len(rates) > 1:
                module.log_dict({f"train/lr/{part}": rate for part, rate in rates.items()})
            self._reset()
            if trainer.is_global_zero:
                m = trainer.callback_metrics
                log.info(
                    "step %d/%d  loss %.4f  %.1f images/s  data wait %.0f%%  lr %.2e",
                    trainer.global_step, trainer.max_steps, m["train/loss"], m["train/images_per_second"],
                    100 * m["train/data_wait"], m["train/lr"],
                )  # fmt: skip


class ProgressiveResizing(pl.Callback):
    """Callback that trains on smaller, cheaper inputs first; validations and checkpoints use the student's own size.

    shares: input side in pixels -> share of all steps, in this order. The other steps use `own`, the student's size.
    """

    def __init__(self, shares: Mapping[int, float], own: int) -> None:
        if (total := sum(shares.values())) > 1:
            raise UserError(f"progressive_resizing: the shares of the steps add up to {total:g}, which is more than 1")
        if (largest := max(shares)) > own:
            raise UserError(f"progressive_resizing: {largest} px is more than the student's own: image_size={own}")
        self.shares, self.own = shares, own

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        assert isinstance(module, Distillation)
        progress, end = trainer.global_step / trainer.max_steps, 0.0
        for side, share in self.shares.items():
            end += share
            if progress < end:
                module.student.image_size = side
                return

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(module, Distillation)
        module.student.image_size = self.own


class Averaged(WeightAveraging):
    """Callback that uses an exponential moving average of the weights for evaluation and saving, but not for training.

    The average spans at most about the last tenth of the steps so far: with `decay` alone, the random weights of step 0
    and the BatchNorm statistics of that step would keep a share in it for a long time.
    """

    def __init__(self, decay: float) -> None:
        def averaged(average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
            steps = torch.as_tensor(count)
            share = ((1 + steps) / (10 + steps)).clamp(max=decay)
            return current + share * (average - current)

        super().__init__(avg_fn=averaged)

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Keep the average on the device: the module is still on the CPU, and copying all weights each step is slow."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, module, stage)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do not restore the trained weights yet: the run folder still has to save the average."""

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the trained weights in the module: the last checkpoint, from which a run may resume, needs both."""


class RunFolder(pl.Callback):
    """Callback that updates student.pt, metrics.json and pictures/ at every validation, and logs the scores."""

    def __init__(self, run_dir: Path, history: History, source: DataSource, facts: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.history = history
        self.source = source
        self.facts = facts
        self.before: dict[str, float] = {}
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"]
        self._started = time.perf_counter() - state["seconds"]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """On resume, write and send the scores of the checkpoint's step if the killed run did not get that far."""
        step, interval = trainer.global_step, int(trainer.val_check_interval) // trainer.accumulate_grad_batches
        self.history.forget_after(step)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and step in self.history.rows:
                logger.log_metrics(self.history.rows[step], step)
        validated = any(name.startswith("val/") for name in self.history.rows.get(step, {}))
        if step % interval == 0 and not trainer.strategy.broadcast(validated):
            trainer.validating = True  # as Lightning sets it for validations during training
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Distillation)
        step = trainer.global_step
        if step == 0:
            self.before = {f"before/{n}": value for n, value in module.metrics.items() if "miou" in n} | module.blind()
        if trainer.world_size > 1:  # share the flags of unreadable samples between all ranks
            unreadable = self.source.skipped_samples.unreadable.to(module.device, torch.uint8)
            torch.distributed.all_reduce(unreadable, torch.distributed.ReduceOp.MAX)
            self.source.skipped_samples.unreadable |= unreadable.cpu().bool()
        if not trainer.is_global_zero:
            return
        metrics = module.metrics | module.evaluator.intervals() | self.before | self.facts
        metrics |= {"steps": step, "images": step * self.facts["images_per_step"], "seconds": round(self.seconds, 1)}
        metrics["images_skipped"] = self.source.skipped
        metrics["images_per_second"] = round(metrics["images"] / self.seconds, 2)
        write_json(self.run_dir / "metrics.json", metrics)
        if step:  # an untrained student is not saved
            save_sam(module.student, self.run_dir / "student.pt")
        self._draw(trainer, module, step)
        scores = {kind: module.metrics.get(f"miou/{kind}", math.nan) for kind in module.evaluator.protocol.kinds}
        miou = "  ".join(f"{kind} {score:.3f}" for kind, score in scores.items())
        log.info(
            "step %d/%d  val mIoU %s  embedding MSE %.5f  cosine %.3f",
            step, trainer.max_steps, miou, module.metrics["embedding_mse"], module.metrics["embedding_cosine"],
        )  # fmt: skip

    def _draw(self, trainer: pl.Trainer, module: Distillation, step: int) -> None:
        pictures = self.run_dir / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        module.evaluator.sheet().save(pictures / f"masks_{step:07d}.png")
        write_curves(self.history.rows, pictures / "curves.png")
        for logger in trainer.loggers:
            logger.log_metrics({"images_skipped": self.source.skipped}, step)
            if isinstance(logger, WandbLogger):
                logger.log_metrics(validation_media(module.evaluator, self.source.skipped_by_tar), step)
