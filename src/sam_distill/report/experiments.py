"""What an experiment is about: experiments.yaml, and for runs of none what they differ in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sam_distill.report.runs import Run, Value

_FILE = Path(__file__).with_name("experiments.yaml")
_COLUMNS = ["miou/point", "miou/box", "embedding_mse", "parameters", "images", "seconds"]  # where nothing else is said
_MANY = 6  # so many settings fit beside each other in a table


@dataclass(frozen=True)
class Measure:
    """A column: how the metric `name` is shown."""

    name: str
    label: str
    scale: float = 1.0
    unit: str = ""
    digits: int = 3

    def number(self, value: float) -> str:
        return f"{value * self.scale:,.{self.digits}f}"

    def shown(self, value: float) -> str:
        return self._with_unit(self.number(value))

    def as_printed(self, value: float) -> str:
        """A number of the paper, with the digits that it has there."""
        return self._with_unit(f"{value * self.scale:,.10g}")

    def _with_unit(self, number: str) -> str:
        return f"{number} {self.unit}".strip()


@dataclass(frozen=True)
class Experiment:
    """See experiments.yaml. place: in the paper; empty beyond it."""

    id: str
    title: str
    keys: Sequence[str]
    columns: Sequence[Measure]
    place: str = ""
    claim: str = ""
    note: str = ""
    plots: Sequence[str] = ()
    across: str = ""
    paper: Sequence[Mapping[str, Value]] = ()


def known() -> dict[str, Experiment]:
    listed: dict[str, dict[str, Any]] = _content()["experiments"]
    return {
        name: Experiment(**{**fields, "id": name, "columns": [measure(c) for c in fields["columns"]]})
        for name, fields in listed.items()
    }


def undescribed(name: str, title: str, runs: Sequence[Run]) -> Experiment:
    """An experiment that no file describes: its keys are what the runs differ in, beside the seed."""
    metrics = {metric for run in runs for metric in run.metrics}
    pairs = [name for name in _content()["metrics"] if name.startswith("miou/pair_")]
    columns = [measure(column) for column in [*pairs, *_COLUMNS] if column in metrics] or [measure(_COLUMNS[0])]
    keys = _differing(runs) or ["run"]
    if len(keys) > _MANY:  # then each run has a row: those that the table can't tell apart are not the same
        keys = ["run", *keys[: _MANY - 1]]
    return Experiment(name, title, keys, columns, plots=keys if len(keys) == 1 else ())


def measure(name: str) -> Measure:
    return Measure(name, **{"label": name, **_content()["metrics"].get(name, {})})


def label(key: str) -> str:
    """Of a setting."""
    return str(_content()["labels"].get(key, key.replace("_", " ")))


def _differing(runs: Sequence[Run]) -> list[str]:
    """Settings in which runs differ, unless that follows from another choice: `encoder.name` is only there for timm."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    nodes = {key.partition(".")[0] for key in keys if "." in key}

    def differ(key: str) -> bool:
        node = key.partition(".")[0]
        alike: dict[str, set[str]] = {}
        for run in runs:
            alike.setdefault(run.setting(node) if key != node and node in nodes else "", set()).add(run.setting(key))
        return any(len(values) > 1 for values in alike.values())

    known_otherwise = {"seed", "change", "date", "version"} | {name for run in runs for name in run.metrics}
    return [key for key in keys if key not in known_otherwise and differ(key)]


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(_FILE.read_text())
    return content
