"""Files that are there whole, or not at all. Quick to import: no torch."""

import csv
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")  # in a run's folder

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}  # by first bytes


def compression(start: bytes) -> str | None:
    """What the first bytes of a file say that it is compressed with. (A .pt is a zip, which is not meant here.)"""
    return next((name for mark, name in _COMPRESSED.items() if start.startswith(mark)), None)


def file_sha256(path: Path) -> str:
    """In hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def disk_is_full(error: BaseException | None) -> bool:
    """Whether that is what an error, or one that it came of, is about."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A draft to write to, which takes the place of `path` when all went well, and is gone when it did not.

    It is on the disk by then: even a power cut leaves either the old file or the new one.
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
        draft.write_text(text, errors="surrogateescape")  # names of files need not be UTF-8


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_write(path) as draft, draft.open("w", newline="", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
