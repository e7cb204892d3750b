"""Sources of a student's ImageNet weights, and whether the weights classify photographs correctly."""

import logging
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import skimage
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import _registry, tiny_vit

from sam_distill.errors import UserError
from sam_distill.images import to_frame
from sam_distill.models import pretrained
from sam_distill.models.encoders import TimmEncoder, TinyViT
from sam_distill.models.pretrained import packaged, with_imagenet_weights
from sam_distill.models.sam import preprocess

CATS, ESPRESSO = {281, 282, 285}, {967}  # ImageNet's class numbers: tabby, tiger cat, Egyptian cat; espresso


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.hub, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on this port
    monkeypatch.setattr(pretrained.hub, "HF_HUB_CACHE", "/nonexistent")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_packaged_weights_classify_photographs_correctly(name: str) -> None:
    """With a student's preprocessing: SAM's pixel statistics and timm's padding."""
    classifier = timm.create_model(name).eval()
    classifier.load_state_dict(packaged(name))
    for photo, classes in (("chelsea.png", CATS), ("coffee.png", ESPRESSO)):
        with Image.open(Path(skimage.__file__).parent / "data" / photo) as image:
            square = image.convert("RGB").resize((1024, 1024))
        frame = to_frame(square).unsqueeze(0)
        with torch.no_grad():
            best = classifier(preprocess(frame, torch.tensor([[1024, 1024]]), 224)).argmax().item()
        assert best in classes, f"{photo} is taken for {best}"


def test_packaged_weights_are_used_if_the_hub_is_unreachable(no_hub: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        encoder = TimmEncoder("efficientnet_lite0")
    assert "ImageNet weights for efficientnet_lite0: from the table of weights" in caplog.text
    torch.testing.assert_close(encoder.backbone.conv_stem.weight, packaged("efficientnet_lite0")["conv_stem.weight"])  # type: ignore[union-attr]


def test_unreachable_weights_cause_a_warning(no_hub: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoder = TinyViT("5m", pretrained=True)
    assert "No ImageNet weights" in caplog.text
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(5.744e6, rel=1e-3)  # paper: 5.78M


@pytest.mark.parametrize("name", ["resnet18", "tiny_vit_5m_224", "convnext_atto"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    """The file's classifier is left out, and layers that timm renames for feature maps are found."""
    theirs = timm.create_model(name).state_dict()
    file = tmp_path / f"weights{suffix}"
    save_file(theirs, file) if suffix == ".safetensors" else torch.save(theirs, file)
    torch.manual_seed(1)
    if name == "tiny_vit_5m_224":
        ours = TinyViT(pretrained=str(file)).backbone.state_dict()
    else:
        ours = TimmEncoder(name, pretrained=str(file)).backbone.state_dict()
    found = [any(torch.equal(value, other) for other in theirs.values()) for value in ours.values()]
    assert all(found)
    assert len(found) > 30


def test_weights_of_a_file_after_importing_mobile_sam(
    mobile_sam: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tiny_vit.tiny_vit_5m_224().state_dict()
    torch.save(theirs, tmp_path / "weights.pt")
    overwritten = mobile_sam.modeling.tiny_vit_sam.tiny_vit_5m_224
    monkeypatch.setitem(_registry._model_entrypoints, "tiny_vit_5m_224", overwritten)
    ours = TinyViT(pretrained=str(tmp_path / "weights.pt")).backbone.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    build = partial(timm.create_model, "resnet18", num_classes=0)
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        with_imagenet_weights("resnet18", build, "nowhere.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match="not a state dict that loads safely"):
        with_imagenet_weights("resnet18", build, str(tmp_path / "text.pt"))
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="not the weights of timm's resnet50"):
        with_imagenet_weights("resnet50", partial(timm.create_model, "resnet50"), str(tmp_path / "other.pt"))


def test_hub_is_reached_through_its_own_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, which knows about proxies, tests whether the hub can be reached, not a socket of ours."""
    asked = []

    class Session:
        def head(self, address: str, timeout: float) -> None:
            asked.append((address, timeout))

    monkeypatch.setattr(pretrained, "get_session", Session)
    monkeypatch.setattr(pretrained.hub, "HF_HUB_OFFLINE", False)
    with pretrained._offline_unless_reached():
        assert not pretrained.hub.HF_HUB_OFFLINE
    assert asked == [(pretrained.hub.ENDPOINT, pretrained.HUB_TIMEOUT)]


def test_depthwise_convolutions_train_in_float32_on_a_cpu() -> None:
    """For speed. Under autocast the output is bf16, the gradient float32, and the values are within 1% of float32's."""
    from sam_distill.models.layers import DepthwiseConv2d

    encoder = TimmEncoder("efficientnet_lite0", pretrained=False)
    depthwise = [module for module in encoder.modules() if isinstance(module, DepthwiseConv2d)]
    assert len(depthwise) == 16
    conv, gradient_dtypes = depthwise[0], []
    x = torch.randn(1, conv.in_channels, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    conv.weight.register_hook(lambda grad: gradient_dtypes.append(grad.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert gradient_dtypes == [torch.float32]
    plain = torch.nn.functional.conv2d(x.float(), conv.weight, None, conv.stride, conv.padding, groups=conv.groups)
    np.testing.assert_allclose(out.float().detach(), plain.detach(), rtol=1e-2, atol=1e-2)
