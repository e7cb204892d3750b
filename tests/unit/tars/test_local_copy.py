from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from sam_distill.data.sa1b import Sa1b
from sam_distill.tars.local_copy import LocalCopy
from sam_distill.tars.tar import PipedTar


@pytest.fixture
def shard(make_shards: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tar for `pipe:cat`, which fails once the file is deleted."""
    monkeypatch.setenv("SAM_DISTILL_HOME", str(tmp_path / "home"))
    return Path(make_shards([6])[0])


def local_copy(shard: Path, folder: Path) -> LocalCopy:
    folder.mkdir(exist_ok=True)
    return LocalCopy(f"pipe:cat {shard}", PipedTar(f"pipe:cat {shard}"), folder)


@pytest.mark.parametrize("images", [None, 2])
def test_second_run_reads_the_local_copy(shard: Path, tmp_path: Path, batches, images: int | None) -> None:
    """The copy is whole, even if only two of the tar's images are used."""
    source = Sa1b(f"pipe:cat {shard}", val_images=1, images=images, local=str(tmp_path / "copies"))
    first = batches(source, 4)
    (copy,) = (tmp_path / "copies").glob("*.tar")
    assert copy.read_bytes() == shard.read_bytes()
    shard.unlink()
    again = Sa1b(f"pipe:cat {shard}", val_images=1, images=images, local=str(tmp_path / "copies"))
    assert batches(again, 4) == first


def test_incomplete_copy_is_not_kept(shard: Path, tmp_path: Path) -> None:
    tar = local_copy(shard, tmp_path / "copies")
    with tar.stream() as file:
        file.read(100)
    assert not [path for path in tar.folder.iterdir() if path.suffix != ".lock"]


def test_tar_is_read_without_copying_while_another_process_copies(shard: Path, tmp_path: Path) -> None:
    tar = local_copy(shard, tmp_path / "copies")
    with FileLock(tar.copy.with_suffix(".lock")), tar.stream() as file:
        assert file.read() == shard.read_bytes()
    assert not tar.copy.exists()


def test_full_disk_stops_the_copy_but_not_the_reading(
    shard: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = local_copy(shard, tmp_path / "copies")
    tar.copy.with_suffix(".part").symlink_to("/dev/full")
    with tar.stream() as file:
        assert file.read() == shard.read_bytes()
    assert "is not kept" in caplog.text
    assert not tar.copy.exists()


def test_folder_that_cannot_be_written_stops_the_copy_but_not_the_reading(
    shard: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = local_copy(shard, tmp_path / "copies")
    tar.copy.with_suffix(".part").mkdir()
    with tar.stream() as file:
        assert file.read() == shard.read_bytes()
    assert "is not kept" in caplog.text
