"""Targets of exports: files or folders that are written only when they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sam_distill.errors import UserError
from sam_distill.export.contract import CONTRACT


@contextmanager
def atomic_target(target: Path, folder: bool) -> Iterator[Path]:
    """Yield a draft file or folder beside the target, and move it to the target if no error occurs.

    Raise UserError if the target is of the other kind, can't be written, or is a non-empty folder without an export.
    """
    if target.exists() and target.is_dir() != folder:
        is_one, expected = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UserError(f"path={target} is {is_one}: expected {expected}")
    if folder and target.is_dir() and not (target / CONTRACT).is_file() and any(target.iterdir()):
        raise UserError(f"path={target} holds other files than an export: give it a folder of its own")
    try:
        place = Path(os.path.abspath(target))  # absolute, since "." has no name
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as beside:
            draft = Path(beside) / place.name
            if folder:
                draft.mkdir()
            yield draft
            if folder:
                target.mkdir(exist_ok=True)
                for file in sorted(draft.iterdir(), reverse=True):  # weights before the graph that names them
                    if file.is_dir():
                        shutil.rmtree(target / file.name, ignore_errors=True)
                    file.replace(target / file.name)
            else:
                draft.replace(target)
    except OSError as error:
        raise UserError(f"path={target}: cannot be written ({error.strerror or error})") from error
