"""The sections of a report: for each experiment its table, plots and pictures."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from sam_distill.report.experiments import Experiment, known, label, undescribed
from sam_distill.report.plots import across, against, learning_curves
from sam_distill.report.runs import Committed, Found, Run
from sam_distill.report.tables import Table, tabulate

_FACTS = ["date", "device", "precision", "encoder", "image_size", "teacher", "data", "batch_size", "steps", "images",
          "seconds", "version"]  # fmt: skip
_WIDTH = 1400  # maximum width of a picture, pixels
_FINDING = re.compile(r"\*\*[^*]+[.?]\*\*")  # start of a paragraph that begins with a bold sentence


@dataclass(frozen=True)
class Picture:
    """Picture of a report. file: its name in pictures/. content: SVG text, or the bytes of a JPEG."""

    file: str
    content: str | bytes
    caption: str


@dataclass(frozen=True)
class Section:
    """Section of a report. facts: header, and a row per run: date, device and main settings.

    notes: what a reader must know about the numbers. finding: conclusion of a README, with its **bold** words.
    """

    experiment: Experiment
    table: Table
    runs: Sequence[Run]
    curves: Sequence[Picture]
    plots: Sequence[Picture]
    photos: Sequence[Picture]
    facts: Sequence[Sequence[str]]
    notes: Sequence[str]
    finding: str = ""

    @property
    def pictures(self) -> Sequence[Picture]:
        return [*self.curves, *self.plots, *self.photos]

    @property
    def coverage(self) -> tuple[int, int]:
        """Return the number of the paper's rows that have runs, and the number of all its rows."""
        cited = [row for row in self.table.rows if row.paper]
        return sum(bool(row.runs) for row in cited), len(cited)


def present(found: Found) -> list[str]:
    """Return the experiments that have runs: those in experiments.yaml in its order, then the others by name."""
    names = {run.experiment for run in found.runs if run.experiment}
    names |= found.committed.keys()
    return [name for name in known() if name in names] + sorted(names - set(known()))


def sections(found: Found, names: Sequence[str]) -> list[Section]:
    experiments = known()
    result = []
    for name in names:
        runs = [run for run in found.runs if run.experiment == name]
        committed = found.committed.get(name)
        notes = []
        if committed and runs:
            notes.append(f"From run folders; the {len(committed.runs)} rows of {name}/results.csv are not counted.")
        chosen = runs or (committed.runs if committed else [])
        about = experiments.get(name) or undescribed(name, name.replace("_", " "), chosen)
        if committed and name not in experiments:
            about = replace(about, claim=next(_paragraphs(committed.readme), "").replace("**", ""))
        paragraphs = _paragraphs(committed.readme) if committed and not runs else ()
        finding = next(filter(_FINDING.match, paragraphs), "")
        result.append(replace(_section(about, chosen, committed, notes), finding=finding))
    return result


def others(found: Found) -> list[Section]:
    """Return a section per command, with its runs that belong to no experiment."""
    result = []
    for command in dict.fromkeys(run.command for run in found.runs if not run.experiment):
        runs = [run for run in found.runs if run.command == command and not run.experiment]
        title = {"train": "Training runs of no experiment", "evaluate": "Evaluations"}.get(command, command)
        result.append(_section(undescribed(command, title, runs), runs, None, []))
    return result


def not_run(names: Sequence[str]) -> list[Section]:
    """Return sections for the paper's tables and figures that are not among `names`."""
    return [_section(one, [], None, []) for name, one in known().items() if one.place and name not in names]


def _section(about: Experiment, runs: Sequence[Run], committed: Committed | None, notes: Sequence[str]) -> Section:
    table = tabulate(about, runs)
    curves = learning_curves(table, about)
    score = "mIoU" if about.across else about.columns[0].label
    caption = "Learning curves: the mean of each setting's runs, in their range"
    drawn = [(x, against(table, about, x)) for x in about.plots]
    drawn += [(about.across, across(table, about))] if about.across else []
    plots = [(re.sub(r"\W+", "_", x), svg, f"{score}, against {label(x)}") for x, svg in drawn if svg]
    return Section(
        experiment=about,
        table=table,
        runs=runs,
        curves=[Picture(f"{about.id}_curves.svg", curves, caption)] if curves else [],
        plots=[Picture(f"{about.id}_{name}.svg", svg, said) for name, svg, said in plots],
        photos=[*_masks(about, runs), *(_illustrations(about.id, committed) if committed else ())],
        facts=_facts(runs),
        notes=[*([about.note] if about.note else []), *notes],
    )


def _masks(about: Experiment, runs: Sequence[Run]) -> Iterator[Picture]:
    """Yield the last picture of the best run that has pictures."""
    score = about.columns[0]
    scored = [(value, run) for run in runs if run.masks and (value := run.measure(score.name)) is not None]
    if scored:
        value, best = max(scored, key=lambda pair: pair[0])
        caption = f"Image, teacher, student: the best run, {best.name} ({score.label} {score.shown(value)})"
        yield from _photo(f"{about.id}_best.jpg", best.masks, caption)


def _paragraphs(readme: str) -> Iterator[str]:
    """Yield the paragraphs without headings, each in one line; links and code lose their marks, bold keeps them."""
    for text in readme.split("\n\n"):
        if text.strip() and not text.startswith("#"):
            yield re.sub(r"`|\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))


def _illustrations(name: str, committed: Committed) -> Iterator[Picture]:
    """Yield the pictures in an experiment's README, with its captions."""
    for caption, file in re.findall(r"!\[(.*?)\]\((.*?)\)", committed.readme, re.DOTALL):
        path = committed.folder / file
        yield from _photo(f"{name}_{path.stem}.jpg", path, " ".join(caption.split()))


def _photo(name: str, path: Path | None, caption: str) -> Iterator[Picture]:
    """Yield the picture as a JPEG of moderate size; nothing if the file is missing, damaged or not a photograph."""
    data = io.BytesIO()
    try:
        with Image.open(path or "") as image:
            small = image.convert("RGB")
    except OSError:
        return
    small.thumbnail((_WIDTH, 10 * _WIDTH))
    small.save(data, "JPEG", quality=82)
    yield Picture(name, data.getvalue(), caption)


def _facts(runs: Sequence[Run]) -> list[list[str]]:
    known_facts = [name for name in _FACTS if any(run.setting(name) for run in runs)]
    header = ["run", *(label(name) for name in known_facts)]
    return [header, *([run.name, *(run.setting(name) for name in known_facts)] for run in runs)] if runs else []
