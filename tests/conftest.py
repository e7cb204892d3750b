"""Reference code for parity tests: MobileSAM's own, and the real weights."""

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

torch.manual_seed(0)  # for networks that are made while tests are collected
torch.set_num_threads(1)  # pytest-xdist runs two processes, and OpenMP's threads would fight for the cores


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test and its fixtures draw the same numbers, whatever ran before."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def mobile_sam_weights() -> str:
    return str(weights.fetch("mobile_sam"))


@pytest.fixture(scope="session")
def teacher(mobile_sam_weights: str) -> Sam:
    """The real MobileSAM in our code. Shared: don't change it."""
    return load_sam(mobile_sam_weights).requires_grad_(False)


@pytest.fixture(scope="session")
def mobile_sam() -> Iterator[ModuleType]:
    """MobileSAM's own package. Importing it overwrites timm's entry for TinyViT, so put that back."""
    before = dict(_registry._model_entrypoints)
    module = importlib.import_module("mobile_sam")
    _registry._model_entrypoints.clear()
    _registry._model_entrypoints.update(before)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "mobile_sam"]:
        del sys.modules[name]
