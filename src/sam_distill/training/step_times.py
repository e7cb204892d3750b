"""Time spent in each part of a training step: data, teacher, encoder, decoder, loss, optimizer."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.hooks import RemovableHandle

from sam_distill.runs.hardware import wait_for
from sam_distill.training.lightning_module import Distillation, ends_logged_step, ends_step
from sam_distill.types import Masks

_WARM_UP = 2  # first steps, not counted: kernels are chosen, memory is allocated


class StepTimes(pl.Callback):
    """Callback that logs `time/PART`, milliseconds per step, averaged between two log lines.

    Forward and backward of a part count together. Each mark adds the time since the last mark to a part. On a GPU every
    mark waits for queued kernels, so the whole step takes longer than without this callback.
    """

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._last = time.perf_counter()
        self._training = False
        self._device = "cpu"
        self._handles: list[RemovableHandle] = []

    def _mark(self, part: str | None) -> None:
        if not self._training:
            return
        wait_for(self._device)
        now = time.perf_counter()
        if part is not None:
            self._spent[part] += now - self._last
        self._last = now

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Distillation)

        def mark(part: str) -> Callable[..., None]:
            return lambda *_: self._mark(part)

        def mark_backward(part: str) -> Callable[..., None]:
            """Return a forward hook that marks `part`, which follows the module, when its output's gradient exists."""

            def hook(_: Any, __: Any, output: Any) -> None:
                tensor = output.low_res if isinstance(output, Masks) else output
                if tensor.requires_grad:
                    tensor.register_hook(mark(part))  # the backward pass of `part` is then done

            return hook

        encoder, decoder = module.student.image_encoder, module.student.mask_decoder
        teacher = module.teacher.sam
        self._handles = [
            encoder.register_forward_pre_hook(mark("teacher")),
            encoder.register_forward_hook(mark("encoder")),
            encoder.register_forward_hook(mark_backward("decoder" if "prompts" in module.requires else "loss")),
            decoder.register_forward_pre_hook(mark("loss")),
            decoder.register_forward_hook(mark("decoder")),
            decoder.register_forward_hook(mark_backward("loss")),
            teacher.mask_decoder.register_forward_pre_hook(mark("loss")),
            teacher.mask_decoder.register_forward_hook(mark("teacher")),
        ]
        self._training, self._device = True, module.device.type
        self._mark(None)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self._mark("data")

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._mark("loss")

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Distillation)
        self._mark("encoder" if "image_encoder" in module.trainable else "decoder")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self._mark("optimizer")
        if not ends_step(trainer, index):
            return
        self._steps += 1
        if trainer.global_step <= _WARM_UP:
            self._reset()
        elif ends_logged_step(trainer, index):
            module.log_dict({f"time/{part}": 1000 * s / self._steps for part, s in self._spent.items()})
            self._reset()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._training = False

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._training = bool(self._handles)
        self._mark(None)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()

    def _reset(self) -> None:
        self._spent.clear()
        self._steps = 0
