"""Tars read from addresses and commands, with a real HTTP server on this machine that can fail."""

import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from sam_distill.data.sa1b import Sa1b
from sam_distill.errors import UserError
from sam_distill.tars import tar as tars


class Server:
    """HTTP server of a folder, by default with support for ranges.

    breaks: bytes after which the connection is cut, one number for each response of more than 20,000 bytes in turn.
    busy: number of requests that are still answered with 503.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.breaks, self.ranges, self.requests = folder, list[int](), True, list[str]()
        self.port, self.busy = 0, 0
        self.start()

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                file = outer.folder / self.path.partition("?")[0].lstrip("/")
                if not file.is_file():
                    self.send_error(404)
                    return
                if outer.busy:
                    outer.busy -= 1
                    self.send_error(503)
                    return
                data, span = file.read_bytes(), self.headers.get("Range")
                outer.requests.append(f"{self.command} {span or ''}".strip())
                if span and outer.ranges:
                    first, _, last = span.removeprefix("bytes=").partition("-")
                    self.send_response(206)
                    data = data[int(first) : int(last) + 1 if last else None]
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if not body:
                    return
                if len(data) > 20000 and outer.breaks:
                    self.wfile.write(data[: outer.breaks.pop(0)])
                    self.close_connection = True
                else:
                    self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def __str__(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SAM_DISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tars, "RETRY_AFTER", (0.01, 0.1, 0.5, 0.5, 0.5, 0.5))
    (tmp_path / "shards").mkdir(exist_ok=True)
    server = Server(tmp_path / "shards")
    yield server
    server.stop()


@pytest.fixture
def shards(make_shards: Callable[[Sequence[int]], list[str]]) -> list[str]:
    return make_shards([12, 9])


BRACES = "sa_{000000..000001}.tar"


def test_remote_tars_give_the_same_batches_as_local_ones(
    server: Server, shards: list[str], tmp_path: Path, batches: Callable[..., list[list[str]]]
) -> None:
    remote, local = Sa1b(f"{server}/{BRACES}", val_images=3), Sa1b(str(tmp_path / "shards"), val_images=3)
    assert [sample.key for sample in remote.val_samples()] == [sample.key for sample in local.val_samples()]
    for workers in (0, 2):
        assert batches(remote, 12, workers=workers) == batches(local, 12, workers=workers)
    assert batches(remote, 5, start=8) == batches(local, 5, start=8)


def test_headers_of_a_remote_tar_are_read_only_once(server: Server, shards: list[str]) -> None:
    Sa1b(f"{server}/{BRACES}?signature=monday", val_images=1)
    assert len(server.requests) > 20
    server.requests.clear()
    Sa1b(f"{server}/{BRACES}?signature=tuesday", val_images=1)
    assert server.requests == ["HEAD", "HEAD"]


def test_headers_are_asked_for_again_where_a_server_is_busy(server: Server, shards: list[str], tmp_path: Path) -> None:
    local = Sa1b(str(tmp_path / "shards"), val_images=1)
    server.busy = 3
    remote = Sa1b(f"{server}/sa_000000.tar", val_images=1)
    assert server.busy == 0
    assert set(remote.keys(remote.train)) < set(local.keys([*local.train, *local.val]))


def test_broken_connections_cost_a_warning(
    server: Server,
    shards: list[str],
    tmp_path: Path,
    batches: Callable[..., list[list[str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    remote, local = Sa1b(f"{server}/{BRACES}", val_images=1), Sa1b(str(tmp_path / "shards"), val_images=1)
    server.breaks = [700, 5000, 0, 12345]
    assert batches(remote, 10) == batches(local, 10)
    assert caplog.text.count("broke off at") == 4
    assert remote.skipped == 0


def test_a_server_that_is_restarted(
    server: Server, shards: list[str], tmp_path: Path, batches: Callable[..., list[list[str]]]
) -> None:
    remote, local = Sa1b(f"{server}/{BRACES}", val_images=1), Sa1b(str(tmp_path / "shards"), val_images=1)
    server.breaks = [5000]
    server.stop()
    threading.Timer(0.5, server.start).start()
    assert batches(remote, 10) == batches(local, 10)
    assert remote.skipped == 0


def test_a_server_that_knows_no_ranges(
    server: Server, shards: list[str], tmp_path: Path, batches: Callable[..., list[list[str]]]
) -> None:
    remote, local = Sa1b(f"{server}/{BRACES}", val_images=1), Sa1b(str(tmp_path / "shards"), val_images=1)
    server.ranges, server.breaks = False, [5000]
    assert batches(remote, 10) == batches(local, 10)
    with pytest.raises(UserError, match="the server can't send parts of a file; download it first, or use pipe:"):
        Sa1b(f"{server}/{BRACES}".replace("127.0.0.1", "localhost"), val_images=1)


def test_missing_remote_tar_is_refused_or_later_skipped(
    server: Server, shards: list[str], batches: Callable[..., list[list[str]]], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"sa_000007\.tar: HTTP 404 Not Found"):
        Sa1b(f"{server}/sa_000007.tar")
    source = Sa1b(f"{server}/{BRACES}", val_images=1)
    Path(shards[1]).unlink()  # as if it were deleted during training
    keys = {key for batch in batches(source, 8) for key in batch}
    assert keys <= {f"sa_{number}" for number in range(12)}
    assert caplog.text.count("skipped: ") == 1
    assert "9 images of" in caplog.text
    assert source.skipped == 9


def test_pipe_cat(server: Server, shards: list[str], tmp_path: Path, batches: Callable[..., list[list[str]]]) -> None:
    local = Sa1b(shards[0], val_images=1)
    remote = Sa1b(f"pipe:cat {shards[0]}", val_images=1)
    assert batches(remote, 8) == batches(local, 8)


def test_pipe_command_with_much_stderr(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes more to stderr than a pipe holds, and would hang if that were a pipe that nobody reads."""
    monkeypatch.setenv("SAM_DISTILL_HOME", str(tmp_path / "home"))
    source = Sa1b(f"pipe:head -c 500000 /dev/zero >&2; cat {shards[0]}", val_images=1)
    assert len(source.keys(source.train)) == 11


