"""format=executorch: .pte files for Android and iOS, from torch.export; ExecuTorch's runtime runs them with XNNPACK."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.utils.configs import get_transform_passes
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.passes.constant_prop_pass import constant_prop_pass
from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
from executorch.runtime import Runtime
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_

from sam_distill.errors import UserError
from sam_distill.export.contract import Settings, graph_as_json
from sam_distill.export.graphs import Decoder, Encoder, prepared
from sam_distill.export.runner import ContractRunner, Run, Runner
from sam_distill.models.sam import Sam

logging.getLogger("executorch").setLevel(logging.ERROR)

ENCODER, DECODER = "encoder.pte", "decoder.pte"
INT8 = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
# Operators not folded into constants: positions (`arange`), since the result is larger, and dequantising int8 weights.
NOT_FOLDED = {torch.ops.aten.arange.default, torch.ops.torchao.dequantize_affine.default}


def write(sam: Sam, folder: Path, settings: Settings) -> dict[str, Any]:
    """Write encoder.pte and decoder.pte; return the graphs' parts of contract.json. Raise UserError for fp16.

    int8: quantise the encoder's linear layers, weights once and inputs by each picture's range, except layers with more
    inputs than outputs: an MLP's second layer causes half of the error.
    """
    if settings.quantize == "fp16":
        raise UserError("quantize=fp16 does not go with format=executorch, whose masks are wrong in it: take int8")
    sam = prepared(sam)
    if settings.quantize == "int8":

        def chosen(layer: nn.Module, _: str) -> bool:
            return isinstance(layer, nn.Linear) and layer.in_features <= layer.out_features

        quantize_(sam.image_encoder, INT8, chosen)
    return {
        "encoder": _write_graph(Encoder(sam, settings.normalize), folder / ENCODER),
        "decoder": _write_graph(Decoder(sam, settings.points), folder / DECODER),
    }


def open_runner(folder: Path, settings: Settings) -> Runner:
    return ContractRunner(_open(folder / ENCODER), _open(folder / DECODER), settings)


@torch.no_grad()
def _write_graph(graph: Any, path: Path) -> dict[str, Any]:
    inputs = tuple(tensor.zeros() for tensor in graph.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's warnings about its own code
        program = torch.export.export(graph.eval(), inputs, strict=False)
        program = constant_prop_pass(program, NOT_FOLDED)  # XNNPACK takes linear layers of constant weights only
        lowered = to_edge_transform_and_lower(program, get_transform_passes(), [XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)
    return graph_as_json(path.name, graph.inputs, graph.outputs)


def _open(path: Path) -> Run:
    _unsafe_reset_threadpool(torch.get_num_threads())
    method = Runtime.get().load_program(path).load_method("forward")

    def run(values: Sequence[np.ndarray]) -> list[np.ndarray]:
        outputs = method.execute([torch.from_numpy(value) for value in values])
        return [output.clone().numpy() for output in outputs]  # the next call overwrites the memory

    return run
