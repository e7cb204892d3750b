import io
import logging
import sys

import pytest

from sam_distill.cli.console import ToStdout


def test_log_lines_go_where_stdout_goes_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars replace sys.stdout while they are on screen."""
    handler, later = ToStdout(sys.stdout), io.StringIO()
    monkeypatch.setattr(sys, "stdout", later)
    handler.emit(logging.makeLogRecord({"msg": "hello"}))
    assert later.getvalue() == "hello\n"


def test_names_that_are_no_text_are_shown_somehow(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    ToStdout(out).emit(logging.makeLogRecord({"msg": "skipped: caf\udce9.jpg \u5199"}))
    assert out.buffer.getvalue() == b"skipped: caf\\udce9.jpg \\u5199\n"  # type: ignore[attr-defined]
    assert capfd.readouterr().err == "", "no traceback of the logging module"
