"""Fixtures for parity tests: the real MobileSAM weights, in our code and in MobileSAM's own package."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from timm.models import _registry

from sam_distill.models import weights
from sam_distill.models.checkpoints import load_sam
from sam_distill.models.sam import Sam

torch.manual_seed(0)  # for networks that are built while tests are collected
torch.set_num_threads(1)  # pytest-xdist runs two processes, whose OpenMP threads would compete for the cores


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed all random numbers, so that a test and its fixtures draw the same ones whatever ran before."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def mobile_sam_weights() -> str:
    return str(weights.fetch("mobile_sam"))


@pytest.fixture(scope="session")
def teacher(mobile_sam_weights: str) -> Sam:
    """Return the real MobileSAM in our code. All tests share it: do not modify it."""
    return load_sam(mobile_sam_weights).requires_grad_(False)


@pytest.fixture(scope="session")
def mobile_sam() -> Iterator[ModuleType]:
    """Yield MobileSAM's own package. Importing it overwrites timm's entry for TinyViT, so restore timm's registry."""
    before = dict(_registry._model_entrypoints)
    module = importlib.import_module("mobile_sam")
    _registry._model_entrypoints.clear()
    _registry._model_entrypoints.update(before)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "mobile_sam"]:
        del sys.modules[name]
