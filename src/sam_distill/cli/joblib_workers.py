"""The worker processes of a local pool, hydra/launcher=joblib: each has a GPU of its own, and all end cleanly.

joblib kills its workers when the first process is interrupted, or when one of them ends. So on a signal the first
process waits, and the workers end the job in hand as ever, begin no other and stay.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from types import FrameType

_NAME = "LokyProcess-"  # and a number from 1
_busy = False  # with a job
_stopped = False  # by a signal


def workers() -> list[int]:
    """Process ids of this process's pool."""
    return [child.pid for child in multiprocessing.active_children() if child.name.startswith(_NAME) and child.pid]


def is_worker() -> bool:
    return multiprocessing.current_process().name.startswith(_NAME)


def set_up_worker() -> None:
    """Before the jobs of a worker."""
    _take_a_gpu(int(multiprocessing.current_process().name.removeprefix(_NAME)))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)


def unless_stopped(job: Callable[[], bool]) -> bool:
    """The job's answer, in a worker; False if a signal has ended it, or one before it."""
    global _busy, _stopped
    if _stopped:
        return False
    _busy = True
    try:
        return job()
    except SystemExit:
        _stopped = True
        return False
    finally:
        _busy = False


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Both the terminal and the first process tell of a signal: the second time it is no news."""
    global _stopped
    before, _stopped = _stopped, True
    if _busy and not before:
        raise SystemExit(128 + number)


def _take_a_gpu(worker: int) -> None:
    """Workers take the GPUs in turn."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[(worker - 1) % len(devices)]
