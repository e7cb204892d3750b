import csv
from pathlib import Path

from sam_distill.loggers.history import History


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_history_has_a_row_per_step_and_grows_columns(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    history = History(path, resume=False)
    history.log_metrics({"train/loss": 2.0, "epoch": 0}, 1)
    history.log_metrics({"train/loss": 1.0}, 2)
    history.log_metrics({"val/miou/point": 0.5}, 2)
    assert rows(path) == [
        {"step": "1", "train/loss": "2.0", "val/miou/point": ""},
        {"step": "2", "train/loss": "1.0", "val/miou/point": "0.5"},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["history.csv"]


def test_resumed_run_replaces_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    first = History(path, resume=False)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": 10.0 + step}, step)
    resumed = History(path, resume=True)
    resumed.forget_after(2)
    resumed.log_metrics({"train/loss": 20.0}, 3)
    assert [(row["step"], row["train/loss"]) for row in rows(path)] == [("1", "11.0"), ("2", "12.0"), ("3", "20.0")]


def test_a_new_run_begins_a_new_history(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    History(path, resume=False).log_metrics({"a": 1.0}, 7)
    History(path, resume=False).log_metrics({"a": 2.0}, 1)
    assert [row["step"] for row in rows(path)] == ["1"]
