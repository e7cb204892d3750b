"""Mistakes in a configuration: each is one line that says where it is and how to correct it. Uses a toy conf/."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from sam_distill.cli.app import default_conf_dir
from sam_distill.config.check import check, nearest
from sam_distill.config.compose import compose_jobs


class Encoder:
    pass


class Tiny(Encoder):
    def __init__(self, width: Annotated[int, Field(gt=0)] = 8, size: Literal["small", "large"] = "small") -> None:
        pass


class Big(Tiny):
    pass


class Adam:
    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        pass


def open_ended(**kwargs: Any) -> Encoder:
    return Encoder()


def toy(
    *,
    encoder: Encoder,
    optim: Adam,
    image: Path,
    batch_size: Annotated[int, Field(gt=0)],
    seed: int,
    run_dir: Path,
    callbacks: list[Encoder] | None = None,
    schedule: Callable[..., Any] | None = None,
) -> None:
    pass


FILES = {
    "toy.yaml": """# A toy.
defaults:
  - _self_
  - encoder: tiny
  - optim: adam
  - optional experiment: null
_target_: HERE.toy
image: ???  # a picture, e.g. image=photo.jpg
batch_size: 8
seed: 0
""",
    "encoder/tiny.yaml": "_target_: HERE.Tiny\nwidth: 8\n",
    "encoder/big.yaml": "_target_: HERE.Big\nwidth: 64\n",
    "encoder/named.yaml": "_target_: HERE.Tiny\nwidth: first\nsize: ${hydra:job.name}\n",
    "encoder/broken.yaml": "_target_: HERE.Tiny\nwidht: 8\n",
    "encoder/wrong.yaml": "_target_: HERE.Adam\nlr: 1.0\n",
    "encoder/gone.yaml": "_target_: HERE.Gone\n",
    "encoder/open.yaml": "_target_: HERE.open_ended\nwhatever: 1\n",
    "optim/adam.yaml": "_target_: HERE.Adam\nlr: 0.001\n",
    "optim/bare.yaml": "_target_: HERE.Adam\n",
    "experiment/bad.yaml": "# @package _global_\nbatch_size: many\n",
    "experiment/sweep.yaml": """# @package _global_
