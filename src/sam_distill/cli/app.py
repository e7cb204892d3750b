"""Run a command: `sam-distill <command> [overrides]`. Compose, check all, then build and call; mistakes are one line.

Exit status: 0 the job was done, 1 it failed, 2 the command line or a file of conf/ is wrong, 130 interrupted (Ctrl-C),
143 terminated (SIGTERM).
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import chain, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from sam_distill.cli import joblib_workers
from sam_distill.cli.allocator import keep_freed_memory
from sam_distill.cli.compose import compose_jobs
from sam_distill.cli.config import check
from sam_distill.cli.jobs import Task, describe, name_folders, say
from sam_distill.cli.resume import continued, misplaced
from sam_distill.cli.sources import task_overrides
from sam_distill.cli.usage import print_usage
from sam_distill.runs import processes

PROGRAM = "sam-distill"
FLAGS_WITH_A_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd")  # Hydra's
ON_ONE_DEVICE = ("bench", "demo", "evaluate", "segment")  # these commands run
_HOME = re.compile(r"""(?<=[=\[,"'])~[\w.-]*(?=/)|(?<==)~$""")  # where a value, or one of a list, begins


def default_conf_dir() -> Path:
    """conf/ inside the installed package, or at the root of a checkout."""
    packaged = Path(__file__).resolve().parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[3] / "conf"


def main(argv: Sequence[str] | None = None, conf_dir: Path | None = None) -> int:
    """The console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands(conf_dir or default_conf_dir())
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            _print_help(known)
            return 0
        name, *rest = arguments
        if name in known:
            return run(name, rest, conf_dir)
        guess = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {guess[0]}?" if guess else f"commands: {', '.join(known)}"
        return _fail(f"{name}: no such command; {hint}", status=2)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def commands(conf_dir: Path) -> dict[str, str]:
    """Every command and its one-line description: the first line of its file in conf/."""
    return {path.stem: path.read_text().partition("\n")[0].lstrip("# ") for path in sorted(conf_dir.glob("*.yaml"))}


def run(command: str, argv: Sequence[str], conf_dir: Path | None = None) -> int:
    """Run one command with Hydra's flags and overrides, and return the exit status."""
    keep_freed_memory()
    conf_dir = (conf_dir or default_conf_dir()).resolve()
    token = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}"
    folders = (token, processes.shared_name() or token)
    name_folders(*folders)
    pairs = pairwise(["", *argv])
    argv = [word if before in FLAGS_WITH_A_VALUE else _in_full(command, word) for before, word in pairs]
    if sum(word.startswith("runs=") for word in argv if command == "report") > 1:
        return _fail("runs: several folders given; name one that holds them all", status=2)
    try:
        with _signals_end_it():
            return _run(command, continued(list(argv)), conf_dir, folders)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    except SystemExit as stop:  # Hydra's flags such as --help end this way
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        raise
    except Exception as error:  # before any job has begun, so there is no log: a folder that can't be made, for one
        return _fail(describe(error))


def _in_full(command: str, word: str) -> str:
    """What a command is mostly asked may be said in short: `bench data`, `report DIR`. `~/` is as in a shell."""
    word = _HOME.sub(lambda found: os.path.expanduser(found[0]), word)
    if command == "bench" and word.isidentifier():
        return f"suite={word}"
    if command == "report" and word.startswith("experiment="):  # to Hydra a recipe for training
        return word.replace("experiment", "only", 1)
    if command == "report" and "=" not in word and not word.startswith("-"):
        return f"runs={word}"
    return word


def _run(command: str, argv: list[str], conf_dir: Path, folders: tuple[str, str]) -> int:
    args, unknown = get_args_parser().parse_known_intermixed_args(argv)
    if unknown:
        return _fail(*(f"{flag}: no such flag; see {PROGRAM} {command} --help" for flag in unknown), status=2)
    extra = [f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']"] if args.config_dir else []
    jobs, mistakes = compose_jobs(conf_dir, command, args.overrides + extra, args.multirun)
    only_shown = args.hydra_help or args.cfg or args.info or args.shell_completion
    if not (args.help or only_shown):
        message = {line.partition("=")[0] for line in mistakes}  # a key that can't be read is not missing as well
        mistakes += [line for job in jobs for line in check(job) if line.partition("=")[0] not in message]
        mistakes = list(_of_another_command(jobs, command)) or mistakes
        mistakes += _forbidden_sweep(jobs, command, args.multirun)
        mistakes += _too_many(jobs, command)
        swept = args.multirun or any(job.hydra.mode == RunMode.MULTIRUN for job in jobs)
        mistakes += _sweep_of_one(jobs) if swept else [line for job in jobs for line in misplaced(job, command)]
        mistakes += _homeless(argv)
    if mistakes:
        return _fail(*dict.fromkeys(mistakes), status=2)
    if args.help:
        print_usage(jobs[0])
        return 0

    task = Task(command, argv, folders)
    if only_shown:
        flags = [word for word in argv if word not in args.overrides]
        with _hydra_sees([sys.argv[0], *flags, *args.overrides]):
            hydra.main(config_path=str(conf_dir), config_name=command, version_base="1.3")(task)()
        return 0
    done = _do(task, conf_dir, args.overrides + extra, args.multirun or jobs[0].hydra.mode == RunMode.MULTIRUN)
    failed = [job for job in done if not job.return_value]
    if failed and len(done) > 1:
        numbers = ", ".join(str(job.hydra_cfg.hydra.job.num) for job in failed)  # type: ignore[union-attr]
        return _fail(f"{len(failed)} of {len(done)} jobs failed: {numbers}")
    return int(bool(failed))


def _do(task: Task, conf_dir: Path, overrides: list[str], swept: bool) -> list[JobReturn]:
    """What hydra.main does, but that keeps to itself what the jobs of a multirun return."""
    with initialize_config_dir(str(conf_dir), job_name=task.command, version_base="1.3"):
        app = GlobalHydra.instance().hydra
        assert app is not None
        if not swept:
            return [app.run(task.command, task, overrides)]
        return list(chain.from_iterable(app.multirun(task.command, task, [*overrides, "hydra.mode=MULTIRUN"])))


def _several(devices: Any) -> bool:
    """Whether this `trainer.devices` or `trainer.nodes` means more than one."""
    return len(devices) > 1 if OmegaConf.is_list(devices) else str(devices) not in ("auto", "0", "1", "None")


def _too_many(jobs: list[DictConfig], command: str) -> Iterator[str]:
    """Devices that would stand idle, or all do the same."""
    if command not in ON_ONE_DEVICE:
        return
    if processes.started() > 1:
        yield f"{processes.launcher()} has started {processes.started()} processes, but {command} runs in one"
    for job in jobs:
        for name in ("devices", "nodes"):
            number = OmegaConf.select(job, f"trainer.{name}", default=1)
            if _several(number):
                yield f"trainer.{name}={number}: {command} runs on one device; give trainer.{name}=1"


def _forbidden_sweep(jobs: list[DictConfig], command: str, multirun: bool) -> Iterator[str]:
    """Lightning's processes for further devices replay the command line: each would start the whole sweep anew."""
    for job in jobs:
        devices = OmegaConf.select(job, "trainer.devices", default=1)
        if _several(devices) and (multirun or job.hydra.mode == RunMode.MULTIRUN):
            own = " ".join(task_overrides(job.hydra))
            yield (
                f"trainer.devices={devices} in a multirun (-m): use trainer.devices=1, or run the jobs one by one"
                f" without -m: {PROGRAM} {command} {own}"
            )


def _sweep_of_one(jobs: list[DictConfig]) -> Iterator[str]:
    if any(job.get("resume") is not None for job in jobs):
        yield (
            "resume goes on with one run, without -m; a sweep goes on by its own command with hydra.sweep.dir=DIR, the"
            " folder it has"
        )


def _of_another_command(jobs: list[DictConfig], command: str) -> Iterator[str]:
    """An experiment names the command that it is a recipe for; with another one it makes no sense at all."""
    for job in jobs:
        other, experiment = job._target_.rpartition(".")[2], job.hydra.runtime.choices.get("experiment")
        if experiment and other != command:
            yield f"experiment={experiment} is for another command: {PROGRAM} {other} experiment={experiment}"


def _homeless(argv: list[str]) -> Iterator[str]:
    """torchrun's processes compose their configurations each on its own."""
    named = processes.shared_name() is not None or any("hydra.run.dir=" in word for word in argv)
    if processes.started() > 1 and not named:
        yield "the processes share no name for the run's folder: give hydra.run.dir=DIR, or torchrun --rdzv-id=NAME"


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """SIGTERM, like Ctrl-C, unwinds the stack, so that whatever it ends is recorded; training refines this.

    The workers of a pool unwind theirs, and this process waits for them; a second signal does not wait.
    """

    heard: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        workers = [] if heard else joblib_workers.workers()
        if not workers:
            raise SystemExit(128 + number)
        heard.append(number)
        for worker in workers:
            os.kill(worker, number)

    here = threading.current_thread() is threading.main_thread()  # only there Python allows it
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        raise SystemExit(128 + heard[0])


@contextmanager
def _hydra_sees(argv: list[str]) -> Iterator[None]:
    """hydra.main reads sys.argv, and raises errors as they are rather than printing them only if told so."""
    before, full_error = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")
    sys.argv[:] = argv
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv[:] = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _fail(*lines: str, status: int = 1) -> int:
    """What all processes of a job have to say alike is said once."""
    if processes.is_first():
        say(*lines)
    return status


def _print_help(known: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, description in known.items():
        table.add_row(f"  {name}", description)
    console = Console(highlight=False)
    console.print(f"usage: {PROGRAM} <command> [key=value ...]\n", markup=False)
    console.print(table)
    console.print(
        f"\nexamples:\n  {PROGRAM} train strategy=decoupled encoder=tinyvit"
        f"\n  {PROGRAM} evaluate checkpoint=outputs/train/RUN data=photos"
        f"\n  {PROGRAM} train --help          the choices and keys of a command"
        f"\n  {PROGRAM} train --cfg job       the configuration, without running",
        markup=False,
    )
