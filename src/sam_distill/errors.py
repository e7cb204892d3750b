"""The error that users can fix, and help with error messages. Quick to import: no torch."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Mistake or shortage that the user can fix. `str(error)` is the one line to print; the exit status is not 0."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str, most: int = 1) -> str:
    """Return a hint for an unknown name: up to `most` similar ones of `known`, or `otherwise` if there are none."""
    nearest = difflib.get_close_matches(word, list(known), most)
    return f"did you mean {', '.join(nearest)}?" if nearest else otherwise


def one_line(error: BaseException) -> str:
    """Return a library error's message on one line, cut at 160 characters, or its type if the message is empty."""
    return " ".join(str(error).split())[:160] or type(error).__name__
