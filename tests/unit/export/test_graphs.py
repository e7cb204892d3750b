"""The graphs that contract.json describes compute the same as SAM."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sam_distill.export.contract import Settings
from sam_distill.export.graphs import Decoder, Encoder, prepared
from sam_distill.export.runner import ContractRunner, Prompt
from sam_distill.models.encoders import SamViT, TimmEncoder, TinyViT
from sam_distill.models.sam import Sam
from sam_distill.types import ALL


@pytest.fixture(scope="module")
def embedding() -> Tensor:
    return torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0)) / 5


def tensors(*values: Any) -> list[Tensor]:
    return [torch.as_tensor(value) for value in values]


class Dimensions(TorchDispatchMode):
    """Mode that records the highest number of dimensions of any result."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            self.most = max(self.most, value.dim() if isinstance(value, Tensor) else 0)
        return out


MASK = torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(1)) * 5
PROMPTS = {
    "a click": Prompt(*tensors([[300.0, 200.0]], [1])),
    "a click that is not": Prompt(*tensors([[300.0, 200.0]], [0])),
    "a box": Prompt(*tensors([[100.0, 80.0], [600.0, 400.0]], [2, 3])),
    "a box and a click": Prompt(*tensors([[300.0, 200.0], [100.0, 80.0], [600.0, 400.0]], [0, 2, 3])),
    "as many as there may be": Prompt(torch.linspace(0, 1000, 8).view(4, 2), torch.tensor([1, 0, 1, 1])),
    "three clicks and a mask": Prompt(torch.linspace(0, 1000, 6).view(3, 2), torch.tensor([1, 0, 1]), MASK),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_padded_prompts_give_the_same_masks_as_sam(teacher: Sam, embedding: Tensor, name: str) -> None:
    prompt, graph = PROMPTS[name], Decoder(teacher, points=4)

    def run(values: Any) -> list[Any]:
        return [out.numpy() for out in graph(*map(torch.from_numpy, values))]

    runner = ContractRunner(run, run, Settings("onnx", None, 1024, 4, "inside"))
    low_res, iou = runner.decode(embedding.numpy(), prompt)
    expected = teacher.decode(embedding, prompt.to_prompts(), ALL)
    torch.testing.assert_close(torch.from_numpy(low_res), expected.low_res[0, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(iou), expected.iou[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("label", [-2, 4, 5])
def test_label_unknown_to_sam_gives_empty_masks(teacher: Sam, embedding: Tensor, label: int) -> None:
    graph = Decoder(teacher, points=2)
    inputs = torch.full((1, 2, 2), 300.0), torch.tensor([[1.0, label]]), torch.zeros(1, 1, 256, 256), torch.zeros(1)
    low_res, iou = graph(embedding, *inputs)
    assert (low_res < 0).all()
    assert (iou < -100).all()


def test_a_decoder_has_five_dimensions_at_most(teacher: Sam) -> None:
    graph = Decoder(teacher, points=5)
    with Dimensions() as dimensions:
        graph(*(tensor.zeros() for tensor in graph.inputs))
    assert dimensions.most <= 5


@pytest.mark.parametrize(
    "encoder",
    [lambda: TinyViT("5m", pretrained=False), lambda: TimmEncoder("tf_efficientnet_lite0", pretrained=False)],
    ids=["tinyvit", "efficientnet"],
)
def test_prepared_encoder_computes_the_same(teacher: Sam, encoder: Any) -> None:
    torch.manual_seed(0)
    sam = Sam(encoder(), teacher.prompt_encoder, teacher.mask_decoder, image_size=192).requires_grad_(False)
    for name, buffer in sam.image_encoder.named_buffers():  # statistics other than those of a new BatchNorm
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    for name, parameter in sam.image_encoder.named_parameters():
        if name.endswith("attention_biases"):
            parameter.normal_()
    sam.eval()
    simple = prepared(sam)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in simple.image_encoder.modules())
    assert not any(getattr(layer, "fused_attn", False) for layer in simple.image_encoder.modules())
    image = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0)) * 255
    graph = Encoder(simple, "inside")
    expected = sam.image_encoder((image - graph.mean) / graph.std)
    with Dimensions() as dimensions:
        found = graph(image)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert dimensions.most <= 4
    torch.testing.assert_close(sam.image_encoder((image - graph.mean) / graph.std), expected, rtol=0, atol=0)


def test_vit_position_embedding_is_resized_before_export(teacher: Sam) -> None:
    torch.manual_seed(0)
    sam = Sam(SamViT(48, 2, 2, [1]), teacher.prompt_encoder, teacher.mask_decoder, image_size=256)
    sam.requires_grad_(False).eval()
    graph = Encoder(prepared(sam), "inside")
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 255
    torch.testing.assert_close(graph(image), Encoder(sam, "inside")(image), rtol=1e-4, atol=1e-4)
    operators = [str(node.target) for node in torch.export.export(graph, (image,)).graph.nodes]
    assert not any("bicubic" in name for name in operators)  # LiteRT and Core ML do not support it
