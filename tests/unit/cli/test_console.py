import io
import logging
import sys

import pytest

from sam_distill.cli.console import ToStdout


def test_log_lines_go_to_the_current_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars replace sys.stdout while they are on screen."""
    handler, later = ToStdout(sys.stdout), io.StringIO()
    monkeypatch.setattr(sys, "stdout", later)
    handler.emit(logging.makeLogRecord({"msg": "hello"}))
    assert later.getvalue() == "hello\n"


def test_characters_that_stdout_cannot_encode_are_escaped(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    ToStdout(out).emit(logging.makeLogRecord({"msg": "skipped: caf\udce9.jpg \u5199"}))
    assert out.buffer.getvalue() == b"skipped: caf\\udce9.jpg \\u5199\n"  # type: ignore[attr-defined]
    assert capfd.readouterr().err == "", "no traceback of the logging module"
