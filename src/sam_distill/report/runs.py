"""Find runs and read their results. Damaged and unfinished runs are listed, and never stop the others."""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

Value = str | float
Curve = Sequence[tuple[int, float]]  # (step, value)

_NOT_ENTERED = ("checkpoints", "wandb", "pictures")
_MACHINERY = ("run_dir", "resume", "plan", "step_times", "validate_every", "logger", "trainer", "teacher.memory_gb",
              "data.shuffle_buffer")  # fmt: skip
_COMMON = ("data", "data.path", "experiment", "init", "scale", "seed", "teacher")  # overrides that change no recipe


@dataclass(frozen=True)
class Run:
    """Finished run with scores, from its folder or from a row of an experiment's results.csv.

    settings: dotted keys as in config.yaml, and the choice from each config group. metrics: those of metrics.json; for
    an mIoU also `NAME/low` and `NAME/high`, the 95% interval of a bootstrap over images.
    """

    name: str
    experiment: str | None
    command: str
    settings: Mapping[str, Value]
    metrics: Mapping[str, Value]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    masks: Path | None = None
    started: str = ""

    def setting(self, key: str) -> str:
        """Return a setting or else a metric as text, empty if there is neither; `run` is the run's name."""
        if key == "run":
            return self.name
        value = self.settings.get(key, self.metrics.get(key, ""))
        return shortest(value) if isinstance(value, float) else value

    def measure(self, name: str) -> float | None:
        value = self.metrics.get(name)
        return value if isinstance(value, float) and math.isfinite(value) else None


@dataclass(frozen=True)
class Unusable:
    """Run without scores, and why: it failed, has not ended, or its files are damaged."""

    name: str
    kind: Literal["failed", "unfinished", "damaged"]
    why: str
    experiment: str | None = None


@dataclass(frozen=True)
class Committed:
    """Folder of an experiment: the runs in its results.csv, and its README, empty if there is none."""

    folder: Path
    runs: Sequence[Run]
    readme: str


@dataclass(frozen=True)
class Found:
    """Runs and experiment folders below a folder. committed: by experiment name."""

    runs: Sequence[Run]
    unusable: Sequence[Unusable]
    committed: Mapping[str, Committed]


def find(root: Path) -> Found:
    runs: list[Run] = []
    unusable: list[Unusable] = []
    committed: dict[str, Committed] = {}
    for folder in _folders(root):
        name = str(folder.relative_to(root)) if folder != root else folder.resolve().name
        try:
            if (folder / "results.csv").is_file():
                readme = folder / "README.md"
                text = readme.read_text() if readme.is_file() else ""
                committed[folder.resolve().name] = Committed(folder, list(_rows(folder)), text)
            elif (folder / "status.json").is_file() or (folder / "metrics.json").is_file():
                run = _run(folder, name)
                (runs if isinstance(run, Run) else unusable).append(run)  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            unusable.append(Unusable(name, "damaged", f"{type(error).__name__}: {' '.join(str(error).split())}"))
    return Found(sorted(runs, key=lambda run: run.started), unusable, committed)  # in a sweep's own order


def _folders(root: Path) -> Iterator[Path]:
    for path, below, _ in os.walk(root):
        entered = [name for name in below if name not in _NOT_ENTERED and not name.startswith(".")]
        if (Path(path) / "status.json").is_file():
            entered = [name for name in entered if name != "bench"]
        below[:] = sorted(entered)
        yield Path(path)


