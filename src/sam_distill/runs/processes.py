"""Processes of a data-parallel run, as the environment describes them; loader workers. Quick to import: no torch."""

import multiprocessing.queues
import os
import signal
import sys
import threading
import time

from sam_distill.errors import one_line

# variables of srun, of torchrun, and of Lightning for processes that it has not started itself
_RANKS = ("SLURM_PROCID", "RANK", "LOCAL_RANK", "NODE_RANK")
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C; a scheduler ends the job
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
    STOP_SIGNALS.append(signal.SIGHUP)  # the terminal is closed


def launcher() -> str | None:
    """Return `torchrun` or `srun` if it has started this process, and therefore all others, too; else None."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # the same rule as in Lightning
    return "srun" if "SLURM_NTASKS" in os.environ and not interactive else None


def launched() -> int:
    """Return how many processes the launcher has started; 1 without a launcher."""
    size = {"torchrun": "WORLD_SIZE", "srun": "SLURM_NTASKS"}.get(launcher() or "", "")
    return int(os.environ.get(size, "1"))


def cores(devices: int) -> int:
    """Return how many cores this process has for itself, if `devices` processes of this run share the machine."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if launcher() == "srun":  # srun binds each process to its own cores
        return min(seen, int(os.environ.get("SLURM_CPUS_PER_TASK", seen)))
    return max(1, seen // devices)


def is_first() -> bool:
    """Whether this is the first process, which keeps the records and prints messages."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def rank(devices: int) -> int:
    """Return this process's rank among all, even if no process group has been created. devices: per node."""
    if launcher() is not None:
        return int(os.environ["SLURM_PROCID" if launcher() == "srun" else "RANK"])
    return int(os.environ.get("NODE_RANK", "0")) * devices + int(os.environ.get("LOCAL_RANK", "0"))


def rank_name() -> str:
    """Return the name of a process that is not the first, for log files and messages."""
    if launcher() is not None:
        return f"rank{rank(1)}"
    node, device = (os.environ.get(key, "0") for key in ("NODE_RANK", "LOCAL_RANK"))
    return f"rank{device}" if node == "0" else f"node{node}rank{device}"


def shared_name() -> str | None:
    """Return a name for the common folder, known to all processes of this run but no others; None if there is none."""
    env = os.environ
    if launcher() == "srun" and "SLURM_JOB_ID" in env:
        again = f"_restart{env['SLURM_RESTART_COUNT']}" if env.get("SLURM_RESTART_COUNT", "0") != "0" else ""
        return f"slurm_{env['SLURM_JOB_ID']}_{env.get('SLURM_STEP_ID', '0')}{again}"
    if launcher() == "torchrun" and env["TORCHELASTIC_RUN_ID"] != "none":  # torchrun's value without --rdzv-id
        return f"torchrun_{env['TORCHELASTIC_RUN_ID']}"
    return None


def begin_worker(worker: int) -> None:
    """Initialise a worker process of a loader: ignore stop signals, and exit when its parent process has ended.

    Ctrl-C and a scheduler's SIGTERM reach all processes, but the parent decides what happens then. If it is killed, a
    worker would wait for ever for somebody to take what it has read, and hold its memory and the parent's locks.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_exit_unsent)  # type: ignore[attr-defined]
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_unsent(error: Exception, _: object) -> None:
    """Exit, as a batch can't be sent: Python would drop it, and the parent would miss it or wait for it for ever."""
    why, hint = one_line(error), "trainer.workers=0 needs none, docker run --shm-size=8g gives more"
    line = f"error: a loader worker can't hand over a batch ({why}); if /dev/shm is full: {hint}"
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
