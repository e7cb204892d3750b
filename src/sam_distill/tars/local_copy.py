"""Copies of remote tars on a disk of this machine, made while the tars are read for the first time.

fsspec's own caches don't fit: with filecache the reader waits for the whole tar, blockcache is not safe with several
processes, and a full disk ends the reading.
"""

import io
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from sam_distill.tars.index import TarIndex, sha256_of
from sam_distill.tars.tar import Tar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalCopy(Tar):
    """Remote tar that is copied into `folder` while it is read for the first time; later reads use the copy."""

    source: Tar
    folder: Path

    @property
    def stem(self) -> str:
        return self.source.stem

    @property
    def copy(self) -> Path:
        return self.folder / f"{self.stem}-{sha256_of(self.source.identity)[:8]}.tar"

    def stream(self) -> IO[bytes]:
        if self.copy.is_file():
            return self.copy.open("rb")
        lock = FileLock(self.copy.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
            return io.BufferedReader(CopyingReader(self.source.stream(), self.copy, lock))
        except Timeout:
            pass  # another process is copying it
        except OSError as error:
            log.warning("data.local: %s is not kept: %s", self.copy.name, error)
        return self.source.stream()

    def index(self) -> TarIndex:
        return self.source.index()


class CopyingReader(io.RawIOBase):
    """Reader of `source` that leaves a copy in `copy` if read to its end. A full disk ends only the copying."""

    def __init__(self, source: IO[bytes], copy: Path, lock: FileLock) -> None:
        self._source, self._copy, self._lock = source, copy, lock
        self._draft = copy.with_suffix(".part")  # written only by the owner of the lock
        self._file: IO[bytes] | None = self._draft.open("wb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        try:
            if self._file is not None:
                self._file.write(data)
                if not data:
                    self._file.close()
                    self._draft.replace(self._copy)
                    self._file = None
        except OSError as error:
            log.warning("data.local: %s is not kept: %s", self._copy.name, error)
            self._end_copy()
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._end_copy()
            self._source.close()
            self._lock.release()
        super().close()

    def _end_copy(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
        self._draft.unlink(missing_ok=True)


def finish_copy(file: IO[bytes]) -> None:
    """Read the rest of a tar if it is being copied, so that the copy is completed."""
    while isinstance(getattr(file, "raw", None), CopyingReader) and file.read(1 << 20):
        pass
