"""LightningModule that trains and validates a student, with any strategy."""

import logging
import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from sam_distill.errors import UserError
from sam_distill.evaluate.agreement import Agreement
from sam_distill.evaluate.evaluator import Evaluator, blind
from sam_distill.evaluate.protocol import Target
from sam_distill.models.checkpoints import DESCRIPTION, describe
from sam_distill.models.sam import Sam
from sam_distill.prompts.samplers import PromptSampler
from sam_distill.prompts.sampling import generator
from sam_distill.strategies.base import Strategy
from sam_distill.teachers import Teacher
from sam_distill.training.optimizers import AdamW
from sam_distill.training.sync_batchnorm import SyncBatchNorm
from sam_distill.types import Batch


def requirements(strategy: Strategy, prompts: PromptSampler) -> frozenset[str]:
    """Return the fields of `Batch` that a training step reads. Raise UserError if the prompts don't suit `strategy`."""
    if "annotations" in strategy.requires and not prompts.of_annotations:
        raise UserError(
            "strategy.targets=annotations learns the annotation that a prompt was made from: "
            "take prompts=boxes or prompts=mask_points, with prompts.masks=annotations"
        )
    return strategy.requires | (prompts.requires if "prompts" in strategy.requires else frozenset())


def ends_step(trainer: pl.Trainer, index: int) -> bool:
    """Whether the batch of this index is the last of an optimizer step, which has `accumulate_grad_batches` of them."""
    return (index + 1) % trainer.accumulate_grad_batches == 0


