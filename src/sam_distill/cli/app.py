"""The command line `sam-distill <command> [overrides]`: check the whole configuration, then build and run the command.

Each mistake is reported on one line. Exit status: 0 success, 1 failure, 2 the command line or a file of conf/ is wrong,
130 interrupted (Ctrl-C), 143 terminated (SIGTERM), 129 the terminal was closed (SIGHUP).
"""

import argparse
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import chain, pairwise
from pathlib import Path
from unittest.mock import patch

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sam_distill.cli.console import discard_output
from sam_distill.cli.jobs import Task, describe_error, print_errors, register_folder_resolvers
from sam_distill.cli.resume import IGNORED_ON_RESUME, run_folder_mistakes, with_resumed_options
from sam_distill.cli.usage import print_usage
from sam_distill.config.check import check, forwarded_options
from sam_distill.config.compose import compose_jobs
from sam_distill.config.sources import task_overrides
from sam_distill.errors import did_you_mean
from sam_distill.runs import joblib_workers, processes
from sam_distill.runs.allocator import keep_freed_memory

PROGRAM = "sam-distill"
ON_ONE_DEVICE = ("bench", "demo", "evaluate", "segment")  # commands that run on one device
FLAGS_WITH_A_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd")  # Hydra's flags
_HOME = re.compile(r"""(?<=[=\[,"'])~[\w.-]*(?=/)|(?<==)~$""")  # ~ where a value or list item begins


def default_conf_dir() -> Path:
    """Return the folder conf/ inside the installed package, or else at the root of the checkout."""
    packaged = Path(__file__).resolve().parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[3] / "conf"


def main(argv: Sequence[str] | None = None, conf_dir: Path | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands(conf_dir or default_conf_dir())
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            _print_help(known)
            return 0
        name, *rest = arguments
        if name in known:
            return run(name, rest, conf_dir)
        hint = did_you_mean(name, known, f"commands: {', '.join(known)}")
        return _fail(f"{name}: no such command; {hint}", status=2)
    except BrokenPipeError:  # the program that reads our output, such as `head`, has ended
        discard_output()
        return 1


def commands(conf_dir: Path) -> dict[str, str]:
    """Return the one-line description of each command: the first line of its file in conf/."""
    return {path.stem: path.read_text().partition("\n")[0].lstrip("# ") for path in sorted(conf_dir.glob("*.yaml"))}


def run(command: str, argv: Sequence[str], conf_dir: Path | None = None) -> int:
    """Run one command with Hydra's flags and overrides, and return the exit status."""
    keep_freed_memory()
    conf_dir = (conf_dir or default_conf_dir()).resolve()
    token = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}"
    folders = (token, processes.shared_name() or token)
    register_folder_resolvers(*folders)
    pairs = pairwise(["", *argv])
    argv = [word if before in FLAGS_WITH_A_VALUE else _expand(command, word) for before, word in pairs]
    try:
        with joblib_workers.stop_on_signals():
            return _run(command, with_resumed_options(argv), conf_dir, folders)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    except SystemExit as stop:  # Hydra's flags such as --version end this way
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        raise
    except OSError as error:  # no job has begun: Hydra could not create the run folder
        return _fail(f"{describe_error(error)}; hydra.run.dir=DIR puts the run elsewhere")
    except Exception as error:  # no job has begun, so there is no log file
        return _fail(describe_error(error))


def _expand(command: str, word: str) -> str:
    """Return the override for a short form, such as `bench data` or `report DIR`. `~/` is expanded as in a shell."""
    word = _HOME.sub(lambda found: os.path.expanduser(found[0]), word)
    if command == "bench" and word.isidentifier():
        return f"suite={word}"
    if command == "report" and word.startswith("experiment="):  # Hydra would expect a config group
        return word.replace("experiment", "only", 1)
    if command == "report" and "=" not in word and not word.startswith("-"):
        return f"runs={word}"
    return word


