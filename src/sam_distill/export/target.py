"""Where an export goes: a file or a folder that is complete, or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sam_distill.export.contract import CONTRACT
from sam_distill.types import UserError


@contextmanager
def atomic_target(target: Path, folder: bool) -> Iterator[Path]:
    """A draft of a file or folder beside its final place, where it is moved when all went well."""
    if target.exists() and target.is_dir() != folder:
        is_one, expected = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UserError(f"path={target} is {is_one}: expected {expected}")
    if folder and target.is_dir() and not (target / CONTRACT).is_file() and any(target.iterdir()):
        raise UserError(f"path={target} holds other files than an export: give it a folder of its own")
    try:
        place = Path(os.path.abspath(target))  # which has a name, unlike "."
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
