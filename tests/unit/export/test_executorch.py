"""ExecuTorch exports in its own runtime. docs/export.md says in which environment this runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sam_distill.cli import app
from sam_distill.models.sam import Sam

pytest.importorskip("executorch", reason="needs executorch, in an environment of its own: docs/export.md")


def test_executorch_and_the_snippet_in_the_docs(
    export: Callable[..., Any], docs_snippet_iou: Callable[..., float]
) -> None:
    exported = export("executorch", "int8", least_iou=0.9)  # at 256 px small errors change MobileSAM's masks
    assert exported["checked"]["runtime"] == "ExecuTorch"
    assert exported["bytes"] < 20e6  # 28 MB in float32
    decoder = Path("student_executorch/decoder.pte").read_bytes()
    assert b"aten::addmm" not in decoder  # outside XNNPACK such a product takes most of the decoder's time
    assert docs_snippet_iou("executorch.runtime") > 0.9  # the snippet resizes directly to 256 px, not via the frame


def test_half_precision_is_refused(student: Sam, capfd: pytest.CaptureFixture[str]) -> None:
    assert app.main(["export", "checkpoint=student.pt", "format=executorch", "quantize=fp16", "path=a"]) == 1
    assert "error: quantize=fp16 does not go with format=executorch" in capfd.readouterr().err
    assert not Path("a").exists()
