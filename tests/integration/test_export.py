"""`sam-distill export` as users type it, and the snippets of the docs that run the exported files."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sam_distill.benchmark.models import exported_encoders
from sam_distill.cli import app
from sam_distill.data.photos import photo
from sam_distill.export import formats, onnx
from sam_distill.files import write_json
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
    """Change to a folder with a small student in student.pt and a photograph in photo.jpg."""
    monkeypatch.chdir(tmp_path)
    save_sam(student, "student.pt")
    photo("coffee.png").crop((0, 0, 512, 384)).resize((1024, 768)).save("photo.jpg", quality=95)
    yield tmp_path
    assert not list(tmp_path.glob(".*")), "drafts are cleared away"


def run(*overrides: str) -> int:
    return app.main(["export", "checkpoint=student.pt", "data.val_images=2", *overrides])


def snippets(file: str) -> list[str]:
    return [
        code
        for code in re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
        if "onnxruntime" in code
    ]


def test_onnx_and_the_snippets_of_the_docs(place: Path, student: Sam, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("format=onnx", "path=student_onnx") == 0
    assert "ONNX Runtime beside PyTorch, 2 photographs, 10 prompts" in capfd.readouterr().out
    assert sorted(file.name for file in Path("student_onnx").iterdir()) == [
        "contract.json", "decoder.onnx", "encoder.onnx",
    ]  # fmt: skip
    contract = json.loads(Path("student_onnx/contract.json").read_text())
    for graph in ("encoder", "decoder"):
        session = onnx.open_session(Path("student_onnx") / contract[graph]["file"])
        for side in ("inputs", "outputs"):
            tensors = getattr(session, f"get_{side}")()
            assert [(t.name, len(t.shape)) for t in tensors] == [
                (t["name"], len(t["shape"])) for t in contract[graph][side]
            ]
    assert contract["checked"]["mask_iou"] > 0.999
    ((contender, about),) = exported_encoders(Path("student_onnx"))  # as `sam-distill bench encoder exported=DIR` does
    assert contender.run().shape == (1, 256, 64, 64)
    assert about.startswith("sam-distill, onnx, fp32: 6")
    assert "mask IoU 0.999" in about or "mask IoU 1.0000" in about

    predictor = SamPredictor(student)
    predictor.set_image(np.asarray(Image.open("photo.jpg")))
    (short,), (whole,) = snippets("docs/use.md"), snippets("docs/export.md")
    result: dict[str, Any] = {}
    exec(short, result)
    expected, _, _ = predictor.predict(np.array([[320, 240]]), np.array([1]), return_logits=True)
    np.testing.assert_allclose(result["masks"][0, 1:], expected, atol=1e-2)
    exec(whole, result)
    masks, iou, _ = predictor.predict(np.array([[320, 240]]), np.array([1]))
    assert (result["at_click"] == masks[iou.argmax()]).mean() > 0.999
    (mask,), _, _ = predictor.predict(box=np.array([100, 80, 400, 300]), multimask_output=False)
    assert (result["in_box"] == mask).mean() > 0.999


def test_safetensors_and_mobile_sam_formats(place: Path, teacher: Sam, capfd: pytest.CaptureFixture[str]) -> None:
    teacher_at_256 = Sam(teacher.image_encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size=256)
    save_sam(teacher_at_256, "tinyvit.pt")
    assert run("format=safetensors", "path=out/student.safetensors") == 0
    assert run("checkpoint=tinyvit.pt", "format=mobile_sam", "path=out/tinyvit.pt") == 0
    assert (
        app.main(["export", "format=safetensors", "path=out/pocket.safetensors"]) == 0
    )  # the student that comes with the project
    said = capfd.readouterr()
    assert 'for sam_model_registry["vit_t"](checkpoint="out/tinyvit.pt")' in said.out
    assert "sees images at 256 pixels" in said.out + said.err
    assert sorted(file.name for file in Path("out").iterdir()) == [
        "pocket.safetensors", "student.safetensors", "tinyvit.pt",
    ]  # fmt: skip


def test_export_below_least_iou_is_not_written(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In fp16 some pixels of an untrained student's masks differ."""
    assert run("format=onnx", "quantize=fp16", "least_iou=1", "path=student_onnx") == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: ONNX Runtime and PyTorch agree to a mask IoU of 0.9")
    assert "less than 1, so nothing was written: take another quantize= or a smaller least_iou=" in line
    assert not Path("student_onnx").exists()


def test_mistakes_are_one_line(place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nonesuch = dataclasses.replace(formats.FORMATS["onnx"], packages=("nonesuch",))
    monkeypatch.setitem(formats.FORMATS, "onnx", nonesuch)
    Path("run").mkdir()
    write_json(Path("run/status.json"), {"command": ["train"]})
    Path("run/student.pt").touch()
    for overrides, complaint in {
        ("format=onnx", "path=a"): "format=onnx needs nonesuch: pip install 'sam-distill[export]'",
        (
            "format=sam",
            "quantize=int8",
            "path=a",
        ): "quantize=int8 goes with format=onnx, litert, executorch, coreml, web, not with",
        ("format=sam", "path=a"): "this is TimmEncoder(name=resnet18, neck=fine): take format=onnx or",
        ("format=safetensors", "path=."): "path=. is a folder: expected a file",
        ("format=safetensors", "path=/proc/a/b"): "path=/proc/a/b: cannot be written (",
        (
            "format=safetensors",
            "quantize=fp16",
            "path=./student.pt",
        ): "path=./student.pt is the checkpoint itself: give",
        ("format=sam", "path=run/student.pt"): "path=run/student.pt belongs to a run, which needs it as it is: give",
        ("format=web", "path=."): "path=. holds other files than an export: give it a folder of its own",
    }.items():
        assert run(*overrides) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert complaint in line
    assert sorted(file.name for file in place.iterdir()) == ["photo.jpg", "run", "student.pt"]
