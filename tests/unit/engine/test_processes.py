from __future__ import annotations

import os

import pytest

from sam_distill.engine import processes

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "x", "SLURM_STEP_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "launcher", "started", "first", "name", "shared"),
    [
        ({}, None, 1, True, "rank0", None),
        ({"LOCAL_RANK": "3"}, None, 1, False, "rank3", None),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, None, 1, False, "node1rank0", None),
        (TORCHRUN, "torchrun", 4, False, "rank2", None),
        (TORCHRUN | {"RANK": "0", "TORCHELASTIC_RUN_ID": "abc"}, "torchrun", 4, True, "rank0", "torchrun_abc"),
        (SRUN, "srun", 8, False, "rank5", "slurm_77_1"),
        (SRUN | {"SLURM_PROCID": "0", "SLURM_RESTART_COUNT": "2"}, "srun", 8, True, "rank0", "slurm_77_1_restart2"),
        (SRUN | {"SLURM_JOB_NAME": "interactive", "SLURM_PROCID": "0"}, None, 1, True, "rank0", None),
    ],
)
def test_what_the_environment_says(
    environment: dict[str, str], launcher: str | None, started: int, first: bool, name: str, shared: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for key in list(os.environ):
        if key.startswith("SLURM_") or "RANK" in key or key in TORCHRUN:
            monkeypatch.delenv(key)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert processes.launcher() == launcher
    assert processes.started() == started
    assert processes.is_first() == first
    assert processes.name() == name
    assert processes.shared_name() == shared
