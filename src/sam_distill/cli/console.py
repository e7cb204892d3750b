"""The log on the console."""

import logging
import sys


class ToStdout(logging.StreamHandler):
    """Writes to what sys.stdout is at the moment: a progress bar replaces it, to let lines scroll by above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Names of files may hold what the terminal can't show, even bytes that are no text."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)
