"""Plots as SVG, in colours that a web page can replace by its own."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sam_distill.report.experiments import Experiment, Measure, label, measure
from sam_distill.report.runs import Curve
from sam_distill.report.tables import Estimate, Row, Table

INK, FAINT = "#24292f", "#d0d7de"  # text; axes and grid. The page replaces them by its own, for dark mode
PAPER = "#8c959f"
COLOURS = ("#2f6fb5", "#d1690e", "#2e8b57", "#b03a6b", "#7256b3", "#a67c00", "#2a9aa8", "#7a5c48", "#5d6b2f", "#c0504d")
_LINES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "figure.constrained_layout.use": True,
    "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "grid.color": FAINT, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def learning_curves(table: Table, experiment: Experiment) -> str | None:
    """Draw validation score and training loss over steps: a line per setting, the mean of its runs, and their range."""
    score = experiment.columns[0]
    rows = [row for row in table.rows if any(run.curves for run in row.runs)]
    columns = max(1, min(6, 120 // max((len(table.name(row)) + 8 for row in rows), default=1)))
    with matplotlib.rc_context(_STYLE):
        figure = Figure((9.8, 3.1 + 0.2 * -(-len(rows) // columns)))
        axes = figure.subplots(1, 2)
        for number, row in enumerate(rows):
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": _LINES[number // len(COLOURS) % len(_LINES)]}
            for name, axis in zip((f"val/{score.name}", "train/loss"), axes, strict=True):
                curves = [run.curves[name] for run in row.runs if name in run.curves]
                _band(axis, curves, label=_name(table, row), **style)
        if not axes[0].lines:
            return None
        for axis, title in zip(axes, (f"{score.label}, on validation images", "training loss"), strict=True):
            axis.set(title=title, xlabel="step")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if axes[1].lines and min(min(line.get_ydata()) for line in axes[1].lines) > 0:
            axes[1].set_yscale("log")
        handles, labels = axes[0].get_legend_handles_labels()
        if len(rows) > 1:
            figure.legend(handles, labels, loc="outside lower left", ncols=columns)
        return _svg(figure, f"{experiment.id} curves")


def against(table: Table, experiment: Experiment, x: str) -> str | None:
    """Draw the first measure against `x`, a setting or another measure, with error bars, ours and the paper's."""
    score = experiment.columns[0]
    rows = [row for row in table.rows if not row.baseline and (score.name in row.ours or score.name in row.paper)]
    if not any(score.name in row.ours for row in rows) or not any(x in row.settings or x in row.ours for row in rows):
        return None
    places = {end: [_place(row, x, paper=end == "paper") for row in rows] for end in ("ours", "paper")}
    numeric = all(p is not None for row, p in zip(rows, places["ours"], strict=True) if row.runs)
    blind = next((row.ours.get(score.name) for row in table.rows if row.baseline), None)
    with matplotlib.rc_context(_STYLE):
        names = max(len(_name(table, row)) for row in rows)
        figure = Figure((5.3, 3.2)) if numeric else Figure((max(5.3, 3.4 + 0.075 * names), 1.1 + 0.36 * len(rows)))
        axis = figure.subplots()
        if numeric:
            _scatter(axis, table, rows, places, score, x)
        else:
            _dots(axis, table, rows, score)
        low, high = axis.get_ylim() if numeric else axis.get_xlim()
        if blind and low - (high - low) < blind.mean * score.scale < high + (high - low):  # or it hides differences
            line = axis.axhline if numeric else axis.axvline
            line(blind.mean * score.scale, color=PAPER, linestyle=":", linewidth=1.4, label="blind")
        figure.legend(loc="outside upper right", ncols=3)
        return _svg(figure, f"{experiment.id} {x}")


