"""Faster copies of a model for inference."""

from typing import Literal

from sam_distill.inference.onednn import with_fused_layers
from sam_distill.inference.openvino_encoder import OpenVinoEncoder
from sam_distill.inference.simplify import has_batch_norms, simplified
from sam_distill.models.sam import Sam

Runtime = Literal["torch", "openvino"]  # library that runs the image encoder


def optimize_for_inference(sam: Sam, runtime: Runtime = "torch") -> Sam:
    """Return a faster copy with the same embeddings, to 1e-4: BatchNorm is folded into convolutions, TinyViT's blocks
    are simplified, and on x86 a layer and its activation run as one.

    The copy can neither be trained nor saved.
    runtime: library that runs the image encoder.
    """
    with_batch_norms = has_batch_norms(sam.image_encoder)
    sam = simplified(sam)
    if runtime == "openvino":
        sam.image_encoder = OpenVinoEncoder(sam.image_encoder, sam.image_size)
    elif with_batch_norms:
        sam.image_encoder = with_fused_layers(sam.image_encoder)
    return sam
