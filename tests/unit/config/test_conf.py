"""Every configuration in conf/ composes, and fits the signatures of what it builds."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sam_distill.cli.app import commands, default_conf_dir, main
from sam_distill.config.check import check
from sam_distill.config.compose import compose_jobs
from sam_distill.report.experiments import known

CONF = default_conf_dir()
MANDATORY = {  # values that only a user can give, by choice or command
    "data=folder": ["data.path=photos"],
    "data=cache": ["data.path=cache"],
    "experiment=mobilesam_1pct": ["data.path=cache"],
    "data=sa1b": ["data.path=tars"],
    "encoder=timm": ["encoder.name=resnet18"],
    "evaluate": ["checkpoint=mobile_sam"],
    "export": ["checkpoint=mobile_sam", "format=onnx", "path=out"],
    "cache": ["path=cache"],
    "segment": ["image=photo.jpg", "path=out.png", "point=[1,2]"],
}
CHOICES = [
    f"{path.parent.name}={path.stem}"
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("hydra", "recipe", "stage")
]


def mistakes(command: str, *overrides: str) -> list[str]:
    jobs, lines = compose_jobs(CONF, command, [*overrides])
    return lines + [line for job in jobs for line in check(job)]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice: str) -> None:
    group, _, name = choice.partition("=")
    command = "evaluate" if group == "protocol" else "train"
    if group == "experiment":
        command = OmegaConf.load(CONF / group / f"{name}.yaml")._target_.rpartition(".")[2]
    assert mistakes(command, choice, *MANDATORY.get(choice, []), *MANDATORY.get(command, [])) == []


def test_options_beside_a_hydra_interpolation_are_checked() -> None:
    """The logger's `group` is known only when a job runs; its other options are checked nevertheless."""
    assert mistakes("train", "logger.tags=first", "seed=-1") == [
        "seed=-1 (command line): should be greater than or equal to 0",
        "logger.tags=first (command line): should be a valid array",
    ]


def test_every_experiment_is_in_the_report_and_every_table_has_a_recipe() -> None:
    recipes = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    assert recipes == set(known()) - {"first_light"}, "first_light was one command without a recipe"


@pytest.mark.parametrize("command", commands(CONF))
def test_every_command_composes(command: str) -> None:
    assert mistakes(command, *MANDATORY.get(command, [])) == []


def test_quick_recipe_applies_only_to_the_built_in_data() -> None:
    (quick,), _ = compose_jobs(CONF, "train", [])
    (paper,), _ = compose_jobs(CONF, "train", ["data=folder", "data.path=x"])
    assert quick.image_size < 1024
    assert (paper.image_size, paper.batch_size, paper.budget) == (1024, 8, "8 epochs")  # paper, section 4.1, Table 4
    (changed,), _ = compose_jobs(CONF, "train", ["image_size=512"])
    assert changed.image_size == 512


def test_finetuning_has_a_lower_learning_rate() -> None:
    rates = {}
    for strategy in ("coupled", "finetune_decoder", "finetune_joint"):
        (job,), _ = compose_jobs(CONF, "train", [f"strategy={strategy}", "data=folder", "data.path=x"])
        rates[strategy] = job.optim.lr
    assert rates["finetune_decoder"] == rates["finetune_joint"] < rates["coupled"]


def test_table2_finetunes_the_decoupled_student_of_the_same_seed() -> None:
    jobs, _ = compose_jobs(CONF, "train", ["experiment=table2_strategies", "data=sa1b", "data.path=x"], multirun=True)
    names = [job.hydra.runtime.choices.strategy for job in jobs]
    order = ["decoupled", "semi_coupled", "coupled", "finetune_decoder", "finetune_joint"]
    assert names == [name for name in order for _ in range(2)]
    starts = [OmegaConf.to_container(job, resolve=False)["init"] for job in jobs]
    assert set(starts) == {
        "${when:${hydra:runtime.choices.strategy},[finetune_decoder,finetune_joint],"
        '"${hydra:sweep.dir}/decoupled_seed${seed}"}'
    }
    assert len({(job.budget, job.batch_size, job.optim.lr) for job in jobs[:6]}) == 1, "the same budget for all"


@pytest.mark.parametrize(("scale", "steps", "side"), [("paper", [50_000, 100_000], 1024), ("small", [500, 1000], 192)])
def test_an_experiment_has_two_scales(scale: str, steps: list[int], side: int) -> None:
    words = ["experiment=table4_compute", f"scale={scale}", "data=sa1b", "data.path=x"]
    jobs, _ = compose_jobs(CONF, "train", words, multirun=True)
    expected = [(batch, f"{budget} steps", side) for batch in (4, 8) for budget in steps]
    assert [(job.batch_size, job.budget, job.image_size) for job in jobs] == expected


@pytest.mark.parametrize(("command", "experiment"), [("train", "table1_parameters"), ("evaluate", "table4_compute")])
def test_experiment_of_another_command_is_a_one_line_error(
    command: str, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, f"experiment={experiment}"]) == 2
    (lines,) = capsys.readouterr().err.splitlines()
    assert lines.startswith(f"error: experiment={experiment} is for another command: sam-distill ")


def test_all_mistakes_are_reported_at_once() -> None:
    """One line per mistake, before anything slow begins."""
    lines = mistakes(
        "train", "encoder=tinyvt", "optim.lrr=1", "batch_size=many", "image_size=1000", "+strategy.typo=1", "budget=8"
    )
    expected = ["encoder=tinyvt", "optim.lrr", "batch_size=many", "image_size=1000", "strategy.typo=1", "budget=8"]
    assert len(lines) == len(expected)
    for mistake in expected:
        assert sum(line.startswith(mistake) for line in lines) == 1, (mistake, lines)
    assert any("did you mean" in line and "tinyvit" in line for line in lines)


def test_hints_for_choices_that_do_not_exist() -> None:
    lines = mistakes("train", "teacher=outputs/first", "data=photographs", "optim.scale={foo:0.1}")
    assert [line.partition(":")[0] for line in lines] == [
        "data=photographs", "teacher=outputs/first", "optim.scale={foo",
    ]  # fmt: skip
    assert lines[1].endswith("; for any other SAM give teacher.checkpoint=...")
    assert lines[0].endswith("; for a folder of images give data=folder data.path=...")
    assert "no such key: foo; there are image_encoder, mask_decoder" in lines[2]


def test_thresholds_must_be_between_0_and_1() -> None:
    lines = mistakes(
        "segment", "image=a.jpg", "path=b.png", "generator.stability_score_thresh=95", "generator.box_nms_thresh=-3"
    )
    assert [line.partition("=")[0] for line in lines] == [
        "generator.stability_score_thresh",
        "generator.box_nms_thresh",
    ]


def test_key_of_another_choice_names_that_choice() -> None:
    (lines,) = mistakes("train", "strategy.rounds=2")
    assert "no such key with the strategy chosen; there is one with strategy=coupled, " in lines
    assert "decoupled" not in lines


def test_options_that_a_strategy_inherits_are_checked_too() -> None:
    lines = mistakes("train", "strategy=coupled", "+strategy.tokns=all", "strategy.rounds=0", "strategy.decoder=new")
    assert len(lines) == 3
    assert any("did you mean strategy.tokens?" in line for line in lines)


def test_wheel_contains_conf() -> None:
    assert 'conf = "sam_distill/conf"' in (Path(__file__).parents[3] / "pyproject.toml").read_text()
