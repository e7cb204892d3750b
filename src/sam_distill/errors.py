"""The one error that is the user's to mend, and what others say. Quick to import: no torch."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake or shortage its reader can mend. `str(error)` is the one line to print; the exit status is not 0."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str, most: int = 1) -> str:
    """A hint for a name that there isn't."""
    nearest = difflib.get_close_matches(word, list(known), most)
    return f"did you mean {', '.join(nearest)}?" if nearest else otherwise


def one_line(error: BaseException) -> str:
    """What a library's error says, or its type where it says nothing."""
    return " ".join(str(error).split())[:160] or type(error).__name__
