import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sam_distill.cli import app
from sam_distill.cli.resume import is_record, run_folder_mistakes, with_resumed_options
from sam_distill.files import write_json
from sam_distill.runs import status


def test_options_of_the_resumed_run_come_back(tmp_path: Path) -> None:
    command = ["train", "encoder=vit_b", "optim.lr=1e-3", "seed=7", "hydra.run.dir=elsewhere", "resume=older"]
    (tmp_path / "status.json").write_text(json.dumps({"command": command}))
    folder_option = f'hydra.run.dir="{tmp_path}"'
    for resume in (f"resume={tmp_path}", f'resume="{tmp_path}"', f"resume='{tmp_path}'"):
        assert with_resumed_options([resume]) == ["encoder=vit_b", "optim.lr=1e-3", "seed=7", resume, folder_option]
    assert with_resumed_options([resume, "seed=1", "hydra.run.dir=new"]) == [
        "encoder=vit_b", "optim.lr=1e-3", resume, "seed=1", "hydra.run.dir=new",
    ]  # fmt: skip


def test_command_line_is_unchanged_without_a_run_to_resume(tmp_path: Path) -> None:
    for argv in ([], ["encoder=vit_b"], ["resume=null"], [f"resume={tmp_path}"]):
        assert with_resumed_options(argv) == argv


@pytest.mark.parametrize("content", ["[1]", "{", '{"status": "running"}', "7"])
def test_folders_without_a_record_of_a_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    (tmp_path / "config.yaml").write_text(content)
    assert with_resumed_options([f"resume={tmp_path}"]) == [f"resume={tmp_path}"]
    assert "no status.json there can be read" in complaints(tmp_path, str(tmp_path))[0]
    write_json(tmp_path / "status.json", {"command": ["train"]})
    assert complaints(tmp_path, str(tmp_path)) == []


def test_init_file_may_be_missing_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "status.json", {"command": ["train", f"init={tmp_path / 'gone'}"]})
    assert app.main(["train", f"resume={tmp_path}", "batch_size=0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: batch_size=0")


def train(*, run_dir: Path, **_: object) -> None:
    pass


def complaints(run_dir: Path, resume: str | None, command: str = "train", **options: object) -> list[str]:
    cfg = {"_target_": f"{__name__}.train", "resume": resume, "hydra": {"run": {"dir": str(run_dir)}}, **options}
    return run_folder_mistakes(OmegaConf.create(cfg), command)


def test_folders_where_no_run_may_start_or_resume(tmp_path: Path) -> None:
    assert complaints(tmp_path, "/nope") == ["resume=/nope: there is no such folder; expected the folder of a run"]
    assert complaints(tmp_path, __file__) == [f"resume={__file__}: is a file; expected the folder of a run"]
    assert complaints(tmp_path, str(tmp_path)) == [
        f"resume={tmp_path}: no status.json there can be read, which says with what options the run began"
    ]
    assert complaints(tmp_path, None) == []
    write_json(tmp_path / "status.json", {"command": ["train"]})
    assert complaints(tmp_path, str(tmp_path)) == complaints(tmp_path, None) == []
    for command in ("evaluate", "bench"):
        assert complaints(tmp_path, None, command) == [
            f"hydra.run.dir={tmp_path} holds a run of sam-distill train: choose another folder"
        ]
    (tmp_path / "student.pt").touch()
    assert complaints(tmp_path, None) == [], "cut short before its first checkpoint"
    write_json(tmp_path / "status.json", {"command": ["train"], "status": "finished"})
    assert complaints(tmp_path, None)[0] == f"hydra.run.dir={tmp_path} holds a student already: choose another folder"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert complaints(tmp_path, None)[0].startswith(f"hydra.run.dir={tmp_path} holds a run already")
    assert complaints(tmp_path, str(tmp_path)) == []


def test_folder_in_which_a_run_is_writing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "PATIENCE", 0.1)
    write_json(tmp_path / "status.json", {"command": ["train"]})
    with status.writing(tmp_path):
        for resume in (None, str(tmp_path)):
            assert complaints(tmp_path, resume) == [
                f"{tmp_path}: another run is writing there; wait for it, or choose another folder"
            ]
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert complaints(tmp_path, None) == [], "a process of that very run"
        monkeypatch.delenv("LOCAL_RANK")
    assert complaints(tmp_path, None) == []


def test_options_that_must_not_change_on_resume(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"command": ["train"]})
    before = {"seed": 0, "strategy": {"_target_": "a.Decoupled"}, "optim": {"_target_": "b.AdamW", "lr": 1e-3},
              "data": {"path": "a", "images": None}, "budget": "1 epoch", "init": None, "sizes": {128: 0.3},
              "teacher": {"checkpoint": "b.pt"}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(before)))

    def changed(**options: object) -> list[str]:
        lines = complaints(tmp_path, str(tmp_path), **{**before, **options})
        assert all(line.endswith(f"init={tmp_path} starts a new run from its weights") for line in lines)
        return [line.partition(": ")[0] for line in lines]

    other_lr = {"_target_": "b.AdamW", "lr": 3e-4}
    assert changed(budget="2 epochs", optim=other_lr, data={"path": "b", "images": None}, trainer={"devices": 1}) == []
    assert changed(teacher={"checkpoint": __file__}) == [], "the file may have moved; its hash is compared later"
    assert changed(teacher={"checkpoint": "sam_vit_h"}) == ["teacher.checkpoint=sam_vit_h"]
    assert changed(optim=other_lr | {"_target_": "since.moved.AdamW"}) == []
    assert changed(optim=other_lr | {"_target_": "b.Muon"}) == ["optim=Muon"]
    assert changed(strategy={"_target_": "a.Coupled"}, seed="${nowhere:}") == ["strategy=Coupled"]
    assert changed(data={"path": "a", "images": 5}, seed=1, later=3) == ["seed=1", "data.images=5"]
    (line,) = complaints(tmp_path, str(tmp_path), **before | {"seed": 1})
    assert line.startswith(f"seed=1: the run in {tmp_path} began with 0; seed=0 goes on with it, init=")
    write_json(tmp_path / "status.json", {"command": ["train"], "choices": {"strategy": "decoupled"}})
    (line,) = complaints(tmp_path, str(tmp_path), **before | {"strategy": {"_target_": "a.Coupled"}})
    assert "began with Decoupled; strategy=decoupled goes on with it" in line, "a default may have changed since"


def test_is_record_tells_the_files_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = ["student.pt", "checkpoints/last.ckpt", "metrics.json", str(tmp_path / "student.pt")]
    assert not any(is_record(Path(name)) for name in kept), "of no run"
    write_json(tmp_path / "status.json", {"command": ["train"]})
    assert all(is_record(Path(name)) for name in kept)
    assert not any(is_record(Path(name)) for name in ("student.safetensors", "last.ckpt", "pictures/student.pt"))
