"""Checkpoints for use elsewhere: in MobileSAM's code, in SAM's code, and in any code that reads safetensors."""

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save

from sam_distill.errors import UserError
from sam_distill.models.checkpoints import DESCRIPTION, describe, format_spec, official_state, save_sam
from sam_distill.models.sam import Sam

# The encoders that the official `sam_model_registry` of MobileSAM and of SAM builds, by their names there.
REGISTRIES: dict[str, dict[str, dict[str, Any]]] = {
    "mobile_sam": {"vit_t": {"class": "TinyViT", "size": "5m"}},
    "sam": {
        "vit_b": {"class": "SamViT", "width": 768, "depth": 12, "heads": 12, "global_blocks": [2, 5, 8, 11]},
        "vit_l": {"class": "SamViT", "width": 1024, "depth": 24, "heads": 16, "global_blocks": [5, 11, 17, 23]},
        "vit_h": {"class": "SamViT", "width": 1280, "depth": 32, "heads": 16, "global_blocks": [7, 15, 23, 31]},
    },
}


def official_names(sam: Sam) -> dict[str, str]:
    """Return {layout: name in its registry} for each official code that builds this architecture; may be empty."""
    encoder = describe(sam)["encoder"]
    return {kind: name for kind, models in REGISTRIES.items() for name, spec in models.items() if spec == encoder}


def save_official(sam: Sam, path: Path, layout: Literal["mobile_sam", "sam"]) -> str:
    """Write a file that the official code loads strictly; return the model's name in that code's registry.

    Raise UserError if that code does not build this architecture.
    """
    found = official_names(sam)
    if layout not in found:
        fits = f"format={next(iter(found))}" if found else "format=onnx or format=safetensors"
        names = {"mobile_sam": "MobileSAM's TinyViT-5M", "sam": "SAM's ViT-B, L and H"}
        raise UserError(
            f"format={layout} is for {names[layout]}, but this is {format_spec(describe(sam)['encoder'])}: take {fits}"
        )
    save_sam(sam, path)
    return found[layout]


def save_safetensors(sam: Sam, path: Path, half: bool = False) -> None:
    """Write safetensors with the official key names; the metadata say how to build the model. half: in float16."""
    state = official_state(sam)
    if half:
        state.update({key: value.half() for key, value in state.items() if value.is_floating_point()})
    path.write_bytes(save(state, {DESCRIPTION: json.dumps(describe(sam))}))
