"""Worker processes of a local pool (hydra/launcher=joblib): each has its own GPU, and all end cleanly.

joblib kills its workers when the main process is interrupted, or when one of them ends. So on a signal the main process
waits, and each worker ends its current job as it would outside a pool, starts no other job, and stays alive.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sam_distill.runs.processes import STOP_SIGNALS

_NAME = "LokyProcess-"  # followed by a number from 1
_has_job = False
_stopped = False  # whether a signal has arrived


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within the context, make SIGTERM, like Ctrl-C, unwind the main process's stack, so that a job's end is recorded.

    Training then installs handlers of its own. If there is a pool, its workers receive the signal and unwind their
    stacks instead, and this process waits for them; after a second signal it does not wait.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        pool = [child.pid for child in multiprocessing.active_children() if child.name.startswith(_NAME) and child.pid]
        if received or not pool:
            raise SystemExit(128 + number)
        received.append(number)
        for pid in pool:
            os.kill(pid, number)

    is_main = threading.current_thread() is threading.main_thread()  # only there does Python allow handlers
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
    """Give this worker one of the GPUs, which are assigned in turn, and its signal handlers. Call it before any job."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(torch.cuda.device_count())]
    worker = int(multiprocessing.current_process().name.removeprefix(_NAME))
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[(worker - 1) % len(devices)]
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)


def run_unless_stopped(job: Callable[[], bool]) -> bool:
    """Run a job in a worker and return its result; False if a signal ends it, or arrived before it."""
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
    """End the current job. The terminal and the main process may both send the same signal: the second is ignored."""
    global _stopped
    before, _stopped = _stopped, True
    if _has_job and not before:
        raise SystemExit(128 + number)
