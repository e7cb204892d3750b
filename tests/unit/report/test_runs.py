from collections.abc import Callable
from pathlib import Path

import pytest

from sam_distill.report.runs import find


def test_run_folder_is_read(runs: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run("nested/a", experiment="loss", score=0.25, data={"path": ["/somewhere/else/x.tar"]})
    (run,) = find(runs).runs
    assert (run.name, run.experiment, run.command) == ("nested/a", "loss", "train")
    assert run.setting("encoder") == "tinyvit 5m"
    assert run.setting("strategy.loss") == "mse"
    assert run.setting("batch_size") == "8"
    assert run.setting("data.path") == "x.tar", "no path of this machine"
    assert run.measure("miou/point") == 0.25
    assert run.measure("precision") is None, "a word"
    assert run.curves["train/loss"] == [(2, 0.4), (4, 0.2)]
    assert run.masks == folder / "pictures" / "masks_0000004.png"


def test_a_setting_may_be_named_by_a_number(runs: Path, make_run: Callable[..., Path]) -> None:
    make_run("r", progressive_resizing={256: 0.3})
    assert find(runs).runs[0].setting("progressive_resizing.256") == "0.3"


def test_an_encoder_is_called_by_its_variant(runs: Path, make_run: Callable[..., Path]) -> None:
    make_run("r", encoder={"_target_": "sam_distill.models.encoders.TimmEncoder", "name": "resnet18"})
    assert find(runs).runs[0].setting("encoder") == "tinyvit resnet18"


def test_change_lists_the_overrides_that_change_the_recipe(runs: Path, make_run: Callable[..., Path]) -> None:
    common = ["experiment=recipe", "scale=small", "data=cache", "data.path=/x/cache", "logger=csv"]
    make_run("a", words=[*common, "seed=0"])
    make_run("b", words=["seed=1", "strategy.loss=norm", *common, "optim.lr=0.002", "init=/x/a"])
    assert [run.setting("change") for run in find(runs).runs] == ["plain", "optim.lr=0.002 strategy.loss=norm"]


def test_runs_come_in_the_order_in_which_they_began(runs: Path, make_run: Callable[..., Path]) -> None:
    for name in ("z", "a", "m"):
        make_run(name)
    assert [run.name for run in find(runs).runs] == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("metrics.json", '{"miou/point": 0.', "damaged"),
        ("metrics.json", "[1, 2]", "damaged"),
        ("metrics.json", None, "unfinished"),
        ("status.json", "", "damaged"),
        ("status.json", None, "damaged"),
        ("status.json", '{"why": null}', "damaged"),
        ("config.yaml", "a: [1", "damaged"),
        ("config.yaml", None, "damaged"),
        ("history.csv", "step,val/miou/point\n1,0.5,7\n", "damaged"),
        ("history.csv", "step,val/miou/point\n1,half\n", "damaged"),
    ],
)
def test_one_damaged_run_stops_no_other(
    runs: Path, make_run: Callable[..., Path], file: str, content: str | None, kind: str
) -> None:
    path = make_run("broken") / file
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    make_run("whole")
    found = find(runs)
    assert [run.name for run in found.runs] == ["whole"]
    (named,) = found.unusable
    assert (named.name, named.kind) == ("broken", kind)
    assert named.why


def test_failed_and_running_runs_are_told_apart(runs: Path, make_run: Callable[..., Path]) -> None:
    make_run("a", status="failed", why="no such folder", experiment="loss")
    make_run("b", status="running")
    found = find(runs)
    assert not found.runs
    assert [(one.kind, one.why, one.experiment) for one in found.unusable] == [
        ("failed", "no such folder", "loss"),
        ("unfinished", "still running, or killed", None),
    ]


def test_results_of_an_experiment(tmp_path: Path) -> None:
    folder = tmp_path / "table4_compute"
    folder.mkdir()
    (folder / "results.csv").write_text("run,batch_size,budget,miou/point\na,4,2 epochs,0.5\nb,8,4 epochs,\n")
    (folder / "history.csv").write_text("run,step,val/miou/point\na,0,0.1\na,5,0.5\nb,5,0.6\n")
    (committed,) = find(tmp_path).committed.values()
    first, second = committed.runs
    assert (first.experiment, first.setting("batch_size"), first.measure("miou/point")) == ("table4_compute", "4", 0.5)
    assert second.measure("miou/point") is None
    assert first.curves == {"val/miou/point": [(0, 0.1), (5, 0.5)]}
    (folder / "results.csv").write_text("")
    assert [(one.name, one.kind) for one in find(tmp_path).unusable] == [("table4_compute", "damaged")]