def across(table: Table, experiment: Experiment) -> str | None:
    """Draw each row's measures against the number at the end of their names, ours and the paper's."""
    lines: list[tuple[str, str, Mapping[float, Estimate]]] = []
    for row in table.rows:
        for end in ("paper", "ours"):
            given = {m.name: value for m in table.measures if (value := _value(row, m, end))}
            found = {float(name.rpartition("_")[2]): value for name, value in given.items()}
            lines += [(f"{_name(table, row)} ({end})", end, found)] if found else []
    if not any(end == "ours" for _, end, _ in lines):
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure((6.2, 3.6))
        axis = figure.subplots()
        for number, (name, end, values) in enumerate(lines):
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "ls": "--" if end == "paper" else "-"}
            axis.plot(list(values), [value.mean for value in values.values()], marker="o", ms=4, label=name, **style)
            low, high = [v.low for v in values.values()], [v.high for v in values.values()]
            axis.fill_between(list(values), low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(title="mIoU", xlabel=experiment.across, ylim=(0, 1))
        figure.legend(loc="outside lower left", ncols=2)
        return _svg(figure, f"{experiment.id} across")


def _scatter(axis: Any, table: Table, rows: Sequence[Row], places: Mapping[str, Any], score: Measure, x: str) -> None:
    for end, style in (("paper", {"mfc": "none", "color": PAPER}), ("ours", {"color": COLOURS[0]})):
        points = [(place, value, row) for row, place in zip(rows, places[end], strict=True)
                  if place is not None and (value := _value(row, score, end))]  # fmt: skip
        for number, (place, value, row) in enumerate(points):
            axis.errorbar(place, value.mean * score.scale, yerr=_bars(value, score.scale), fmt="o", capsize=3,
                          label=end if number == 0 else None, **style)  # fmt: skip
            if len(rows) <= 24 and (end == "ours" or not row.runs):
                spot = (place, value.mean * score.scale)
                axis.annotate(_name(table, row, x), spot, xytext=(6, 4), textcoords="offset points", size=8)
    axis.margins(x=0.12)
    drawn = [place for end in places.values() for place in end if place]
    if min(drawn, default=0) > 0 and max(drawn) / min(drawn) >= 8:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(drawn) / min(drawn) < 200 else (1,)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set(title=_with_unit(score), xlabel=_axis_label(rows, x))


def _dots(axis: Any, table: Table, rows: Sequence[Row], score: Measure) -> None:
    for end, style in (("paper", {"mfc": "none", "color": PAPER}), ("ours", {"color": COLOURS[0]})):
        points = [(len(rows) - i, value) for i, row in enumerate(rows) if (value := _value(row, score, end))]
        for number, (height, value) in enumerate(points):
            axis.errorbar(value.mean * score.scale, height, xerr=_bars(value, score.scale), fmt="o", capsize=3,
                          label=end if number == 0 else None, **style)  # fmt: skip
    axis.set_yticks([len(rows) - i for i in range(len(rows))], [_name(table, row) for row in rows])
    axis.set_ylim(0.4, len(rows) + 0.6)
    axis.margins(x=0.08)
    axis.grid(axis="y", visible=False)
    axis.set_title(_with_unit(score))


def _bars(value: Estimate, scale: float) -> list[list[float]] | None:
    """Return the lengths of the error bar below and above the mean, in matplotlib's form; None without a spread."""
    return [[(value.mean - value.low) * scale], [(value.high - value.mean) * scale]] if value.spread else None


def _band(axis: Any, curves: Sequence[Curve], **style: Any) -> None:
    """Draw the mean of the curves at the steps that all of them have, and their range."""
    values = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in values))) if values else []
    if not steps:
        return
    columns = [[curve[step] for curve in values] for step in steps]
    mean = [sum(column) / len(column) for column in columns]
    axis.plot(steps, mean, linewidth=1.6, marker="o" if len(steps) < 15 else None, ms=3, **style)
    if len(curves) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _value(row: Row, score: Measure, end: str) -> Estimate | None:
    if end == "ours":
        return row.ours.get(score.name)
    cited = row.paper.get(score.name)
    return None if cited is None else Estimate(cited, cited, cited, 0)


def _place(row: Row, x: str, paper: bool) -> float | None:
    """Return a row's position on the axis of `x`; None if the row has no number for `x`."""
    if x in row.settings:
        try:
            return float(row.settings[x].partition(" ")[0])
        except ValueError:
            return None
    found = row.paper.get(x) if paper else row.ours[x].mean if x in row.ours else None
    return None if found is None else found * measure(x).scale


def _axis_label(rows: Sequence[Row], x: str) -> str:
    """Return the label of the axis of `x`: the unit of its values, as `epochs` of `8 epochs`, or else its name."""
    if not any(x in row.settings for row in rows):
        return _with_unit(measure(x))
    units = {row.settings.get(x, "").partition(" ")[2] for row in rows} - {""}
    return ", ".join(sorted(units)) or label(x)


def _name(table: Table, row: Row, besides: str = "") -> str:
    """Return the row's name, with dollar signs escaped, which start mathematics in matplotlib."""
    return table.name(row, besides).replace("$", r"\$")


def _with_unit(shown: Measure) -> str:
    return f"{shown.label} ({shown.unit})" if shown.unit else shown.label


def _svg(figure: Figure, salt: str) -> str:
    """Return the SVG: the same bytes for the same data, without the element ids that all figures have in common."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r'<(\w+) id="[A-Za-z0-9.]+_\d+"', r"<\1", text.getvalue())
