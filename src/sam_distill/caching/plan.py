"""Estimate of the disk space, time and memory that writing a cache takes, measured on a few batches beforehand."""

import shutil
import time
from datetime import timedelta
from itertools import islice

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_distill.caching.write_cache import CacheJob
from sam_distill.errors import UserError
from sam_distill.runs import processes
from sam_distill.runs.hardware import peak_memory

BATCHES = 4  # batches to measure, after one that is not measured


@torch.inference_mode()
def plan_cache(job: CacheJob) -> bool:
    """Print what writing the cache will take, and return whether it fits on its disk. Write nothing."""
    images, hardware = job.images, job.hardware
    job.teacher.sam.to(hardware.kind)
    loader = job.loader(list(range(len(job.blocks))))
    measured, sizes, started = 0, [], 0.0
    for turn, batch in enumerate(islice(loader, 1 + BATCHES)):
        sizes += [sum(map(len, content.values())) for content in job.members(batch, job.embed(batch))]
        if turn == 0:
            started = time.perf_counter()
        else:
            measured += len(batch)
    if not sizes or not measured:
        raise UserError("there are too few images that can be read: nothing to measure")
    seconds_per_image = (time.perf_counter() - started) / measured
    existing = next(path for path in (job.folder, *job.folder.absolute().parents) if path.exists())
    needed, free = images * sum(sizes) / len(sizes), shutil.disk_usage(existing).free
    seconds = round(images * seconds_per_image / hardware.processes)
    table = Table("", "", show_header=False, title=f"What caching {images} images will take")
    table.add_row("disk", f"{needed / 1e9:.2f} GB, {needed / images / 1e3:.0f} kB per image; free: {free / 1e9:.1f} GB")
    table.add_row("time", f"{timedelta(seconds=seconds)} at {1 / seconds_per_image:.1f} images/s per process")
    table.add_row("memory", f"{peak_memory(hardware.kind) / 1e9:.1f} GB so far")
    table.add_row("teacher", Text(f"{job.teacher.checkpoint}, {hardware.resolved_precision} on {hardware.kind}"))
    if processes.is_first():
        Console().print(table)
    return needed < free
