"""Errors for folders that only look like a distillation cache."""

from pathlib import Path

import pytest

from sam_distill.data.cache import Cache
from sam_distill.errors import UserError
from sam_distill.teachers import CachedTeacher


@pytest.mark.parametrize("content", ['{"name": "My app", "icons": []}', "[]", "7"])
def test_manifest_of_another_program_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"holds no cache: its manifest\.json is that of something else"):
        Cache(str(tmp_path))


def test_damaged_teacher_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "teacher.pt").write_bytes(b"no tensors")
    with pytest.raises(
        UserError, match=r"teacher\.pt can't be read \(.*: the sam-distill cache that wrote it, run again"
    ):
        _ = CachedTeacher(str(tmp_path)).sam


def test_a_file_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "cache.tar").touch()
    with pytest.raises(UserError, match=r"cache\.tar holds no cache"):
        Cache(str(tmp_path / "cache.tar"))
