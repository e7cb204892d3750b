from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from sam_distill.cli.resume import continued, misplaced


def test_options_of_the_resumed_run_come_back(tmp_path: Path) -> None:
    command = ["train", "encoder=vit_b", "optim.lr=1e-3", "seed=7", "hydra.run.dir=elsewhere", "resume=older"]
    (tmp_path / "status.json").write_text(json.dumps({"command": command}))
    resume = f"resume={tmp_path}"
    assert continued([resume]) == ["encoder=vit_b", "optim.lr=1e-3", "seed=7", resume, f"hydra.run.dir={tmp_path}"]
    assert continued([resume, "seed=1", "hydra.run.dir=new"]) == [
        "encoder=vit_b", "optim.lr=1e-3", resume, "seed=1", "hydra.run.dir=new",
    ]  # fmt: skip


def test_other_command_lines_stay_as_they_are(tmp_path: Path) -> None:
    for argv in ([], ["encoder=vit_b"], ["resume=null"], [f"resume={tmp_path}"]):
        assert continued(argv) == argv


def test_where_no_run_can_begin_or_go_on(tmp_path: Path) -> None:
    def told(resume: str | None) -> list[str]:
        return misplaced(OmegaConf.create({"resume": resume, "hydra": {"run": {"dir": str(tmp_path)}}}))

    assert told("/nope") == ["resume=/nope: there is no such folder; expected that of a run"]
    assert told(str(tmp_path)) == told(None) == []
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert told(None)[0].startswith(f"hydra.run.dir={tmp_path} holds a run already")
    assert told(str(tmp_path)) == []
