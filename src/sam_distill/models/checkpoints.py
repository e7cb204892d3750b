"""Reading SAM checkpoints of every layout, and writing them with the official key names.

Layouts read: SAM's (ViT-B/L/H), MobileSAM's, our own student.pt (the same names; other backbones keep timm's names
under `image_encoder.`), the same as .safetensors, and Lightning's .ckpt. The architecture is recognised from the
tensors, or read from our description of it: in student.pt it is in `state_dict._metadata`, which strict loaders ignore.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sam_distill.errors import UserError, did_you_mean
from sam_distill.files import LAST_CHECKPOINT, atomic_write, compression, file_sha256
from sam_distill.models import weights
from sam_distill.models.encoders import ImageEncoder, SamViT, TinyViT, build_encoder
from sam_distill.models.sam import Sam
from sam_distill.types import FRAME

DESCRIPTION = "sam_distill"  # key of our description of the model in a file
STUDENT = "student."  # prefix of the student's tensors in Lightning's checkpoints
_ENCODER = "image_encoder."
_TINY_VIT_SIZES = {320: "5m", 448: "11m", 576: "21m"}  # width of the last stage -> size


def _check_checkpoint(checkpoint: str) -> str:
    if checkpoint not in weights.names("sam"):
        try:
            find_checkpoint(checkpoint)
        except UserError as error:
            raise ValueError(str(error)) from None
    return checkpoint


Checkpoint = Annotated[str, AfterValidator(_check_checkpoint)]  # config field: checked before any build or download


def load_sam(checkpoint: str | Path) -> Sam:
    """Return the SAM that a checkpoint holds, of any architecture, in eval mode on the CPU.

    checkpoint: a run folder, a .ckpt, a .pt/.pth/.safetensors with official names, or a name (`mobile_sam`, ...).
    """
    path = find_checkpoint(checkpoint)
    state, description = _read(path)
    try:
        sam = Sam(build_encoder(description["encoder"]), image_size=description["image_size"])
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} holds a model that this version of sam-distill can't build ({why})") from error
    _load(sam, state, path)
    return sam.eval()


# For scripts written for segment-anything or MobileSAM. Every entry loads any of these models: the file tells which.
sam_model_registry = dict.fromkeys(("default", "vit_h", "vit_l", "vit_b", "vit_t"), load_sam)


def load_weights(sam: Sam, checkpoint: str | Path) -> None:
    """Load a checkpoint into `sam`; UserError if its architecture is not the same (image_size may differ)."""
    path = find_checkpoint(checkpoint)
    state, description = _read(path)
    ours = describe(sam)["encoder"]
    if description["encoder"] != ours:
        held = format_spec(description["encoder"])
        raise UserError(f"{path} holds the encoder {held}, but this is {format_spec(ours)}")
    _load(sam, state, path)


def save_sam(sam: Sam, path: str | Path) -> None:
    """Write `sam` in the official layout. The code of SAM and MobileSAM loads files with its own encoders strictly."""
    state = official_state(sam)
    state._metadata = {DESCRIPTION: describe(sam)}  # type: ignore[attr-defined]
    with atomic_write(Path(path)) as draft, draft.open("wb") as file:  # given a path, torch hides that the disk is full
        torch.save(state, file)


def describe(sam: Sam) -> dict[str, Any]:
    """Return what is needed to build `sam` again, as plain values: the spec of its image encoder, and image_size."""
    if not isinstance(sam.image_encoder, ImageEncoder):
        raise UserError(f"can't save a {type(sam.image_encoder).__name__}: image encoders derive from ImageEncoder")
    return {"encoder": sam.image_encoder.spec, "image_size": sam.image_size}


def official_state(sam: Sam) -> OrderedDict[str, Tensor]:
    """Return the tensors on the CPU under official names, for TinyViT with the classifier that MobileSAM requires."""
    names = _official_names(sam)
    state = OrderedDict((names[key], value.detach().cpu().contiguous()) for key, value in sam.state_dict().items())
    if isinstance(sam.image_encoder, TinyViT):
        width = state[f"{_ENCODER}neck.0.weight"].shape[1]
        state[f"{_ENCODER}norm_head.weight"] = torch.ones(width)
        state[f"{_ENCODER}norm_head.bias"] = torch.zeros(width)
        state[f"{_ENCODER}head.weight"] = torch.zeros(1000, width)
        state[f"{_ENCODER}head.bias"] = torch.zeros(1000)
    return state


def find_checkpoint(checkpoint: str | Path) -> Path:
    """Return the file for a name, run folder or path; download a named one if needed. UserError if there is none."""
    if str(checkpoint) in weights.names("sam"):
        return weights.fetch(str(checkpoint))
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        inside = [path / "student.pt", path / LAST_CHECKPOINT]
        found = next((file for file in inside if file.is_file()), None)
        if found is None:
            raise UserError(f"{path} is not a run folder: it has neither student.pt nor {LAST_CHECKPOINT}")
        return found
    if not path.is_file():
        if str(checkpoint) in weights.names("fastsam"):
            raise UserError(f"{checkpoint} is no SAM: only sam-distill evaluate takes it")
        known = [*weights.names("sam"), *weights.names("fastsam")]
        hint = did_you_mean(str(checkpoint), known, f"the names known are {', '.join(known)}")
        raise UserError(f"no checkpoint {checkpoint}: it is neither a file, a run folder nor a name ({hint})")
    return path


def fingerprint(checkpoint: str) -> str:
    """Return the sha256 of a checkpoint's file; for a name it is known without the file."""
    if checkpoint in weights.names("sam"):
        return weights.sha256(checkpoint)
    return file_sha256(find_checkpoint(checkpoint))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, under official names (those of a .ckpt: our names), and the description of their model."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if not start:
        raise UserError(f"{path} is empty")
    if start[8:] == b"{":  # safetensors, whatever its name: 8 bytes of header length, then the JSON header
        return _read_safetensors(path)
    if packed := compression(start):
        raise UserError(f"{path} is compressed with {packed}: unpack it first")
    try:
        with path.open("rb") as file:  # given a path, torch would trust the suffix .safetensors
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file makes it raise
        reason = re.split(r"\.\s|\n", str(error).strip())[0]  # the first sentence; the rest is torch's advice
        reason = reason if re.search("[a-z]{3}", reason) else type(error).__name__  # it may be just a number
        raise UserError(f"{path} is not a PyTorch checkpoint that loads safely ({reason})") from error
    if not (isinstance(content, Mapping) and all(isinstance(name, str) for name in content)):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict, which is tensors by their names")
    if DESCRIPTION in content and isinstance(content.get("state_dict"), Mapping):
        tensors = content["state_dict"].items()
        state = {k.removeprefix(STUDENT): v for k, v in tensors if k.startswith(STUDENT)}
        return state, _checked(content[DESCRIPTION], path)
    description = getattr(content, "_metadata", {}).get(DESCRIPTION) or _recognise(content, path)
    return dict(content), _checked(description, path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            description = (file.metadata() or {}).get(DESCRIPTION)
        content = json.loads(description) if description else _recognise(state, path)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a safetensors file ({error})") from error
    return state, _checked(content, path)


def _checked(description: Any, path: Path) -> dict[str, Any]:
    """Return a file's description of its model; UserError unless it has the form that `describe` returns."""
    kinds = {"encoder": dict, "image_size": int}
    if not (isinstance(description, dict) and all(isinstance(description.get(n), k) for n, k in kinds.items())):
        raise UserError(f"{path} describes its model as no version of sam-distill does ({str(description)[:60]})")
    if description["encoder"].get("class") == "TimmEncoder":
        description["encoder"].setdefault("neck", "coarse")  # files from before this option have no entry
    return description


def _recognise(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the description of an official file's model, derived from names and shapes of the tensors."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
    encoder = {k.removeprefix(_ENCODER): v for k, v in tensors.items() if k.startswith(_ENCODER)}
    spec: dict[str, Any] | None = None
    if "patch_embed.seq.0.c.weight" in encoder and "neck.0.weight" in encoder:
        size = _TINY_VIT_SIZES.get(encoder["neck.0.weight"].shape[1])
        spec = {"class": "TinyViT", "size": size} if size else None
    elif "pos_embed" in encoder and "blocks.0.attn.rel_pos_h" in encoder:
        tables = [encoder[f"blocks.{i}.attn.rel_pos_h"] for i in range(sum(".attn.rel_pos_h" in k for k in encoder))]
        width, side = encoder["pos_embed"].shape[-1], encoder["pos_embed"].shape[1]
        spec = {"class": "SamViT", "width": width, "depth": len(tables), "heads": width // tables[0].shape[1]}
        spec["global_blocks"] = [i for i, table in enumerate(tables) if len(table) == 2 * side - 1]
    if spec is None:
        raise UserError(f"{path} holds no SAM we know: {_describe_unknown(state)}")
    return {"encoder": spec, "image_size": FRAME}


def _describe_unknown(state: Mapping[str, Any]) -> str:
    parts = {name for key in state for name in (_ENCODER, "prompt_encoder.", "mask_decoder.") if key.startswith(name)}
    inside = next((key for key, value in state.items() if isinstance(value, Mapping)), None)
    if inside:
        return f"it holds {inside} and other things, not the tensors themselves: save {inside} alone"
    if parts != {_ENCODER} and parts:
        return "its tensors match neither SAM's ViTs, MobileSAM's TinyViT nor ours"
    first = next(iter(state), "nothing")
    return f"an image encoder alone, it seems ({first}, ...), without prompt_encoder and mask_decoder"


def _load(sam: Sam, state: dict[str, Tensor], path: Path) -> None:
    """Load strictly, but ignore MobileSAM's unused classifier (head and norm_head) and SAM's pixel statistics."""
    unused = ("image_encoder.head.", "image_encoder.norm_head.", "pixel_mean", "pixel_std")
    ours = {official: key for key, official in _official_names(sam).items()}
    state = {ours.get(key, key): value for key, value in state.items() if not key.startswith(unused)}
    own = sam.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshapen = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    message = [f"{len(keys)} tensors {what} ({keys[0]}, ...)" for what, keys in problems.items() if keys]
    if message:
        raise UserError(f"{path} does not fit {format_spec(describe(sam)['encoder'])}: {'; '.join(message)}")
    broken = sorted(key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all())
    if broken:
        raise UserError(f"{path} holds NaN or infinity in {len(broken)} tensors ({broken[0]}, ...): it can't be used")
    sam.load_state_dict(state)


def _official_names(sam: Sam) -> dict[str, str]:
    """Return a dict from our key to the official key, for every tensor of `sam`."""
    rules: list[tuple[str, str]] = []
    if isinstance(sam.image_encoder, TinyViT | SamViT):
        rules += [(r"^neck\.reduce\.0\.", "neck.0."), (r"^neck\.norm1\.", "neck.1."), (r"^neck\.conv\.", "neck.2.")]
        rules += [(r"^neck\.norm2\.", "neck.3."), (r"^backbone\.", "")]
    if isinstance(sam.image_encoder, TinyViT):
        rules += [(r"^patch_embed\.conv1\.", "patch_embed.seq.0."), (r"^patch_embed\.conv2\.", "patch_embed.seq.2.")]
        # MobileSAM keeps a down-sampling layer in the stage before it, timm in the stage after it.
        rules += [(rf"^stages\.{i}\.downsample\.", f"layers.{i - 1}.downsample.") for i in (1, 2, 3)]
        rules += [(r"^stages\.", "layers."), (r"\.conv\.", ".c.")]
    if isinstance(sam.image_encoder, SamViT):
        rules += [(r"\.mlp\.fc(\d)\.", r".mlp.lin\1.")]

    def official(key: str) -> str:
        if not key.startswith(_ENCODER):
            return key
        key = key.removeprefix(_ENCODER)
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        return _ENCODER + key

    return {key: official(key) for key in sam.state_dict()}


def format_spec(spec: Mapping[str, Any]) -> str:
    """Return an encoder's spec as text for messages: `Class(name=value, ...)`."""
    details = ", ".join(f"{name}={value}" for name, value in spec.items() if name != "class")
    return f"{spec['class']}({details})"
