"""The log on the console."""

from __future__ import annotations

import logging
import sys


class ToStdout(logging.StreamHandler):
    """Writes to what sys.stdout is at the moment: a progress bar replaces it, to let lines scroll by above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)
