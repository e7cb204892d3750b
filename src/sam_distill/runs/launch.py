"""Start and watch the other processes of a data-parallel run if neither torchrun nor srun has started them.

Lightning (2.6) could start them, too, but within five seconds of a failure it sends SIGKILL to all processes, including
the first one, which then can't print or record the reason.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sam_distill.errors import UserError
from sam_distill.runs import processes, status
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.overrides import quoted_override

STOPPED = {128 + number for number in processes.STOP_SIGNALS}  # exit statuses after a stop signal
PATIENCE = 10.0  # seconds for the others to end by themselves once one process has ended

_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@contextmanager
def all_processes(hardware: Hardware, run_dir: Path) -> Iterator[None]:
    """Run the body in every process of the run. Whatever ends it, no process goes on for long after it."""
    _check_launcher(hardware)
    if hardware.processes == 1:
        yield
        return
    own_launcher = processes.launcher() is None
    if own_launcher and "OMP_NUM_THREADS" not in os.environ:  # torchrun and srun do so themselves
        torch.set_num_threads(processes.cores(hardware.devices))
    before = dict(os.environ)
    children = _start(hardware, run_dir) if own_launcher and "LOCAL_RANK" not in os.environ else []
    finished = threading.Event()
    if own_launcher:
        threading.Thread(target=_watch, args=(children, os.getppid(), run_dir, finished), daemon=True).start()
    try:
        yield
    except SystemExit:
        _wait(children, 3)  # they have received the signal, too
        raise
    except Exception as error:
        if any(text in str(error) for text in _LOST_CONNECTION):
            raise UserError(_exit_report(children)) from error
        raise
    else:
        _wait(children, PATIENCE)
    finally:
        finished.set()
        for child in children:
            child.kill()
        os.environ.clear()
        os.environ.update(before)


def _check_launcher(hardware: Hardware) -> None:
    """Raise UserError if torchrun or srun started another number of processes, or if nodes can't find each other."""
    wanted, launcher, started = hardware.processes, processes.launcher(), processes.launched()
    if launcher is not None and started != wanted:
        options = {"torchrun": "--nnodes and --nproc-per-node", "srun": "--nodes and --ntasks-per-node"}[launcher]
        raise UserError(
            f"trainer.nodes={hardware.nodes} trainer.devices={hardware.devices} make {wanted} processes, but {launcher}"
            f" has started {started}: let them agree with its {options}"
        )
    if launcher is None and hardware.nodes > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
        if missing:
            raise UserError(
                f"trainer.nodes={hardware.nodes}: the nodes have to find each other, so start the command by torchrun"
                f" or srun, or set {', '.join(missing)} on each (docs/distributed.md)"
            )


def _start(hardware: Hardware, run_dir: Path) -> list[subprocess.Popen[bytes]]:
    """Run the command line again for each further device of this node, with the environment that Lightning expects."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free_port = probe.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(free_port),
        "NODE_RANK": os.environ.get("NODE_RANK", "0"),
        "WORLD_SIZE": str(hardware.processes),
        "LOCAL_RANK": "0",
    }
    own_folder = quoted_override("hydra.run.dir", str(run_dir))
    command = [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:], own_folder]
    ranks = range(1, hardware.devices)
    return [subprocess.Popen(command, env=os.environ | {"LOCAL_RANK": str(rank)}) for rank in ranks]


def _watch(children: list[subprocess.Popen[bytes]], parent: int, run_dir: Path, finished: threading.Event) -> None:
    """Exit if another process has died: the main thread may wait for it in a collective for ever, running no Python."""
    is_child = os.environ["LOCAL_RANK"] != "0"
    while not finished.wait(0.5):
        orphaned = is_child and os.getppid() != parent
        codes = [code for child in children if (code := child.poll())]
        if not codes and not orphaned:
            continue
        if finished.wait(PATIENCE if codes and codes[0] in STOPPED else PATIENCE / 3):
            return
        why = "the first process has ended" if orphaned else _exit_report(children)
        if status.fail(run_dir, why) or not (is_child or (run_dir / "status.json").exists()):  # caching has no record
            print(f"error: {why}", file=sys.stderr, flush=True)
        for child in children:
            child.kill()
        os._exit(codes[0] if codes and codes[0] in STOPPED else 1)


def _wait(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return


def _exit_report(children: list[subprocess.Popen[bytes]]) -> str:
    """Return which process has ended, and how, as far as this process can tell within two seconds."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        for rank, child in enumerate(children, 1):
            code = child.poll()
            if code is not None and code < 0:
                return f"the process of device {rank} was killed by {signal.Signals(-code).name}"
            if code:
                return f"the process of device {rank} has failed"
        time.sleep(0.1)
    return "another process of this run has ended; its own message or log says why"
