import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from torch.utils.data import DataLoader, IterableDataset

from sam_distill.runs import processes
from sam_distill.runs.processes import begin_worker

T = TypeVar("T")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "x", "SLURM_STEP_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "launcher", "started", "first", "name", "shared"),
    [
        ({}, None, 1, True, "rank0", None),
        ({"LOCAL_RANK": "3"}, None, 1, False, "rank3", None),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, None, 1, False, "node1rank0", None),
        (TORCHRUN, "torchrun", 4, False, "rank2", None),
        (TORCHRUN | {"RANK": "0", "TORCHELASTIC_RUN_ID": "abc"}, "torchrun", 4, True, "rank0", "torchrun_abc"),
        (SRUN, "srun", 8, False, "rank5", "slurm_77_1"),
        (SRUN | {"SLURM_PROCID": "0", "SLURM_RESTART_COUNT": "2"}, "srun", 8, True, "rank0", "slurm_77_1_restart2"),
        (SRUN | {"SLURM_JOB_NAME": "interactive", "SLURM_PROCID": "0"}, None, 1, True, "rank0", None),
    ],
)
def test_launcher_and_rank_are_read_from_the_environment(
    environment: dict[str, str], launcher: str | None, started: int, first: bool, name: str, shared: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for key in list(os.environ):
        if key.startswith("SLURM_") or "RANK" in key or key in TORCHRUN:
            monkeypatch.delenv(key)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert processes.launcher() == launcher
    assert processes.launched() == started
    assert processes.is_first() == first
    assert processes.rank_name() == name
    assert processes.shared_name() == shared


def test_a_loader_worker_does_not_outlive_its_process(tmp_path: Path) -> None:
    """A killed process can't stop its workers, and a worker that has a batch to deliver would wait for ever."""
    code = """
import multiprocessing, time
from pathlib import Path
from sam_distill.runs.processes import begin_worker

def work():
    begin_worker(0)
    Path("worker").write_text(str(multiprocessing.current_process().pid))
    time.sleep(300)

multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
time.sleep(300)
"""
    master = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        worker = int(_eventually(lambda: (tmp_path / "worker").read_text()))
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGHUP)
        time.sleep(0.1)
        assert not _has_ended(worker), "such signals are left to the master"
    finally:
        master.kill()
        master.wait()
    _eventually(lambda: _has_ended(worker))


class Unsendable(IterableDataset):
    def __iter__(self) -> Iterator[Callable[[], None]]:
        yield lambda: None


def test_loader_worker_reports_a_batch_that_it_cannot_send(capfd: pytest.CaptureFixture[str]) -> None:
    """Here the batch can't be pickled; the usual cause is a full /dev/shm, for which Docker allows 64 MB."""
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(iter(DataLoader(Unsendable(), None, num_workers=1, worker_init_fn=begin_worker, timeout=300)))
    assert "can't hand over a batch" in capfd.readouterr().err


def _eventually(condition: Callable[[], T]) -> T:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if value := condition():
                return value
        time.sleep(0.05)
    raise TimeoutError


def _has_ended(pid: int) -> bool:
    """Whether the process has ended, even if it is still a zombie that a container's first process has not reaped."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
