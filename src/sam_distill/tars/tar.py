"""Access to tars on a disk, at an address, or from a command (`pipe:ssh HOST cat sa_000000.tar`).

All are read from front to back. A broken connection is reopened after a pause, and reading continues where it broke.
http is read with requests as one stream: fsspec requests block after block, which took twice the time, can't continue
if a server does not support ranges, and ignores proxies. All other addresses (s3, gs, hf, ...) are read with fsspec.
"""

import io
import logging
import os
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import PurePosixPath
from tempfile import TemporaryFile
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
import requests
from fsspec.spec import AbstractBufferedFile

from sam_distill.errors import UserError, one_line
from sam_distill.tars.index import TarIndex, cached_index, file_stamp, read_headers, sha256_of

log = logging.getLogger(__name__)

RETRY_AFTER = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60, 60)  # seconds before each retry; success starts anew
RETRIES_AT_START = 3  # before a run has started, while the user is waiting
TIMEOUT = 60  # seconds without receiving a byte
FEW_IMAGES = 100  # a local tar with fewer images gets no index file: reading its headers is as fast
BLOCK, HEADERS = 8 << 20, 1024  # bytes per request if there is no stream: for images, for headers


@dataclass(frozen=True)
class Tar(ABC):
    address: str

    def __str__(self) -> str:
        return self.address

    @property
    def identity(self) -> str:
        """Key under which the tar's index and its local copy are stored."""
        return self.address

    @property
    def stem(self) -> str:
        """Name of the tar, to tell its images from those of another tar."""
        return PurePosixPath(urlsplit(self.address).path).stem

    @abstractmethod
    def stream(self) -> IO[bytes]:
        """Open the tar at its beginning. Reading raises OSError if it still fails after several attempts."""

    @abstractmethod
    def index(self) -> TarIndex:
        """Return the index of its images."""


class LocalTar(Tar):
    def stream(self) -> IO[bytes]:
        return open(self.address, "rb")

    def index(self) -> TarIndex:
        stat, path = os.stat(self.address), os.path.abspath(self.address)
        stamp, read = file_stamp(stat), lambda: read_headers(self.stream(), stat.st_size, self.address)
        return cached_index(path, stamp, read, FEW_IMAGES)


class RemoteTar(Tar):
    """Tar at an address that fsspec reads."""

    @property
    def identity(self) -> str:
        return self.address.partition("?")[0]  # the query may be a signature that changes every day

    def stream(self) -> IO[bytes]:
        return io.BufferedReader(RetryingReader(self))

    def index(self) -> TarIndex:
        try:
            file, size = self.open_headers()
            return cached_index(self.identity, str(size), lambda: read_headers(file, size, self.address))
        except UserError:
            raise
        except Exception as error:  # every library has its own errors
            raise UserError(f"{self.address}: no connection ({one_line(error)})") from error

    def open_at(self, position: int, block_size: int = BLOCK) -> tuple[Any, int | None]:
        """Return the rest of the tar from byte `position` on, and the length of the whole tar, or None if unknown."""
        try:
            system, path = fsspec.url_to_fs(self.address)  # anew in each process: a file system can't survive a fork
            file = system.open(path, block_size=block_size, cache_type="readahead")
        except FileNotFoundError as error:  # retrying won't help
            raise UserError(f"{self.address}: there is no such tar") from error
        except PermissionError as error:
            raise UserError(f"{self.address}: {one_line(error)}") from error
        file.seek(position)
        return file, file.size

    def open_headers(self) -> tuple[Any, int | None]:
        """Return the tar opened with random access, for small reads, and its length."""
        return self.open_at(0, HEADERS)


class HttpTar(RemoteTar):
    def open_at(self, position: int, block_size: int = BLOCK) -> tuple[Any, int | None]:
        headers = {"Range": f"bytes={position}-", "Accept-Encoding": "identity"}
        response = requests.get(self.address, stream=True, timeout=TIMEOUT, headers=headers)
        _raise_for_status(response)
        skip = 0 if response.status_code == 206 else position
        length = response.headers.get("Content-Length")
        _read_off(response.raw, skip)
        return response.raw, None if length is None else position + int(length) - skip

    def open_headers(self) -> tuple[Any, int | None]:
        file = _HttpRanges(self.address)
        return file, file.size


