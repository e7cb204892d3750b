"""Every encoder of conf/encoder, tested through the common ImageEncoder interface."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sam_distill.errors import UserError
from sam_distill.models import checkpoints, encoders
from sam_distill.models.encoders import ImageEncoder, TimmEncoder, TinyViT
from sam_distill.models.sam import Sam

CONF = Path(__file__).parents[3] / "conf" / "encoder"
S = 128


def build(choice: str) -> ImageEncoder:
    options: dict[str, Any] = yaml.safe_load((CONF / f"{choice}.yaml").read_text())
    kind = getattr(encoders, options.pop("_target_").rpartition(".")[2])
    if "pretrained" in options:
        options["pretrained"] = False
    if choice == "timm":
        options["name"] = "resnet18"
    if "depth" in options:  # shrink the large ViTs: two blocks, one of them with global attention
        options |= {"depth": 2, "global_blocks": [1]}
    encoder = kind(**options)
    assert isinstance(encoder, ImageEncoder)
    return encoder


@pytest.mark.parametrize("choice", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_encoder_shape_gradients_and_checkpoint(choice: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build(choice)
    x = torch.randn(2, 3, S, S)
    embedding = encoder(x)
    assert embedding.shape == (2, 256, 64, 64)
    embedding.square().mean().backward()
    without_gradient = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert not without_gradient, f"parameters that never learn would stop DDP: {without_gradient}"

    sam = Sam(encoder, image_size=S).eval()
    checkpoints.save_sam(sam, tmp_path / "student.pt")
    loaded = checkpoints.load_sam(tmp_path / "student.pt")
    assert loaded.image_size == S
    with torch.no_grad():
        assert torch.equal(loaded.image_encoder(x), sam.image_encoder(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small", "convnext_atto", "repvit_m1"])
def test_timm_backbones(name: str) -> None:
    with torch.no_grad():
        assert TimmEncoder(name, pretrained=False).eval()(torch.randn(1, 3, S, S)).shape == (1, 256, 64, 64)


@pytest.mark.parametrize("side", [64, 192, 512])
def test_any_multiple_of_64(side: int) -> None:
    with torch.no_grad():
        assert TinyViT(pretrained=False).eval()(torch.randn(1, 3, side, side)).shape == (1, 256, 64, 64)


def test_unknown_timm_name() -> None:
    with pytest.raises(UserError, match=r"encoder\.name=resnet81: timm has no such model; did you mean .*resnet18"):
        TimmEncoder("resnet81")


def test_a_fine_neck_keeps_the_detail_of_small_inputs() -> None:
    """The stride 8 features of 512 px are 64 x 64: with the fine neck, neighbouring cells differ more."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 512, 512)
    fine, coarse = (TimmEncoder("resnet18", pretrained=False, neck=neck).eval() for neck in ("fine", "coarse"))
    coarse.load_state_dict(fine.state_dict())
    with torch.no_grad():
        sharp, smooth = ((e - e.roll(1, -1)).square().mean() for e in (fine(x), coarse(x)))
    assert sharp > 1.5 * smooth


def test_same_seed_same_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(TinyViT(pretrained=False).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
