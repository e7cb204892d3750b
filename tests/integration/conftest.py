import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sam_distill.cli import app


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Callable[..., int]]]:
    """command(yaml) returns a function that runs the command `toy` in tmp_path; changes to logging are undone."""
    conf = tmp_path / "conf"

    def make(yaml: str) -> Callable[..., int]:
        (conf / "hydra").mkdir(parents=True)
        (conf / "hydra/common.yaml").write_text((app.default_conf_dir() / "hydra/common.yaml").read_text())
        (conf / "toy.yaml").write_text(yaml)
        monkeypatch.chdir(tmp_path)
        return lambda *argv: app.run("toy", argv, conf)

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield make
    root.handlers[:] = handlers
    root.setLevel(level)