class PipedTar(Tar):
    @property
    def stem(self) -> str:
        return sha256_of(self.address)[:8]

    def stream(self, retries: int | None = None) -> IO[bytes]:
        return io.BufferedReader(RetryingReader(self, retries))

    def index(self) -> TarIndex:
        return cached_index(self.identity, "", lambda: read_headers(self.stream(RETRIES_AT_START), None, self.address))

    def open_at(self, position: int) -> tuple[Any, None]:
        output = _CommandOutput(self.address.removeprefix("pipe:"))
        _read_off(output.pipe, position)
        return output, None


def _read_off(file: Any, size: int) -> None:
    """Read this many bytes, or to the end, a part at a time, and forget them."""
    while size:
        size -= len(file.read(min(size, 1 << 20))) or size


class _CommandOutput:
    """Output of a shell command. Reading its end raises ConnectionError if the command failed: data are missing."""

    def __init__(self, command: str) -> None:
        self.errors = TemporaryFile()  # noqa: SIM115 (not a pipe: a talkative command would fill it and wait for ever)
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=self.errors)
        assert self.process.stdout is not None
        self.pipe = self.process.stdout

    def read(self, size: int) -> bytes:
        data = self.pipe.read(size)
        if not data and self.process.wait():
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
            raise ConnectionError(f"exit status {self.process.returncode}: {last}")
        return data

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


class RetryingReader(io.RawIOBase):
    """Stream of a tar that is reopened where it broke, at most `retries` (None: len(RETRY_AFTER)) times in a row."""

    def __init__(self, tar: RemoteTar | PipedTar, retries: int | None = None) -> None:
        self._tar, self._retry_after = tar, RETRY_AFTER[:retries]
        self._position, self._failures = 0, 0
        self._source: Any = None
        self._length: int | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._position != self._length:
            try:
                if self._source is None:
                    self._source, self._length = self._tar.open_at(self._position)
                data: bytes = self._source.read(len(buffer))
                if not data and self._length not in (None, self._position):
                    raise ConnectionError("it ended too early")
            except UserError:
                raise
            except Exception as error:  # requests, urllib3, http.client and sockets each have their own errors
                self._wait(error)
                continue
            if data:
                self._failures = 0
            buffer[: len(data)] = data
            self._position += len(data)
            return len(data)
        return 0

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None
        super().close()

    def _wait(self, error: Exception) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._failures == len(self._retry_after):
            raise OSError(f"given up after {1 + self._failures} attempts: {one_line(error)}") from error
        seconds = self._retry_after[self._failures]
        self._failures += 1
        log.warning("%s broke off at %d (%s); again in %d s", self._tar, self._position, one_line(error), seconds)
        time.sleep(seconds)


class _HttpRanges(AbstractBufferedFile):
    """Remote file with random access: one HTTP range request for each block that is read."""

    def __init__(self, address: str) -> None:
        self._session, self._address = requests.Session(), address
        response = self._request("HEAD")
        if "Content-Length" not in response.headers:
            raise UserError(f"{address}: the server does not say how long it is; download it first")
        super().__init__(None, address, block_size=HEADERS, size=int(response.headers["Content-Length"]))

    def _fetch_range(self, start: int, end: int) -> bytes:
        response = self._request("GET", {"Range": f"bytes={start}-{end - 1}"})
        if response.status_code != 206:
            raise UserError(f"{self.path}: the server can't send parts of a file; download it first, or use pipe:")
        return response.content

    def _request(self, method: str, headers: dict[str, str] | None = None) -> requests.Response:
        """Return the response, after retries if need be. urllib3's Retry does not retry a body that breaks off."""
        retry_after = iter(RETRY_AFTER[:RETRIES_AT_START])
        while True:
            try:
                response = self._session.request(method, self._address, headers=headers, timeout=TIMEOUT)
                _raise_for_status(response)
                return response
            except requests.RequestException as error:
                if (seconds := next(retry_after, None)) is None:  # without its headers, the tar would count as damaged
                    raise UserError(f"{self._address}: no connection ({one_line(error)})") from error
                time.sleep(seconds)


def _raise_for_status(response: requests.Response) -> None:
    if response.status_code in (400, 401, 403, 404, 410):  # retrying won't help
        raise UserError(f"{response.url}: HTTP {response.status_code} {response.reason}")
    response.raise_for_status()
