from pathlib import Path

import pytest

from sam_distill.files import atomic_write


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(TypeError), atomic_write(path) as draft:
        draft.open("w").writelines(["half", 1])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"
    with atomic_write(path) as draft:
        draft.write_text("after")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "after"
