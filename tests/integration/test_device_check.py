"""scripts/device_check.py, with this machine as the device."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_distill.cli import app
from sam_distill.export import web
from sam_distill.models.checkpoints import save_sam
from sam_distill.models.encoders import TimmEncoder
from sam_distill.models.sam import Sam

SCRIPTS = Path(__file__).parents[2] / "scripts"
GREETING = "import runpy, sys; print('This is a private machine', flush=True); runpy.run_path(sys.argv[1])"
Checked = tuple[Any, str, str]
WORKER = [sys.executable, str(SCRIPTS / "device_worker.py")]


@pytest.fixture(scope="module")
def place(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two students of 64 px and one of 96 px, and an export of the first."""
    place = tmp_path_factory.mktemp("device")
    torch.manual_seed(0)
    for name, side in (("64", 64), ("other", 64), ("96", 96)):
        encoder = TimmEncoder("resnet18", pretrained=False)
        save_sam(Sam(encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size=side), place / f"{name}.pt")
    (place / "runtime").mkdir()  # of the browser: not needed here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "_runtime", lambda: place / "runtime")
        assert app.main(["export", f"checkpoint={place}/64.pt", "format=web", f"path={place}/page"]) == 0
    return place


@pytest.fixture
def check(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Checked]:
    """Return a function that runs the script -> exit status, output, errors."""

    def run(checkpoint: str, *command: str) -> Checked:
        words = [f"{place}/page", f"{place}/{checkpoint}", "--images=1", f"--json={place}/found.json", "--", *command]
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "device_check.py"), *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return ended.value.code, *capfd.readouterr()

    return run


def test_the_device_is_compared_with_pytorch(place: Path, check: Callable[..., Checked]) -> None:
    code, out, error = check("64.pt", *WORKER)
    assert code == 0, error
    assert "ONNX Runtime on the device and PyTorch here, 1 photographs, 5 prompts" in out
    assert json.loads((place / "found.json").read_text())["mask_iou"] > 0.999


def test_a_greeting_does_no_harm(check: Callable[..., Checked]) -> None:
    assert check("64.pt", sys.executable, "-c", GREETING, WORKER[1])[0] == 0


def test_less_agreement_than_wanted_is_an_error(check: Callable[..., Checked]) -> None:
    code, _, error = check("other.pt", *WORKER)
    assert code == 1
    assert "agree less than 0.999" in error


def test_a_missing_runtime_is_named(check: Callable[..., Checked]) -> None:
    hidden = "import runpy, sys; sys.modules['onnxruntime'] = None; runpy.run_path(sys.argv[1])"
    code, _, error = check("64.pt", sys.executable, "-c", hidden, WORKER[1])
    assert code == 1
    first, second = error.splitlines()
    assert first.endswith("install the runtime of format=web here")
    assert second == "error: the worker has ended with exit status 1; its own message, if any, is above"


@pytest.mark.parametrize(
    ("checkpoint", "command", "message"),
    [
        ("96.pt", WORKER, "96.pt is for 96 px, "),
        ("64.pt", [sys.executable, "-c", "raise SystemExit(3)"], "the worker has ended with exit status 3"),
        ("64.pt", ["/no/such/program"], "/no/such/program: cannot be started"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: str, command: list[str], message: str, check: Callable[..., Checked]
) -> None:
    code, out, error = check(checkpoint, *command)
    assert (code, out) == (1, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
