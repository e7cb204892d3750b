"""`resume=RUN_DIR` alone is enough: the run goes on in its own folder with the options it was started with."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig


def continued(argv: list[str]) -> list[str]:
    """The command line with the options of the run that it resumes. Those given now take precedence."""
    given = {_key(word): word for word in argv}
    run_dir = given.get("resume", "").partition("=")[2]
    if run_dir in ("", "null"):
        return argv
    try:
        before = json.loads((Path(run_dir) / "status.json").read_text())["command"][1:]
    except (OSError, ValueError, KeyError):  # not a run folder: the engine says so when it looks for the checkpoint
        return argv
    kept = [word for word in before if _key(word) not in given and _key(word) not in ("resume", "hydra.run.dir")]
    place = [] if "hydra.run.dir" in given else [f"hydra.run.dir={run_dir}"]
    return [*kept, *argv, *place]


def misplaced(cfg: DictConfig) -> list[str]:
    """A complaint if a run is to go on nowhere, or to begin in the folder of another, whose checkpoint it'd replace."""
    run_dir, resume = Path(cfg.hydra.run.dir), cfg.get("resume", "")
    if resume and not Path(resume).is_dir():
        return [f"resume={resume}: there is no such folder; expected that of a run"]
    if resume is None and (run_dir / "checkpoints" / "last.ckpt").is_file():
        return [
            f"hydra.run.dir={run_dir} holds a run already: resume={run_dir} goes on with it; else choose another folder"
        ]
    return []


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]
