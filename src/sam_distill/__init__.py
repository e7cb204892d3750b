"""Distil Segment Anything into a small image encoder."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam_distill.inference.optimize import optimize_for_inference as optimize_for_inference
    from sam_distill.models.checkpoints import load_sam as load_sam
    from sam_distill.models.checkpoints import sam_model_registry as sam_model_registry
    from sam_distill.predict.mask_generator import SamAutomaticMaskGenerator as SamAutomaticMaskGenerator
    from sam_distill.predict.predictor import SamPredictor as SamPredictor

_MODULES = {
    "load_sam": "sam_distill.models.checkpoints",
    "sam_model_registry": "sam_distill.models.checkpoints",
    "optimize_for_inference": "sam_distill.inference.optimize",
    "SamPredictor": "sam_distill.predict.predictor",
    "SamAutomaticMaskGenerator": "sam_distill.predict.mask_generator",
}
__all__ = ["SamAutomaticMaskGenerator", "SamPredictor", "load_sam", "optimize_for_inference", "sam_model_registry"]


def __getattr__(name: str) -> Any:
    """Import a name on its first use: importing torch takes seconds, and `sam-distill --help` does not need it."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
