"""The one LightningModule, host to every strategy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sam_distill.engine.judge import Judge
from sam_distill.engine.optim import AdamW
from sam_distill.engine.sync_batchnorm import SyncBatchNorm
from sam_distill.evaluate.agreement import Agreement, Target
from sam_distill.models.checkpoints import DESCRIPTION, describe
from sam_distill.models.sam import Sam
from sam_distill.strategies.base import Strategy
from sam_distill.teachers import LiveTeacher
from sam_distill.types import Batch, UserError


class Distillation(pl.LightningModule):
    """Trains `student` by `strategy`, validates it by `agreement`. The teacher is not part of the module's state."""

    def __init__(
        self,
        student: Sam,
        strategy: Strategy,
        teacher: LiveTeacher,
        optim: AdamW,
        agreement: Agreement,
        sync_batchnorm: bool = False,
    ) -> None:
        super().__init__()
        missing = strategy.requires - teacher.provides
        if missing:
            raise UserError(
                f"strategy {type(strategy).__name__} needs {', '.join(sorted(missing))}, which no one provides"
            )
        self.student = student.to(memory_format=torch.channels_last)
        self.strategy = strategy
        self.optim = optim
        self.sync_batchnorm = sync_batchnorm
        self.judge = Judge(agreement)
        self.metrics: dict[str, float] = {}  # of the latest validation, ...
        self.validated_at: int | None = None  # ... and its step
        self._teacher = (teacher,)  # in a tuple, where nn.Module does not find it
        self._answers: dict[tuple[str, ...], tuple[Batch, Tensor, list[Target]]] = {}
        self._trainable = strategy.trainable(student)
        student.requires_grad_(False)
        for part in self._trainable.values():
            part.requires_grad_(True)

    @property
    def teacher(self) -> LiveTeacher:
        return self._teacher[0]

    def train(self, mode: bool = True) -> Distillation:
        """Frozen parts stay in eval mode whoever calls this: BatchNorm's statistics would drift."""
        super().train(False)
        for part in self._trainable.values():
            part.train(mode)
        self.training = mode
        return self

    def training_step(self, batch: Batch, _: int) -> Tensor:
        batch = self.teacher.fill(batch)
        with SyncBatchNorm() if self.sync_batchnorm else nullcontext():
            out = self.strategy.step(self.student, batch)
        if not torch.isfinite(out.loss):
            raise UserError(
                f"the loss is {out.loss.item()} at step {self.global_step} (images {', '.join(batch.keys)}): "
                "try a smaller optim.lr, or trainer.precision=fp32"
            )
        logs = self._over_ranks({"loss": out.loss} | out.logs)
        self.log("train/loss", logs.pop("loss"), prog_bar=True, batch_size=len(batch))
        # Lightning would count this step from 0, and validations from -1.
        named = {f"train/{name}": value for name, value in logs.items()} | {"step": self.global_step + 1.0}
        self.log_dict(named, batch_size=len(batch))
        return out.loss

    def _over_ranks(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """Means over all ranks where a step is logged; between those steps, what this rank sees will do."""
        if self.trainer.world_size == 1 or (self.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return dict(logs)
        values = torch.stack([torch.as_tensor(value, device=self.device).detach().float() for value in logs.values()])
        torch.distributed.all_reduce(values)
        return dict(zip(logs, values / self.trainer.world_size, strict=True))

    def on_validation_epoch_start(self) -> None:
        self.judge.reset()

    def validation_step(self, batch: Batch, _: int) -> None:
        teacher_embedding, targets = self._ask_teacher(batch)
        embedding = self.student.encode(batch.images, batch.sizes)
        self.judge.update(self.student, embedding, batch, teacher_embedding, targets)

    def on_validation_epoch_end(self) -> None:
        self.metrics, self.validated_at = self.judge.compute(), self.global_step
        logs = {f"val/{name}": float(value) for name, value in self.metrics.items()}
        self.log_dict(logs | {"step": float(self.global_step)})

    def _ask_teacher(self, batch: Batch) -> tuple[Tensor, list[Target]]:
        """The teacher's embedding and masks. The validation set is small and fixed: it is asked once per batch."""
        keys = tuple(batch.keys)
        if keys not in self._answers:
            self.teacher.sam.to(self.device)
            embedding = self.teacher.sam.encode(batch.images, batch.sizes)
            self._answers[keys] = batch, embedding, self.judge.agreement.ask(self.teacher.sam, embedding, batch)
        return self._answers[keys][1:]

    @torch.no_grad()
    def blind(self) -> dict[str, float]:
        """What an encoder scores that never looks: the teacher's mean embedding, the same for every validation image.

        Large masks forgive a lot, so a student has learned something only as far as it beats this.
        """
        judge = Judge(self.judge.agreement).to(self.device)
        own = torch.cat([embedding for _, embedding, _ in self._answers.values()])
        count = torch.tensor(float(len(own)), device=self.device)
        totals: Any = self.all_gather(own.sum(0))  # [ranks, 256, 64, 64], or just [256, 64, 64] on one
        counts: Any = self.all_gather(count)
        mean = totals.reshape(-1, *own.shape[1:]).sum(0, keepdim=True) / counts.sum()
        for batch, embedding, targets in self._answers.values():
            judge.update(self.student, mean.expand_as(embedding), batch, embedding, targets)
        return judge.compute()

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.optim.build(self._trainable, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[DESCRIPTION] = describe(self.student)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        held = checkpoint.get(DESCRIPTION)
        if held != describe(self.student):
            raise UserError(f"resume: the checkpoint holds {held}, but this run builds {describe(self.student)}")
