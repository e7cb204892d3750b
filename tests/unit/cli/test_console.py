from __future__ import annotations

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
