"""Write the two ONNX files of a SAM, and open them in ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.export import Dim

from sam_distill.export.graphs import Decoder, Encoder
from sam_distill.models.sam import Sam
from sam_distill.types import EMBED_DIM, FRAME, GRID, LOW_RES, Sample

for exporter in ("onnx_ir", "onnxscript", "torch.onnx"):
    logging.getLogger(exporter).setLevel(logging.ERROR)  # they tell every constant that they fold

EMBEDDINGS, MASKS, IOUS, LOW_RES_MASKS = "image_embeddings", "masks", "iou_predictions", "low_res_masks"
OPSET = 18  # what PyTorch's exporter writes natively; ONNX Runtime reads it since 1.14
LARGEST_FILE = 2**31 - 2**24  # bytes of weights that fit into one ONNX file beside its graph


def write_encoder(sam: Sam, path: Path) -> None:
    """Write `graphs.Encoder`. Beyond 2 GB its weights lie in a second file, `path` + ".data"."""
    height, width = Dim("height", max=FRAME), Dim("width", max=FRAME)
    image = torch.zeros(FRAME // 2, FRAME - 1, 3, dtype=torch.uint8)  # sizes that are nobody's special case
    _write(Encoder(sam), path, {"image": image}, {"image": {0: height, 1: width}}, [EMBEDDINGS])


def write_decoder(sam: Sam, path: Path) -> None:
    """Write `graphs.Decoder`."""
    example = {
        EMBEDDINGS: torch.zeros(1, EMBED_DIM, GRID, GRID),
        "point_coords": torch.zeros(2, 3, 2),
        "point_labels": torch.zeros(2, 3),
        "mask_input": torch.zeros(1, 1, LOW_RES, LOW_RES),
        "has_mask_input": torch.zeros(1),
        "orig_im_size": torch.tensor([480.0, 640.0]),
    }
    prompts = {0: Dim("prompts"), 1: Dim("points")}
    dynamic = {name: prompts if name.startswith("point_") else {} for name in example}
    _write(Decoder(sam), path, example, dynamic, [MASKS, IOUS, LOW_RES_MASKS])


def _write(
    model: nn.Module, path: Path, example: dict[str, Tensor], dynamic: dict[str, dict[int, Dim]], outputs: list[str]
) -> None:
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own affairs
        torch.onnx.export(
            model.eval(),
            tuple(example.values()),
            path,
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes=tuple(dynamic.values()),
            opset_version=OPSET,
            dynamo=True,
            external_data=size > LARGEST_FILE,
            verbose=False,
        )
    model.train().eval()  # TinyViT keeps attention biases while in eval mode: now those of the exporter, without values


def open_session(model: Path | bytes) -> InferenceSession:
    """On the CPU, with as many threads as PyTorch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])


def encoder_input(sample: Sample) -> dict[str, np.ndarray]:
    return {"image": sample.image.permute(1, 2, 0).contiguous().numpy()}
