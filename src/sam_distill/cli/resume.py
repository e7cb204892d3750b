"""Checks of run folders, and how a run is resumed: `resume=RUN_DIR` alone restores its folder and its options."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_distill.config.check import keeps_run_folder, show
from sam_distill.config.sources import leaves
from sam_distill.files import LAST_CHECKPOINT
from sam_distill.runs import processes, status
from sam_distill.runs.overrides import quoted_override

_RECORDS = ("status.json", "config.yaml", "metrics.json", "history.csv", "prompts.csv", "student.pt")

# Options that a resumed run may change, with effect; training checks that images and images per step stay the same.
_MAY_CHANGE = (
    "resume", "plan", "scale", "budget", "validate_every", "step_times", "compile", "logger", "trainer", "optim",
    "batch_size", "accumulate", "data.path", "data.local", "data.shuffle_buffer", "teacher.memory_gb",
)  # fmt: skip
IGNORED_ON_RESUME = frozenset({"init"})  # not read on resuming: the checkpoint has the weights; init's file may be gone


def with_resumed_options(argv: list[str]) -> list[str]:
    """Return the command line with the options of the run that it resumes; options given now take precedence."""
    given = {_key(word) for word in argv}
    run_dir = next((_value(word) for word in reversed(argv) if _key(word) == "resume"), None)
    if not run_dir:
        return argv
    before = status.read(Path(run_dir)).get("command")
    if not before:
        return argv  # `run_folder_mistakes` reports it
    inherited = [word for word in before[1:] if _key(word) not in {*given, "resume", "hydra.run.dir"}]
    folder = [] if "hydra.run.dir" in given else [quoted_override("hydra.run.dir", run_dir)]
    return [*inherited, *argv, *folder]


def run_folder_mistakes(cfg: DictConfig, command: str) -> list[str]:
    """Return the mistakes: `resume` names no run or one with other options, or the folder is in use or taken."""
    run_dir, resume = Path(cfg.hydra.run.dir), cfg.get("resume")
    if not keeps_run_folder(cfg):
        return []
    if resume is not None and not Path(resume).is_dir():
        wrong = "is a file" if Path(resume).exists() else "there is no such folder"
        return [f"resume={resume}: {wrong}; expected the folder of a run"]
    if resume is not None and not status.read(Path(resume)).get("command"):
        return [f"resume={resume}: no status.json there can be read, which says with what options the run began"]
    if processes.is_first() and (line := status.why_locked(run_dir)):
        return [line]
    if resume is not None:
        return list(_changed(cfg, Path(resume)))
    return [f"hydra.run.dir={line}"] if (line := why_occupied(run_dir, command)) else []


def why_occupied(run_dir: Path, command: str) -> str:
    """Return why `command` may not start a run in this folder, as it would overwrite files of another; "" if it may."""
    record = status.read(run_dir)
    other = (record.get("command") or [command])[0]
    foreign = "" if record.get("command") else next((name for name in _RECORDS if (run_dir / name).exists()), "")
    if foreign:
        return f"{run_dir} holds a {foreign}, but no record of a run, which would write over it: choose another folder"
    if other != command:
        return f"{run_dir} holds a run of sam-distill {other}: choose another folder"
    if (run_dir / LAST_CHECKPOINT).is_file():
        return f"{run_dir} holds a run already: resume={run_dir} goes on with it; else choose another folder"
    if (run_dir / "student.pt").is_file() and record.get("status") == "finished":
        return f"{run_dir} holds a student already: choose another folder"
    return ""


def is_record(file: Path) -> bool:
    """Whether the file belongs to the records of a run, such as its student, last checkpoint and scores."""
    file = file.absolute()
    for run_dir in file.parents[:2]:
        if any(file == run_dir / record for record in (*_RECORDS, LAST_CHECKPOINT)):
            return bool(status.read(run_dir).get("command"))
    return False


def _changed(cfg: DictConfig, run_dir: Path) -> Iterator[str]:
    """Yield a mistake for each option that differs from the run's config.yaml and must not. New options are ignored."""
    then, choices = dict(leaves(status.config(run_dir))), status.read(run_dir).get("choices", {})
    for key, _ in leaves(OmegaConf.to_container(cfg, resolve=False)):
        allowed = key != "optim._target_" and any(f"{key}.".startswith(f"{name}.") for name in (*_MAY_CHANGE, "hydra"))
        if allowed or key not in then:
            continue
        with suppress(OmegaConfBaseException):  # known only when the job runs
            value = OmegaConf.select(cfg, key)
            if key == "teacher.checkpoint" and Path(value).expanduser().is_file():
                continue  # the file may have moved; training compares its hash
            now = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            old, new = then[key], now
            if key.endswith("_target_"):  # the class may be in another module now
                old, new = (str(name).rpartition(".")[2] for name in (old, new))
            if new != old:
                name, old, new = key.removesuffix("._target_"), show(old), show(new)
                same = f"{name}={choices[name] if key.endswith('_target_') and name in choices else old}"
                yield (
                    f"{name}={new}: the run in {run_dir} began with {old}; {same} goes on with it, init={run_dir}"
                    " starts a new run from its weights"
                )


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _value(word: str) -> str | None:
    """Return an override's value without quotes; None for null, several values, or if it can't be parsed."""
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return None  # reported when the configuration is composed
    value = None if override.is_sweep_override() else override.value()
    return None if value is None else str(value)
