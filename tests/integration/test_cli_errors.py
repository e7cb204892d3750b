"""Errors, records and run folders of commands: toy commands, which run in this process and hardly use torch."""

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from sam_distill.cli import app
from sam_distill.errors import UserError
from sam_distill.runs import status as run_status

ROOT = Path(__file__).parents[2]
random_numbers: list[float] = []  # the random number that each job drew, in order
arguments: list[list[str]] = []  # sys.argv in each job


class Fuse:
    """Component that can fail while it is built, as one would with a missing weights file."""

    def __init__(self, blow: bool = False) -> None:
        if blow:
            raise UserError("no such weights; give fuse.blow=false")


def job(*, fuse: Fuse, seed: int, how: str, run_dir: Path) -> None:
    if how == "table":
        Console().print("a table")
    random_numbers.append(random.random())
    arguments.append(list(sys.argv))
    assert json.loads((run_dir / "status.json").read_text())["status"] == "running"
    logging.getLogger("toy").info("hello")
    if how == "bug":
        raise ZeroDivisionError("split\nlines")
    if how == "mistake":
        raise UserError("mend me")
    if how == "interrupt":
        raise KeyboardInterrupt


CONF = """# A toy job.
defaults: [hydra/common, _self_]
_target_: HERE.job
fuse: {_target_: HERE.Fuse, blow: false}
seed: 0
how: well
"""


@pytest.fixture
def toy(command: Callable[[str], Callable[..., int]]) -> Callable[..., int]:
    random_numbers.clear()
    arguments.clear()
    return command(CONF.replace("HERE", __name__))


def status(folder: str = "run") -> dict[str, object]:
    content: dict[str, object] = json.loads(Path(folder, "status.json").read_text())
    return content


def test_a_job_that_ends_well(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.argv)
    assert toy("hydra.run.dir=run", "how=fine") == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("hello\n", "")
    record = status()
    assert (record["status"], record["why"], record["command"]) == (
        "finished", None, ["toy", "hydra.run.dir=run", "how=fine"],
    )  # fmt: skip
    assert record["started"]
    assert record["ended"]
    assert OmegaConf.load("run/config.yaml").how == "fine"
    assert "hydra" not in OmegaConf.load("run/config.yaml")
    assert Path("run/toy.log").read_text().endswith("INFO toy: hello\n")
    files = [path.name for path in Path("run").iterdir() if not path.name.startswith(".")]
    assert sorted(files) == ["config.yaml", "status.json", "toy.log"]
    assert arguments == [before]  # Lightning starts further processes with this sys.argv
    assert sys.argv == before


def test_running_again_in_the_same_folder_appends_to_the_log(toy: Callable[..., int]) -> None:
    assert toy("hydra.run.dir=run") == toy("hydra.run.dir=run") == 0
    assert Path("run/toy.log").read_text().count("hello") == 2


