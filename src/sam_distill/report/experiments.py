"""Descriptions of experiments: from experiments.yaml, or made from the settings in which the runs differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sam_distill.report.runs import Run, Value

_FILE = Path(__file__).with_name("experiments.yaml")
_COLUMNS = ["miou/point", "miou/box", "embedding_mse", "parameters", "images", "seconds"]  # of undescribed experiments
_MAX_KEYS = 6  # settings that fit side by side in a table


@dataclass(frozen=True)
class Measure:
    """Table column, and how it shows the metric `name`."""

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
        """Return a number of the paper with all the digits that the paper prints."""
        return self._with_unit(f"{value * self.scale:,.10g}")

    def _with_unit(self, number: str) -> str:
        return f"{number} {self.unit}".strip()


@dataclass(frozen=True)
class Experiment:
    """Description of an experiment, see experiments.yaml. place: in the paper; empty if the paper does not have it."""

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
    """Return an experiment that experiments.yaml lacks; its keys are the settings that differ, except the seed."""
    metrics = {metric for run in runs for metric in run.metrics}
    pairs = [name for name in _content()["metrics"] if name.startswith("miou/pair_")]
    columns = [measure(column) for column in [*pairs, *_COLUMNS] if column in metrics] or [measure(_COLUMNS[0])]
    keys = _differing(runs) or ["run"]
    if len(keys) > _MAX_KEYS:  # give each run a row: runs that look equal in the table may differ in other keys
        keys = ["run", *keys[: _MAX_KEYS - 1]]
    return Experiment(name, title, keys, columns, plots=keys if len(keys) == 1 else ())


def measure(name: str) -> Measure:
    return Measure(name, **{"label": name, **_content()["metrics"].get(name, {})})


def label(key: str) -> str:
    """Return the label of a setting."""
    return str(_content()["labels"].get(key, key.replace("_", " ")))


def _differing(runs: Sequence[Run]) -> list[str]:
    """Return the settings in which runs differ; one like `encoder.name` must differ between runs with one `encoder`."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    nodes = {key.partition(".")[0] for key in keys if "." in key}

    def differ(key: str) -> bool:
        node = key.partition(".")[0]
        alike: dict[str, set[str]] = {}
        for run in runs:
            alike.setdefault(run.setting(node) if key != node and node in nodes else "", set()).add(run.setting(key))
        return any(len(values) > 1 for values in alike.values())

    ignored = {"seed", "change", "date", "version"} | {name for run in runs for name in run.metrics}
    return [key for key in keys if key not in ignored and differ(key)]


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(_FILE.read_text())
    return content
