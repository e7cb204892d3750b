"""Create a W&B report that compares the runs of an experiment: python scripts/wandb_report.py table4_compute

Needs a key (`wandb login`) and pip install 'sam-distill[wandb-workspaces]'. Every call creates a new report; it shows
the runs that are at W&B now and those added later. `sam-distill report` compares run folders, and needs neither.
"""

from __future__ import annotations

import argparse
import sys

import wandb

try:
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.expr import Metric
except ImportError:
    sys.exit("error: this needs the package wandb-workspaces: pip install 'sam-distill[wandb-workspaces]'")

from sam_distill.cli.app import default_conf_dir
from sam_distill.loggers.wandb import STEP, SUMMARIES, has_key
from sam_distill.report.experiments import Experiment, known, label
from sam_distill.report.tables import markdown_table

TRAINS = "_target_: sam_distill.cli.train.train"  # in the config of an experiment that trains: only its runs are at W&B


def main() -> None:
    recipes = {path.stem: path.read_text() for path in (default_conf_dir() / "experiment").glob("*.yaml")}
    experiments = {name: one for name, one in known().items() if TRAINS in recipes.get(name, "")}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiment", choices=experiments)
    parser.add_argument("--project", default="sam-distill", help="where the runs are")
    parser.add_argument("--entity", help="the team; by default your own")
    args = parser.parse_args()
    if not has_key():
        sys.exit("error: W&B wants a key: wandb login, or WANDB_API_KEY=...")
    try:
        entity = args.entity or wandb.Api().default_entity
        print(report(experiments[args.experiment], args.project, entity).save().url)
    except Exception as error:  # of the network, of permissions, or of W&B itself
        sys.exit(f"error: W&B: {type(error).__name__}: {' '.join(str(error).split())}")


def report(experiment: Experiment, project: str, entity: str) -> wr.Report:
    """Return a report: claim, the paper's numbers, curves, best scores over seeds, validation images, config diffs."""
    measures = {f"val/{m.name}": m.label for m in experiment.columns if f"val/{m.name}" in SUMMARIES}
    curves = [wr.LinePlot(title=name, x=STEP, y=[key]) for key, name in measures.items()]
    curves.append(wr.LinePlot(title="training loss", x=STEP, y=["train/loss"], log_y=True))
    bars = [
        wr.BarPlot(title=f"{name}, {SUMMARIES[key]}", metrics=[wr.SummaryMetric(f"{key}.{SUMMARIES[key]}")])
        for key, name in measures.items()
    ]
    pictures = [
        wr.MediaBrowser(media_keys=["val/masks"], layout=wr.Layout(w=24, h=10)),
        wr.WeavePanelSummaryTable(table_name="val/pictures", layout=wr.Layout(w=24, h=10)),
        wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=10)),
    ]
    runs = {"filters": [Metric("Group") == experiment.id]}
    settings = [f"config.{_config_key(key)}" for key in (*experiment.keys, "scale")]
    blocks = [wr.P(experiment.claim), *([wr.P(experiment.note)] if experiment.note else [])]
    if experiment.paper:
        blocks += [wr.H2("The paper"), wr.MarkdownBlock(_paper_table(experiment))]
    blocks += [
        wr.H2("Runs, those of one setting together"),
        wr.PanelGrid(runsets=[wr.Runset(name="settings", groupby=settings, **runs)], panels=curves + bars),
        wr.H2("Each run"),
        wr.PanelGrid(runsets=[wr.Runset(name="runs", **runs)], panels=pictures),
    ]
    place = f" ({experiment.place})" if experiment.place else ""
    return wr.Report(project=project, entity=entity, title=experiment.title + place, blocks=blocks, width="fluid")


def _config_key(key: str) -> str:
    """Return a setting's key in the W&B config; for a config group such as `encoder`, the key of the chosen name."""
    return f"choices.{key}" if (default_conf_dir() / key).is_dir() else key


def _paper_table(experiment: Experiment) -> str:
    measures = [m for m in experiment.columns if any(m.name in row for row in experiment.paper)]
    keys = [key for key in experiment.keys if any(key in row for row in experiment.paper)]
    head = [label(key) for key in keys] + [m.label for m in measures]
    rows = [
        [str(row.get(key, "")) for key in keys]
        + [m.as_printed(float(row[m.name])) if m.name in row else "" for m in measures]
        for row in experiment.paper
    ]
    return markdown_table([head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main()
