"""format=onnx, and functions that write any graph as an ONNX file, quantise it, and open it in ONNX Runtime."""

import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript import opset18
from torch.export import Dim

from sam_distill.errors import UserError
from sam_distill.export.contract import Quantize, Settings, graph_as_json
from sam_distill.export.graphs import Decoder, prepared
from sam_distill.export.runner import Prompt, Runner, mask_inputs
from sam_distill.export.sam_layout import AnySizeEncoder, UpscalingDecoder
from sam_distill.models.sam import Sam
from sam_distill.types import FRAME, Sample

for exporter in ("onnx_ir", "onnxscript", "torch.onnx", "onnxruntime"):
    logging.getLogger(exporter).setLevel(logging.ERROR)  # they log every constant that they fold

OPSET = 18  # PyTorch's exporter writes it natively; ONNX Runtime reads it since 1.14
LARGEST_FILE = 2**31 - 2**24  # bytes of weights that fit into one ONNX file together with its graph
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
LEAST_VALUES = 1024  # a tensor with fewer is not worth halving


def write(sam: Sam, folder: Path, settings: Settings) -> dict[str, Any]:
    """Write encoder.onnx and decoder.onnx in segment-anything's layout; weights beyond 2 GB get a file of their own."""
    sam = prepared(sam)
    return {
        "encoder": write_graph(AnySizeEncoder(sam), folder / ENCODER, settings.quantize),
        "decoder": write_graph(UpscalingDecoder(sam), folder / DECODER, settings.quantize),
    }


def open_runner(folder: Path, settings: Settings) -> Runner:
    return OnnxRunner(open_session(folder / ENCODER), open_session(folder / DECODER))


@dataclass(frozen=True)
class OnnxRunner:
    """Runner of files in segment-anything's layout."""

    encoder: InferenceSession
    decoder: InferenceSession

    def encode(self, sample: Sample) -> np.ndarray:
        return self.encoder.run(None, encoder_input(sample))[0]

    def decode(self, embedding: np.ndarray, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        prompts = prompt.to_prompts()
        values = [
            embedding, prompts.points[0].numpy(), prompts.labels[0].float().numpy(), *mask_inputs(prompt),
            np.array([FRAME, FRAME], np.float32),
        ]  # fmt: skip
        names = [tensor.name for tensor in self.decoder.get_inputs()]
        low_res, iou = self.decoder.run(["low_res_masks", "iou_predictions"], dict(zip(names, values, strict=True)))
        return low_res[0], iou[0]


def encoder_input(sample: Sample) -> dict[str, np.ndarray]:
    return {"image": sample.image.permute(1, 2, 0).contiguous().numpy()}


def open_session(model: Path) -> InferenceSession:
    """Open an ONNX file on the CPU, with as many threads as PyTorch uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])


def write_graph(graph: Any, path: Path, quantize: Quantize | None = None) -> dict[str, Any]:
    """Write a module that has `inputs` and `outputs` (`contract.TensorSpec`); return its part of contract.json.

    A decoder gets fp16 in place of int8, in which it is no faster but loses a hundredth of its masks' IoU.
    Raise UserError if a model to quantise is larger than 2 GB.
    """
    free = {side: Dim(str(side), max=FRAME if graph.inputs[0].dtype == "uint8" else None)
            for tensor in graph.inputs for side in tensor.shape if isinstance(side, str)}  # fmt: skip
    sides = [{i: free[s] for i, s in enumerate(tensor.shape) if isinstance(s, str)} for tensor in graph.inputs]
    size = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
    if quantize and size > LARGEST_FILE:
        raise UserError(f"quantize={quantize} takes models of up to 2 GB")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's warnings about its own code
        torch.onnx.export(
            graph.eval(),
            tuple(tensor.zeros() for tensor in graph.inputs),
            path,
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=[tensor.name for tensor in graph.outputs],
            dynamic_shapes=tuple(sides),
            custom_translation_table={torch.ops.aten.gelu.default: _gelu},
            opset_version=OPSET,
            dynamo=True,
            external_data=size > LARGEST_FILE,
            verbose=False,
        )
    if quantize:
        quantize_file(path, "fp16" if isinstance(graph, Decoder | UpscalingDecoder) else quantize)
    return graph_as_json(path.name, graph.inputs, graph.outputs)


def quantize_file(path: Path, quantize: Quantize) -> None:
    """Quantise a file's weights. fp16: all in fp16. int8: those of most linear layers in int8, the others in fp16."""
    if quantize == "int8":
        _quantize_linear_layers(path)
    _halve_weights(path)


def _gelu(x: Any, approximate: str = "none") -> Any:
    """Write GELU so that ONNX Runtime runs it as one operator, unlike PyTorch's form x * (0.5 * (1 + erf))."""
    op: Any = opset18
    one, half, root = (op.CastLike(op.Constant(value_float=value), x) for value in (1.0, 0.5, math.sqrt(2)))
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


def _quantize_linear_layers(path: Path) -> None:
    """Quantise weights of linear layers to 8 bits, with a scale per channel; activations by each picture's range.

    Skip layers with more inputs than outputs: an MLP's second layer causes most of the error.
    """
    model = onnx.load(path)
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2]
    narrow = {matrix.name for matrix in matrices if matrix.dims[0] <= matrix.dims[1]}  # no more inputs than outputs
    excluded = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] not in narrow]
    logging.disable(logging.WARNING)  # it logs every tensor that it leaves alone
    try:
        quantize_dynamic(
            model, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


def _halve_weights(path: Path) -> None:
    """Store weights in 16 bits; the runtime converts them to 32 bits at loading, and computes in 32 bits."""
    model = onnx.load(path)
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 and np.prod(tensor.dims) >= LEAST_VALUES:
            name = tensor.name
            half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{name}.fp16")
            tensor.CopyFrom(half)
            casts.append(helper.make_node("Cast", [half.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)
