"""Progress bars and progress log lines."""

import logging
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


def new_bar(**options: Any) -> Progress:
    """Return a progress bar with tasks that have a `note`. It is drawn on updates, not by a thread: loader workers are
    forked while it is shown, and would inherit that thread's locks.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    return Progress("{task.description}", *columns, auto_refresh=False, speed_estimate_period=120, **options)


class CountProgress:
    """Progress of a count, with its rate and the time left: a bar on a terminal, else a log line every half minute."""

    every = 30.0  # seconds between log lines

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.completed = total, what, 0
        self._bar = new_bar()
        self._task = self._bar.add_task(what, total=total, note="")
        self._is_terminal = self._bar.console.is_terminal
        self._started = self._logged_at = time.perf_counter()

    def __enter__(self) -> "CountProgress":
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            self._bar.stop()

    def add(self, number: int, note: str = "") -> None:
        self.completed += number
        now = time.perf_counter()
        rate = self.completed / (now - self._started)
        text = f"{rate:.1f}/s  {note}"
        if self._is_terminal:
            self._bar.update(self._task, completed=self.completed, note=text, refresh=True)
        elif now - self._logged_at > self.every:
            self._logged_at = now
            left = (self.total - self.completed) / rate / 60
            log.info("%s %d/%d  %s  %.0f minutes left", self.what, self.completed, self.total, text, left)
