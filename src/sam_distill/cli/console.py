"""The log on the console."""

import logging
import os
import sys


def go_on_unread(*_: object) -> None:
    """The reader of what we say, such as `head`, has left: from now on it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ToStdout(logging.StreamHandler):
    """Writes to what sys.stdout is at the moment: a progress bar replaces it, to let lines scroll by above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        if self.stream is not None:  # as it is where stdout was closed
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's own name)
        go_on_unread() if isinstance(sys.exc_info()[1], BrokenPipeError) else super().handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """Names of files may hold what the terminal can't show, even bytes that are no text."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)
