"""`sam-distill export` as users type it, and the snippets that run what it leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sam_distill.cli import app
from sam_distill.cli import export as command
from sam_distill.data.photos import photo
from sam_distill.export import check, onnx
from sam_distill.models.checkpoints import save_sam
from sam_distill.models.encoders import TimmEncoder
from sam_distill.models.sam import Sam
from sam_distill.predict.predictor import SamPredictor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def student(teacher: Sam) -> Sam:
    torch.manual_seed(0)
    encoder = TimmEncoder("resnet18", pretrained=False)
    return Sam(encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size=64).eval()


@pytest.fixture
def place(student: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a small student in student.pt and a photograph."""
    monkeypatch.chdir(tmp_path)
    save_sam(student, "student.pt")
    photo("coffee.png").crop((0, 0, 512, 384)).resize((1024, 768)).save("photo.jpg", quality=95)
    yield tmp_path
    assert not list(tmp_path.glob(".*")), "drafts are cleared away"


def run(*overrides: str) -> int:
    return app.main(["export", "checkpoint=student.pt", "data.val_images=2", "protocol.points=1", *overrides])


def snippets(file: str) -> list[str]:
    return [code for code in re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL) if "onnx" in code]


def test_onnx_int8_and_the_snippets_of_the_docs(place: Path, student: Sam, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("format=onnx", "quantize=int8", "path=student_onnx") == 0
    said = capfd.readouterr().out
    assert "low_res_masks" in said
    assert re.search(r"mIoU, one box +│ [01]\.\d{4}", said)
    sizes = {file.name: file.stat().st_size for file in Path("student_onnx").iterdir()}
    assert sorted(sizes) == ["decoder.onnx", "encoder.int8.onnx", "encoder.onnx"]
    assert sizes["encoder.int8.onnx"] < 0.6 * sizes["encoder.onnx"]

    predictor = SamPredictor(student)
    predictor.set_image(np.asarray(Image.open("photo.jpg")))
    (short,), (whole,) = snippets("README.md"), snippets("docs/export.md")
    result: dict[str, Any] = {}
    exec(short, result)
    expected, _, _ = predictor.predict(np.array([[320, 240]]), np.array([1]), return_logits=True)
    np.testing.assert_allclose(result["masks"][0, 1:], expected, atol=1e-2)
    exec(whole, result)
    masks, iou, _ = predictor.predict(np.array([[320, 240]]), np.array([1]))
    assert (result["at_click"] == masks[iou.argmax()]).mean() > 0.999
    (mask,), _, _ = predictor.predict(box=np.array([100, 80, 400, 300]), multimask_output=False)
    assert (result["in_box"] == mask).mean() > 0.999


def test_files_for_other_code(place: Path, teacher: Sam, capfd: pytest.CaptureFixture[str]) -> None:
    teacher_at_256 = Sam(teacher.image_encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size=256)
    save_sam(teacher_at_256, "tinyvit.pt")
    assert run("format=safetensors", "path=out/student.safetensors") == 0
    assert run("checkpoint=tinyvit.pt", "format=mobile_sam", "path=out/tinyvit.pt") == 0
    said = capfd.readouterr()
    assert 'for sam_model_registry["vit_t"](checkpoint="out/tinyvit.pt")' in said.out
    assert "sees images at 256 pixels" in said.out + said.err
    assert sorted(file.name for file in Path("out").iterdir()) == ["student.safetensors", "tinyvit.pt"]


def test_what_differs_is_not_written(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "write_encoder", lambda sam, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx, "write_decoder", lambda sam, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx, "open_session", lambda path: None)
    monkeypatch.setattr(check, "compare", lambda *_: [check.Difference("image_embeddings", 0.1, 0.001)])
    assert run("format=onnx", "path=student_onnx") == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: ONNX Runtime and PyTorch disagree in image_embeddings, so nothing was written")
    assert not Path("student_onnx").exists()


def test_mistakes_are_one_line(place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "EXTRA", ("nonesuch",))
    for overrides, complaint in {
        ("format=onnx", "path=a"): "format=onnx needs nonesuch: pip install 'sam-distill[export]'",
        ("format=sam", "quantize=int8", "path=a"): "quantize=int8 goes with format=onnx, not with format=sam",
        ("format=sam", "path=a"): "but this is TimmEncoder(name=resnet18): take format=onnx or format=safetensors",
        ("format=safetensors", "path=."): "path=. is a folder: expected a file",
        ("format=safetensors", "path=/proc/a/b"): "path=/proc/a/b: cannot be written (",
    }.items():
        assert run(*overrides) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert complaint in line
    assert sorted(file.name for file in place.iterdir()) == ["photo.jpg", "student.pt"]
