"""The table "paper | ours" of an experiment: its runs grouped by setting, beside the paper's rows; and results.csv."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sam_distill.report.experiments import Experiment, Measure, label
from sam_distill.report.runs import Run, shortest

NOT_RUN = "not run"
_FIRST = ["seed", "strategy", "encoder", "teacher", "data", "budget", "batch_size", "image_size", "optim.lr"]
_LAST = ["precision", "device", "version", "date"]


@dataclass(frozen=True)
class Estimate:
    """Mean over runs, with the lowest and the highest value; for a single run, its bootstrap interval if known."""

    mean: float
    low: float
    high: float
    runs: int

    @property
    def spread(self) -> bool:
        return self.high > self.low


@dataclass(frozen=True)
class Row:
    """Row for one setting. ours, paper: numbers by metric. runs: ours. baseline: the blind encoder, not a student."""

    settings: Mapping[str, str]
    ours: Mapping[str, Estimate] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    runs: Sequence[Run] = ()
    baseline: bool = False

    def missing(self, name: str) -> str:
        """Return the text of a cell without a number of ours: NOT_RUN if the paper has one but we have no run."""
        return NOT_RUN if name in self.paper and not self.runs else ""


@dataclass(frozen=True)
class Table:
    """Table. keys: settings that differ between rows. measures: those with numbers. cited: those the paper gives."""

    keys: Sequence[str]
    measures: Sequence[Measure]
    cited: frozenset[str]
    rows: Sequence[Row]

    def name(self, row: Row, besides: str = "") -> str:
        """Return the settings that tell a row from the others: `8 epochs, batch size 4`. besides: a setting to omit."""
        settings = {key: row.settings[key] for key in self.keys if key != besides and row.settings.get(key)}
        return ", ".join(f"{label(key)} {value}" if _is_bare(value) else value for key, value in settings.items())


def tabulate(experiment: Experiment, runs: Sequence[Run]) -> Table:
    """Return the paper's rows first, in its order, then our settings that the paper does not have, then `blind`."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: [_number(run.setting(key)) for key in experiment.keys]):
        groups.setdefault(tuple(run.setting(key) for key in experiment.keys), []).append(run)
    names = [measure.name for measure in experiment.columns]
    ours = [_row(dict(zip(experiment.keys, key, strict=True)), group, names) for key, group in groups.items()]
    rows: list[Row] = []
    for cited in experiment.paper:
        keys = {key: _text(value) for key, value in cited.items() if key in experiment.keys}
        paper = {name: float(value) for name, value in cited.items() if name in names}
        twin = next((row for row in ours if all(row.settings.get(k) == v for k, v in keys.items())), None)
        ours = [row for row in ours if row is not twin]
        rows.append(replace(twin, paper=paper) if twin else Row(keys, paper=paper))
    rows += ours
    cited_names = frozenset(name for row in rows for name in row.paper)
    measures = [m for m in experiment.columns if m.name in cited_names or any(m.name in row.ours for row in rows)]
    varied = [key for key in experiment.keys if len({row.settings.get(key, "") for row in rows}) > 1]
    blind = _row({}, runs, [f"blind/{name}" for name in names if name.startswith("miou/")])
    if blind.ours:
        blind_scores = {name.removeprefix("blind/"): estimate for name, estimate in blind.ours.items()}
        rows.append(Row({(varied or experiment.keys)[0]: "blind"}, blind_scores, baseline=True))
    return Table(varied or experiment.keys[:1], measures, cited_names, rows)


def estimate(runs: Sequence[Run], name: str) -> Estimate | None:
    scored = [(run, value) for run in runs if (value := run.measure(name)) is not None]
    if not scored:
        return None
    values = [value for _, value in scored]
    low, high = min(values), max(values)
    if len(values) == 1:
        bounds = [scored[0][0].measure(f"{name}/{end}") for end in ("low", "high")]
        low, high = (value if bound is None else bound for bound, value in zip(bounds, values * 2, strict=True))
    return Estimate(sum(values) / len(values), low, high, len(values))


def markdown(table: Table) -> str:
    """Return the table in Markdown, for table.md and report.md."""
    header = [label(key) for key in table.keys]
    for measure in table.measures:
        header += [f"{measure.label} (paper)"] * (measure.name in table.cited)
        header += [f"{measure.label} (ours)"]
    lines = [[*header, "runs"]]
    for row in table.rows:
        cells = [row.settings.get(key, "") for key in table.keys]
        for measure in table.measures:
            cited, ours = row.paper.get(measure.name), row.ours.get(measure.name)
            if measure.name in table.cited:
                cells.append("" if cited is None else measure.as_printed(cited))
            cells.append(_cell(measure, ours) if ours else row.missing(measure.name))
        lines.append([*cells, "" if row.baseline else str(len(row.runs))])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown. lines: the header, then a line per row."""
    header, *rows = lines
    cells = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in cells)


def results_csv(experiment: Experiment, runs: Sequence[Run]) -> str:
    """Return a CSV with a row per run: its name, the experiment's keys, further settings, metrics, device and date."""
    values = [{**run.metrics, **{k: run.setting(k) for k in dict.fromkeys([*experiment.keys, *_FIRST, *_LAST])}}
              for run in runs]  # fmt: skip
    head = list(dict.fromkeys([*experiment.keys, *_FIRST]))
    measured = dict.fromkeys(name for run in runs for name in run.metrics if name not in (*head, *_LAST))
    columns = [name for name in [*head, *measured, *_LAST] if any(row.get(name, "") != "" for row in values)]
    columns = ["run", *(name for name in columns if name != "run")]
    return _csv(columns, [{**row, "run": run.name} for run, row in zip(runs, values, strict=True)])


def history_csv(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return a CSV of the curves `names` of all runs, with a row per run and step."""
    rows = []
    for run in runs:
        by_step: dict[int, dict[str, float]] = {}
        for name in names:
            for step, value in run.curves.get(name, ()):
                by_step.setdefault(step, {})[name] = value
        rows += [{"run": run.name, "step": step, **by_step[step]} for step in sorted(by_step)]
    return _csv(["run", "step", *names], rows)


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: shortest(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def _row(settings: Mapping[str, str], runs: Sequence[Run], names: Sequence[str]) -> Row:
    found = {name: estimate(runs, name) for name in names}
    return Row(settings, {name: value for name, value in found.items() if value is not None}, runs=runs)


def _cell(measure: Measure, ours: Estimate) -> str:
    spread = f" ({measure.number(ours.low)} to {measure.number(ours.high)})" if ours.spread else ""
    return measure.shown(ours.mean) + spread


def _text(value: object) -> str:
    return shortest(float(value)) if isinstance(value, (int, float)) else str(value)


def _is_bare(text: str) -> bool:
    """Whether a value, such as `true` or `4`, says nothing without its name."""
    return text in ("true", "false") or (_number(text) != float("inf") and " " not in text)


def _number(text: str) -> float:
    """Return a sort key: `8 epochs` comes before `16 epochs`; words come last and keep their order."""
    try:
        return float(text.partition(" ")[0])
    except ValueError:
        return float("inf")
