from __future__ import annotations

import pytest
import torch

from sam_distill.engine.optim import AdamW
from sam_distill.models.encoders import TinyViT


def test_no_decay_on_biases_norms_and_attention_biases() -> None:
    """Design, numerics rule 16."""
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
