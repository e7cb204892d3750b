"""ImageNet weights for timm's backbones: from the model hub, from a pip package, or from a file."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import get_session
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from sam_distill.errors import UserError
from sam_distill.models import weights

log = logging.getLogger(__name__)
logging.getLogger("timm").setLevel(logging.ERROR)  # it logs downloads even if they fail, and unused layers

HUB_TIMEOUT = 3  # timeout of the connection, seconds


def with_imagenet_weights(name: str, build: Callable[..., nn.Module], pretrained: bool | str) -> nn.Module:
    """Return a backbone with ImageNet weights, built by `build(pretrained=..., ...)`, and log their source.

    name: the model's name in timm. build: takes timm's own arguments.
    pretrained: False for random weights; a file's path for the weights in it (a state dict or safetensors under timm's
        names); True for those of the model hub, else those of weights.yaml, else a warning and random weights.
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
    """Return the weights that weights.yaml has for a backbone, under timm's names, classifier included.

    The file uses the names of another code base, but in the same order.
    """
    theirs = torch.load(weights.fetch(name), map_location="cpu", weights_only=True)
    return dict(zip(_random(name).state_dict(), theirs.values(), strict=True))


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
    """Build the backbone with `state`; UserError if tensors are missing or misshapen, as timm ignores missing ones."""
    with torch.device("meta"):
        whole = _random(name, num_classes=0)
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


def _random(name: str, **options: Any) -> nn.Module:
    """Build timm's own model with random weights: importing MobileSAM's code overwrites TinyViT in timm's registry."""
    own = getattr(timm.models, name.partition(".")[0], None)
    model: nn.Module = own(**options) if own else timm.create_model(name, **options)
    return model


@contextmanager
def _offline_unless_reached() -> Iterator[None]:
    """If the model hub can't be reached, use only its local cache: its client would retry for a minute.

    The test uses the client itself, so that proxies, mirrors and certificates are the same as in a download.
    """
    before = hub.HF_HUB_OFFLINE
    try:
        get_session().head(hub.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # its type depends on the library that the client is built on
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
