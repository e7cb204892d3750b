import os
from pathlib import Path

import pytest

from sam_distill.files import atomic_write, write_csv


def test_atomic_write_keeps_the_old_file_on_error(tmp_path: Path) -> None:
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


def test_csv_accepts_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")  # é in Latin-1
    write_csv(tmp_path / "prompts.csv", ["image"], [{"image": name}])
    assert (tmp_path / "prompts.csv").read_bytes() == b"image\r\ncaf\xe9.jpg\r\n"
