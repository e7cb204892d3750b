"""The processes of a data-parallel run, as the environment describes them, and loader workers. No torch: quick."""

import multiprocessing.queues
import os
import signal
import sys
import threading
import time

from sam_distill.errors import one_line

# srun's, torchrun's, and those of Lightning's own contract for processes that someone else starts
_RANKS = ("SLURM_PROCID", "RANK", "LOCAL_RANK", "NODE_RANK")
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C, a scheduler's end
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup has ignored
    STOP_SIGNALS.append(signal.SIGHUP)  # the terminal is gone


def launcher() -> str | None:
    """`torchrun` or `srun`, if one of them has started this process; it then starts the others, too."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # Lightning's own rule
    return "srun" if "SLURM_NTASKS" in os.environ and not interactive else None


def started() -> int:
    """How many processes the launcher has started; 1 without one."""
    size = {"torchrun": "WORLD_SIZE", "srun": "SLURM_NTASKS"}.get(launcher() or "", "")
    return int(os.environ.get(size, "1"))


def cores(devices: int) -> int:
    """How many cores this process has for itself, where `devices` processes of this run share a machine."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if launcher() == "srun":  # binds each process to cores of its own
        return min(seen, int(os.environ.get("SLURM_CPUS_PER_TASK", seen)))
    return max(1, seen // devices)


def is_first() -> bool:
    """Whether this process keeps the records and talks to the user."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def rank(devices: int) -> int:
    """This process's place among all, also where no process group has been made. devices: of each node."""
    if launcher() is not None:
        return int(os.environ["SLURM_PROCID" if launcher() == "srun" else "RANK"])
    return int(os.environ.get("NODE_RANK", "0")) * devices + int(os.environ.get("LOCAL_RANK", "0"))


def name() -> str:
    """Names a process that is not the first, in logs and messages."""
    if launcher() is not None:
        return f"rank{rank(1)}"
    node, device = (os.environ.get(key, "0") for key in ("NODE_RANK", "LOCAL_RANK"))
    return f"rank{device}" if node == "0" else f"node{node}rank{device}"


def shared_name() -> str | None:
    """Part of the name of the common folder, known to all processes of this run and no others. None: there is none."""
    env = os.environ
    if launcher() == "srun" and "SLURM_JOB_ID" in env:
        again = f"_restart{env['SLURM_RESTART_COUNT']}" if env.get("SLURM_RESTART_COUNT", "0") != "0" else ""
        return f"slurm_{env['SLURM_JOB_ID']}_{env.get('SLURM_STEP_ID', '0')}{again}"
    if launcher() == "torchrun" and env["TORCHELASTIC_RUN_ID"] != "none":  # what torchrun says without --rdzv-id
        return f"torchrun_{env['TORCHELASTIC_RUN_ID']}"
    return None


def begin_worker(worker: int) -> None:
    """What the worker processes of a loader do first: leave signals to the process they work for, and end with it.

    Ctrl-C and a scheduler's SIGTERM reach all processes, but that one decides what happens then. If it is killed, a
    worker would wait for ever for somebody to take what it has read, and hold its memory and its master's locks.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()


def _end_unsent(error: Exception, _: object) -> None:
    """A batch that can't be handed over: Python would drop it, and the master miss it, or wait for it for ever."""
    why, hint = one_line(error), "trainer.workers=0 needs none, docker run --shm-size=8g gives more"
    line = f"error: a loader worker can't hand over a batch ({why}); if /dev/shm is full: {hint}"
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
