from pathlib import Path

import pytest

from sam_distill.export.target import atomic_target


def test_export_into_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_target(Path(), folder=True) as draft:
        (draft / "encoder.onnx").touch()
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["here", "here/encoder.onnx"]
