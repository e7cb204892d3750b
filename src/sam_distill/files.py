"""Atomic writing of files, their hashes and compression. Quick to import: no torch."""

import csv
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")  # in a run folder

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}  # first bytes -> name


def compression(start: bytes) -> str | None:
    """Return the compression that a file's first bytes show, or None. (A .pt is a zip, which does not count here.)"""
    return next((name for mark, name in _COMPRESSED.items() if start.startswith(mark)), None)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that the disk is full: no space, over quota, or file too large."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a draft's path to write to; the draft replaces `path` on success and is deleted after an error.

    It is synced to the disk first: even a power cut leaves either the old file or the new one.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as draft:
        draft.write_text(text, errors="surrogateescape")  # file names in the text need not be UTF-8


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_write(path) as draft, draft.open("w", newline="", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
