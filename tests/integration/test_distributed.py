"""Data-parallel runs that are started, stopped and killed: two processes on the CPU, with the real teacher."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
QUICK = ["image_size=64", "batch_size=2", "trainer=cpu", "trainer.workers=0", "encoder.pretrained=false",
         "protocol.points=1", "data.val_images=2", "logger=csv", "trainer.precision=fp32"]  # fmt: skip
TWO = "trainer.devices=2"

FAILING_STRATEGY = """
import os, signal
from sam_distill.strategies.decoupled import Decoupled

class Falling(Decoupled):
    steps = 0
    def step(self, sam, batch):
        self.steps += 1
        if self.steps == 3 and os.environ["LOCAL_RANK"] == os.environ["FALLS"]:
            if os.environ["HOW"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("power cut")
        return super().step(sam, batch)
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of ten drawings of one size."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        image = Image.new("RGB", (96, 64), (25 * number, 120, 200))
        ImageDraw.Draw(image).ellipse((10 + 3 * number, 8, 50 + 4 * number, 50), fill=(200, 25 * number, 20))
        image.save(folder / f"{number}.png")
    return folder


class Run:
    """Run of `python train.py ...` in its own process group, as a terminal would start it."""

    def __init__(self, folder: Path, *options: str, launcher: Sequence[str] = (), **environment: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "train.py"), *QUICK, *options], cwd=folder.parent, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait(self, seconds: float = 300) -> tuple[int, str, list[str]]:
        """Return the exit status, standard output, and the lines on standard error that begin with `error: `."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, [line for line in err.splitlines() if line.startswith("error: ")]

    def wait_for_steps(self) -> None:
        deadline = time.monotonic() + 300
        while len(self.losses()) < 2:
            assert self.process.poll() is None, self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def history(self) -> list[dict[str, str]]:
        file = self.folder / "history.csv"
        rows = list(csv.DictReader(file.read_text().splitlines())) if file.is_file() else []
        return [{"train/loss": ""} | row for row in rows]

    def losses(self) -> list[float]:
        return [float(row["train/loss"]) for row in self.history() if row["train/loss"]]

    def status(self) -> tuple[str, str | None]:
        content = json.loads((self.folder / "status.json").read_text())
        return content["status"], content["why"]

    def steps_saved(self) -> int:
        checkpoint: dict[str, Any] = torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True)
        return int(checkpoint["global_step"])

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()

    def left_over(self) -> bool:
        """Whether any process of its group is still running after a minute."""
        for _ in range(600):
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.1)
        return True


@pytest.fixture
def start(images: Path, tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def begin(name: str, *options: str, **more: Any) -> Run:
        place = [] if name == "unnamed" else [f"hydra.run.dir={tmp_path / name}"]
        data = ["data=folder", f"data.path={images}", "data.images=4", *place]
        runs.append(Run(tmp_path / name, *data, *options, **more))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


@pytest.mark.parametrize("strategy", ["decoupled", "coupled"])
def test_two_processes_train_as_one_with_twice_the_batch(strategy: str, start: Any) -> None:
    """Compare each step's loss and all weights, with many BatchNorms. The 3 steps end between two validations."""
    same = ["budget=3 steps", "validate_every=2 steps", "optim.warmup=0", f"strategy={strategy}", "prompts.count=1"]
    alone = start("alone", *same, "batch_size=4")
    together = start("together", *same, TWO, "trainer.sync_batchnorm=true")
    assert (alone.wait()[0], together.wait()[0]) == (0, 0)
    assert len(alone.losses()) == 3
    assert together.losses() == pytest.approx(alone.losses(), rel=2e-4)

    one, two = (torch.load(run.folder / "student.pt", weights_only=True) for run in (alone, together))
    assert one.keys() == two.keys()
    for key, value in one.items():
        if value.is_floating_point():  # AdamW's first steps have the size of lr, whatever the gradient's size
            torch.testing.assert_close(two[key], value, rtol=1e-2, atol=2e-3, msg=lambda m: f"{key}: {m}")  # noqa: B023
    assert together.steps_saved() == 3, "the last checkpoint is that of the end"


