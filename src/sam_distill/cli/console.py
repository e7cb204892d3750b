"""Log lines on the console."""

import logging
import os
import sys


def discard_output(*_: object) -> None:
    """Discard all further output: the program that reads it, such as `head`, has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ToStdout(logging.StreamHandler):
    """Log handler that writes to the current sys.stdout: a progress bar replaces it, to print lines above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        if self.stream is not None:  # it is None where stdout was closed
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's own name)
        discard_output() if isinstance(sys.exc_info()[1], BrokenPipeError) else super().handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """Escape characters that the terminal can't show: file names may have some, or even bytes that are not text."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)
