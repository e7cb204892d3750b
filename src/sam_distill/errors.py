"""The one error that is the user's to mend. Quick to import: no torch."""


class UserError(Exception):
    """A mistake or shortage its reader can mend. `str(error)` is the one line to print; the exit status is not 0."""