hydra: {mode: MULTIRUN, sweeper: {params: {encoder: 'tiny,big'}}}
""",
}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text.replace("HERE", __name__))
    return tmp_path / "conf"


def mistakes(conf: Path, *overrides: str, multirun: bool = False) -> list[str]:
    jobs, found = compose_jobs(conf, "toy", ["image=photo.jpg", *overrides], multirun)
    return list(dict.fromkeys(found + [line for job in jobs for line in check(job)]))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("encoder=open", "+encoder.anything=[1,2]"),
        ("optim.lr=1",),  # an int is valid for a float
        ("+optim.betas=[0.8,0.9]",),  # a list is valid for a tuple
        ("+callbacks=null",),
        (f"+callbacks=[{{_target_: {__name__}.Tiny, width: 3}}]",),
        (f"+schedule={{_target_: {__name__}.Adam, _partial_: true}}",),  # lr is given later, by the caller
        ("seed=${batch_size}",),
    ],
)
def test_valid(conf: Path, overrides: tuple[str, ...]) -> None:
    assert mistakes(conf, *overrides) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("batch_size=abc", "batch_size=abc (command line): should be a valid integer"),
        ("batch_size=1.5", "batch_size=1.5 (command line): should be a valid integer"),
        ("batch_size=true", "batch_size=true (command line): should be a valid integer"),
        ("batch_size=0", "batch_size=0 (command line): should be greater than 0"),
        ("batch_size=null", "batch_size=null (command line): should be a valid integer"),
        ("seed='0'", "seed=0 (command line): should be a valid integer; the quotes make it text: write seed=0"),
        ("experiment=bad", "batch_size=many (conf/experiment/bad.yaml): should be a valid integer"),
        ("encoder.width=-1", "encoder.width=-1 (command line): should be greater than 0"),
        (
            "+encoder.size=smal",
            "encoder.size=smal (command line): should be 'small' or 'large'; did you mean small?",
        ),
        (
            "encoder=broken",
            "encoder.widht=8 (conf/encoder/broken.yaml): Tiny has no parameter widht; did you mean encoder.width?",
        ),
        ("+optim.lrr=1", "optim.lrr=1 (command line): Adam has no parameter lrr; did you mean optim.lr?"),
        ("+run_dir=x", "run_dir=x (command line): toy has no parameter run_dir; it takes: encoder, optim, image, "
                       "batch_size, seed, callbacks, schedule"),
        ("encoder=wrong", f"encoder={__name__}.Adam (conf/encoder/wrong.yaml): builds a Adam, expected Encoder"),
        ("encoder=gone", f"encoder._target_={__name__}.Gone (conf/encoder/gone.yaml): can't be imported: module "
                         f"'{__name__}' has no attribute 'Gone'"),
        ("optim=bare", "optim.lr (conf/optim/bare.yaml): missing, Adam needs it, expected float; give +optim.lr=..."),
        ("image=???", "image=??? (command line): no value given, expected Path; give image=... "
                      "(a picture, e.g. image=photo.jpg)"),
        ("seed=${nowhere}", "seed=${nowhere} (command line): can't be resolved: Interpolation key 'nowhere' not found"),
        ("encoder.width=${no}", "encoder.width=${no} (command line): can't be resolved: "
                                "Interpolation key 'no' not found"),
        ("+optim.betas=[0.8]", "optim.betas=[0.8] (command line): should have 2 values, not 1"),
        ("+optim.betas=[0.8,0.9,1]", "optim.betas=[0.8, 0.9, 1] (command line): should have 2 values, not 3"),
        ("encoder=named", "encoder.width=first (conf/encoder/named.yaml): should be a valid integer"),
        ("+callbacks=[1]", "callbacks=[1] (command line): expected list[Encoder] or null, a node with _target_"),
        ("seed={a:1}", 'seed={"a": 1} (command line): a mapping without _target_, expected int'),
        ("optim=3", "optim=3: no such choice; choices: adam, bare"),
        ("encoder=tinny", "encoder=tinny: no such choice; did you mean tiny? "
                          "choices: big, broken, gone, named, open, tiny, wrong"),
        ("lr=1", "lr=1: no such key; did you mean optim.lr?"),
        ("bach_size=1", "bach_size=1: no such key; did you mean batch_size?"),
        ("optim.eps=1", "optim.eps=1: in no file yet; add it with +optim.eps=1"),
        ("batch_size", "batch_size: not an override; write key=value"),
        ("+optim.betas='[0.8,1]'", "optim.betas=[0.8,1] (command line): should be a valid array; the quotes make it "
                                   "text: write optim.betas=[0.8,1]"),
        ("image=2024", "image=2024 (command line): should be a valid string; it reads as a number: for text quote it "
                       "twice, image='\"...\"'"),
        ("optim=mine/adam", "optim=mine/adam: no such choice; choices: adam, bare"),
        ("seed=1,2", "seed=1,2: several values need -m (a sweep); a list is seed=[1,2], one value seed='\"1,2\"'"),
    ],
)  # fmt: skip
def test_mistake(conf: Path, override: str, line: str) -> None:
    assert mistakes(conf, override) == [line]


@pytest.mark.parametrize("words", [("seed", "=", "3"), ("seed=", "3"), ("seed", "=3")])
def test_override_with_spaces_is_one_mistake(conf: Path, words: tuple[str, ...]) -> None:
    assert mistakes(conf, *words, "bach_size=1") == [
        f"{' '.join(words)}: leave out the spaces: seed=3",
        "bach_size=1: no such key; did you mean batch_size?",
    ]


def test_list_split_by_the_shell_is_one_mistake(conf: Path) -> None:
    assert mistakes(conf, "+optim.betas=[0.8,", "0.9]", "bach_size=1") == [
        "+optim.betas=[0.8, 0.9]: torn apart at its spaces; leave them out, or quote it: '+optim.betas=[0.8, 0.9]'",
        "bach_size=1: no such key; did you mean batch_size?",
    ]
    assert mistakes(conf, "+optim.betas=[0.8,", "seed=1") == ["+optim.betas=[0.8,: a bracket is not closed"]


@pytest.mark.parametrize("given", ["(0.8, 0.9)", "[(1,2),(3,4)]"])
def test_parentheses_get_the_advice_to_use_square_brackets(conf: Path, given: str) -> None:
    (line,) = mistakes(conf, f"+optim.betas={given}")
    expected = given.replace("(", "[").replace(")", "]")
    assert line == f"+optim.betas={given}: lists have square brackets: '+optim.betas={expected}'"


@pytest.mark.parametrize("value", ["a_{0..9}.tar", "it's (1).jpg", 'a (1) "b".jpg'])
def test_the_advice_to_quote_works_in_a_shell(conf: Path, value: str) -> None:
    (line,) = mistakes(conf, f"image={value}")
    (pasted,) = shlex.split(line.partition("; quote it: ")[2])
    jobs, found = compose_jobs(conf, "toy", [pasted])
    assert found == []
    assert jobs[0].image == value


def test_missing_mandatory_value(conf: Path) -> None:
    jobs, found = compose_jobs(conf, "toy", [])
    assert found == []
    assert check(jobs[0]) == [
        "image=??? (conf/toy.yaml): no value given, expected Path; give image=... (a picture, e.g. image=photo.jpg)"
    ]


def test_all_mistakes_at_once(conf: Path) -> None:
    found = mistakes(conf, "lr=1", "encoder=tinny", "encoder.width=3", "batch_size=0", "optim=bare", "seed=a=b")
    assert [line.partition(":")[0].partition(" (")[0] for line in found] == [
        "seed=a=b", "encoder=tinny", "lr=1", "batch_size=0", "optim.lr",
    ]  # fmt: skip


def test_value_may_precede_the_choice_it_belongs_to(conf: Path) -> None:
    assert mistakes(conf, "encoder.whatever=2", "encoder=open", "lr=1") == ["lr=1: no such key; did you mean optim.lr?"]


def test_every_job_of_a_sweep_is_checked(conf: Path) -> None:
    assert mistakes(conf, "seed=0,1", "encoder=tiny,big", multirun=True) == []
    assert mistakes(conf, "seed=0,x", "encoder=tiny,broken", multirun=True) == [
        "encoder.widht=8 (conf/encoder/broken.yaml): Tiny has no parameter widht; did you mean encoder.width?",
        "seed=x (command line): should be a valid integer",
    ]


def test_an_experiment_can_be_a_sweep(conf: Path) -> None:
    jobs, found = compose_jobs(conf, "toy", ["image=x", "experiment=sweep"])
    assert found == []
    assert [job.encoder.width for job in jobs] == [8, 64]


def test_broken_yaml_file_is_one_mistake(conf: Path) -> None:
    (conf / "toy.yaml").write_text("a: [1\n")
    jobs, found = compose_jobs(conf, "toy", [])
    assert jobs == []
    assert len(found) == 1
    assert found[0].startswith("conf/toy.yaml: ")


def test_nearest_prefers_an_equal_last_part() -> None:
    assert nearest("lr", ["optim.lr", "l", "r"]) == "optim.lr"
    assert nearest("qqq", ["optim.lr"]) == ""
    assert nearest("compile", ["strategy.cosine"]) == ""


@pytest.mark.parametrize("command", sorted(path.stem for path in default_conf_dir().glob("*.yaml")))
def test_shipped_commands_begin_with_their_description(command: str) -> None:
    first, *_ = (default_conf_dir() / f"{command}.yaml").read_text().splitlines()
    assert first.startswith("# ")
    assert first.endswith(".")
