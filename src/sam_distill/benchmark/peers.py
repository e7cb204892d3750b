"""The reference implementation to compare with, if installed: MobileSAM's code, which contains segment-anything's."""

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

from sam_distill.export.official import official_names
from sam_distill.models.checkpoints import load_sam, official_state
from sam_distill.models.sam import Sam

MISSING = "MobileSAM's code: not run, it needs pip install 'sam-distill[bench]'"


@dataclass(frozen=True)
class Peer:
    """Reference implementation. package: `mobile_sam`. model: its SAM, of our architecture and weights if it has it."""

    name: str
    package: Any
    model: Any


def peer_of(sam: Sam, device: str) -> Peer | None:
    """Return MobileSAM's code with its version of `sam`, else with MobileSAM itself; None if it is not installed.

    Importing that code overwrites timm's registry entries for TinyViT, which our own TinyViT does not use.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = importlib.import_module("mobile_sam")
    except ImportError:
        return None
    name = next(iter(official_names(sam).values()), None)  # MobileSAM's registry contains SAM's models, too
    source = sam if name else load_sam("mobile_sam")
    model = package.sam_model_registry[name or "vit_t"]()
    model.load_state_dict(official_state(source))
    model.train().eval()  # recompute the attention biases that its TinyViT caches: the weights have changed
    return Peer(f"MobileSAM's code, {name or 'vit_t'}, fp32", package, model.to(device))
