import pytest
import torch

from sam_distill.models.encoders import TinyViT
from sam_distill.training.optimizers import AdamW, Muon


def test_no_decay_on_biases_norms_and_attention_biases() -> None:
    """Only matrices and filters decay."""
    encoder = TinyViT(pretrained=False)
    optimizer, _ = AdamW(weight_decay=0.05).build({"image_encoder": encoder}, 10)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(encoder.parameters()))
    for name, parameter in encoder.named_parameters():
        is_matrix = name.endswith("weight") and "norm" not in name and ".bn." not in name
        assert decay[id(parameter)] == (0.05 if is_matrix else 0.0), name


def test_warm_up_and_cosine() -> None:
    part = torch.nn.Linear(2, 2)
    optimizer, schedule = AdamW(lr=1.0, warmup=0.1, final=0.01).build({"part": part}, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.505)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw() -> None:
    torch.manual_seed(0)
    part = torch.nn.Linear(64, 32)
    before = {name: parameter.detach().clone() for name, parameter in part.named_parameters()}
    # The smallest gradients of embedding_mse are around 1e-8, some directions far stronger than others.
    gradient = torch.randn(32, 64) * torch.logspace(0, -2, 64) * 1e-8
    optimizer, _ = Muon(lr=0.1, weight_decay=0.0, warmup=0.0, eps=1e-12).build({"part": part}, 10)
    part.weight.grad, part.bias.grad = gradient, torch.randn(32) * 1e-8
    optimizer.step()
    step = before["weight"] - part.weight
    strengths = torch.linalg.svdvals(step / step.norm() * 32**0.5)
    assert strengths.min() > 0.5, "each direction is stepped alike, weak or strong"
    assert strengths.max() < 1.5
    assert step.square().mean().sqrt().item() == pytest.approx(0.2 * 0.1, rel=0.3), "the length of AdamW's steps"
    moved = (before["bias"] - part.bias).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1.9 * 0.1), rtol=1e-2, atol=0)  # NAdam's first step


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_muon_updates_only_the_weights_that_decay(weight_decay: float) -> None:
    part = torch.nn.Module()
    part.pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 4, 8))
    part.filters = torch.nn.Conv2d(3, 8, 3)
    optimizer, _ = Muon(weight_decay=weight_decay).build({"image_encoder": part}, 10)
    for parameter in part.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    by_muon = {name for name, p in part.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert by_muon == {"filters.weight"}
