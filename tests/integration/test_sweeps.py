"""Multiruns whose jobs run in processes of their own: toy jobs with joblib and submitit."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from sam_distill.errors import UserError

POOL = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
CONF = """# A toy job.
defaults: [hydra/common, _self_]
_target_: HERE.job
how: well
"""


def job(*, how: str, run_dir: Path) -> None:
    seen = {"process": os.getpid(), "threads": torch.get_num_threads(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
    (run_dir / "seen.json").write_text(json.dumps(seen))
    if how in ("mistake", "meet"):  # wait until both jobs are running
        deadline = time.monotonic() + 300
        while len(list(run_dir.parent.glob("*/seen.json"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    if how == "mistake":
        raise UserError("mend me")
    if how.startswith("long"):
        time.sleep(300)


@pytest.fixture
def toy(command: Callable[[str], Callable[..., int]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield command(CONF.replace("HERE", __name__))
    get_reusable_executor().shutdown(kill_workers=True)


def status(number: int) -> tuple[str, str | None]:
    record = json.loads(Path(f"sweep/{number}/status.json").read_text())
    return record["status"], record["why"]


def test_joblib_pool_runs_jobs_in_parallel(toy: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    """A failed job does not stop the others, but sets the exit status; a second run repeats only the failed job."""
    assert toy(*POOL, "how=mistake,meet,well") == 1
    output = capfd.readouterr()
    assert output.err == "error: job 0 (how=mistake): mend me\nerror: 1 of 3 jobs failed: 0\n"
    assert [status(number) for number in range(3)] == [("failed", "mend me"), ("finished", None), ("finished", None)]
    failed, met = (json.loads(Path(f"sweep/{number}/seen.json").read_text()) for number in (0, 1))
    assert len({failed["process"], met["process"], os.getpid()}) == 3
    assert {failed["gpu"], met["gpu"]} == {"4", "5"}
    assert failed["threads"] == max(1, joblib.cpu_count() // 2)

    assert toy(*POOL, "how=mistake,meet,well") == 1
    output = capfd.readouterr()
    assert output.out.count("has finished before") == 2
    assert output.err.count("mend me") == 1


def test_jobs_of_a_pool_share_one_sweep_folder(toy: Callable[..., int]) -> None:
    assert toy(*POOL[:-1], "how=well,fine") == 0
    (sweep,) = Path("outputs/multirun").iterdir()
    assert {path.name for path in sweep.iterdir()} == {"multirun.yaml", "0", "1"}


def test_a_pool_is_interrupted(toy: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    """Each running job is recorded as interrupted, and no other job is started."""

    def stop() -> None:
        while len(list(Path("sweep").glob("*/seen.json"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert toy(*POOL, "how=long,longer,well") == 143
    assert [status(number) for number in (0, 1)] == [("failed", "interrupted by SIGTERM")] * 2
    assert not Path("sweep/2/status.json").exists()


def test_submitit(toy: Callable[..., int]) -> None:
    """Its local executor runs a job as under SLURM: the job has only what was pickled."""
    assert toy("-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep", "how=mistake,meet") == 1
    assert [status(number) for number in (0, 1)] == [("failed", "mend me"), ("finished", None)]


def test_a_launcher_that_is_not_there(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("-m", "hydra/launcher=slurm", "how=well,fine") == 2
    assert "no such choice; " in (output := capsys.readouterr().err)
    assert output.endswith("; pip install 'sam-distill[sweeps]' brings joblib and submitit_*\n")
