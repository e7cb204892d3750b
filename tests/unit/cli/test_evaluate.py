from __future__ import annotations

from pathlib import Path

import pytest

from sam_distill.cli.evaluate import _data_path


@pytest.mark.parametrize("content", ["", "- a", "data: photos", "{", "data: {path: null}"])
def test_a_configuration_that_names_no_data(tmp_path: Path, content: str) -> None:
    """A checkpoint may lie beside the config.yaml of anything."""
    (tmp_path / "config.yaml").write_text(content)
    assert _data_path(tmp_path) == []


def test_the_data_of_a_run(tmp_path: Path) -> None:
    assert _data_path(tmp_path) == []
    (tmp_path / "config.yaml").write_text("data: {path: [/a, /b]}")
    assert _data_path(tmp_path) == ["/a", "/b"]
