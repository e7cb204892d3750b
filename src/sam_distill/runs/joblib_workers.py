"""The worker processes of a local pool, hydra/launcher=joblib: each has a GPU of its own, and all end cleanly.

joblib kills its workers when the first process is interrupted, or when one of them ends. So on a signal the first
process waits, and the workers end the job in hand as ever, begin no other and stay.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sam_distill.runs.processes import STOP_SIGNALS

_NAME = "LokyProcess-"  # and a number from 1
_has_job = False
_stopped = False  # by a signal


@contextmanager
def signals_end_all() -> Iterator[None]:
    """In the first process, SIGTERM, like Ctrl-C, unwinds the stack, so that whatever it ends is recorded; training
    refines this. The workers of a pool unwind theirs, and this process waits for them; a second signal does not wait.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        pool = [child.pid for child in multiprocessing.active_children() if child.name.startswith(_NAME) and child.pid]
        if received or not pool:
            raise SystemExit(128 + number)
        received.append(number)
        for pid in pool:
            os.kill(pid, number)

    is_main = threading.current_thread() is threading.main_thread()  # only there Python allows it
    before = {number: signal.signal(number, end) for number in STOP_SIGNALS if is_main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise SystemExit(128 + received[0])


def is_worker() -> bool:
    return multiprocessing.current_process().name.startswith(_NAME)


def set_up_worker() -> None:
    """Before the jobs of a worker, which takes one of the GPUs: they are dealt out in turn."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(torch.cuda.device_count())]
    worker = int(multiprocessing.current_process().name.removeprefix(_NAME))
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[(worker - 1) % len(devices)]
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)


def unless_stopped(job: Callable[[], bool]) -> bool:
    """The job's answer, in a worker; False if a signal has ended it, or one before it."""
    global _has_job, _stopped
    if _stopped:
        return False
    _has_job = True
    try:
        return job()
    except SystemExit:
        _stopped = True
        return False
    finally:
        _has_job = False


def _on_signal(number: int, frame: FrameType | None) -> None:
    """The terminal and the first process both pass on a signal: the second time is ignored."""
    global _stopped
    before, _stopped = _stopped, True
    if _has_job and not before:
        raise SystemExit(128 + number)
