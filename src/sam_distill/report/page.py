"""Write a report: report.html, which is self-contained, and report.md with its pictures in a folder beside it."""

import base64
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sam_distill.files import atomic_write, write_text
from sam_distill.report.experiments import label
from sam_distill.report.plots import FAINT, INK
from sam_distill.report.runs import Unusable
from sam_distill.report.sections import Picture, Section
from sam_distill.report.tables import history_csv, markdown, markdown_table, results_csv

LEGEND = (
    "**paper**: the numbers of MobileSAM's paper ([arXiv:2306.14289](https://arxiv.org/abs/2306.14289), version 2);"
    " **ours**: measured by the runs of this report; **not run**: the paper has a number, we have no run for it yet.",
    "A row of ours beside one of the paper has the same setting, named in the first columns. Data, teacher and budget"
    " may be others: they are listed below each table.",
    "**mIoU**: the mean IoU between the masks of teacher and student for the same prompts, over prompts. Every number"
    " is the mean over the runs of its setting, with the least and the greatest of them; for a single run, with the"
    " middle 95% of a bootstrap over its images. Error bars are the same; bands are the least and the greatest.",
    "**blind**: an encoder that answers every image with the teacher's mean embedding of the other images. A student"
    " below it has learned nothing that depends on the image.",
)


@dataclass(frozen=True)
class Report:
    """Content of a report page. title: of the page. waiting: the paper's tables and figures that have no runs."""

    title: str
    sections: Sequence[Section]
    waiting: Sequence[Section]
    unusable: Sequence[Unusable]

    @property
    def counts(self) -> dict[str, int]:
        """Return how many runs are finished, failed, unfinished and damaged."""
        finished = sum(len(section.runs) for section in self.sections)
        return {"finished": finished, **Counter(one.kind for one in self.unusable)}

    @property
    def follows_the_paper(self) -> bool:
        return any(section.experiment.place for section in self.sections)


def write(report: Report, folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for section in report.sections:
        for picture in section.pictures:
            data = picture.content
            if isinstance(data, str):
                data = data.replace("<svg ", '<svg style="background: #fff" ', 1).encode()
            with atomic_write(folder / "pictures" / picture.file) as draft:
                draft.write_bytes(data)
    for name in ("report.md", "report.html"):
        write_text(folder / name, _render(report, name))


def write_experiment(section: Section, folder: Path) -> None:
    score = section.experiment.columns[0].name
    write_text(folder / "results.csv", results_csv(section.experiment, section.runs))
    write_text(folder / "table.md", markdown(section.table))
    if any(run.curves for run in section.runs):
        write_text(folder / "history.csv", history_csv(section.runs, [f"val/{score}", "train/loss"]))


def _render(report: Report, name: str) -> str:
    """Return the report, rendered with the template for `name` beside this file."""
    environment = Environment(
        loader=PackageLoader("sam_distill.report", "."), undefined=StrictUndefined, autoescape=name.endswith(".html"),
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    filters = [_drawn, label, _emphasised, markdown, markdown_table]
    environment.filters |= {each.__name__.lstrip("_"): each for each in filters}
    return environment.get_template(f"{name}.j2").render(report=report, legend=LEGEND, today=date.today())


def _drawn(picture: Picture) -> Markup:
    """Return the HTML of a picture: an SVG in the colours of the page, also in dark mode, or an embedded JPEG."""
    if isinstance(picture.content, str):
        svg = picture.content[picture.content.index("<svg") :]
        return Markup(svg.replace(INK, "var(--ink)").replace(FAINT, "var(--line)"))
    data = base64.b64encode(picture.content).decode()
    return Markup('<img alt="{}" src="data:image/jpeg;base64,{}">').format(picture.caption, data)


def _emphasised(text: str) -> Markup:
    """Return the HTML of a line of markdown with **bold** words and links."""
    html = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(Markup.escape(text)))
    return Markup(re.sub(r"\[(.+?)\]\((.+?)\)", r'<a href="\2">\1</a>', html))
