import io
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from sam_distill.runs.progress import new_bar
from sam_distill.training import progress


def test_bar_shows_steps_and_loss_below_printed_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, before = io.StringIO(), sys.stdout
    console = Console(file=screen, force_terminal=True, color_system=None, width=100)
    monkeypatch.setattr(progress, "new_bar", partial(new_bar, console=console))
    monkeypatch.setattr(progress, "INTERVAL", 0)
    trainer: Any = SimpleNamespace(
        is_global_zero=True, max_steps=10, global_step=2, log_every_n_steps=1, callback_metrics={}
    )
    module: Any = None
    bar = progress.TrainingBar()
    bar.setup(trainer, module, "validate")
    assert screen.getvalue() == ""
    bar.setup(trainer, module, "fit")
    bar.on_train_start(trainer, module)
    assert "training" in screen.getvalue()
    assert "2/10" in screen.getvalue()
    print("a line of the log")
    trainer.global_step, trainer.callback_metrics = 3, {"train/loss": torch.tensor(0.5)}
    bar.on_train_batch_end(trainer, module, None, None, 0)
    after = screen.getvalue().partition("a line of the log\n")[2]
    assert "3/10" in after
    assert "loss 0.5000" in after
    bar.on_validation_start(trainer, module)
    assert "validating" in screen.getvalue()
    bar.on_exception(trainer, module, KeyboardInterrupt())
    assert sys.stdout is before
