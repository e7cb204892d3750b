"""format=litert: .tflite files, mainly for Android, converted by litert-torch and run by LiteRT's own interpreter."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # set before LiteRT is imported, which logs every pass otherwise

import litert_torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer.quantizer import Quantizer
from ai_edge_quantizer.recipe import AlgorithmName, TFLOperationName

from sam_distill.export.contract import Settings, graph_as_json
from sam_distill.export.graphs import Decoder, Encoder, prepared
from sam_distill.export.runner import ContractRunner, Run, Runner
from sam_distill.models.sam import Sam

logging.getLogger("absl").setLevel(logging.ERROR)
litert_torch.config.show_progress = False

ENCODER, DECODER = "encoder.tflite", "decoder.tflite"
LINEAR = TFLOperationName.FULLY_CONNECTED
CONVOLUTIONS = (TFLOperationName.CONV_2D, TFLOperationName.DEPTHWISE_CONV_2D)


def write(sam: Sam, folder: Path, settings: Settings) -> dict[str, Any]:
    sam, quantize = prepared(sam), settings.quantize
    return {
        "encoder": _write_graph(Encoder(sam, settings.normalize), folder / ENCODER, quantize),
        "decoder": _write_graph(Decoder(sam, settings.points), folder / DECODER, quantize and "fp16"),
    }


def open_runner(folder: Path, settings: Settings) -> Runner:
    return ContractRunner(_open(folder / ENCODER), _open(folder / DECODER), settings)


@torch.no_grad()
def _write_graph(graph: Any, path: Path, quantize: str | None) -> dict[str, Any]:
    names = {tensor.name: tensor.zeros() for tensor in graph.inputs}
    content = bytes(litert_torch.convert(graph.eval(), sample_kwargs=names).model_content())
    if quantize:
        content = _quantized(content, quantize)
    path.write_bytes(content)
    return graph_as_json(path.name, graph.inputs, graph.outputs)


def _quantized(content: bytes, quantize: str) -> bytes:
    """Quantise weights: convolutions to fp16, linear layers to `quantize`; int8 activations by each picture's range."""
    quantizer = Quantizer(content)
    halved = CONVOLUTIONS if quantize == "int8" else (*CONVOLUTIONS, LINEAR)
    for operation in halved:
        quantizer.add_weight_only_config(".*", operation, 16, algorithm_key=AlgorithmName.FLOAT_CASTING)
    if quantize == "int8":
        quantizer.add_dynamic_config(".*", LINEAR, 8)
    result = quantizer.quantize(enable_progress_bar=False, enable_progress_report=False).quantized_model
    assert result is not None
    return bytes(result)


def _open(path: Path) -> Run:
    interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def run(values: Sequence[np.ndarray]) -> list[np.ndarray]:
        for tensor, value in zip(inputs, values, strict=True):
            interpreter.set_tensor(tensor["index"], value)
        interpreter.invoke()
        return [interpreter.get_tensor(tensor["index"]) for tensor in outputs]

    return run
