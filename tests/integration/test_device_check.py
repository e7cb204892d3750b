"""scripts/device_check.py, with this machine as the device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam_distill.cli import app
from sam_distill.export import web
from sam_distill.models.checkpoints import save_sam
from sam_distill.models.encoders import TimmEncoder
from sam_distill.models.sam import Sam

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORKER = [sys.executable, str(SCRIPTS / "device_worker.py")]


@pytest.fixture(scope="module")
def place(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two students of 64 and 96 px, and an export of the first."""
    place = tmp_path_factory.mktemp("device")
    torch.manual_seed(0)
    encoder = TimmEncoder("resnet18", pretrained=False)
    for side in (64, 96):
        save_sam(Sam(encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size=side), place / f"{side}.pt")
    (place / "runtime").mkdir()  # of the browser: not needed here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "_runtime", lambda: place / "runtime")
        assert app.main(["export", f"checkpoint={place}/64.pt", "format=web", f"path={place}/page"]) == 0
    return place


def check(place: Path, checkpoint: str, *command: str) -> tuple[int, str, str]:
    words = [place / "page", place / checkpoint, "--images=1", f"--json={place}/found.json", "--", *command]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "device_check.py", *words],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_device_is_compared_with_pytorch(place: Path) -> None:
    code, out, error = check(place, "64.pt", *WORKER)
    assert (code, error) == (0, "")
    assert "ONNX Runtime on the device and PyTorch here, 1 photographs, 5 prompts" in out
    assert json.loads((place / "found.json").read_text())["mask_iou"] > 0.999


@pytest.mark.parametrize(
    ("checkpoint", "command", "message"),
    [
        ("96.pt", WORKER, "96.pt is for 96 px, "),
        ("64.pt", [sys.executable, "-c", "raise SystemExit(3)"], "the worker has ended with exit status 3"),
        ("64.pt", [sys.executable, "-c", "print('hello')"], "the worker has ended with exit status"),
        ("64.pt", ["/no/such/program"], "/no/such/program: cannot be started"),
    ],
)
def test_mistakes_are_one_line(place: Path, checkpoint: str, command: list[str], message: str) -> None:
    code, out, error = check(place, checkpoint, *command)
    assert (code, out) == (1, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
