"""MobileSAM's own code, which holds segment-anything's: what we are compared with, where it is installed."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

from sam_distill.export.official import official_names
from sam_distill.models.checkpoints import load_sam, official_state
from sam_distill.models.sam import Sam

MISSING = "MobileSAM's code: not run, it needs pip install 'sam-distill[bench]'"


def mobile_sam() -> ModuleType | None:
    """Importing it overwrites timm's entries for TinyViT, which our own TinyViT does not ask for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("mobile_sam")
    except ImportError:
        return None


def peer_of(sam: Sam) -> tuple[str, Any] | None:
    """(its name, the reference model): of the same architecture and weights, if they have it, else MobileSAM itself."""
    package = mobile_sam()
    if package is None:
        return None
    name = next(iter(official_names(sam).values()), None)  # MobileSAM's registry has SAM's own as well
    source = sam if name else load_sam("mobile_sam")
    model = package.sam_model_registry[name or "vit_t"]()
    model.load_state_dict(official_state(source))
    model.train().eval()  # its TinyViT keeps attention biases, which the weights have just changed
    return f"MobileSAM's code, {name or 'vit_t'}", model
