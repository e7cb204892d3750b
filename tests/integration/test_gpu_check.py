"""scripts/gpu_check.py, run on the CPU with toy sizes."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def check(*argv: str) -> tuple[int, str, str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, timeout=600, env=env)
    return done.returncode, done.stdout, done.stderr


def test_every_part_runs_and_is_not_repeated(tmp_path: Path) -> None:
    toy = ["--toy", f"--out={tmp_path}", "--minutes=60"]
    assert check(*toy, "--parts", "tests", "step")[0] == 0
    code, said, _ = check(*toy, "optim.lr=1e-4")
    assert code == 0, said
    assert "tests: passed before" in said
    assert "step: passed before" in said
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(
        ("tests", "encoder", "decoder", "everything", "step", "cache", "train"), "passed"
    )
    assert parts["tests"]["passed"] >= 2
    assert parts["step"]["seconds_per_image"] > 0
    assert parts["cache"]["images_per_second"] > 0
    assert parts["train"]["steps"] == 2
    assert "miou/point" in parts["train"]
    assert "optim.lr=1e-4" in parts["train"]["command"]
    text = (tmp_path / "README.md").read_text()
    assert "toy sizes" in text
    assert "not run" not in text.partition("|")[2]


def test_own_results_do_not_count_as_changed_code(tmp_path: Path) -> None:
    """They lie in the git checkout, so once they are written its version ends with `-dirty`."""
    module = runpy.run_path(str(SCRIPT))
    done = {"machine": {"device": "H200", "version": "0.1.0+ab12"}, "parts": {"tests": {"state": "passed"}}}
    (tmp_path / "results.json").write_text(json.dumps(done))
    assert module["_before"](tmp_path, {"device": "H200", "version": "0.1.0+ab12-dirty"}, again=False) == done
    later = {"device": "H200", "version": "0.1.0+cd34"}
    assert module["_before"](tmp_path, later, again=False) == {"machine": later, "parts": {}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    code, _, said = check(f"--out={tmp_path / 'gpu'}")
    assert code == 1
    assert said.splitlines()[-1].startswith("error: there is no GPU here")
    assert not (tmp_path / "gpu").exists()
