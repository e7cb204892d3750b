"""Optimizers with linear warm-up and cosine decay; biases, norms and position tables have no weight decay."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.optim import Muon as TimmMuon
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sam_distill.errors import UserError

_NO_DECAY = ("bias", "attention_biases", "pos_embed", "rel_pos_h", "rel_pos_w")
NOT_DECAYED = ", no decay"  # suffix of the name of their parameter group

Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class AdamW:
    """Builder of a torch.optim.AdamW and its schedule for the trainable parts; itself no optimizer, nor is `Muon`.

    conf/optim/adamw.yaml explains each option.
    """

    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    warmup: Fraction = 0.05
    final: Fraction = 0.01
    clip: Annotated[float, Field(ge=0)] = 1.0
    eps: Annotated[float, Field(gt=0)] = 1e-8
    scale: Mapping[str, Annotated[float, Field(gt=0)]] | None = None

    def check(self, parts: Collection[str]) -> None:
        """Raise UserError if `scale` has a factor other than 1 for a part that does not train."""
        frozen = {name for name, factor in (self.scale or {}).items() if factor != 1} - set(parts)
        if frozen:
            raise UserError(f"optim.scale names {', '.join(sorted(frozen))}; what trains is {', '.join(parts)}")

    def build(self, parts: Mapping[str, nn.Module], total_steps: int) -> tuple[Optimizer, LambdaLR]:
        """Return an optimizer over the trainable parts, and its learning rate schedule per optimizer step."""
        optimizer = self._optimizer([group for name, part in parts.items() for group in self._groups(name, part)])
        return optimizer, LambdaLR(optimizer, lambda step: self._factor(step, total_steps))

    def renew(self, optimizer: Optimizer, schedule: LambdaLR, parts: Mapping[str, nn.Module], total_steps: int) -> None:
        """Apply these options to an optimizer and schedule that `build` made for the same parts with other options."""
        fresh, _ = self.build(parts, total_steps)
        for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group.update({name: value for name, value in new.items() if name != "params"})
            group["lr"] = new["initial_lr"] * self._factor(schedule.last_epoch, total_steps)
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)

    def _groups(self, name: str, part: nn.Module) -> Iterator[dict[str, Any]]:
        decayed: list[nn.Parameter] = []
        not_decayed: list[nn.Parameter] = []
        for key, parameter in part.named_parameters():
            exempt = parameter.ndim <= 1 or key.split(".")[-1] in _NO_DECAY
            (not_decayed if exempt else decayed).append(parameter)
        lr = self.lr * (self.scale or {}).get(name, 1.0)
        yield {"name": name, "params": decayed, "weight_decay": self.weight_decay, "lr": lr}
        yield {"name": name + NOT_DECAYED, "params": not_decayed, "weight_decay": 0.0, "lr": lr}

    def _factor(self, step: int, total_steps: int) -> float:
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class Muon(AdamW):
    """Builder of Muon (Jordan et al. 2024): each matrix or filter is updated by its orthogonalised momentum.

    Updates are scaled to AdamW's usual length (Liu et al. 2025), so that learning rates mean the same. Biases, norms
    and position tables use AdamW at the same rate. Both use Nesterov momentum. The options are those of `AdamW`.
    """

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        routed = [group | {"use_fallback": group["name"].endswith(NOT_DECAYED)} for group in groups]
        return TimmMuon(routed, lr=self.lr, betas=self.betas, eps=self.eps, nesterov=True)
