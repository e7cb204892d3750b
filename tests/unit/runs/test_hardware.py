import os

import pytest
import torch

from sam_distill.runs.hardware import Hardware

SRUN = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "distil"}


@pytest.mark.parametrize(
    ("environment", "seen", "workers"),
    [
        ({}, 48, 11),
        ({}, 12, 2),
        ({"TORCHELASTIC_RUN_ID": "x"}, 48, 11),
        (SRUN, 12, 11),  # srun --cpus-per-task=12, each process bound to its own 12 cores
        (SRUN | {"SLURM_CPUS_PER_TASK": "12"}, 48, 11),  # a cluster that binds no process to cores
        (SRUN, 1, 1),
    ],
)
def test_loaders_have_the_cores_of_one_device(
    environment: dict[str, str], seen: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in [key for key in os.environ if key.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(key)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(seen)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Hardware(devices=4).num_workers == workers


def test_hardware_sets_the_matmul_precision() -> None:
    """Training, evaluation and caching share nothing but Hardware, so it sets the precision of matrix products."""
    torch.set_float32_matmul_precision("highest")
    Hardware(accelerator="cpu")
    assert torch.get_float32_matmul_precision() == "high"
