import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sam_distill.report.experiments import known, measure, undescribed
from sam_distill.report.runs import find
from sam_distill.report.tables import history_csv, markdown, results_csv, tabulate


def test_the_papers_numbers_are_well_formed() -> None:
    """Every row of the paper has a key that identifies it, and a number in some column."""
    for experiment in known().values():
        columns = {column.name for column in experiment.columns}
        assert experiment.claim
        for row in experiment.paper:
            assert experiment.place
            assert set(row) <= columns | set(experiment.keys), experiment.id
            assert set(row) & set(experiment.keys)
            assert any(isinstance(row.get(name), (int, float)) for name in columns)


def test_table4_says_what_the_paper_says() -> None:
    table = tabulate(known()["table4_compute"], [])
    cells = [line.split("|")[1:5] for line in markdown(table).splitlines()[2:]]
    assert [[cell.strip() for cell in line] for line in cells] == [
        ["4", "50000 steps", "0.7057", "not run"],
        ["8", "50000 steps", "0.7286", "not run"],
        ["8", "100000 steps", "0.7447", "not run"],
    ]


def test_our_runs_stand_beside_the_papers_rows(runs: Path, make_run: Callable[..., Path]) -> None:
    for seed, score in enumerate((0.6, 0.7)):
        make_run(f"a{seed}", score=score, batch_size=8, budget="100000 steps", seed=seed)
    make_run("own", score=0.4, batch_size=16, budget="100000 steps")
    table = tabulate(known()["table4_compute"], find(runs).runs)
    assert [dict(row.settings) for row in table.rows[:4]] == [
        {"batch_size": "4", "budget": "50000 steps"},
        {"batch_size": "8", "budget": "50000 steps"},
        {"batch_size": "8", "budget": "100000 steps"},
        {"batch_size": "16", "budget": "100000 steps"},
    ]
    both = table.rows[2]
    assert both.paper["miou/point"] == 0.7447
    ours = both.ours["miou/point"]
    assert (ours.mean, ours.low, ours.high, ours.runs) == (pytest.approx(0.65), 0.6, 0.7, 2)
    assert table.rows[0].missing("miou/point") == "not run"
    assert table.rows[3].missing("miou/point") == ""
    assert table.rows[4].baseline
    assert table.rows[4].ours["miou/point"].mean == pytest.approx(0.2)
    assert "| 8 | 100000 steps | 0.7447 | 0.650 (0.600 to 0.700) |" in markdown(table)


def test_a_single_run_shows_its_bootstrap(runs: Path, make_run: Callable[..., Path]) -> None:
    metrics = make_run("a", score=0.5) / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"miou/point/low": 0.4, "miou/point/high": 0.6}))
    row = next(row for row in tabulate(known()["table4_compute"], find(runs).runs).rows if row.runs)
    ours = row.ours["miou/point"]
    assert (ours.mean, ours.low, ours.high) == (0.5, 0.4, 0.6)


def test_bench_metrics_are_added_to_their_run(runs: Path, make_run: Callable[..., Path]) -> None:
    bench = make_run("a", score=0.5) / "bench"
    bench.mkdir()
    (bench / "status.json").write_text("{}")
    (bench / "metrics.json").write_text('{"encoder_ms": 12.5, "parameters": 1, "device": "another"}')
    (run,) = find(runs).runs
    assert run.measure("encoder_ms") == 12.5
    assert "device" not in run.metrics
    assert not find(runs).unusable


def test_results_and_curves_can_be_read_back(runs: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(f"decoupled{seed}", score=0.1 + seed / 3, seed=seed, experiment="table2_strategies")
    make_run("coupled", strategy="coupled", experiment="table2_strategies", score=0.0)
    about, found = known()["table2_strategies"], find(runs).runs
    folder = tmp_path / "experiments" / "table2_strategies"
    folder.mkdir(parents=True)
    (folder / "results.csv").write_text(results_csv(about, found))
    (folder / "history.csv").write_text(history_csv(found, ["val/miou/point", "train/loss"]))
    (committed,) = find(tmp_path / "experiments").committed.values()
    assert markdown(tabulate(about, committed.runs)) == markdown(tabulate(about, found))
    assert committed.runs[0].curves == found[0].curves
    assert results_csv(about, committed.runs) == results_csv(about, found)
    rows = list(csv.DictReader(io.StringIO(results_csv(about, found))))
    assert [(row["run"], row["strategy"], row["seed"]) for row in rows][2] == ("coupled", "coupled", "0")
    assert str(tmp_path) not in results_csv(about, found)


def test_runs_without_experiment_are_told_apart_by_differing_settings(
    runs: Path, make_run: Callable[..., Path]
) -> None:
    make_run("a", batch_size=4, trainer={"workers": 1})
    make_run("b", batch_size=8, trainer={"workers": 2}, seed=1)
    make_run("c", batch_size=16, encoder={"_target_": "x.TimmEncoder", "name": "resnet18", "depth": 3})
    found = find(runs).runs
    about = undescribed("train", "Training", found)
    assert list(about.keys) == ["encoder", "batch_size"], "not the machine's, nor the seed, nor what only timm has"
    assert len(tabulate(about, found).rows) == 3 + 1


def test_numbers_are_shown_with_their_unit() -> None:
    assert measure("parameters").shown(5743892) == "5.74 M"
    assert measure("parameters").as_printed(632_000_000) == "632 M"
    assert measure("miou/point").as_printed(0.7057) == "0.7057"
    assert measure("unheard/of").shown(0.25) == "0.250"


def test_runs_with_too_many_differences_get_one_row_each(runs: Path, make_run: Callable[..., Path]) -> None:
    for number in range(2):
        make_run(f"run{number}", **{f"option_{letter}": number for letter in "abcdefgh"})
    found = find(runs).runs
    about = undescribed("train", "Training", found)
    assert about.keys[0] == "run"
    assert [len(row.runs) for row in tabulate(about, found).rows[:2]] == [1, 1]
