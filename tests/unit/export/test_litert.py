"""LiteRT exports in its own interpreter. docs/export.md says in which environment this runs."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("litert_torch", reason="needs litert-torch, in an environment of its own: docs/export.md")


def test_litert_and_the_snippet_in_the_docs(export: Callable[..., Any], docs_snippet_iou: Callable[..., float]) -> None:
    small = export("litert", "int8", least_iou=0.9)  # at 256 px small errors change MobileSAM's masks
    whole = export("litert", "null", least_iou=0.9999)
    assert whole["checked"]["runtime"] == "LiteRT"
    assert small["bytes"] < 0.5 * whole["bytes"]
    assert docs_snippet_iou("ai_edge_litert") > 0.97  # the snippet resizes directly to 256 px, not via the frame