def test_tilde_is_expanded_in_any_value(
    toy: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert toy("hydra.run.dir=~/run", "how='~/a'", "+hydra.job.env_set={A: x}") == 0
    assert (tmp_path / "me" / "run" / "status.json").is_file()
    assert OmegaConf.load(tmp_path / "me" / "run" / "config.yaml").how == str(tmp_path / "me" / "a")
    assert not Path("~").exists()


def test_another_run_is_writing_there(
    toy: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run is refused before it writes anything; a later check is for runs that start at the same moment."""
    monkeypatch.setattr(run_status, "PATIENCE", 0.1)
    assert toy("hydra.run.dir=run") == 0
    before = status()
    with run_status.writing(Path("run")):
        assert toy("hydra.run.dir=run") == 2
        monkeypatch.setattr(app, "run_folder_mistakes", lambda *_: [])
        assert toy("hydra.run.dir=run") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("another run is writing there; wait for it, or choose another folder") for line in lines] == [
        True, True,
    ]  # fmt: skip
    assert status() == before


@pytest.mark.parametrize("name", ["status.json", "config.yaml", "metrics.json", "student.pt"])
def test_files_of_ones_own_are_not_written_over(
    toy: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """For example hydra.run.dir=. in the folder of another project."""
    Path(name).write_text('{"mine": 1}')
    assert toy("hydra.run.dir=.") == 2
    assert f"holds a {name}, but no record of a run" in capsys.readouterr().err
    assert Path(name).read_text() == '{"mine": 1}'


def test_a_sweep_does_not_write_over_students(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("-m", "hydra.sweep.dir=sweep", "seed=0") == 0
    Path("sweep/0/student.pt").touch()
    assert toy("-m", "hydra.sweep.dir=sweep", "seed=1") == 1
    assert "job 0 (seed=1): " in (said := capsys.readouterr().err)
    assert "holds a student already: choose another folder" in said


def test_seed_0_is_set_like_any_other(toy: Callable[..., int]) -> None:
    toy("seed=0")
    toy("seed=0")
    toy("seed=1")
    assert random_numbers[0] == random_numbers[1] != random_numbers[2]


def test_runs_of_the_same_second_have_their_own_folders(toy: Callable[..., int]) -> None:
    for _ in range(3):
        toy()
    folders = list(Path("outputs/toy").iterdir())
    assert len(folders) == 3
    assert not any(set("=, ") & set(folder.name) for folder in folders)


@pytest.mark.parametrize(
    ("override", "line", "why"),
    [
        ("how=mistake", "error: mend me\n", "mend me"),
        ("fuse.blow=true", "error: no such weights; give fuse.blow=false\n", "no such weights; give fuse.blow=false"),
        (
            "how=bug",
            "error: ZeroDivisionError: split lines (traceback in {log})\n",
            "ZeroDivisionError: split lines",
        ),
    ],
)
def test_a_failure_is_one_line(
    toy: Callable[..., int], capsys: pytest.CaptureFixture[str], override: str, line: str, why: str
) -> None:
    assert toy("hydra.run.dir=run", override) == 1
    out, err = capsys.readouterr()
    assert err == line.format(log=Path("run/toy.log").absolute())
    assert "Traceback" not in out
    assert "Traceback (most recent call last)" in Path("run/toy.log").read_text()
    assert (status()["status"], status()["why"]) == ("failed", why)


def test_where_no_folder_can_be_made(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert toy("hydra.run.dir=file/run") == 1
    assert capsys.readouterr().err == "error: file/run: Not a directory; hydra.run.dir=DIR puts the run elsewhere\n"


def test_where_no_log_can_be_written(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """The traceback is printed instead, and the last line is the job's error, not that of the log."""
    Path("run/toy.log").mkdir(parents=True)
    quiet = ["+hydra.job_logging.handlers.file.delay=true", "hydra.job_logging.root.handlers=[console]"]
    assert toy("hydra.run.dir=run", "how=bug", *quiet) == 1
    err = capsys.readouterr().err
    assert "in job\n" in err
    assert err.endswith("\nerror: ZeroDivisionError: split lines\n")


@pytest.mark.parametrize("how", ["well", "table"])
def test_closed_stdout_does_not_fail_the_job(
    toy: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    """The job finishes also if the reader of its output ends early (`| head`), or if stdout was closed before."""
    reader, writer = os.pipe()
    os.close(reader)
    for place, stdout in {"left": os.fdopen(writer, "w"), "closed": None}.items():
        monkeypatch.setattr(sys, "stdout", stdout)
        assert toy(f"hydra.run.dir={place}", f"how={how}") == 0
        assert status(place)["status"] == "finished"
    assert capfd.readouterr().err == ""


def test_interrupted(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("hydra.run.dir=run", "how=interrupt") == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert (status()["status"], status()["why"]) == ("failed", "interrupted")


def test_mistakes_are_told_before_anything_is_made(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("sed=1", "+fuse.blw=true", "seed=x") == 2
    assert capsys.readouterr() == (
        "",
        "error: sed=1: no such key; did you mean seed?\n"
        "error: fuse.blw=true (command line): Fuse has no parameter blw; did you mean fuse.blow?\n"
        "error: seed=x (command line): should be a valid integer\n",
    )
    assert not Path("outputs").exists()
    assert random_numbers == []


def test_unknown_flag(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("--sed") == 2
    assert capsys.readouterr().err == "error: --sed: no such flag; see sam-distill toy --help\n"


def test_repeated_sweep_runs_only_unfinished_jobs(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["-m", "hydra.sweep.dir=sweep", "seed=0,1,2"]
    assert toy(*sweep) == 0
    record = json.loads(Path("sweep/1/status.json").read_text())
    Path("sweep/1/status.json").write_text(json.dumps(record | {"status": "failed", "why": "power cut"}))
    capsys.readouterr()
    assert toy(*sweep) == 0
    assert len(random_numbers) == 4, "only job 1 ran again"
    assert random_numbers[3] == random_numbers[1]
    assert capsys.readouterr().out.count("has finished before") == 2
    assert toy(*sweep, "how=fine") == 0
    assert len(random_numbers) == 7, "another configuration is another job"


@pytest.mark.parametrize("flag", ["-m", "hydra.mode=MULTIRUN"])
def test_a_multirun_goes_on_after_a_failure(
    toy: Callable[..., int], capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert toy("hydra.sweep.dir=sweep", flag, "how=mistake,well") == 1
    assert capsys.readouterr().err == "error: job 0 (how=mistake): mend me\nerror: 1 of 2 jobs failed: 0\n"
    assert [status(f"sweep/{n}")["status"] for n in (0, 1)] == ["failed", "finished"]
    assert status("sweep/0")["command"] == ["toy", "how=mistake"]
    assert "Traceback" in Path("sweep/0/toy.log").read_text()


def test_a_multirun_on_several_devices_is_refused(
    toy: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_yaml = (tmp_path / "conf/toy.yaml").read_text() + f"trainer: {{_target_: {__name__}.trainer, devices: 2}}\n"
    (tmp_path / "conf/toy.yaml").write_text(toy_yaml.replace(".job", ".on_devices"))
    assert toy("-m", "seed=0,1") == 2
    hint = "error: trainer.devices=2 in a multirun (-m): use trainer.devices=1, or run the jobs one by one without -m: "
    assert capsys.readouterr().err == "".join(f"{hint}sam-distill toy seed={seed}\n" for seed in (0, 1))
    assert toy("-m", "seed=0,1", "trainer.devices=1") == 0
    assert toy("trainer.devices=2") == 0


@pytest.mark.parametrize("command", app.ON_ONE_DEVICE)
def test_commands_for_one_device_refuse_more(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"evaluate": ["checkpoint=mobile_sam"], "segment": ["image=a.jpg", "path=b.png"]}.get(command, [])
    assert app.run(command, [*options, "trainer=ddp", "trainer.devices=4", "trainer.nodes=2"]) == 2
    message = [f"error: trainer.{name}: {command} runs on one device" for name in ("devices=4", "nodes=2")]
    assert [line.partition(";")[0] for line in capsys.readouterr().err.splitlines()] == message
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.run(command, options) == 2
    assert f"torchrun has started 2 processes, but {command} runs in one" in capsys.readouterr().err


def test_options_of_lightnings_trainer_are_for_training(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["checkpoint=mobile_sam", "+trainer.profiler=simple", "+trainer.wrkers=1"]
    assert app.run("evaluate", options) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: trainer.wrkers=1 (command line): Hardware has no parameter wrkers; did you mean trainer.workers?",
        "error: trainer.profiler: an option of sam-distill train alone",
    ]


def trainer(devices: int = 1) -> int:
    return devices


def on_devices(*, trainer: int, fuse: Fuse, seed: int, how: str) -> None:
    assert not list(Path().glob("outputs/**/status.json"))  # a job without the parameter run_dir has no records


def test_only_the_first_process_keeps_the_records(toy: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").mkdir()
    Path("run/status.json").write_text('{"status": "running", "command": ["toy"]}')
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert toy("hydra.run.dir=run", "hydra.job.name=train_ddp_process_1") == 0
    assert status() == {"status": "running", "command": ["toy"]}
    assert not Path("run/config.yaml").exists()


def test_help_lists_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.yaml").write_text("# A toy job.\n")
    assert app.main([], tmp_path) == app.main(["--help"], tmp_path) == 0
    assert "toy  A toy job." in capsys.readouterr().out
    assert app.main(["tyo"], tmp_path) == 2
    assert capsys.readouterr().err == "error: tyo: no such command; did you mean toy?\n"


def test_help_of_a_command(toy: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("sam-distill toy [key=value ...]")
    assert "how=well" in out


def test_train_py_is_the_train_command() -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "--no-such-flag"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --no-such-flag: no such flag; see sam-distill train --help\n"


def test_help_does_not_import_torch() -> None:
    code = "import sys; from sam_distill.cli.app import main; main(['segment', '-h']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=300)
