"""Fixtures: a student in the working folder, exports of it, and the snippets of docs/export.md that run them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam_distill.cli import app
from sam_distill.data.photos import photo
from sam_distill.models.checkpoints import save_sam
from sam_distill.models.sam import Sam
from sam_distill.predict.predictor import SamPredictor

DOCS = Path(__file__).parents[3] / "docs/export.md"


@pytest.fixture
def student(teacher: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sam:
    """Write MobileSAM at 256 px to student.pt in a new working folder, with a photograph, and return it."""
    monkeypatch.chdir(tmp_path)
    student = Sam(teacher.image_encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size=256)
    save_sam(student, "student.pt")
    photo("coffee.png").save("photo.jpg", quality=95)
    return student


@pytest.fixture
def export(student: Sam) -> Callable[..., dict[str, Any]]:
    """Return a function that exports the student by the command -> contract.json, and the encoder's size as `bytes`."""

    def run(format: str, quantize: str, least_iou: float) -> dict[str, Any]:
        words = [f"format={format}", f"quantize={quantize}", f"least_iou={least_iou}", f"path=student_{format}"]
        assert app.main(["export", "checkpoint=student.pt", "data.val_images=2", *words]) == 0
        contract = json.loads(Path(f"student_{format}/contract.json").read_text())
        return contract | {"bytes": Path(f"student_{format}", contract["encoder"]["file"]).stat().st_size}

    return run


@pytest.fixture
def run_snippets() -> Callable[..., dict[str, Any]]:
    """Return a function that runs the snippets of docs/export.md with the given words, in order -> their variables."""

    def run(*words: str) -> dict[str, Any]:
        snippets = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
        result: dict[str, Any] = {}
        for word in words:
            (snippet,) = [code for code in snippets if word in code]
            exec(snippet, result)
        return result

    return run


@pytest.fixture
def docs_snippet_iou(student: Sam, run_snippets: Callable[..., dict[str, Any]]) -> Callable[[str], float]:
    """Return a function that runs the snippet with the given word, then that from photo to mask -> IoU with ours."""

    def run(word: str) -> float:
        result = run_snippets(word, "{folder}/contract.json")
        predictor = SamPredictor(student)
        predictor.set_image(np.asarray(Image.open("photo.jpg")))
        masks, iou, _ = predictor.predict(np.array([[320, 240]]), np.array([1]))
        expected, found = masks[iou.argmax()], result["mask"]
        return float((found & expected).sum() / (found | expected).sum())

    return run