def _flags() -> argparse.ArgumentParser:
    """Return a parser for the Hydra flags that are supported, and for --help."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    for names in (["--help", "-h"], ["--multirun", "-m"], ["--run", "-r"]):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--config-dir", "-cd")
    for names in (["--hydra-help"], ["--version"], ["--resolve"], ["--shell-completion", "-sc"]):
        parser.add_argument(*names, action="store_true", dest="shows")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    return parser


def _run(command: str, argv: list[str], conf_dir: Path, folders: tuple[str, str]) -> int:
    args, unknown = _flags().parse_known_intermixed_args(argv)
    if unknown:
        return _fail(*(f"{flag}: no such flag; see {PROGRAM} {command} --help" for flag in unknown), status=2)
    extra = [f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']"] if args.config_dir else []
    jobs, mistakes = compose_jobs(conf_dir, command, args.overrides + extra, args.multirun)
    swept = args.multirun or any(job.hydra.mode == RunMode.MULTIRUN for job in jobs)
    only_shows = args.shows or args.cfg or args.info
    if not (args.help or only_shows):
        unreadable = {line.partition("=")[0] for line in mistakes}  # such a key is not reported as missing, too
        for job in jobs:
            ignored = unreadable | IGNORED_ON_RESUME if job.get("resume") else unreadable
            mistakes += [line for line in check(job) if line.partition("=")[0] not in ignored]
        mistakes = list(_of_another_command(jobs, command)) or mistakes
        mistakes += _conflicts(jobs, command, swept, argv)
        mistakes += [] if swept else [line for job in jobs for line in run_folder_mistakes(job, command)]
    if mistakes:
        return _fail(*dict.fromkeys(mistakes), status=2)
    if args.help:
        print_usage(jobs[0])
        return 0
    task = Task(command, argv, folders)
    if only_shows:
        words = [sys.argv[0], *(word for word in argv if word not in args.overrides), *args.overrides]
        with patch.object(sys, "argv", words), patch.dict(os.environ, HYDRA_FULL_ERROR="1"):  # Hydra raises errors
            hydra.main(config_path=str(conf_dir), config_name=command, version_base="1.3")(task)()
        return 0
    done = _run_jobs(task, conf_dir, args.overrides + extra, swept)
    failed = [job for job in done if not job.return_value]
    if failed and len(done) > 1:
        numbers = ", ".join(str(job.hydra_cfg.hydra.job.num) for job in failed)  # type: ignore[union-attr]
        return _fail(f"{len(failed)} of {len(done)} jobs failed: {numbers}")
    return int(bool(failed))


def _run_jobs(task: Task, conf_dir: Path, overrides: list[str], swept: bool) -> list[JobReturn]:
    """Run the jobs as hydra.main does, but return their results, which hydra.main discards."""
    with initialize_config_dir(str(conf_dir), job_name=task.command, version_base="1.3"):
        app = GlobalHydra.instance().hydra
        assert app is not None
        if not swept:
            return [app.run(task.command, task, overrides)]
        return list(chain.from_iterable(app.multirun(task.command, task, [*overrides, "hydra.mode=MULTIRUN"])))


def _of_another_command(jobs: list[DictConfig], command: str) -> Iterator[str]:
    """Yield a mistake for each job with an experiment that is a recipe for another command, as its `_target_` says."""
    for job in jobs:
        other, experiment = job._target_.rpartition(".")[2], job.hydra.runtime.choices.get("experiment")
        if experiment and other != command:
            yield f"experiment={experiment} is for another command: {PROGRAM} {other} experiment={experiment}"


def _conflicts(jobs: list[DictConfig], command: str, swept: bool, argv: list[str]) -> Iterator[str]:
    """Yield a mistake for options that are valid one by one, but not together, or not with this command."""
    if command == "report" and sum(word.startswith("runs=") for word in argv) > 1:
        yield "runs: several folders given; name one that holds them all"
    if command in ON_ONE_DEVICE and processes.launched() > 1:
        yield f"{processes.launcher()} has started {processes.launched()} processes, but {command} runs in one"
    for job in jobs:
        for name in ("devices", "nodes"):
            number = OmegaConf.select(job, f"trainer.{name}", default=1)
            if str(number) in ("auto", "0", "1", "None"):
                continue
            if command in ON_ONE_DEVICE:
                yield f"trainer.{name}={number}: {command} runs on one device; give trainer.{name}=1"
            if swept and name == "devices":  # each of Lightning's processes would start the whole sweep again
                own = " ".join(task_overrides(job.hydra))
                yield (
                    f"trainer.devices={number} in a multirun (-m): use trainer.devices=1, or run the jobs one by one"
                    f" without -m: {PROGRAM} {command} {own}"
                )
        trainer = job.get("trainer")
        if command != "train" and isinstance(trainer, DictConfig) and "_target_" in trainer:
            yield from (f"trainer.{name}: an option of {PROGRAM} train alone" for name in forwarded_options(trainer))
    if swept and any(job.get("resume") is not None for job in jobs):
        yield (
            "resume goes on with one run, without -m; a sweep goes on by its own command with hydra.sweep.dir=DIR, the"
            " folder it has"
        )
    named = processes.shared_name() is not None or any("hydra.run.dir=" in word for word in argv)
    if processes.launched() > 1 and not named:  # each process would compose another folder name
        yield "the processes share no name for the run's folder: give hydra.run.dir=DIR, or torchrun --rdzv-id=NAME"


def _fail(*lines: str, status: int = 1) -> int:
    """Print error lines, from the first process of a job only, and return `status`."""
    if processes.is_first():
        print_errors(*lines)
    return status


def _print_help(known: dict[str, str]) -> None:
    print(f"usage: {PROGRAM} <command> [key=value ...]\n")
    for name, description in known.items():
        print(f"  {name:{max(map(len, known))}}  {description}")
    print(
        f"\nexamples:\n  {PROGRAM} train strategy=decoupled encoder=tinyvit"
        f"\n  {PROGRAM} evaluate checkpoint=outputs/train/RUN data=photos"
        f"\n  {PROGRAM} train --help          the choices and keys of a command"
        f"\n  {PROGRAM} train --cfg job       the configuration, without running"
    )
