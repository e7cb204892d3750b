"""What a job will take, measured on a few batches before it is begun."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from datetime import timedelta
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from sam_distill.engine.caching import CacheJob
from sam_distill.engine.datamodule import Loaders
from sam_distill.engine.hardware import Hardware
from sam_distill.engine.module import Distillation, quieten
from sam_distill.types import UserError

BATCHES = 4  # that are measured, ...
WARM_UP = 2  # ... after so many steps of training, or one batch of caching


@torch.inference_mode()
def plan_cache(job: CacheJob) -> bool:
    """Say what writing a cache will take, and return whether it fits on its disk. Writes nothing."""
    images, hardware = job.images, job.hardware
    job.teacher.sam.to(hardware.kind)
    loader = job.loader(list(range(len(job.blocks))))
    done, sizes, started = 0, [], 0.0
    for turn, (_, prepared) in enumerate(islice(loader, 1 + BATCHES)):
        sizes += [sum(map(len, content.values())) for content in job.members(prepared, job.embed(prepared))]
        if turn == 0:
            started = time.perf_counter()
        else:
            done += len(prepared)
    if not sizes or not done:
        raise UserError("there are too few images that can be read: nothing to measure")
    each = (time.perf_counter() - started) / done
    needed, free = images * sum(sizes) / len(sizes), _free(job.folder)
    seconds = round(images * each / (hardware.devices * hardware.nodes))
    table = Table("", "", show_header=False, title=f"What caching {images} images will take")
    table.add_row("disk", f"{needed / 1e9:.2f} GB, {needed / images / 1e3:.0f} kB per image; free: {free / 1e9:.1f} GB")
    table.add_row("time", f"{timedelta(seconds=seconds)} at {1 / each:.1f} images/s per process")
    table.add_row("memory", f"{_peak_memory(hardware.kind) / 1e9:.1f} GB so far")
    table.add_row("teacher", f"{job.teacher.checkpoint}, {hardware.num_format} on {hardware.kind}")
    Console().print(table)
    return needed < free


class _Clock(pl.Callback):
    """When each step got its batch, and when it ended."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measure_steps(module: Distillation, loaders: Loaders, hardware: Hardware, steps: int) -> tuple[list[float], float]:
    """(seconds of each of so many steps, the share of them spent waiting for data). The weights change."""
    quieten()
    clock = _Clock()
    trainer = pl.Trainer(
        **hardware.trainer_arguments(), max_steps=WARM_UP + steps, max_epochs=-1, limit_val_batches=0,
        callbacks=[clock], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loaders)
    starts, ends = clock.starts[WARM_UP:], clock.ends[WARM_UP - 1 :]
    waits = [start - before for start, before in zip(starts, ends, strict=False)]
    return [end - before for before, end in pairwise(ends)], sum(waits) / (ends[-1] - ends[0])


def plan_training(module: Distillation, loaders: Loaders, hardware: Hardware, steps: int, accumulate: int) -> None:
    """Take a few steps, which are forgotten, and say what all of them will take. Writes nothing."""
    times, waited = measure_steps(module, loaders, hardware, BATCHES)
    each = sum(times) / len(times)
    images = loaders.batch_size * hardware.devices * hardware.nodes
    epoch = loaders.source.num_train_images
    total = steps * accumulate * images
    table = Table("", "", show_header=False, title=f"What {steps} steps will take")
    table.add_row("images", f"{total}, {total / epoch:.1f} epochs of {epoch}")
    table.add_row("time", f"{timedelta(seconds=round(steps * accumulate * each))} at {images / each:.1f} images/s")
    table.add_row("memory", f"{_peak_memory(hardware.kind) / 1e9:.1f} GB so far")
    table.add_row("data", f"{100 * waited:.0f}% of the time is waiting for images")
    table.add_row("with", f"{hardware.num_format} on {hardware.devices * hardware.nodes} x {hardware.kind}")
    console = Console()
    console.print(table)
    if module.requires & module.teacher.provides and module.teacher.capacity >= epoch:
        console.print("the teacher is part of that; it will be faster once the teacher has answered all images")
    console.print("validations not counted")


def _free(folder: Path) -> int:
    """Bytes free on the disk where `folder` is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _peak_memory(kind: str) -> int:
    """Bytes, of the GPU if there is one, else of this process."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
