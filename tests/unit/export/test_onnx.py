"""The ONNX files in ONNX Runtime against PyTorch, for every family of encoders."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package
import pytest
import torch
from onnxruntime import InferenceSession

from sam_distill.errors import UserError
from sam_distill.export import check, onnx
from sam_distill.export.graphs import Encoder, prepared
from sam_distill.export.sam_layout import AnySizeEncoder, UpscalingDecoder
from sam_distill.images import frame_size
from sam_distill.models.encoders import build_encoder
from sam_distill.models.sam import Sam
from sam_distill.types import Sample

ENCODERS: dict[str, dict[str, Any]] = {
    "tinyvit": {"class": "TinyViT", "size": "5m"},
    "vit_b, two blocks": {"class": "SamViT", "width": 768, "depth": 2, "heads": 12, "global_blocks": [1]},
    "efficientvit": {"class": "TimmEncoder", "name": "efficientvit_m0"},
    "efficientvit_mit": {"class": "TimmEncoder", "name": "efficientvit_b0"},
    "resnet18": {"class": "TimmEncoder", "name": "resnet18"},
}


def sample(height: int, width: int, original_size: tuple[int, int]) -> Sample:
    """Return a sample of random colour blocks, height x width in the frame."""
    coarse = np.random.default_rng(0).uniform(0, 255, (3, 8, 8))
    image = torch.from_numpy(np.kron(coarse, np.ones((128, 128))))[:, :height, :width]
    return Sample("blocks", image.byte().contiguous(), original_size)


def student(name: str, teacher: Sam, image_size: int) -> Sam:
    torch.manual_seed(0)
    encoder = build_encoder(ENCODERS[name])
    return Sam(encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def decoder(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> InferenceSession:
    path = tmp_path_factory.mktemp("teacher") / "decoder.onnx"
    onnx.write_graph(UpscalingDecoder(teacher), path)
    return onnx.open_session(path)


@pytest.mark.parametrize("name", ENCODERS)
def test_onnx_runtime_agrees_with_pytorch(name: str, teacher: Sam, decoder: InferenceSession, tmp_path: Path) -> None:
    sam = student(name, teacher, image_size=256)
    onnx.write_graph(AnySizeEncoder(prepared(sam)), tmp_path / "encoder.onnx")
    assert len(list(tmp_path.iterdir())) == 1
    samples = [sample(683, 1024, (321, 481)), sample(1024, 300, (2000, 586))]
    runner = onnx.OnnxRunner(onnx.open_session(tmp_path / "encoder.onnx"), decoder)
    found = check.compare(sam, runner, samples)
    assert (found.images, found.prompts) == (2, 10)
    assert found.embedding < 2e-4
    assert found.predicted_iou < 2e-4
    assert found.worst_mask_iou > 0.999


def test_openvino_reduces_the_image_to_the_students_size_in_the_same_way(teacher: Sam, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs openvino: docs/use.md")
    file = tmp_path / "encoder.onnx"
    onnx.write_graph(AnySizeEncoder(prepared(student("resnet18", teacher, image_size=128))), file)
    given = onnx.encoder_input(sample(683, 1024, (321, 481)))
    (expected,) = onnx.open_session(file).run(None, given)
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(given).to_tuple()[0], expected, atol=1e-4)


def test_an_image_that_was_not_resized_is_an_error(teacher: Sam, tmp_path: Path) -> None:
    """Otherwise it would be padded or cut off, and give wrong masks."""
    encoder = AnySizeEncoder(prepared(student("resnet18", teacher, image_size=64)))
    onnx.write_graph(encoder, tmp_path / "encoder.onnx")
    session = onnx.open_session(tmp_path / "encoder.onnx")
    for height, width in [(480, 640), (683, 1023), (1500, 1024), (1025, 1025)]:
        image = np.zeros((height, width, 3), np.uint8)
        with pytest.raises(IndexError):
            encoder(torch.from_numpy(image))
        with pytest.raises(Exception, match="out of data bounds"):
            session.run(None, {"image": image})


def test_check_detects_a_difference(teacher: Sam, decoder: InferenceSession, tmp_path: Path) -> None:
    sam = student("resnet18", teacher, image_size=64)
    onnx.write_graph(AnySizeEncoder(prepared(sam)), tmp_path / "encoder.onnx")
    runner = onnx.OnnxRunner(onnx.open_session(tmp_path / "encoder.onnx"), decoder)
    samples = [sample(683, 1024, (321, 481))]
    assert check.compare(sam, runner, samples).good(0.999)
    assert check.compare(sam, runner, samples, points=1).prompts == 2, "the two clicks"
    sam.image_encoder.neck.norm2.bias[:64] += 1
    found = check.compare(sam, runner, samples)
    assert not found.good(0.999)
    assert found.embedding == pytest.approx(1, abs=1e-3)
    sam.image_encoder.neck.norm2.bias[0] = torch.nan
    assert not check.compare(sam, runner, samples).good(0)


def test_gelu_is_one_operator(teacher: Sam, tmp_path: Path) -> None:
    """ONNX Runtime fuses all 23 GELUs of TinyViT; as PyTorch's exporter writes them, it would fuse none."""
    onnx.write_graph(Encoder(prepared(student("tinyvit", teacher, 64)), "inside"), tmp_path / "encoder.onnx")
    options = onnx.onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    InferenceSession(tmp_path / "encoder.onnx", options, providers=["CPUExecutionProvider"])
    used = [node.op_type for node in onnx_package.load(tmp_path / "optimized.onnx").graph.node]
    assert sum(op in ("Gelu", "BiasGelu") for op in used) == 23
    assert "Erf" not in used
    assert "BatchNormalization" not in used


