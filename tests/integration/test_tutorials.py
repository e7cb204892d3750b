"""The commands and code of docs/start.md, docs/add.md and docs/use.md, run at tiny sizes."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sam_distill.cli import app

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n((?:.*\n)*?)```', re.MULTILINE)
TINY = ["image_size=64", "batch_size=2", "budget=2 steps", "validate_every=null", "trainer=cpu", "trainer.workers=0",
        "encoder.pretrained=false", "protocol.points=1", "data.val_images=2", "logger=csv"]  # fmt: skip
TINIER = {"train": TINY, "evaluate": ["trainer=cpu", "data.val_images=2", "protocol.points=1"]}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a new folder with six pictures in its subfolder `photos`; return the new folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        picture = Image.new("RGB", (400, 300), (40 * number, 120, 200))
        ImageDraw.Draw(picture).ellipse((250, 180, 390, 290), fill=(200, 40 * number, 20))
        picture.save(folder / f"{number}.jpg")
    return tmp_path


def run(line: str) -> None:
    """Run a command line of the page at tiny sizes."""
    program, *words = shlex.split(line)
    command = "train" if program == "python" else words[0]
    assert app.main([command, *words[1:], *TINIER.get(command, [])]) == 0, line


def test_commands_and_code_of_start_md(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blocks = [(language, code) for language, _, code in FENCE.findall((DOCS / "start.md").read_text())]
    for language, code in blocks:
        if language == "python":
            result: dict[str, np.ndarray] = {}
            exec(code, result)
            assert result["masks"].shape == (3, 300, 400)
        if language == "bash":
            for line in code.replace("\\\n", "").splitlines():
                run(line)
    said = capfd.readouterr().out
    assert "mIoU, one point" in said
    assert "before/miou/box" in json.loads(Path("outputs/better/metrics.json").read_text())
    assert {path.name for path in photos.iterdir()} == {
        "photos",
        "outputs",
        "seen.png",
        "seen.json",
        "student.safetensors",
    }
    assert 0 <= json.loads(Path("outputs/evaluated/metrics.json").read_text())["miou/point"] <= 1


def test_files_and_commands_of_add_md(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    for language, title, code in FENCE.findall((DOCS / "add.md").read_text()):
        if title:
            Path(title).parent.mkdir(parents=True, exist_ok=True)
            Path(title).write_text(code)
        elif not language and "train.py" in code:
            commands.append(code.strip().removeprefix("PYTHONPATH=mine "))
    assert len(commands) == 2
    monkeypatch.syspath_prepend("mine")
    for number, command in enumerate(commands):
        run(f"{command} data=folder data.path=photos hydra.run.dir=outputs/{number}")
        assert (photos / f"outputs/{number}/student.pt").is_file()
    header, *rows = Path("outputs/1/history.csv").read_text().splitlines()
    assert "train/cosine" in header.split(",")
    assert rows


def test_use_from_python(photos: Path) -> None:
    for number, name in enumerate(["photo.jpg", "other.jpg"]):
        (photos / f"photos/{number}.jpg").rename(name)
    (code, *_) = [code for language, _, code in FENCE.findall((DOCS / "use.md").read_text()) if language == "python"]
    result: dict[str, list] = {}
    exec(code.replace("points_per_side=16", "points_per_side=3"), result)
    assert len(result["answers"]) == 2
    assert len(result["everything"]) >= 1
