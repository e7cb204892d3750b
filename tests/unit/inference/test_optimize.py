import pytest
import torch
from torch import Tensor, nn

from sam_distill.inference.optimize import optimize_for_inference
from sam_distill.inference.simplify import WindowBlock
from sam_distill.models.encoders import EfficientViT, EfficientViTMIT, ImageEncoder, SamViT, TimmEncoder, TinyViT
from sam_distill.models.sam import Sam


def encoders() -> list[ImageEncoder]:
    return [
        TinyViT(pretrained=False),
        TimmEncoder("efficientnet_lite0", pretrained=False),
        TimmEncoder("resnet18", pretrained=False),
        EfficientViT("m0", pretrained=False),
        EfficientViTMIT("b0", pretrained=False),
        SamViT(width=64, depth=2, heads=2, global_blocks=[1]),
    ]


@pytest.mark.parametrize(
    "encoder", encoders(), ids=lambda encoder: str(encoder.spec.get("name", encoder.spec["class"]))
)
def test_embeddings_stay_the_same(encoder: ImageEncoder) -> None:
    sam = Sam(encoder, image_size=256)
    sam.train()
    with torch.no_grad():  # gives the BatchNorms statistics, so that folding them changes weights
        encoder(torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0)))
    sam.eval()
    images = torch.randint(256, (2, 3, 1024, 1024), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sizes = torch.tensor([[1024, 700], [333, 1024]])
    before = {key: value.clone() for key, value in sam.state_dict().items()}
    with torch.inference_mode():
        fast = optimize_for_inference(sam)
        expected, found = sam.encode(images, sizes), fast.encode(images, sizes)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fast_error, plain_error = (1 - cosine(model.encode(images, sizes), expected) for model in (fast, sam))
    assert fast_error < max(1e-3, 1.5 * plain_error)
    assert all(torch.equal(value, before[key]) for key, value in sam.state_dict().items()), "a copy"
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="oneDNN's operators are for x86")
def test_activations_are_fused_into_layers() -> None:
    tinyvit = optimize_for_inference(Sam(TinyViT(pretrained=False), image_size=256)).image_encoder
    gelus = [name for name, layer in tinyvit.named_modules() if isinstance(layer, nn.GELU) and "activation" not in name]
    assert len(gelus) == 2, gelus  # they follow a residual addition, not a layer
    # Students copy the neck's weights under these names.
    assert tinyvit.neck.state_dict().keys() == TinyViT(pretrained=False).neck.state_dict().keys()
    lite = optimize_for_inference(Sam(TimmEncoder("efficientnet_lite0", pretrained=False), image_size=256))
    relu6_names = [name for name, layer in lite.image_encoder.named_modules() if isinstance(layer, nn.ReLU6)]
    assert {name.rsplit(".", 1)[-1] for name in relu6_names} == {"activation"}


class ConvWithTwoConsumers(TimmEncoder):
    """Encoder that uses the output of its convolution twice: as it is, and after `act`."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.backbone.conv1(x)
        return nn.functional.interpolate((out + self.act(out))[:, :1].expand(-1, 256, -1, -1), size=64)


@pytest.mark.parametrize("act", [nn.GELU(), nn.BatchNorm2d(64)])
def test_layer_with_a_second_consumer_is_not_fused(act: nn.Module) -> None:
    encoder = ConvWithTwoConsumers("resnet18", pretrained=False)
    encoder.act = act
    if isinstance(act, nn.BatchNorm2d):
        nn.init.constant_(act.running_mean, 1.0)
    fast = optimize_for_inference(Sam(encoder, image_size=256)).image_encoder
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), encoder.eval()(x), atol=1e-5, rtol=1e-5)


def test_batch_gives_the_same_embeddings_as_single_images() -> None:
    """Several images are encoded at a time on a GPU."""
    fast = optimize_for_inference(Sam(TinyViT(pretrained=False), image_size=256)).image_encoder
    images = torch.randn(3, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            fast(images), torch.cat([fast(image[None]) for image in images]), atol=1e-5, rtol=1e-5
        )
    assert sum(isinstance(layer, WindowBlock) for layer in fast.modules()) == 10
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fast.modules())
