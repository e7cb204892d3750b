"""ImageNet weights for timm's backbones: from the model hub, from a package by pip, or from a file."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import get_session
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from sam_distill.models import weights
from sam_distill.types import UserError

log = logging.getLogger(__name__)
logging.getLogger("timm").setLevel(logging.ERROR)  # it announces downloads that may not succeed, and unused layers

HUB_PATIENCE = 3  # seconds to connect


def with_imagenet_weights(name: str, build: Callable[..., nn.Module], pretrained: bool | str) -> nn.Module:
    """A backbone with its ImageNet weights: `build(pretrained=..., ...)` with timm's own arguments, and a log line.

    name: timm's. pretrained: False for random weights; a file for the weights in it (a state dict or safetensors under
    timm's names); True for the model hub's, else those of weights.yaml, else a warning and random weights.
    """
    if pretrained is False:
        return build(pretrained=False)
    if isinstance(pretrained, str):
        return _built_with(name, build, _read(pretrained), pretrained)
    with _offline_unless_reached():
        try:
            backbone = build(pretrained=True)
        except (OSError, RuntimeError, ValueError) as error:
            offline = "the model hub can't be reached and they are not in its cache"
            reason = offline if hub.HF_HUB_OFFLINE else str(error).split("\n")[0]
        else:
            log.info("ImageNet weights for %s: from the model hub", name)
            return backbone
    if name in weights.names("backbone"):
        try:
            return _built_with(name, build, packaged(name), f"the table of weights ({reason})")
        except UserError as error:
            reason += f"; {error}"
    log.warning("No ImageNet weights for the student, it starts from scratch: %s", reason)
    return build(pretrained=False)


def packaged(name: str) -> dict[str, Tensor]:
    """The weights of weights.yaml under timm's names, classifier included.

    Their own names are the layers' in another code base, in the same order.
    """
    theirs = torch.load(weights.fetch(name), map_location="cpu", weights_only=True)
    return dict(zip(timm.create_model(name).state_dict(), theirs.values(), strict=True))


def _read(path: str) -> Mapping[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"encoder.pretrained={path}: no such file; true asks the model hub, false starts from scratch")
    try:
        return load_state_dict(str(file))
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"encoder.pretrained={path}: not a state dict that loads safely ({reason})") from error


def _built_with(name: str, build: Callable[..., nn.Module], state: Mapping[str, Tensor], source: str) -> nn.Module:
    """timm loads what it is given without complaint about layers that are missing, so that is checked first."""
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0)
    wanted = {key: value.shape for key, value in whole.state_dict().items()}
    absent = [key for key, shape in wanted.items() if key not in state or state[key].shape != shape]
    if absent:
        raise UserError(
            f"encoder.pretrained={source}: not the weights of timm's {name}: {len(absent)} of its {len(wanted)} tensors"
            f" are missing or of another shape, such as {absent[0]}"
        )
    backbone = build(pretrained=True, pretrained_cfg_overlay={"state_dict": {key: state[key] for key in wanted}})
    backbone.pretrained_cfg = backbone.default_cfg = {}  # type: ignore[assignment] # they hold on to the state dict
    log.info("ImageNet weights for %s: from %s", name, source)
    return backbone


@contextmanager
def _offline_unless_reached() -> Iterator[None]:
    """Where the model hub can't be reached, use only what it has cached: its client would retry for a minute.

    The client itself is asked, so that proxies, mirrors and certificates are those it will use.
    """
    before = hub.HF_HUB_OFFLINE
    try:
        get_session().head(hub.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception:  # of whichever library the client is built on
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