def _run(folder: Path, name: str) -> Run | Unusable:
    if not (folder / "status.json").is_file():
        return Unusable(name, "damaged", "it has no status.json")
    status = json.loads((folder / "status.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    choices = status.get("choices") or dict(w.split("=", 1) for w in status["command"][1:] if _chooses(w, config))
    experiment = choices.get("experiment") or (config.get("logger") or {}).get("group")
    if status["status"] == "failed":
        return Unusable(name, "failed", status["why"], experiment)
    if status["status"] != "finished":
        return Unusable(name, "unfinished", "still running, or killed", experiment)
    if not (folder / "metrics.json").is_file():
        return Unusable(name, "unfinished", "it has ended without scores: no metrics.json", experiment)
    metrics = _metrics(folder) | {n: v for n, v in _metrics(folder / "bench").items() if "_ms" in n}
    facts = {
        "change": _change(status["command"][1:]),
        "date": str(status["started"])[:10],
        "version": status.get("version", ""),
    }
    pictures = [path for name in ("everything.png", "masks*.png") for path in sorted((folder / "pictures").glob(name))]
    return Run(
        name=name,
        experiment=experiment,
        command=status["command"][0],
        settings=_settings(config, choices) | facts,
        metrics=metrics,
        curves=_curves(_read_csv(folder / "history.csv")) if (folder / "history.csv").is_file() else {},
        masks=pictures[-1] if pictures else None,
        started=str(status["started"]),
    )


def _metrics(folder: Path) -> dict[str, Value]:
    """Return metrics.json, empty if there is none. In RUN/bench it holds what `sam-distill bench` measured of RUN."""
    file = folder / "metrics.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    return {name: _value(value) for name, value in content.items() if value is not None}


def _chooses(word: str, config: Mapping[str, Any]) -> bool:
    """Whether an override chooses from a config group; earlier versions kept no other record of the choices."""
    key = word.partition("=")[0]
    return key == "experiment" or ("=" in word and isinstance(config.get(key), dict))


def _change(words: Sequence[str]) -> str:
    """Return the overrides that change the recipe, or `plain`: the key of tables with one change per row."""
    asked = [word for word in words if word.partition("=")[0] not in (*_COMMON, *_MACHINERY)]
    return " ".join(sorted(asked)) or "plain"


def _settings(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, Value]:
    """Return dotted keys and values. A node's value is its choice and its variant: `timm resnet18`, `tinyvit 5m`."""
    settings: dict[str, Value] = {}
    for key, value in config.items():
        if isinstance(value, dict) and "_target_" in value:
            kind = value["_target_"].rpartition(".")[2].lower()
            chosen = str(choices.get(key) or (value.get("checkpoint") if key == "teacher" else "") or kind)
            variant = str(value.get("name" if "name" in value else "size") or "")
            settings[key] = chosen if chosen.endswith(variant) else f"{chosen} {variant}"
    for key, value in _leaves(config):
        if not any(key == skipped or key.startswith(skipped + ".") for skipped in _MACHINERY):
            settings[key] = _value(value)
    return {key: value for key, value in settings.items() if key not in _MACHINERY}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}", value


def _value(value: Any) -> Value:
    """Return numbers as floats and all else as text; of a path the last part, as reports are read on other machines."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, list):
        return ", ".join(str(_value(v)) for v in value)
    text = str(value).rstrip("/")
    return text.rpartition("/")[2] if "/" in text else _number(text)


def shortest(number: float) -> str:
    """Return a number as text: 5743892, not 5743892.0 nor 5.74e+06."""
    return f"{number:.12g}"


def _number(text: str) -> Value:
    try:
        return float(text)
    except ValueError:
        return text


def _rows(folder: Path) -> Iterator[Run]:
    """Yield the runs of a results.csv, each with its curves from a history.csv beside it."""
    history = _read_csv(folder / "history.csv") if (folder / "history.csv").is_file() else []
    rows = _read_csv(folder / "results.csv")
    if not rows:
        raise ValueError("results.csv has no rows")
    for number, row in enumerate(rows):
        name = row.get("run") or f"row {number + 1}"
        values = {key: _number(text) for key, text in row.items() if text != ""}
        curves = _curves([line for line in history if line.get("run") == name])
        yield Run(name, folder.resolve().name, row.get("command") or "train", values, values, curves)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path.name} is not a table: its rows differ in length")
    return rows


def _curves(rows: Sequence[Mapping[str, str]]) -> dict[str, Curve]:
    names = [name for name in (rows[0] if rows else []) if name.startswith(("val/", "train/"))]
    curves = {n: [(int(row["step"]), float(row[n])) for row in rows if row[n] != ""] for n in names}
    return {name: curve for name, curve in curves.items() if curve}
