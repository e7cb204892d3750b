from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from sam_distill.export.onnx import open_session
from sam_distill.export.quantize import quantize_encoder


def test_layers_that_cannot_bear_8_bits_are_left_alone(tmp_path: Path) -> None:
    """One channel between the second and third layer is a thousand times the others, and hardly counts."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)
    )
    layers[2].weight.data[0] *= 1000
    layers[4].weight.data[:, 0] /= 100_000
    source, target = tmp_path / "encoder.onnx", tmp_path / "encoder.int8.onnx"
    inputs = [{"image": np.random.default_rng(i).normal(size=(1, 3, 32, 32)).astype(np.float32)} for i in range(4)]
    example = (torch.from_numpy(inputs[0]["image"]),)
    torch.onnx.export(layers.eval(), example, source, input_names=["image"], dynamo=True, external_data=False)

    assert quantize_encoder(source, target, inputs) == (2, 4)
    weights = {w.name: w for w in onnx.load(target).graph.initializer}
    assert sum(w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 4 for w in weights.values()) == 2
    (expected,), (result,) = (open_session(path).run(None, inputs[3]) for path in (source, target))
    assert np.square(result - expected).mean() < 0.01 * np.square(expected).mean()
