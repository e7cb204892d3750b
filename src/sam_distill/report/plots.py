"""Plots as SVG, in colours that a page can exchange for its own."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sam_distill.report.experiments import Experiment, Measure, label, measure
from sam_distill.report.runs import Curve
from sam_distill.report.tables import Estimate, Row, Table

INK, FAINT = "#24292f", "#d0d7de"  # of all text and lines, which the page replaces in dark mode
PAPER = "#8c959f"
COLOURS = ("#2f6fb5", "#d1690e", "#2e8b57", "#b03a6b", "#7256b3", "#a67c00", "#2a9aa8", "#7a5c48", "#5d6b2f", "#c0504d")
_STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 10.5,
    "axes.titlelocation": "left", "axes.titleweight": "semibold", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "grid.color": FAINT, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def learning_curves(table: Table, score: str) -> str | None:
    """Validation score and training loss over steps: a line per setting, the mean of its runs, in their range."""
    rows = [row for row in table.rows if any(run.curves for run in row.runs)]
    with matplotlib.rc_context(_STYLE):
        figure = _figure(9.4, 3.1 + 0.16 * max(0, len(rows) - 9))
        axes = figure.subplots(1, 2)
        for row, colour in zip(rows, _cycle(), strict=False):
            for name, axis in zip((f"val/{score}", "train/loss"), axes, strict=True):
                _band(axis, [run.curves[name] for run in row.runs if name in run.curves], table.name(row), colour)
        if not axes[0].lines:
            return None
        axes[0].set(title=f"{measure(score).label}, on validation images", xlabel="step")
        axes[1].set(title="training loss", xlabel="step")
        if axes[1].lines and min(min(line.get_ydata()) for line in axes[1].lines) > 0:
            axes[1].set_yscale("log")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        return _svg(figure, f"curves {table.rows}")


def against(table: Table, experiment: Experiment, x: str) -> str | None:
    """The first measure against a setting or another measure `x`, with error bars, ours and the paper's."""
    score = experiment.columns[0]
    rows = [row for row in table.rows if not row.baseline and (score.name in row.ours or score.name in row.paper)]
    if not any(score.name in row.ours for row in rows):
        return None
    places = {end: [_place(row, x, paper=end == "paper") for row in rows] for end in ("ours", "paper")}
    numeric = all(p is not None for row, p in zip(rows, places["ours"], strict=True) if row.runs)
    blind = next((row.ours.get(score.name) for row in table.rows if row.baseline), None)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(5.6, 3.2 if numeric else 1.1 + 0.36 * len(rows))
        axis = figure.subplots()
        if numeric:
            _scatter(axis, table, rows, places, score, x)
        else:
            _dots(axis, table, rows, score)
        if blind:
            line = axis.axhline if numeric else axis.axvline
            line(blind.mean * score.scale, color=PAPER, linestyle=":", linewidth=1.4, label="blind")
        figure.legend(loc="outside upper right", ncols=3)
        return _svg(figure, f"{x} {table.rows}")


def _scatter(axis: Any, table: Table, rows: Sequence[Row], places: Mapping[str, Any], score: Measure, x: str) -> None:
    for end, style in (("paper", {"mfc": "none", "color": PAPER}), ("ours", {"color": COLOURS[0]})):
        points = [(place, value, row) for row, place in zip(rows, places[end], strict=True)
                  if place is not None and (value := _value(row, score, end))]  # fmt: skip
        for number, (place, value, row) in enumerate(points):
            _bar(axis, place, value, score.scale, marker="o", label=end if number == 0 else None, **style)
            others = [row.settings.get(key, "") for key in table.keys if key != x]
            if len(rows) <= 24 and any(others):
                text = ", ".join(filter(None, others)).replace("_", " ")
                axis.annotate(text, (place, value.mean * score.scale), xytext=(5, 4), textcoords="offset points", size=8)
    axis.margins(x=0.12)
    drawn = [place for end in places.values() for place in end if place]
    if min(drawn, default=0) > 0 and max(drawn) / min(drawn) >= 8:
        axis.set_xscale("log")
        if len(set(drawn)) <= 6:
            axis.set_xticks(sorted(set(drawn)), [f"{place:g}" for place in sorted(set(drawn))], minor=False)
            axis.set_xticks([], minor=True)
    axis.set(title=_with_unit(score), xlabel=_axis_label(rows, x))


def _dots(axis: Any, table: Table, rows: Sequence[Row], score: Measure) -> None:
    for end, style in (("paper", {"mfc": "none", "color": PAPER}), ("ours", {"color": COLOURS[0]})):
        points = [(len(rows) - i, value) for i, row in enumerate(rows) if (value := _value(row, score, end))]
        for number, (height, value) in enumerate(points):
            error = [[(value.mean - value.low) * score.scale], [(value.high - value.mean) * score.scale]]
            axis.errorbar(value.mean * score.scale, height, xerr=error, fmt="o", capsize=3,
                          label=end if number == 0 else None, **style)  # fmt: skip
    axis.set_yticks([len(rows) - i for i in range(len(rows))], [table.name(row) for row in rows])
    axis.set_ylim(0.4, len(rows) + 0.6)
    axis.margins(x=0.08)
    axis.grid(axis="y", visible=False)
    axis.set_title(_with_unit(score))


def _bar(axis: Any, place: float, value: Estimate, scale: float, **style: Any) -> None:
    error = [[(value.mean - value.low) * scale], [(value.high - value.mean) * scale]]
    axis.errorbar(place, value.mean * scale, yerr=error, capsize=3, linestyle="none", **style)


def _band(axis: Any, curves: Sequence[Curve], name: str, colour: str) -> None:
    """The mean of the curves at the steps that all of them have, and their range."""
    values = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in values))) if values else []
    if not steps:
        return
    columns = [[curve[step] for curve in values] for step in steps]
    mean = [sum(column) / len(column) for column in columns]
    axis.plot(steps, mean, color=colour, linewidth=1.6, label=name, marker="o" if len(steps) < 15 else None, ms=3)
    if len(curves) > 1:
        axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.18, lw=0)


def _value(row: Row, score: Measure, end: str) -> Estimate | None:
    if end == "ours":
        return row.ours.get(score.name)
    cited = row.paper.get(score.name)
    return None if cited is None else Estimate(cited, cited, cited, 0)


def _place(row: Row, x: str, paper: bool) -> float | None:
    """Where a row stands on the axis of `x`; None if `x` has no number there."""
    if x in row.settings:
        try:
            return float(row.settings[x].partition(" ")[0])
        except ValueError:
            return None
    found = row.paper.get(x) if paper else row.ours[x].mean if x in row.ours else None
    return None if found is None else found * measure(x).scale


def _axis_label(rows: Sequence[Row], x: str) -> str:
    """`8 epochs` is 8 on an axis of epochs."""
    if not any(x in row.settings for row in rows):
        return _with_unit(measure(x))
    units = {row.settings.get(x, "").partition(" ")[2] for row in rows} - {""}
    return ", ".join(sorted(units)) or label(x)


def _with_unit(shown: Measure) -> str:
    return f"{shown.label} ({shown.unit})" if shown.unit else shown.label


def _cycle() -> Sequence[str]:
    return [*COLOURS] * 8


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, salt: str) -> str:
    """The same bytes for the same data; ids differ between the figures of a page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()
