"""format=coreml: Core ML files (.mlpackage) for Apple's devices, converted by coremltools. Only a Mac can run them.

The files are checked without running them: inputs and outputs are the contract's, no tensor has over five dimensions.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import register_torch_op
from coremltools.converters.mil.frontend.torch.ops import noop
from coremltools.optimize.coreml import OpLinearQuantizerConfig, OptimizationConfig, linear_quantize_weights
from coremltools.proto.FeatureTypes_pb2 import ArrayFeatureType

from sam_distill.errors import UserError
from sam_distill.export.contract import Quantize, Settings, graph_as_json
from sam_distill.export.graphs import Decoder, Encoder, prepared
from sam_distill.models.sam import Sam

logging.getLogger("coremltools").setLevel(logging.ERROR)

ENCODER, DECODER = "encoder.mlpackage", "decoder.mlpackage"
OLDEST = ct.target.iOS17  # oldest systems that can run the files: iOS 17 and macOS 14
MOST_DIMENSIONS = 5
INT8 = OptimizationConfig(op_type_configs={"linear": OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")})


@register_torch_op(override=True)
def alias(context: Any, node: Any) -> None:
    """Convert torch.export's `alias`, a tensor under another name, to no operation: coremltools 9 does not know it."""
    noop(context, node)


def write(sam: Sam, folder: Path, settings: Settings) -> dict[str, Any]:
    """Write encoder.mlpackage and decoder.mlpackage; return the graphs' parts of contract.json.

    fp16: weights and arithmetic in 16 bits. int8: in addition, the weights of the encoder's linear layers in 8 bits.
    """
    sam, quantize = prepared(sam), settings.quantize
    return {
        "encoder": _write_graph(Encoder(sam, settings.normalize), folder / ENCODER, quantize),
        "decoder": _write_graph(Decoder(sam, settings.points), folder / DECODER, quantize and "fp16"),
    }


@torch.no_grad()
def _write_graph(graph: Any, path: Path, quantize: Quantize | None) -> dict[str, Any]:
    inputs = tuple(tensor.zeros() for tensor in graph.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter's warnings about its own code
        program = torch.export.export(graph.eval(), inputs, strict=False).run_decompositions({})
        try:
            model = ct.convert(
                program,
                inputs=[ct.TensorType(tensor.name, tensor.shape, np.float32) for tensor in graph.inputs],
                outputs=[ct.TensorType(tensor.name, dtype=np.float32) for tensor in graph.outputs],
                compute_precision=ct.precision.FLOAT16 if quantize else ct.precision.FLOAT32,
                minimum_deployment_target=OLDEST,
                skip_model_load=True,
            )
        except NotImplementedError as error:
            raise UserError(f"coremltools cannot convert this encoder ({error}): take another format=") from error
        if quantize == "int8":
            model = linear_quantize_weights(model, INT8)
    model.save(str(path))
    _check(ct.models.MLModel(str(path), skip_model_load=True).get_spec(), graph)
    return graph_as_json(path.name, graph.inputs, graph.outputs)


def _check(spec: Any, graph: Any) -> None:
    """Raise UserError unless the file has the contract's inputs and outputs, and at most MOST_DIMENSIONS per tensor."""
    for found, expected in ((spec.description.input, graph.inputs), (spec.description.output, graph.outputs)):
        said = [(feature.name, tuple(feature.type.multiArrayType.shape)) for feature in found]
        types = {feature.type.multiArrayType.dataType for feature in found}
        if said != [(tensor.name, tensor.shape) for tensor in expected] or types != {ArrayFeatureType.FLOAT32}:
            raise UserError(f"Core ML's program has {said} instead of the contract's tensors, so nothing was written")
    blocks = [block for main in spec.mlProgram.functions.values() for block in main.block_specializations.values()]
    outputs = [output for block in blocks for operation in block.operations for output in operation.outputs]
    if (most := max(output.type.tensorType.rank for output in outputs)) > MOST_DIMENSIONS:
        raise UserError(f"this encoder has tensors of {most} dimensions; Core ML takes {MOST_DIMENSIONS} at most")
