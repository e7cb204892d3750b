"""Timing of code side by side: contenders take turns, so that a noisy machine disturbs all of them alike."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sam_distill.runs.hardware import wait_for

MIN_ROUNDS = 5  # rounds; fewer if they take more than ...
_PATIENCE = 12  # ... so many times the requested seconds


@dataclass(frozen=True)
class Contender:
    """Code to time. run: performs `units` units of work. ours: False for a peer, with which ours are compared."""

    name: str
    run: Callable[[], object]
    units: float = 1.0
    ours: bool = True


@dataclass(frozen=True)
class Timing:
    """Seconds per unit: the median over all rounds, and the middle half of them.

    memory: peak bytes during one call, minus those in use before it; None where that can't be measured.
    """

    name: str
    ours: bool
    median: float
    low: float
    high: float
    rounds: int
    memory: int | None

    @classmethod
    def of(cls, name: str, ours: bool, times: Sequence[float], memory: int | None = None) -> "Timing":
        low, median, high = map(float, np.quantile(times, (0.25, 0.5, 0.75)))
        return cls(name, ours, median, low, high, len(times), memory)


def time_in_turns(
    contenders: Sequence[Contender], device: str, seconds: float = 0, turns: int | None = None
) -> list[Timing]:
    """Time all contenders in turn: for `seconds` each on average, and for at least `MIN_ROUNDS` rounds.

    A first round is not counted. If a round takes very long, such as that of a ViT-H on a CPU, there may be fewer.

    turns: exact number of rounds instead, the first one counted, for code that takes minutes.
    """
    first = [_measured(contender.run, device) for contender in contenders]
    spent = [[took / c.units] if turns else [] for c, (took, _) in zip(contenders, first, strict=True)]
    memory = [used for _, used in first]
    started = time.perf_counter()

    def go_on() -> bool:
        if turns:
            return len(spent[0]) < turns
        passed, wanted = time.perf_counter() - started, seconds * len(contenders)
        return not spent[0] or passed < (_PATIENCE * wanted if len(spent[0]) < MIN_ROUNDS else wanted)

    while go_on():
        for contender, times in zip(contenders, spent, strict=True):
            times.append(_timed(contender.run, device) / contender.units)
    return [
        Timing.of(contender.name, contender.ours, times, used)
        for contender, times, used in zip(contenders, spent, memory, strict=True)
    ]


def _timed(run: Callable[[], object], device: str) -> float:
    begun = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - begun


def _measured(run: Callable[[], object], device: str) -> tuple[float, int | None]:
    """Return seconds and peak bytes of one call: of the GPU, or of this process by Linux's high-water mark, or None."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return _timed(run, device), torch.cuda.max_memory_allocated() - before
    marks = Path("/proc/self/clear_refs")
    if device != "cpu" or not marks.exists():
        return _timed(run, device), None
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # else the reuse of freed memory would not be measured
    marks.write_text("5")  # reset the high-water mark
    before = _status("VmRSS")
    return _timed(run, device), max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Return a size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
