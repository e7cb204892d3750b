"""Where tars lie: on a disk, behind an http(s) address, or at the end of a command (`pipe:aws s3 cp s3://... -`).

All are read from front to back. A connection that breaks is taken up again where it broke, after a while. What a tar
holds is read off its headers once, and remembered.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import subprocess
import tarfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

import requests

from sam_distill.data.tar_index import FEW, Contents, remembered, stamp_of
from sam_distill.files import compression
from sam_distill.types import UserError

log = logging.getLogger(__name__)

PATIENCE = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60, 60)  # seconds before each new attempt, in mid-run; reset by success
HASTE = 3  # attempts before a run has begun: its user waits for an answer
TIMEOUT = 60  # seconds without a byte
_GIVEN_UP = {400, 401, 403, 404, 410}  # HTTP: asking again won't help


@dataclass(frozen=True)
class Tar(ABC):
    where: str

    def __str__(self) -> str:
        return self.where

    @property
    def identity(self) -> str:
        """What it is remembered by."""
        return self.where

    @property
    def stem(self) -> str:
        """Its name, to tell its images from those of another."""
        return PurePosixPath(urlsplit(self.where).path).stem

    @abstractmethod
    def stream(self) -> IO[bytes]:
        """From its beginning. Raises OSError where it can't be read on, even after several attempts."""

    @abstractmethod
    def contents(self) -> Contents:
        """What it holds."""


class LocalTar(Tar):
    def stream(self) -> IO[bytes]:
        return open(self.where, "rb")

    def contents(self) -> Contents:
        stat = Path(self.where).stat()

        def read() -> Contents:
            with self.stream() as file:
                return _headers(file, stat.st_size, self.where)

        return remembered(os.path.abspath(self.where), stamp_of(stat), read, FEW)


class HttpTar(Tar):
    def stream(self) -> IO[bytes]:
        return io.BufferedReader(Persistent(self.where, self._open))

    def contents(self) -> Contents:
        size = len(_Ranges(self.where))
        return remembered(self.identity, str(size), lambda: _headers(_Ranges(self.where), size, self.where))

    @property
    def identity(self) -> str:
        return self.where.partition("?")[0]  # what follows may be a signature that changes every day

    def _open(self, position: int) -> tuple[Any, int | None]:
        headers = {"Range": f"bytes={position}-", "Accept-Encoding": "identity"}
        answer = requests.get(self.where, stream=True, timeout=TIMEOUT, headers=headers)
        _complain(answer)
        skip = 0 if answer.status_code == 206 else position
        length = answer.headers.get("Content-Length")
        answer.raw.read(skip)
        return answer.raw, None if length is None else position + int(length) - skip


class PipedTar(Tar):
    @property
    def stem(self) -> str:
        return hashlib.sha256(self.where.encode()).hexdigest()[:8]

    def stream(self) -> IO[bytes]:
        return io.BufferedReader(Persistent(self.where, self._open))

    def contents(self) -> Contents:
        def read() -> Contents:
            with io.BufferedReader(Persistent(self.where, self._open, HASTE)) as file:
                return _headers(file, None, self.where)

        return remembered(self.where, "", read)

    def _open(self, position: int) -> tuple[Any, int | None]:
        command = self.where.removeprefix("pipe:")
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        while position:
            position -= len(process.stdout.read(min(position, 1 << 20))) or position
        return _Output(process), None


class _Output:
    """What a command writes; a command that fails has not written all."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def read(self, size: int) -> bytes:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        data = self.process.stdout.read(size)
        if not data and self.process.wait():
            said = self.process.stderr.read().decode(errors="replace").strip().splitlines()
            raise ConnectionError(f"exit status {self.process.returncode}: {said[-1] if said else 'no message'}")
        return data

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Persistent(io.RawIOBase):
    """A stream that is opened again where it broke.

    begin: position -> a stream from there, and the length of the whole, if that is known.
    """

    def __init__(self, where: str, begin: Callable[[int], tuple[Any, int | None]], attempts: int | None = None) -> None:
        self._where, self._begin, self._patience = where, begin, PATIENCE[:attempts]
        self._position, self._failed = 0, 0
        self._source: Any = None
        self._length: int | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._position != self._length:
            try:
                if self._source is None:
                    self._source, self._length = self._begin(self._position)
                data: bytes = self._source.read(len(buffer))
                if not data and self._length is not None and self._position < self._length:
                    raise ConnectionError("it ended too early")
            except Exception as error:  # requests, urllib3, http.client and sockets each have errors of their own
                if isinstance(error, UserError):
                    raise
                self._wait(error)
                continue
            if data:
                self._failed = 0
            buffer[: len(data)] = data
            self._position += len(data)
            return len(data)
        return 0

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        super().close()

    def _wait(self, error: Exception) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._failed == len(self._patience):
            raise OSError(f"given up after {1 + self._failed} attempts: {_one_line(error)}") from error
        seconds = self._patience[self._failed]
        self._failed += 1
        log.warning("%s broke off at %d (%s); again in %d s", self._where, self._position, _one_line(error), seconds)
        time.sleep(seconds)


class _Ranges(io.RawIOBase):
    """A remote file with random access, for headers: a request for each block that is read."""

    def __init__(self, address: str) -> None:
        self._address, self._position = address, 0
        self._session = requests.Session()
        try:
            answer = self._session.head(address, timeout=TIMEOUT, allow_redirects=True)
        except requests.RequestException as error:
            raise UserError(f"{address}: no connection ({_one_line(error)})") from error
        _complain(answer)
        if "Content-Length" not in answer.headers:
            raise UserError(f"{address}: the server does not say how long it is; download it first")
        self._length = int(answer.headers["Content-Length"])

    def __len__(self) -> int:
        return self._length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._length - self._position)
        if size <= 0:
            return 0
        span = f"bytes={self._position}-{self._position + size - 1}"
        for seconds in (*PATIENCE[:HASTE], None):
            try:
                answer = self._session.get(self._address, timeout=TIMEOUT, headers={"Range": span})
                break
            except requests.RequestException as error:
                if seconds is None:
                    raise OSError(_one_line(error)) from error
                time.sleep(seconds)
        _complain(answer)
        if answer.status_code != 206:
            raise UserError(f"{self._address}: the server can't send parts of a file; download it first, or use pipe:")
        buffer[: len(answer.content)] = answer.content
        self._position += len(answer.content)
        return len(answer.content)


def _complain(answer: requests.Response) -> None:
    if answer.status_code in _GIVEN_UP:
        raise UserError(f"{answer.url}: HTTP {answer.status_code} {answer.reason}")
    answer.raise_for_status()


def _headers(file: Any, size: int | None, where: str) -> Contents:
    """size: of the file, which is None if it can only be read from front to back."""
    names: dict[str, None] = {}  # an ordered set
    try:
        with tarfile.open(fileobj=file, mode="r:" if size is not None else "r|") as tar:
            for member in tar:
                if size is not None and member.isreg() and member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"truncated in {member.name}")
                if member.isreg():
                    names[member.name] = None
            if size is not None:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # neither the end of the archive nor that of the file
                    raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, OSError) as error:
        if size and not names and (packed := compression(_start(file))):
            return Contents.of([], f"{where} is compressed with {packed}: unpack it, or read it by a command, pipe:...")
        return Contents.of(list(names), f"the rest of {where} after {len(names)} files ({_one_line(error)})")
    return Contents.of(list(names))


def _start(file: Any) -> bytes:
    file.seek(0)
    return bytes(file.read(8))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
