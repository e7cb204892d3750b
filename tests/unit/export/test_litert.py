"""LiteRT's files in its own interpreter. docs/export.md says in which environment this runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sam_distill.cli import app
from sam_distill.data.photos import photo
from sam_distill.models.checkpoints import save_sam
from sam_distill.models.sam import Sam
from sam_distill.predict.predictor import SamPredictor

pytest.importorskip("litert_torch", reason="needs litert-torch, in an environment of its own: docs/export.md")


def test_litert_and_the_snippet_of_the_docs(teacher: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    student = Sam(teacher.image_encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size=256)
    save_sam(student, "student.pt")
    photo("coffee.png").save("photo.jpg", quality=95)
    words = ["export", "checkpoint=student.pt", "format=litert", "data.val_images=2", "path=student_litert"]
    sizes = {}
    for quantize, least in (("int8", 0.9), ("null", 0.9999)):  # at 256 px MobileSAM's masks are easily moved
        assert app.main([*words, f"quantize={quantize}", f"least_iou={least}"]) == 0
        sizes[quantize] = Path("student_litert/encoder.tflite").stat().st_size
        contract = json.loads(Path("student_litert/contract.json").read_text())
        assert contract["checked"]["runtime"] == "LiteRT"
        assert contract["checked"]["mask_iou"] > least
    assert sizes["int8"] < 0.5 * sizes["null"]

    text = (Path(__file__).parents[3] / "docs/export.md").read_text()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "ai_edge_litert" in code]
    result: dict[str, Any] = {}
    exec(snippet, result)
    predictor = SamPredictor(student)
    predictor.set_image(np.asarray(Image.open("photo.jpg")))
    masks, iou, _ = predictor.predict(np.array([[320, 240]]), np.array([1]))
    expected = torch.from_numpy(masks[iou.argmax()])
    found = torch.from_numpy(result["mask"])
    assert (found & expected).sum() / (found | expected).sum() > 0.97  # its resize skips the frame
