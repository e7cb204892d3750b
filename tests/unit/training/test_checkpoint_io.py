import resource
from pathlib import Path

import pytest
import torch

from sam_distill.errors import UserError
from sam_distill.files import disk_is_full
from sam_distill.training.checkpoint_io import AtomicCheckpointIO


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    path, io = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(RuntimeError) as error:
            io.save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert disk_is_full(error.value)
    assert io.load_checkpoint(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_partial_file_of_a_killed_process_is_deleted(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.123.part").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_truncated_checkpoint_raises_user_error(tmp_path: Path) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"weights": torch.zeros(1000)}, path)
    for size in (0, 1000):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match=r"resume: .*last.ckpt can't be read \(.*\); init=RUN_DIR starts a new run"):
            io.load_checkpoint(path)
