"""Peak arithmetic speed of the machine, and the share of it that a model reaches."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from sam_distill.benchmark.tables import Finding
from sam_distill.benchmark.timing import Contender, time_in_turns

SIDE = 2048  # rows and columns of the matrices
FP32, BF16 = "fp32", "bf16"


def bench_peak(device: str, seconds: float) -> Finding:
    """Measure the peak speed by products of large matrices, in billions of multiplications and additions (GFLOP)."""
    units = 2 * SIDE**3 / 1e9
    matrices = [(FP32, torch.randn(SIDE, SIDE, device=device))]
    matrices.append((BF16, matrices[0][1].bfloat16()))
    contenders = [Contender(name, partial(torch.mm, matrix, matrix), units) for name, matrix in matrices]
    what = f"The most that this machine does: products of {SIDE} x {SIDE} matrices, {device}"
    peak = Finding(what, "GFLOP", time_in_turns(contenders, device, seconds))
    return replace(peak, metrics={f"peak_gflops/{timing.name}": 1 / timing.median for timing in peak.timings})


def with_share_of_peak(finding: Finding, peak: Finding, gflop: float, fp32: str, bf16: str) -> Finding:
    """Return `finding` with a line on how far contenders `fp32` and `bf16` are from the peak, at `gflop` per unit."""
    reached = []
    for precision, name in ((FP32, fp32), (BF16, bf16)):
        best, took = gflop * peak.milliseconds(precision), finding.milliseconds(name)
        reached.append(f"{best:.3g} ms in {precision} ({name}: {took / best:.1f} times as long)")
    line = f"{gflop:.3g} GFLOP, which large matrices' products would take {' or '.join(reached)}"
    return replace(finding, note=f"{line}\n{finding.note}")


def gflop_of(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9