def test_addresses_of_fsspec(
    shards: list[str], tmp_path: Path, batches: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's file system in memory stands in for s3 and others."""
    monkeypatch.setenv("SAM_DISTILL_HOME", str(tmp_path / "home"))
    memory, local = fsspec.filesystem("memory"), Sa1b(str(tmp_path / "shards"), val_images=3)
    for shard in shards:
        memory.pipe(f"/bucket/{Path(shard).name}", Path(shard).read_bytes())
    for path in (f"memory://bucket/{BRACES}", "memory://bucket/*.tar", "memory://bucket"):
        remote = Sa1b(path, val_images=3)
        assert (remote.keys(remote.train), remote.keys(remote.val)) == (local.keys(local.train), local.keys(local.val))
    assert batches(remote, 12, workers=2) == batches(local, 12, workers=2)
    for path in ("memory://bucket/none.tar", "memory://none"):
        with pytest.raises(UserError, match=f"{path}: "):
            Sa1b(path)
    if find_spec("s3fs") is None:
        with pytest.raises(UserError, match=r"s3://bucket/a\.tar: Install s3fs"):
            Sa1b("s3://bucket/a.tar")


def test_an_address_whose_connection_breaks(
    shards: list[str], tmp_path: Path, batches: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAM_DISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tars, "RETRY_AFTER", (0.01, 0.01))
    fsspec.filesystem("memory").pipe("/bucket/a.tar", Path(shards[0]).read_bytes())
    remote, local = Sa1b("memory://bucket/a.tar", val_images=1), Sa1b(shards[0], val_images=1)
    read, breaks = MemoryFile.read, [True, False, True, False]

    def breaking(file: MemoryFile, size: int) -> bytes:
        if file.tell() > 9000 and breaks and breaks.pop():
            raise OSError("slow down")
        return read(file, size)

    monkeypatch.setattr(MemoryFile, "read", breaking)
    assert batches(remote, 5) == batches(local, 5)
    assert (remote.skipped, breaks) == (0, [])


def test_a_command_that_fails_now_and_then(
    server: Server,
    shards: list[str],
    tmp_path: Path,
    batches: Callable[..., list[list[str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mark = tmp_path / "was_here"
    fails = f"head -c 9000 {shards[0]}; touch {mark}; echo no network >&2; exit 3"
    script = f"if [ -e {mark} ]; then cat {shards[0]}; else {fails}; fi"
    mark.touch()
    source = Sa1b(f"pipe:{script}", val_images=1)
    mark.unlink()
    assert batches(source, 5) == batches(Sa1b(shards[0], val_images=1), 5)
    assert "broke off at 9000 (exit status 3: no network)" in caplog.text
