"""A student in a working folder, exported and run by the snippets of docs/export.md."""

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
    """MobileSAM at 256 px, in student.pt of the working folder, beside a photograph."""
    monkeypatch.chdir(tmp_path)
    student = Sam(teacher.image_encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size=256)
    save_sam(student, "student.pt")
    photo("coffee.png").save("photo.jpg", quality=95)
    return student


@pytest.fixture
def export(student: Sam) -> Callable[..., dict[str, Any]]:
    """Export the student by its command -> contract.json and the encoder's size in bytes."""

    def run(format: str, quantize: str, least_iou: float) -> dict[str, Any]:
        words = [f"format={format}", f"quantize={quantize}", f"least_iou={least_iou}", f"path=student_{format}"]
        assert app.main(["export", "checkpoint=student.pt", "data.val_images=2", *words]) == 0
        contract = json.loads(Path(f"student_{format}/contract.json").read_text())
        return contract | {"bytes": Path(f"student_{format}", contract["encoder"]["file"]).stat().st_size}

    return run


@pytest.fixture
def run_snippets() -> Callable[..., dict[str, Any]]:
    """Run those of docs/export.md that have the given words, one after the other -> their variables."""

    def run(*words: str) -> dict[str, Any]:
        snippets = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
        result: dict[str, Any] = {}
        for word in words:
            (snippet,) = [code for code in snippets if word in code]
            exec(snippet, result)
        return result

    return run


@pytest.fixture
def iou_of_the_docs(student: Sam, run_snippets: Callable[..., dict[str, Any]]) -> Callable[[str], float]:
    """Run the snippet that has the given word, and the one that goes from a photograph to a mask -> IoU with ours."""

    def run(word: str) -> float:
        result = run_snippets(word, "{folder}/contract.json")
        predictor = SamPredictor(student)
        predictor.set_image(np.asarray(Image.open("photo.jpg")))
        masks, iou, _ = predictor.predict(np.array([[320, 240]]), np.array([1]))
        expected, found = masks[iou.argmax()], result["mask"]
        return float((found & expected).sum() / (found | expected).sum())

    return run
