"""Benchmark of the training loop: its overhead over the bare training step."""

import time
from itertools import pairwise

from sam_distill.benchmark.tables import Finding
from sam_distill.benchmark.timing import Timing
from sam_distill.data.base import collate
from sam_distill.runs.hardware import Hardware, wait_for
from sam_distill.training.datamodule import DistillationData
from sam_distill.training.lightning_module import Distillation
from sam_distill.training.plan import WARM_UP, measure_steps

STEPS = 8  # measured per turn
TURNS = 3  # of both loops, alternating


def bench_step(module: Distillation, loaders: DistillationData, hardware: Hardware) -> Finding:
    """Measure the whole loop of `sam-distill train`, with data loading, against a bare PyTorch loop over one batch."""
    whole, bare, waits = [], [], []
    for _ in range(TURNS):
        times, waited = measure_steps(module, loaders, hardware, STEPS)
        whole += times
        waits.append(waited)
        bare += _bare_steps(module, loaders, hardware)
    images = loaders.batch_size
    timings = [
        Timing.of("sam-distill train", True, [seconds / images for seconds in whole]),
        Timing.of("bare PyTorch loop, one batch again and again", False, [seconds / images for seconds in bare]),
    ]
    what = f"A training step of {images} images, {module.student.image_size} px, {hardware.resolved_precision}"
    return Finding(what, "image", timings, f"waiting for data: {100 * sum(waits) / TURNS:.1f}% of the time")


def _bare_steps(module: Distillation, loaders: DistillationData, hardware: Hardware) -> list[float]:
    stream = iter(loaders.source.train_stream(0, 0, 0, 1, loaders.batch_size))
    batch = collate([next(stream) for _ in range(loaders.batch_size)]).to(hardware.kind)
    module.to(hardware.kind).train()
    optimizer, schedule = module.optim.build(module.trainable, WARM_UP + STEPS)
    ends = []
    for _ in range(WARM_UP + STEPS):
        with hardware.autocast():
            loss = module.strategy.step(module.student, batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        wait_for(hardware.kind)
        ends.append(time.perf_counter())
    return [end - before for before, end in pairwise(ends[WARM_UP - 1 :])]