def test_quantized_weights(teacher: Sam, tmp_path: Path) -> None:
    """int8: TinyViT's linear layers in 8 bits, except each MLP's second one, and all other weights in 16 bits."""
    sam = Sam(teacher.image_encoder, teacher.prompt_encoder, teacher.mask_decoder, image_size=256)
    graph, sizes = Encoder(prepared(sam), "outside"), {}
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = graph(x)
    onnx.write_graph(graph, tmp_path / "encoder.onnx")
    for quantize, least in ((None, 0.99999), ("fp16", 0.9999), ("int8", 0.9999)):
        path = Path(shutil.copy(tmp_path / "encoder.onnx", tmp_path / f"{quantize}.onnx"))
        if quantize:
            onnx.quantize_file(path, quantize)
        (found,) = onnx.open_session(path).run(None, {"image": x.numpy()})
        cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(found).flatten(), expected.flatten(), dim=0)
        assert cosine > least, quantize
        sizes[quantize] = path.stat().st_size
    assert sizes["fp16"] < 0.53 * sizes[None]
    assert sizes["int8"] < 0.85 * sizes["fp16"]


def test_the_decoder_has_the_names_and_shapes_of_segment_anythings_export(decoder: InferenceSession) -> None:
    inputs = {tensor.name: tensor.shape for tensor in decoder.get_inputs()}
    assert list(inputs) == [
        "image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size",
    ]  # fmt: skip
    assert inputs["point_coords"] == ["prompts", "points", 2]
    assert [tensor.name for tensor in decoder.get_outputs()] == ["masks", "iou_predictions", "low_res_masks"]
    assert {tensor.type for tensor in decoder.get_inputs()} == {"tensor(float)"}


@pytest.mark.parametrize("size", [(321, 481), (2000, 3), (1, 700), (1333, 1999), (427, 641)])
def test_masks_have_the_original_size(decoder: InferenceSession, size: tuple[int, int]) -> None:
    """`frame_size` rounds in double precision; float32 would cut some sizes a pixel off."""
    inputs = {
        "image_embeddings": np.zeros((1, 256, 64, 64), np.float32),
        "point_coords": np.full((1, 1, 2), 9, np.float32),
        "point_labels": np.ones((1, 1), np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array(size, np.float32),
    }
    masks, _, low_res = decoder.run(None, inputs)
    assert masks.shape == (1, 4, *size)
    height, width = frame_size(size)
    framed = torch.nn.functional.interpolate(torch.from_numpy(low_res), (1024, 1024), mode="bilinear")
    expected = torch.nn.functional.interpolate(framed[..., :height, :width], size, mode="bilinear")
    np.testing.assert_allclose(masks, expected.numpy(), atol=1e-3)


def test_three_prompts_at_once(teacher: Sam, decoder: InferenceSession) -> None:
    embedding = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    points = np.random.default_rng(0).uniform(0, 1024, (3, 2, 2)).astype(np.float32)
    labels = np.array([[1, -1], [1, 0], [2, 3]], np.float32)
    others = {
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([64, 64], np.float32),
    }
    together = decoder.run(
        None, {"image_embeddings": embedding, "point_coords": points, "point_labels": labels, **others}
    )
    for i in range(3):
        one = {"point_coords": points[i : i + 1], "point_labels": labels[i : i + 1]}
        alone = decoder.run(None, {"image_embeddings": embedding, **one, **others})
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, atol=1e-3)


def test_weights_beyond_2_gb_get_their_own_file(teacher: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "LARGEST_FILE", 1000)
    graph = AnySizeEncoder(prepared(student("resnet18", teacher, image_size=64)))
    onnx.write_graph(graph, tmp_path / "encoder.onnx")
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert sorted(file.name for file in moved.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
    encoder = onnx.open_session(moved / "encoder.onnx")
    assert encoder.run(None, onnx.encoder_input(sample(64, 1024, (4, 64))))[0].shape == (1, 256, 64, 64)
    with pytest.raises(UserError, match="models of up to 2 GB"):
        onnx.write_graph(graph, moved / "encoder.int8.onnx", "int8")


def test_a_label_that_sam_does_not_know_is_an_error(decoder: InferenceSession) -> None:
    """Otherwise it would be treated as a point that is neither foreground nor background."""
    inputs = {
        "image_embeddings": np.zeros((1, 256, 64, 64), np.float32),
        "point_coords": np.full((1, 2, 2), 9, np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([64, 64], np.float32),
    }
    for label in (4, -2, 0.5, np.nan):
        with pytest.raises(Exception, match="out of data bounds"):
            decoder.run(None, inputs | {"point_labels": np.array([[1, label]], np.float32)})
