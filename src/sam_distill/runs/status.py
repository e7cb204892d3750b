"""status.json, the state of a run. The first process that fails records the reason. Quick to import: no torch."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from sam_distill.errors import UserError
from sam_distill.files import write_json, write_text

LOCK = ".lock"  # in a run folder
PATIENCE = 5  # seconds to wait for a lock: the loader workers of a killed process hold its locks for a moment


class Status:
    """Record of one job. recorded: whether to keep one. first: this process keeps it; others only record a failure.

    choices: the choice of each config group, `experiment` included; config.yaml only has the values that result.
    """

    def __init__(
        self, run_dir: Path, command: list[str], choices: dict[str, str], first: bool, recorded: bool, resumed: bool
    ) -> None:
        self.run_dir, self.first, self.recorded = run_dir, first, recorded
        self._content: dict[str, Any] = {"status": "running", "why": None, "command": command, "choices": choices}
        self._content |= {"pid": os.getpid(), "started": now(), "ended": None}
        self._logged_before = _last_logged(run_dir)
        files = [run_dir / name for name in ("status.json", "config.yaml")] if resumed else []
        self._earlier_records = {file: file.read_text() for file in files if file.is_file()}

    def begin(self, config: str) -> None:
        if self.first and self.recorded:
            self._content["version"] = version()
            self._write()  # before config.yaml: status.json makes this a run folder
            write_text(self.run_dir / "config.yaml", config)

    def end(self, why: str | None) -> bool:
        """Record the job's end. Return whether to print `why`: not if another process failed first and caused this."""
        if not self.recorded:
            return True
        if not self.first:
            return why is not None and fail(self.run_dir, why)
        is_first_failure = why is None or read(self.run_dir).get("status") != "failed"
        if why is not None and self._earlier_records and _last_logged(self.run_dir) == self._logged_before:
            for file, content in self._earlier_records.items():  # resumed, but no new step: restore the old record
                write_text(file, content)
        elif is_first_failure:
            self._content |= {"status": "failed" if why else "finished", "why": why, "ended": now()}
            self._write()
        return is_first_failure

    def _write(self) -> None:
        write_json(self.run_dir / "status.json", self._content)


@contextmanager
def only_process(lock: Path, message: str) -> Iterator[None]:
    """Hold `lock`, which is freed however this process ends. Raise UserError(message) if another process has it."""
    held = FileLock(lock)
    try:
        held.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(message) from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    try:
        yield
    finally:
        held.release()


def writing(run_dir: Path) -> AbstractContextManager[None]:
    """Return the lock that a process holds while it writes a run's records: two would overwrite each other's."""
    message = f"{run_dir}: another run is writing there; wait for it, or choose another folder"
    return only_process(run_dir / LOCK, message)


def why_locked(run_dir: Path) -> str:
    """Return the message with which `writing` would fail now; "" if it would not."""
    try:
        with writing(run_dir) if (run_dir / LOCK).exists() else nullcontext():
            return ""
    except UserError as error:
        return str(error)


def earlier_outcome(run_dir: Path, config: str) -> str | None:
    """Return the status of an earlier job in this folder with the same configuration; None if there was none."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        return None
    try:
        texts = [re.sub(r"_target_: \S*\.", "_target_: ", text) for text in (config, file.read_text())]  # classes move
        now, then = (dict(yaml.safe_load(text)) | {"resume": None} for text in texts)
    except (yaml.YAMLError, TypeError, ValueError):  # not written by a job
        return None
    return read(run_dir).get("status") if now == then else None


def fail(run_dir: Path, why: str) -> bool:
    """Record that a running run has failed, and return True; return False if it was not running."""
    content = read(run_dir)
    if content.get("status") != "running":
        return False
    content |= {"status": "failed", "why": why, "ended": now()}
    write_json(run_dir / "status.json", content)
    return True


def version() -> str:
    """Return the version of this code: the release and, in a checkout, the commit, with `-dirty` if files differ."""
    release, root = metadata.version("sam-distill"), Path(__file__).parents[3]
    if not (root / ".git").exists():
        return release
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow disk
        commit = ""
    return f"{release}+{commit}" if commit else release


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def read(run_dir: Path) -> dict[str, Any]:
    """Return the content of status.json; {} if it does not exist or can't be read."""
    return _mapping(run_dir / "status.json", json.loads)


def config(run_dir: Path) -> dict[str, Any]:
    """Return the resolved configuration that a job has written to its folder; {} if there is none that can be read."""
    return _mapping(run_dir / "config.yaml", yaml.safe_load)


def _mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_logged(run_dir: Path) -> float | None:
    """Return the time at which history.csv was last written; None if there is none."""
    file = run_dir / "history.csv"
    return file.stat().st_mtime if file.is_file() else None
