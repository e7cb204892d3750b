"""MobileSAM's own code, which holds segment-anything's: what we are compared with, where it is installed."""

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
    """package: `mobile_sam`. model: its SAM, of the same architecture and weights as ours, if it has that at all."""

    name: str
    package: Any
    model: Any


def peer_of(sam: Sam, device: str) -> Peer | None:
    """MobileSAM's code with the model that it has for this one, else with MobileSAM itself. None: it is not installed.

    Importing it overwrites timm's entries for TinyViT, which our own TinyViT does not ask for.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = importlib.import_module("mobile_sam")
    except ImportError:
        return None
    name = next(iter(official_names(sam).values()), None)  # MobileSAM's registry has SAM's own as well
    source = sam if name else load_sam("mobile_sam")
    model = package.sam_model_registry[name or "vit_t"]()
    model.load_state_dict(official_state(source))
    model.train().eval()  # its TinyViT keeps attention biases, which the weights have just changed
    return Peer(f"MobileSAM's code, {name or 'vit_t'}, fp32", package, model.to(device))
