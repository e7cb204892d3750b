"""The one LightningModule, host to every strategy."""

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

from sam_distill.evaluate.agreement import Agreement
from sam_distill.evaluate.judge import Judge, blind
from sam_distill.evaluate.protocol import Target
from sam_distill.models.checkpoints import DESCRIPTION, describe
from sam_distill.models.sam import Sam
from sam_distill.prompts.samplers import PromptSampler
from sam_distill.prompts.sampling import generator
from sam_distill.strategies.base import Strategy
from sam_distill.teachers import Teacher
from sam_distill.training.optimizers import AdamW
from sam_distill.training.sync_batchnorm import SyncBatchNorm
from sam_distill.types import Batch, UserError


def requirements(strategy: Strategy, prompts: PromptSampler) -> frozenset[str]:
    """The fields of `Batch` that a training step reads."""
    if "annotations" in strategy.requires and not prompts.of_annotations:
        raise UserError(
            "strategy.targets=annotations learns the annotation that a prompt was made from: "
            "take prompts=boxes or prompts=mask_points, with prompts.masks=annotations"
        )
    return strategy.requires | (prompts.requires if "prompts" in strategy.requires else frozenset())


def ends_step(trainer: pl.Trainer, index: int) -> bool:
    """Whether the batch of this index is the last of an optimizer step, of which there may be `accumulate`."""
    return (index + 1) % trainer.accumulate_grad_batches == 0


def ends_logged_step(trainer: pl.Trainer, index: int) -> bool:
    """When that batch is done: whether its step is logged."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return ends_step(trainer, index) and trainer.global_step % every == 0


class Distillation(pl.LightningModule):
    """Trains `student` by `strategy`, validates it by `agreement`. The teacher is not part of the module's state."""

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
        missing = self.requires - teacher.provides - {"prompts", "annotations"}  # data say themselves if they have none
        if missing:
            raise UserError(f"strategy={strategy.name} needs {', '.join(sorted(missing))}, which no one provides")
        self.student = student.to(memory_format=torch.channels_last)
        self.strategy = strategy
        self.prompts = prompts
        self.optim = optim
        self.sync_batchnorm = sync_batchnorm
        self.seed = seed
        self.judge = Judge(agreement)
        self.metrics: dict[str, float] = {}  # of the latest validation, ...
        self.validated_at: int | None = None  # ... and its step
        self._teacher = (teacher,)  # in a tuple, where nn.Module does not find it
        self._step_logs: list[Mapping[str, Any]] = []  # of the batches of the step in hand
        self._answers: dict[tuple[str, ...], tuple[Batch, Tensor, list[Target]]] = {}
        self._unchecked: list[tuple[int, list[str], Tensor]] = []  # losses, with their steps and image keys
        self.trainable = strategy.trainable(student)
        optim.check(self.trainable)
        student.requires_grad_(False)
        for part in self.trainable.values():
            part.requires_grad_(True)
        self.train()  # Lightning calls it no more: it restores the modes that it finds

    @property
    def teacher(self) -> Teacher:
        return self._teacher[0]

    def train(self, mode: bool = True) -> "Distillation":
        """Frozen parts stay in eval mode whoever calls this: BatchNorm's statistics would drift."""
        super().train(False)
        for part in self.trainable.values():
            part.train(mode)
        self.training = mode
        return self

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """What torch draws now, such as DropPath's masks, differs between ranks, and is the same after a resume."""
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
                # Lightning would count this step from 0, and validations from -1.
                logs = {f"train/{name}": value for name, value in self._over_ranks(mean).items()}
                self.log_dict(logs | {"step": self.global_step + 1.0}, batch_size=len(batch))
        return out.loss

    def _check_losses(self) -> None:
        """A loss that is not finite ends the run. Not at every step: reading it would make a GPU wait."""
        unchecked, self._unchecked = self._unchecked, []
        values = torch.stack([loss for *_, loss in unchecked]).tolist() if unchecked else []
        for (step, keys, _), value in zip(unchecked, values, strict=True):
            if not math.isfinite(value):
                message = f"the loss is {value} at step {step} (images {', '.join(keys)})"
                raise UserError(f"{message}: try a smaller optim.lr, or trainer.precision=fp32")

    def _check_finite(self) -> None:
        """Before weights are judged or saved. Finite losses are not enough: a gradient may not have been finite."""
        self._check_losses()
        weights = [value for value in self.student.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in weights]).all():
            message = f"weights are no numbers any more after step {self.global_step}, though all losses were"
            raise UserError(f"{message}: try a smaller optim.lr, or trainer.precision=fp32")

    def _over_ranks(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """Means over all ranks, in one go: Lightning's `sync_dist` has all of them wait for each value."""
        if self.trainer.world_size == 1:
            return dict(logs)
        values = torch.stack([torch.as_tensor(value, device=self.device).detach().float() for value in logs.values()])
        torch.distributed.all_reduce(values)
        return dict(zip(logs, values / self.trainer.world_size, strict=True))

    def on_validation_epoch_start(self) -> None:
        self._check_finite()
        self.judge.reset()

    def validation_step(self, batch: Batch, _: int) -> None:
        teacher_embedding, targets = self._ask_teacher(batch)
        embedding = self.student.encode(batch.images, batch.sizes)
        self.judge.update(self.judge.protocol.see(self.student, embedding, batch), teacher_embedding, targets)

    def on_validation_epoch_end(self) -> None:
        self.metrics, self.validated_at = self.judge.compute(), self.global_step
        logs = {f"val/{name}": float(value) for name, value in self.metrics.items()}
        self.log_dict(logs | {"step": float(self.global_step)})

    def _ask_teacher(self, batch: Batch) -> tuple[Tensor, list[Target]]:
        """The teacher's embedding and masks. The validation set is small and fixed: it is asked once per batch."""
        keys = tuple(batch.keys)
        if keys not in self._answers:
            self.teacher.sam.to(self.device)
            embedding, protocol = self.teacher.embed(batch), self.judge.protocol
            self._answers[keys] = batch, embedding, protocol.ask(protocol.see(self.teacher.sam, embedding, batch))
        return self._answers[keys][1:]

    @torch.no_grad()
    def blind(self) -> dict[str, float]:
        """The score of never looking, on the validation images; all ranks take part."""
        own = torch.cat([embedding for _, embedding, _ in self._answers.values()]).float()
        totals: Any = self.all_gather(own.sum(0))  # [ranks, 256, 64, 64], or just [256, 64, 64] on one
        counts: Any = self.all_gather(torch.tensor(len(own), device=self.device))
        total, images = totals.reshape(-1, *own.shape[1:]).sum(0), int(counts.sum())
        judge = Judge(self.judge.protocol).to(self.device)
        return blind(judge, self.teacher.sam, self._answers.values(), total, images)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.optim.build(self.trainable, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A resumed optimizer has the options back that it was saved with; what is asked for now is put in place."""
        (optimizer,), (schedule,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        assert isinstance(schedule.scheduler, LambdaLR)
        self.optim.renew(optimizer, schedule.scheduler, self.trainable, self.trainer.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_finite()
        checkpoint[DESCRIPTION] = describe(self.student)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        held = checkpoint.get(DESCRIPTION)
        if held != describe(self.student):
            raise UserError(f"resume: the checkpoint holds {held}, but this run builds {describe(self.student)}")


def silence_lightning() -> None:
    """Lightning's advice is about choices that are made here on purpose."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)  # what +trainer.profiler=simple has found
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
