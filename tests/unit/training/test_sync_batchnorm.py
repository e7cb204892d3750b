"""Two processes with SyncBatchNorm compute the same as one process with both batches."""

from pathlib import Path

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from sam_distill.training.sync_batchnorm import SyncBatchNorm

RANKS, BATCH = 2, 3


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {
        "2d": nn.BatchNorm2d(4), "1d": nn.BatchNorm1d(4, momentum=0.3), "plain": nn.BatchNorm2d(4, affine=False),
        "with activation": BatchNormAct2d(4, act_layer=nn.GELU), "frozen": nn.BatchNorm2d(4).eval(),
        "large": nn.BatchNorm2d(4),
    }  # fmt: skip
    for layer in found.values():
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return found


def inputs(name: str) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(RANKS * BATCH, 4, *(() if name == "1d" else (5, 6))) * torch.arange(1, 5).view(
        4, *(() if name == "1d" else (1, 1))
    )
    return x + (1000 if name == "large" else 0)  # so large that E[x^2] - E[x]^2 would lose all digits


def outcome(name: str, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output, the gradients of a loss that depends on every element, and all buffers."""
    x = x.requires_grad_()
    out = layer(x)
    (out * torch.linspace(-1, 1, out[0].numel()).view_as(out[0]) + out**2 / 2).sum().backward()
    assert x.grad is not None
    gradients = {f"d{key}": value.grad.clone() for key, value in layer.named_parameters() if value.grad is not None}
    return {"out": out.detach(), "dx": x.grad} | gradients | dict(layer.named_buffers())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    results = {}
    for name, layer in layers().items():
        with SyncBatchNorm():
            results[name] = outcome(name, layer, inputs(name)[rank * BATCH : (rank + 1) * BATCH])
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_match_one_process_with_both_batches(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for name, layer in layers().items():
        keys = layer.state_dict().keys()
        alone = outcome(name, layer, inputs(name))
        assert layer.state_dict().keys() == keys
        for key, value in alone.items():
            parts = [result[name][key] for result in ranks]
            if key in ("out", "dx"):
                together = torch.cat(parts)
            elif key.startswith("d"):
                together = sum(parts)  # what DDP does with the gradients of parameters
            else:
                assert torch.equal(*parts), (name, key)
                together = parts[0]
            tolerance = 1e-3 if name == "large" else 1e-5
            assert torch.allclose(together, value, rtol=tolerance, atol=tolerance), (name, key)
