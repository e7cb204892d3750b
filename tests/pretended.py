"""Pretended GPU for machines that have none: tensors claim to be on cuda:0, but their data are on the CPU.

Inside `pretended_gpu` an operation that mixes devices raises an error, as on a GPU, and any operation that would make
the CPU wait for the GPU's queue is recorded. Backward passes, kernels, memory and NCCL need a GPU (`make gpu-check`).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

COPIES = {aten._to_copy.default, aten.copy_.default}
LOOK_UPS = {aten.index.Tensor, aten._unsafe_index.Tensor}
WRITES = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
READS = {  # operations that need a value, or a result's number of elements, on the CPU
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip

_entered: list[PretendedGpu] = []


class OnGpu(torch.Tensor):
    """Tensor that claims to be on cuda:0. cpu_data: its data, on the CPU."""

    cpu_data: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, cpu_data: Tensor) -> OnGpu:
        layout: dict[str, Any] = {"strides": cpu_data.stride(), "storage_offset": cpu_data.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, cpu_data.shape, dtype=cpu_data.dtype, device=CUDA, **layout)  # type: ignore[attr-defined]

    def __init__(self, cpu_data: Tensor) -> None:
        self.cpu_data = cpu_data

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _entered[-1].perform(func, args, kwargs or {})

    def tolist(self) -> Any:
        _entered[-1].wait("tolist")
        return self.cpu_data.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor on cuda:0 is no numpy array: .cpu() comes first")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({list(self.shape)}, {self.dtype})"


class PretendedGpu(TorchDispatchMode):
    """Mode that runs all operations on the CPU. waits: each one that would make the CPU wait, with its line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.perform(func, args, kwargs or {})

    def wait(self, operation: str) -> None:
        """Record an operation with the innermost line of sam_distill that led to it, or else of other code."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        place = next((frame for frame in reversed(frames) if "/sam_distill/" in frame.filename), frames[-1])
        self.waits.append(f"{operation}  {place.filename.rpartition('/')[2]}:{place.lineno}  {place.line}")

    def perform(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        if on_gpu and func not in COPIES:
            _refuse_mix(func, args, tensors)
        to_gpu = bool(on_gpu)
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type == "cuda"
            kwargs = kwargs | {"device": CPU}
        if func is aten.copy_.default:
            to_gpu = isinstance(args[0], OnGpu)
        self._note(func, args, kwargs, bool(on_gpu), to_gpu)
        known = {id(tensor.cpu_data): tensor for tensor in on_gpu}  # in-place operations return the same tensor object
        kwargs = kwargs | ({"pin_memory": False} if kwargs.get("pin_memory") else {})
        out = func(*tree_map_only(OnGpu, _cpu_data, args), **tree_map_only(OnGpu, _cpu_data, kwargs))
        if to_gpu:
            return tree_map_only(Tensor, lambda tensor: known.get(id(tensor), OnGpu(tensor)), out)
        if func is aten._to_copy.default and on_gpu and kwargs.get("non_blocking"):
            out.pinned = True
        return tree_map_only(Tensor, lambda tensor: known.get(id(tensor), tensor), out)

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], any_on_gpu: bool, to_gpu: bool) -> None:
        if func in COPIES:
            source = args[0] if func is aten._to_copy.default else args[1]
            queued = kwargs.get("non_blocking") or (func is aten.copy_.default and any(args[2:]))
            queued = queued and (not to_gpu or hasattr(source, "pinned"))
            waits = to_gpu != isinstance(source, OnGpu) and not queued
        elif func in LOOK_UPS | WRITES:
            waits = any_on_gpu and any(_index_waits(index, args) for index in args[1])
        else:
            waits = any_on_gpu and func in READS
        if waits:
            self.wait(str(func))


def _refuse_mix(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    if func in LOOK_UPS | WRITES and isinstance(args[0], OnGpu):  # torch copies indices itself, but no values
        tensors = [args[0], *(value for value in args[2:3] if isinstance(value, Tensor))]
    for tensor in tensors:
        if not isinstance(tensor, OnGpu) and tensor.dim():  # a tensor without dimensions may be on the CPU
            raise RuntimeError(f"{func}: some on cuda:0 and, on the CPU, {list(tensor.shape)} {tensor.dtype}")


def _index_waits(index: Tensor | None, args: Sequence[Any]) -> bool:
    """Whether the CPU waits: to copy an index to the GPU, or to count a mask's elements unless one value fills them."""
    fills = len(args) > 2 and args[2].numel() == 1
    return index is not None and (not isinstance(index, OnGpu) or (index.dtype == torch.bool and not fills))


def _cpu_data(tensor: OnGpu) -> Tensor:
    return tensor.cpu_data


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Compute attention without the fused kernels, which ask the GPU's driver what it supports."""
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]


def _no_grad(mode: bool = True) -> AbstractContextManager[Any]:
    """Replace inference mode: tensors made in it have no version counter, which wrapped tensors need."""
    return torch.no_grad() if mode else nullcontext()


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Make torch believe in a GPU "cuda:0" inside the context; yield the mode that records the waits."""
    swaps, lifts = torch.__future__.get_swap_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    cudnn, gpu = torch.backends.cudnn.enabled, PretendedGpu()
    torch._C._ensureCUDADeviceGuardSet()
    changes = {
        "torch.nn.functional.scaled_dot_product_attention": _attention,
        "torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.current_device": lambda: 0,
        "torch.accelerator.is_available": lambda: True,
        "torch.Tensor.pin_memory": _pinned,
        "torch.inference_mode": _no_grad,
    }
    with ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(patch(name, value))
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        torch.backends.cudnn.enabled = False
        _entered.append(gpu)
        try:
            with gpu:
                yield gpu
        finally:
            _entered.pop()
            torch.backends.cudnn.enabled = cudnn
            torch._C._set_only_lift_cpu_tensors(lifts)
            torch.__future__.set_swap_module_params_on_conversion(swaps)
