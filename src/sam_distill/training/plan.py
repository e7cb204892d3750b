"""Estimate of the time and memory that a training run takes, measured on a few steps."""

import time
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LambdaCallback
from rich.console import Console
from rich.table import Table

from sam_distill.runs import processes
from sam_distill.runs.hardware import Hardware, peak_memory, wait_for
from sam_distill.training.datamodule import DistillationData
from sam_distill.training.lightning_module import Distillation, silence_lightning

STEPS = 4  # measured steps
WARM_UP = 2  # steps before the measured ones


def measure_steps(
    module: Distillation, loaders: DistillationData, hardware: Hardware, steps: int
) -> tuple[list[float], float]:
    """Return (seconds of each of `steps` steps, share of the time spent waiting for data). The weights change."""
    silence_lightning()
    starts: list[float] = []  # when each step got its batch
    ends: list[float] = []  # when each step ended

    def end(*_: Any) -> None:
        wait_for(hardware.kind)
        ends.append(time.perf_counter())

    clock = LambdaCallback(on_train_batch_start=lambda *_: starts.append(time.perf_counter()), on_train_batch_end=end)
    arguments: dict[str, Any] = {
        "max_steps": WARM_UP + steps, "limit_val_batches": 0, "callbacks": [clock], "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer = pl.Trainer(**hardware.trainer_arguments() | arguments)
    trainer.fit(module, loaders)
    ends = ends[WARM_UP - 1 :]
    waits = [start - before for start, before in zip(starts[WARM_UP:], ends, strict=False)]
    return [end - before for before, end in pairwise(ends)], sum(waits) / (ends[-1] - ends[0])


def plan_training(
    module: Distillation, loaders: DistillationData, hardware: Hardware, steps: int, accumulate: int
) -> None:
    """Run a few steps and print the time, memory and data wait to expect of all `steps`. Write no files."""
    times, waited = measure_steps(module, loaders, hardware, STEPS)
    each = sum(times) / len(times)
    images = loaders.batch_size * hardware.processes
    epoch = loaders.source.num_train_images
    total = steps * accumulate * images
    table = Table("", "", show_header=False, title=f"What {steps} steps will take")
    table.add_row("images", f"{total}, {total / epoch:.1f} epochs of {epoch}")
    table.add_row("time", f"{timedelta(seconds=round(steps * accumulate * each))} at {images / each:.1f} images/s")
    table.add_row("memory", f"{peak_memory(hardware.kind) / 1e9:.1f} GB so far")
    table.add_row("data", f"{100 * waited:.0f}% of the time is waiting for images")
    table.add_row("with", f"{hardware.resolved_precision} on {hardware.processes} x {hardware.kind}")
    if not processes.is_first():
        return
    console = Console()
    console.print(table)
    if module.requires & module.teacher.provides and module.teacher.capacity >= epoch:
        console.print("the teacher is part of that; it will be faster once the teacher has answered all images")
    console.print("validations not counted")
