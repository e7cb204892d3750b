import json
from importlib import metadata
from pathlib import Path

import pytest

from sam_distill.runs.status import Status, earlier_outcome, fail, read


def status_and_reason(run_dir: Path) -> tuple[str, str | None]:
    content = json.loads((run_dir / "status.json").read_text())
    return content["status"], content["why"]


def status(run_dir: Path, first: bool = True, resumed: bool = False) -> Status:
    return Status(run_dir, ["train", "seed=1"], {"data": "photos"}, first, recorded=True, resumed=resumed)


def test_record_of_one_process(tmp_path: Path) -> None:
    one = status(tmp_path)
    one.begin("seed: 1")
    assert status_and_reason(tmp_path) == ("running", None)
    record = json.loads((tmp_path / "status.json").read_text())
    assert record["choices"] == {"data": "photos"}
    assert record["version"].startswith(metadata.version("sam-distill"))
    assert one.end(None)
    assert status_and_reason(tmp_path) == ("finished", None)
    assert not fail(tmp_path, "too late"), "it has finished"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "status.json"]


def test_the_first_failure_is_the_one_that_counts(tmp_path: Path) -> None:
    first, other, third = status(tmp_path), status(tmp_path, first=False), status(tmp_path, first=False)
    first.begin("")
    other.begin("not to be written")
    assert (tmp_path / "config.yaml").read_text() == ""
    assert other.end("power cut")
    assert not third.end("connection closed")
    assert not first.end("connection closed")
    assert status_and_reason(tmp_path) == ("failed", "power cut")


def test_resume_without_a_new_step_restores_the_earlier_record(tmp_path: Path) -> None:
    first = status(tmp_path)
    first.begin("seed: 1")
    first.end("interrupted")
    again = status(tmp_path, resumed=True)
    again.begin("seed: 2")
    assert status_and_reason(tmp_path) == ("running", None)
    assert again.end("another architecture")
    assert status_and_reason(tmp_path) == ("failed", "interrupted")
    assert (tmp_path / "config.yaml").read_text() == "seed: 1"

    with_new_step = status(tmp_path, resumed=True)
    with_new_step.begin("seed: 2")
    (tmp_path / "history.csv").write_text("step\n1\n")
    with_new_step.end("power cut")
    assert status_and_reason(tmp_path) == ("failed", "power cut")
    assert (tmp_path / "config.yaml").read_text() == "seed: 2"


def test_moved_class_is_the_same_configuration(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"status": "finished"}')
    (tmp_path / "config.yaml").write_text("fastsam:\n  _target_: sam_distill.evaluate.fastsam.FastSam\n  conf: 0.4\n")
    assert earlier_outcome(tmp_path, "fastsam: {_target_: sam_distill.fastsam.model.FastSam, conf: 0.4}") == "finished"
    assert earlier_outcome(tmp_path, "fastsam: {_target_: sam_distill.fastsam.model.Other, conf: 0.4}") is None


def test_a_command_without_records(tmp_path: Path) -> None:
    for first in (True, False):
        job = Status(tmp_path, ["segment"], {}, first, recorded=False, resumed=False)
        job.begin("")
        assert job.end("mend me"), "no record tells which process failed first"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["[1, 2]", "{", "7"])
def test_invalid_record_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    (tmp_path / "config.yaml").write_text(content)
    assert read(tmp_path) == {}
    assert earlier_outcome(tmp_path, "seed: 1") is None