@pytest.mark.parametrize(
    ("number", "to_all", "devices"),
    [(signal.SIGINT, True, 2), (signal.SIGTERM, False, 2), (signal.SIGINT, False, 1), (signal.SIGTERM, True, 1)],
)
def test_a_clean_stop(number: signal.Signals, to_all: bool, devices: int, start: Any) -> None:
    run = start(
        "run", f"trainer.devices={devices}", "trainer.workers=1", "budget=100 steps", "validate_every=100 steps"
    )
    run.wait_for_steps()
    (os.killpg if to_all else os.kill)(run.process.pid, number)
    code, _, lines = run.wait(30)
    assert code == 128 + number
    why = "interrupted" if number == signal.SIGINT else "interrupted by SIGTERM"
    assert run.status() == ("failed", why)
    assert lines == [f"error: {why}; resume={run.folder} goes on from the last checkpoint"]
    assert not run.left_over()
    done = run.steps_saved()
    assert done >= int(run.history()[-1]["step"]) > 0, "not a step is lost"
    if to_all and devices == 2:
        again = Run(run.folder, f"resume={run.folder}", f"budget={done + 3} steps")
        assert again.wait()[0] == 0
        assert again.steps_saved() == done + 3
        assert again.status() == ("finished", None)


@pytest.mark.parametrize(("falls", "how"), [(0, "raises"), (1, "raises"), (1, "killed"), (0, "killed")])
def test_a_failing_process_takes_the_others_along(falls: int, how: str, start: Any, tmp_path: Path) -> None:
    (tmp_path / "falling.py").write_text(FAILING_STRATEGY)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    options = [TWO, "budget=400 steps", "strategy._target_=falling.Falling"]
    run = start("run", *options, FALLS=str(falls), HOW=how, PYTHONPATH=path)
    code, _, lines = run.wait()
    assert not run.left_over()
    assert len(lines) == 1
    state, why = run.status()
    assert state == "failed"
    assert lines[0].startswith(f"error: {why}")
    if how == "raises":
        assert why == ["RuntimeError: power cut", "rank1: RuntimeError: power cut"][falls]
    elif falls == 1:
        assert why == "the process of device 1 was killed by SIGKILL"
    assert code == (-9 if (falls, how) == (0, "killed") else 1)


def test_torchrun(start: Any) -> None:
    """Processes agree on a run folder and print each line once; another number than torchrun's is refused."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = start("unnamed", TWO, "budget=2 steps", launcher=torchrun)
    code, out, _ = run.wait()
    assert code == 0
    assert out.count("step 2/2  loss") == out.count("Loading the teacher") == 1
    (folder,) = run.folder.parent.glob("outputs/train/*")
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    assert [path.name for path in folder.glob("*.log")] == ["train.log"]

    code, _, lines = start("run", "trainer.devices=3", launcher=torchrun).wait()
    assert code == 1
    assert len(lines) == 1
    assert "make 3 processes, but torchrun has started 2" in lines[0]


def test_slurm(start: Any) -> None:
    """srun starts the processes; they connect by SLURM's variables and use one folder named after the job."""
    port = str(20000 + os.getpid() % 10000)
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
             "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "distil",
             "MASTER_PORT": port}  # fmt: skip
    ranks = [
        start("unnamed", TWO, "budget=2 steps", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **slurm)
        for rank in range(2)
    ]
    (first, out, _), (second, silence, _) = [run.wait() for run in ranks]
    assert (first, second) == (0, 0)
    assert "step 2/2  loss" in out
    assert silence == ""
    (folder,) = ranks[0].folder.parent.glob("outputs/train/*")
    assert folder.name == "slurm_42_0"
    assert [path.name for path in folder.glob("*.log")] == ["train.log"]
