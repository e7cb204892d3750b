"""Device, precision and loader workers of a run."""

import platform
import resource
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.utils.data import DataLoader

from sam_distill.errors import UserError
from sam_distill.runs import processes

_OWN_OPTIONS = {  # argument of Lightning's Trainer -> our option to give instead
    "max_epochs": "budget", "max_steps": "budget", "accumulate_grad_batches": "accumulate", "logger": "logger",
    "val_check_interval": "validate_every", "check_val_every_n_epoch": "validate_every", "num_nodes": "trainer.nodes",
    "default_root_dir": "hydra.run.dir", "limit_val_batches": "data.val_images",
}  # fmt: skip


class Hardware:
    """Device, precision and workers of a run (options: conf/trainer/auto.yaml). In fp32, GPUs use TF32 for products.

    lightning: further arguments of Lightning's Trainer, for training. None leaves the argument out.
    """

    def __init__(
        self,
        accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto",
        devices: Annotated[int, Field(gt=0)] = 1,
        nodes: Annotated[int, Field(gt=0)] = 1,
        precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
        workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto",
        sync_batchnorm: bool = False,
        **lightning: Annotated[Any, "pytorch_lightning.trainer.trainer.Trainer"],
    ) -> None:
        self.accelerator, self.devices, self.nodes, self.precision = accelerator, devices, nodes, precision
        self.workers, self.sync_batchnorm = workers, sync_batchnorm
        self.lightning = {name: value for name, value in lightning.items() if value is not None}
        for name in self.lightning.keys() & _OWN_OPTIONS:
            raise UserError(f"trainer.{name}: give {_OWN_OPTIONS[name]}=... instead")
        _ = self.kind  # report a missing device before anything else is built
        torch.set_float32_matmul_precision("high")  # in all commands: evaluate a student as it was trained

    @property
    def kind(self) -> str:
        """Return `cuda`, `mps` or `cpu`. Raise UserError if this machine does not have the device, or too few GPUs."""
        available = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        chosen = next(n for n, ok in available.items() if ok) if self.accelerator == "auto" else self.accelerator
        if not available[chosen]:
            raise UserError(
                f"trainer.accelerator={chosen}: this machine has none that PyTorch can use; try trainer=cpu"
            )
        if chosen == "gpu" and self.devices > torch.cuda.device_count():
            raise UserError(f"trainer.devices={self.devices}: this machine has {torch.cuda.device_count()} GPUs")
        return "cuda" if chosen == "gpu" else chosen

    @property
    def processes(self) -> int:
        """Return the number of processes of the run: one for each device of each node."""
        return self.devices * self.nodes

    @property
    def synchronises_batchnorm(self) -> bool:
        """Whether BatchNorm takes its statistics over all processes."""
        return self.sync_batchnorm and self.processes > 1

    @property
    def device_name(self) -> str:
        """Return the model name of the GPU or processor."""
        if self.kind == "cuda":
            return torch.cuda.get_device_name()
        names = (line.partition(": ")[2] for line in _cpu_info().splitlines() if line.startswith("model name"))
        return next(names, platform.processor())

    @property
    def resolved_precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """Return the precision that is used, which for `auto` depends on the device."""
        if self.precision != "auto":
            return self.precision
        if self.kind == "cuda":
            native = torch.cuda.get_device_capability()[0] >= 8
        else:  # emulated bf16 is slower than fp32, so look for the instructions
            avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
            native = self.kind == "cpu" and avx512 and "avx512_bf16" in _cpu_info()
        return "bf16" if native else "fp32"

    @property
    def num_workers(self) -> int:
        if self.workers != "auto":
            return self.workers
        cores = processes.cores(self.devices)
        if self.kind == "cpu":  # the training itself needs the cores
            return 1 if cores > 1 else 0
        return max(1, min(12, cores - 1))

    def loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        """Return a DataLoader with `num_workers` workers and, for a GPU, pinned memory, from which it copies fast."""
        workers: dict[str, Any] = {"num_workers": self.num_workers, "worker_init_fn": processes.begin_worker}
        return DataLoader(dataset, pin_memory=self.kind == "cuda", **workers | options)

    def trainer_arguments(self) -> dict[str, Any]:
        return {
            "accelerator": {"cuda": "gpu"}.get(self.kind, self.kind),
            "devices": self.devices,
            "num_nodes": self.nodes,
            "strategy": "ddp" if self.processes > 1 else "auto",
            "precision": {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[self.resolved_precision],
            "use_distributed_sampler": False,
            **self.lightning,
        }

    def autocast(self) -> torch.autocast:
        """Return an autocast context with the precision `resolved_precision`, for use outside a Trainer."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.resolved_precision]
        return torch.autocast(self.kind, dtype=dtype, enabled=self.resolved_precision != "fp32")


def _cpu_info() -> str:
    """Return the text of /proc/cpuinfo, which Linux has; "" on other systems."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def peak_memory(kind: str) -> int:
    """Return the peak memory in bytes, of the GPU if `kind` is `cuda`, else of this process."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def wait_for(kind: str) -> None:
    """Wait until the device has finished its queued work."""
    if kind != "cpu":
        torch.accelerator.synchronize()
