"""What writing a cache will take, measured on a few batches before it is begun."""

import shutil
import time
from datetime import timedelta
from itertools import islice

import torch
from rich.console import Console
from rich.table import Table

from sam_distill.caching.write_cache import CacheJob
from sam_distill.runs.hardware import peak_memory
from sam_distill.types import UserError

BATCHES = 4  # that are measured, after one that is not


@torch.inference_mode()
def plan_cache(job: CacheJob) -> bool:
    """Say what writing a cache will take, and return whether it fits on its disk. Writes nothing."""
    images, hardware = job.images, job.hardware
    job.teacher.sam.to(hardware.kind)
    loader = job.loader(list(range(len(job.blocks))))
    done, sizes, started = 0, [], 0.0
    for turn, batch in enumerate(islice(loader, 1 + BATCHES)):
        sizes += [sum(map(len, content.values())) for content in job.members(batch, job.embed(batch))]
        if turn == 0:
            started = time.perf_counter()
        else:
            done += len(batch)
    if not sizes or not done:
        raise UserError("there are too few images that can be read: nothing to measure")
    each = (time.perf_counter() - started) / done
    there = next(path for path in (job.folder, *job.folder.absolute().parents) if path.exists())
    needed, free = images * sum(sizes) / len(sizes), shutil.disk_usage(there).free
    seconds = round(images * each / hardware.processes)
    table = Table("", "", show_header=False, title=f"What caching {images} images will take")
    table.add_row("disk", f"{needed / 1e9:.2f} GB, {needed / images / 1e3:.0f} kB per image; free: {free / 1e9:.1f} GB")
    table.add_row("time", f"{timedelta(seconds=seconds)} at {1 / each:.1f} images/s per process")
    table.add_row("memory", f"{peak_memory(hardware.kind) / 1e9:.1f} GB so far")
    table.add_row("teacher", f"{job.teacher.checkpoint}, {hardware.num_format} on {hardware.kind}")
    Console().print(table)
    return needed < free
