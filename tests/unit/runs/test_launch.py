import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sam_distill.errors import UserError
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.launch import all_processes


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3"},
            "trainer.nodes=1 trainer.devices=2 make 2 processes, but torchrun has started 3: let them agree with its "
            "--nnodes and --nproc-per-node",
        ),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x"}, "srun has started 1: let them agree with its --nodes and --nta"),
    ],
)
def test_launcher_and_options_disagree(
    environment: dict[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint), all_processes(Hardware("cpu", devices=2), tmp_path):
        pytest.fail("this must not run")


def test_several_nodes_without_an_address_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="or set MASTER_ADDR, MASTER_PORT, NODE_RANK on each"),
        all_processes(Hardware("cpu", nodes=2), tmp_path),
    ):
        pytest.fail("this must not run")


UNRESPONSIVE = """
import os, sys, time, ctypes
from pathlib import Path
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.launch import all_processes

run_dir = Path(sys.argv[1])
with all_processes(Hardware("cpu", devices=2), run_dir):
    (run_dir / f"pid{os.environ['LOCAL_RANK']}").write_text(str(os.getpid()))
    if os.environ["LOCAL_RANK"] == sys.argv[2]:
        while len(list(run_dir.glob("pid?"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), 9)
    ctypes.CDLL(None).sleep(600)  # as deaf as a collective that waits for a dead process
"""


@pytest.mark.parametrize("dies", [0, 1])
def test_no_process_waits_for_a_dead_one(dies: int, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"status": "running"}')
    script = tmp_path / "deaf.py"
    script.write_text(textwrap.dedent(UNRESPONSIVE))
    run = subprocess.run([sys.executable, script, tmp_path, str(dies)], capture_output=True, text=True, timeout=300)
    assert run.returncode == (-9 if dies == 0 else 1)
    other = int((tmp_path / f"pid{1 - dies}").read_text())
    deadline = time.monotonic() + 300
    while alive(other):
        assert time.monotonic() < deadline, "the other process hangs"
        time.sleep(0.1)
    why = "the process of device 1 was killed by SIGKILL" if dies == 1 else "the first process has ended"
    assert json.loads((tmp_path / "status.json").read_text())["why"] == why
    if dies == 1:
        assert run.stderr == f"error: {why}\n"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
