"""BatchNorm over the batches of all devices, so that N devices with batch B train like one with batch N x B.

torch.nn.SyncBatchNorm, which Lightning's `sync_batchnorm` uses, does not run on CPUs and does not replace timm's
BatchNorms with a built-in activation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as OnGpu
from torch.overrides import TorchFunctionMode


class SyncBatchNorm(TorchFunctionMode):
    """Context in which every `F.batch_norm` in training mode computes its statistics over all ranks.

    Modules are neither replaced nor changed: all that call this function, such as timm's BatchNorm with a built-in
    activation, are included, and state dicts stay as they are. Frozen modules, in eval mode, are not affected.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise like `F.batch_norm`, but over all ranks. Torch's own implementation of this works on GPUs only."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.is_cuda:
        group, ranks = distributed.group.WORLD, distributed.get_world_size()
        return OnGpu.apply(input, weight, bias, running_mean, running_var, eps, momentum, group, ranks)
    # First the mean, then the squared differences from it: a single pass would lose precision.
    axes = [axis for axis in range(input.ndim) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(input.ndim)]
    x = input.float()
    sums = all_reduce(torch.cat([x.sum(axes), x.new_tensor([x.numel() / x.shape[1]])]))
    count = sums[-1].item()
    mean = sums[:-1] / count
    centred = x - mean.view(shape)
    var = all_reduce(centred.square().sum(axes)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * (count / max(1, count - 1))).to(running_var), momentum)
    out = centred * (var + eps).rsqrt().view(shape)
    if weight is not None and bias is not None:
        out = out * weight.view(shape) + bias.view(shape)
    return out.to(input.dtype)