def ends_logged_step(trainer: pl.Trainer, index: int) -> bool:
    """Whether this batch ends an optimizer step that is logged. Call it after the batch, when the step is counted."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return ends_step(trainer, index) and trainer.global_step % every == 0


class Distillation(pl.LightningModule):
    """LightningModule that trains `student` by `strategy` and validates it by `agreement`. Its state has no teacher."""

    def __init__(
        self,
        student: Sam,
        strategy: Strategy,
        teacher: Teacher,
        prompts: PromptSampler,
        optim: AdamW,
        agreement: Agreement,
        sync_batchnorm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.requires = requirements(strategy, prompts)
        missing = self.requires - teacher.provides - {"prompts", "annotations"}  # data sources check annotations
        if missing:
            raise UserError(f"strategy={strategy.name} needs {', '.join(sorted(missing))}, which no one provides")
        self.student = student.to(memory_format=torch.channels_last)
        self.strategy = strategy
        self.prompts = prompts
        self.optim = optim
        self.sync_batchnorm = sync_batchnorm
        self.seed = seed
        self.evaluator = Evaluator(agreement)
        self.metrics: dict[str, float] = {}  # of the latest validation
        self.validated_at: int | None = None  # step of the latest validation
        self.teacher = teacher
        self._step_logs: list[Mapping[str, Any]] = []  # of the current optimizer step, one per batch
        self._teacher_cache: dict[tuple[str, ...], tuple[Batch, Tensor, list[Target]]] = {}
        self._unchecked: list[tuple[int, list[str], Tensor]] = []  # (step, image keys, loss)
        self.trainable = strategy.trainable(student)
        optim.check(self.trainable)
        student.requires_grad_(False)
        for part in self.trainable.values():
            part.requires_grad_(True)
        self.train()  # Lightning does not call it: it restores the modes that it finds

    def train(self, mode: bool = True) -> "Distillation":
        """Set the mode of the trainable parts. Frozen parts stay in eval mode: BatchNorm's statistics would drift."""
        super().train(False)
        for part in self.trainable.values():
            part.train(mode)
        self.training = mode
        return self

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """Seed torch: its draws, such as DropPath's masks, differ between ranks and are the same after a resume."""
        place = f"{self.global_rank}/{index % self.trainer.accumulate_grad_batches}"
        torch.manual_seed(int(generator(self.seed, place, self.global_step, "torch").integers(2**63)))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        batch = self.teacher.fill(batch, self.requires)
        if "prompts" in self.requires:
            batch = replace(batch, prompts=self.prompts.draw(batch))
        with SyncBatchNorm() if self.sync_batchnorm else nullcontext():
            out = self.strategy.step(self.student, batch)
        self._unchecked.append((self.global_step, batch.keys, out.loss.detach()))
        self._step_logs.append({"loss": out.loss.detach()} | out.logs)
        if ends_step(self.trainer, index):
            batches, self._step_logs = self._step_logs, []
            if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                self._check_losses()
                mean = {name: sum(logs[name] for logs in batches) / len(batches) for name in batches[0]}
                # Without "step", Lightning would log training steps and validations under a number one too low.
                logs = {f"train/{name}": value for name, value in self._over_ranks(mean).items()}
                self.log_dict(logs | {"step": self.global_step + 1.0}, batch_size=len(batch))
        return out.loss

    def _check_losses(self) -> None:
        """Raise UserError if a loss is not finite. Do not call it at every step: reading a loss makes a GPU wait."""
        unchecked, self._unchecked = self._unchecked, []
        values = torch.stack([loss for *_, loss in unchecked]).tolist() if unchecked else []
        for (step, keys, _), value in zip(unchecked, values, strict=True):
            if not math.isfinite(value):
                message = f"the loss is {value} at step {step} (images {', '.join(keys)})"
                raise UserError(f"{message}: try a smaller optim.lr, or trainer.precision=fp32")

    def _check_finite(self) -> None:
        """Raise UserError if a loss or a weight is not finite, before weights are evaluated or saved."""
        self._check_losses()  # not enough: a gradient may not be finite although the loss is
        weights = [value for value in self.student.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in weights]).all():
            message = f"weights are no numbers any more after step {self.global_step}, though all losses were"
            raise UserError(f"{message}: try a smaller optim.lr, or trainer.precision=fp32")

    def _over_ranks(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """Return means over all ranks, by one reduction: Lightning's `sync_dist` makes ranks wait for each value."""
        if self.trainer.world_size == 1:
            return dict(logs)
        values = torch.stack([torch.as_tensor(value, device=self.device).detach().float() for value in logs.values()])
        torch.distributed.all_reduce(values)
        return dict(zip(logs, values / self.trainer.world_size, strict=True))

    def on_validation_epoch_start(self) -> None:
        self._check_finite()
        self.evaluator.reset()

    def validation_step(self, batch: Batch, _: int) -> None:
        teacher_embedding, targets = self._teacher_outputs(batch)
        embedding = self.student.encode(batch.images, batch.sizes)
        self.evaluator.update(self.evaluator.protocol.view(self.student, embedding, batch), teacher_embedding, targets)

    def on_validation_epoch_end(self) -> None:
        self.metrics, self.validated_at = self.evaluator.compute(), self.global_step
        logs = {f"val/{name}": float(value) for name, value in self.metrics.items()}
        self.log_dict(logs | {"step": float(self.global_step)})

    def _teacher_outputs(self, batch: Batch) -> tuple[Tensor, list[Target]]:
        """Return the teacher's embedding and masks, computed once per batch: the validation set is small and fixed."""
        keys = tuple(batch.keys)
        if keys not in self._teacher_cache:
            self.teacher.sam.to(self.device)
            embedding, protocol = self.teacher.embed(batch), self.evaluator.protocol
            self._teacher_cache[keys] = (
                batch,
                embedding,
                protocol.make_targets(protocol.view(self.teacher.sam, embedding, batch)),
            )
        return self._teacher_cache[keys][1:]

    @torch.no_grad()
    def blind(self) -> dict[str, float]:
        """Return the validation scores of the blind baseline (see `blind`). All ranks have to call this."""
        embeddings = torch.cat([embedding for _, embedding, _ in self._teacher_cache.values()]).float()
        totals: Any = self.all_gather(embeddings.sum(0))  # [ranks, 256, 64, 64]; [256, 64, 64] on one rank
        counts: Any = self.all_gather(torch.tensor(len(embeddings), device=self.device))
        total, images = totals.reshape(-1, *embeddings.shape[1:]).sum(0), int(counts.sum())
        evaluator = Evaluator(self.evaluator.protocol).to(self.device)
        return blind(evaluator, self.teacher.sam, self._teacher_cache.values(), total, images)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.optim.build(self.trainable, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Apply the current options to a resumed optimizer, which has got back the options that it was saved with."""
        (optimizer,), (schedule,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        assert isinstance(schedule.scheduler, LambdaLR)
        self.optim.renew(optimizer, schedule.scheduler, self.trainable, self.trainer.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_finite()
        checkpoint[DESCRIPTION] = describe(self.student)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint.get(DESCRIPTION)
        if saved != describe(self.student):
            raise UserError(f"resume: the checkpoint holds {saved}, but this run builds {describe(self.student)}")


def silence_lightning() -> None:
    """Hide Lightning's messages and warnings: they are about choices that are made here on purpose."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)  # the report of +trainer.profiler=simple
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
