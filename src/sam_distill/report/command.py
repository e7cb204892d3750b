"""The command `sam-distill report`: write one page about the runs in a folder."""

import logging
from pathlib import Path

from sam_distill.errors import UserError
from sam_distill.report.page import Report, write, write_experiment
from sam_distill.report.runs import find
from sam_distill.report.sections import not_run, others, present, sections

log = logging.getLogger(__name__)

ALL = "all"


def report(*, runs: str, only: str, path: str) -> None:
    """Compare the runs in the folder `runs` with the paper; conf/report.yaml says what each option means."""
    root, folder = Path(runs).expanduser(), Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"runs={runs}: there is no such folder; expected one with run folders in it, at any depth")
    found = find(root)
    if not (found.runs or found.committed or found.unusable):
        raise UserError(f"runs={runs} holds no run: neither a status.json of a run folder, nor a results.csv")
    names = present(found)
    if only not in (ALL, *names):
        raise UserError(f"experiment={only}: no finished run of it in {runs}; there: {', '.join(names) or 'none'}")
    chosen = sections(found, names) + others(found) if only == ALL else sections(found, [only])
    page = Report(
        title="sam-distill: results" if only == ALL else f"sam-distill: {chosen[0].experiment.title}",
        sections=chosen,
        waiting=not_run(names) if only == ALL else (),
        unusable=[one for one in found.unusable if only in (ALL, one.experiment)],
    )
    try:
        write(page, folder)
        if only != ALL:
            write_experiment(chosen[0], folder)
    except OSError as error:
        raise UserError(f"path={path}: cannot be written ({error.strerror})") from error
    log.info("runs: %s", ", ".join(f"{number} {kind}" for kind, number in page.counts.items()))
    for one in page.unusable:
        log.info("  %s: %s (%s)", one.kind, one.name, one.why)
    log.info("report  %s", folder / "report.html")
