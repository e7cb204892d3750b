"""Core ML exports: only a Mac can run them, so they are only read here. docs/export.md says in which environment."""

import json
from pathlib import Path
from typing import Any

import pytest

from sam_distill.cli import app

ct: Any = pytest.importorskip("coremltools", reason="needs coremltools, in an environment of its own: docs/export.md")


@pytest.mark.usefixtures("student")
def test_coreml_has_the_contracts_tensors_and_says_that_it_was_not_run(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["checkpoint=student.pt", "format=coreml", "quantize=int8", "path=student_coreml"]
    assert app.main(["export", *words]) == 0
    captured = capfd.readouterr()
    assert "format=coreml was not run" in captured.out + captured.err
    contract = json.loads(Path("student_coreml/contract.json").read_text())
    assert contract["checked"] is None
    for graph in ("encoder", "decoder"):
        package = Path("student_coreml") / contract[graph]["file"]
        assert sum(file.stat().st_size for file in package.rglob("*") if file.is_file()) < 13e6
        description = ct.models.MLModel(str(package), skip_model_load=True).get_spec().description
        for side, features in (("inputs", description.input), ("outputs", description.output)):
            shapes = [(feature.name, list(feature.type.multiArrayType.shape)) for feature in features]
            assert shapes == [(tensor["name"], tensor["shape"]) for tensor in contract[graph][side]]
