"""Run a command: `sam-distill <command> [overrides]`. Compose, check all, then build and call; mistakes are one line.

Exit status: 0 the job was done, 1 it failed, 2 the command line or a file of conf/ is wrong, 130 interrupted (Ctrl-C),
143 terminated (SIGTERM).
"""

from __future__ import annotations

import difflib
import gc
import logging
import os
import pkgutil
import random
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from sam_distill.cli.compose import compose_jobs
from sam_distill.cli.config import check, parameters
from sam_distill.cli.resume import continued, misplaced
from sam_distill.cli.sources import task_overrides
from sam_distill.cli.usage import print_usage
from sam_distill.engine import processes
from sam_distill.engine.status import Status, earlier

PROGRAM = "sam-distill"
tracebacks = logging.getLogger("sam_distill.tracebacks")  # goes to the log file only: conf/hydra/common.yaml


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
    conf_dir = (conf_dir or default_conf_dir()).resolve()
    token = secrets.token_hex(3)
    name = processes.shared_name() or f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{token}"
    OmegaConf.register_new_resolver("run_token", lambda: token, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda: name, replace=True)
    argv = [_in_full(command, word) for word in argv]
    if sum(word.startswith("runs=") for word in argv if command == "report") > 1:
        return _fail("runs: several folders given; name one that holds them all", status=2)
    try:
        with _signals_end_it():
            return _run(command, continued(list(argv)), conf_dir)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    except SystemExit as stop:  # Hydra's flags such as --help end this way
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        raise
    except Exception as error:  # before any job has begun, so there is no log: a folder that can't be made, for one
        return _fail(_describe(error))


def _in_full(command: str, word: str) -> str:
    """`bench data`, `report DIR`: what a command is mostly asked may be said in short."""
    if command == "bench" and word.isidentifier():
        return f"suite={word}"
    if command == "report" and word.startswith("experiment="):  # to Hydra a recipe for training
        return word.replace("experiment", "only", 1)
    if command == "report" and "=" not in word and not word.startswith("-"):
        return f"runs={word}"
    return word


def _run(command: str, argv: list[str], conf_dir: Path) -> int:
    args, unknown = get_args_parser().parse_known_intermixed_args(argv)
    if unknown:
        return _fail(*(f"{flag}: no such flag; see {PROGRAM} {command} --help" for flag in unknown), status=2)
    extra = [f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']"] if args.config_dir else []
    jobs, mistakes = compose_jobs(conf_dir, command, args.overrides + extra, args.multirun)
    if not (args.help or args.hydra_help or args.cfg or args.info or args.shell_completion):
        told = {line.partition("=")[0] for line in mistakes}  # a key that can't be read is not missing as well
        mistakes += [line for job in jobs for line in check(job) if line.partition("=")[0] not in told]
        mistakes = list(_of_another_command(jobs, command)) or mistakes
        mistakes += _forbidden_sweep(jobs, command, args.multirun)
        mistakes += [] if args.multirun else [line for job in jobs for line in misplaced(job)]
        mistakes += _homeless(argv)
    if mistakes:
        return _fail(*dict.fromkeys(mistakes), status=2)
    if args.help:
        print_usage(jobs[0])
        return 0

    failed: list[str] = []
    original = list(sys.argv)

    def task(cfg: DictConfig) -> None:
        sys.argv[:] = original  # Lightning starts the other processes of a DDP job by this
        _run_job(cfg, command, argv, failed)

    flags = [word for word in argv if word not in args.overrides]
    with _hydra_sees([original[0], *flags, *args.overrides]):
        hydra.main(config_path=str(conf_dir), config_name=command, version_base="1.3")(task)()
    if failed and len(jobs) > 1:
        return _fail(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}")
    return int(bool(failed))


def _forbidden_sweep(jobs: list[DictConfig], command: str, multirun: bool) -> Iterator[str]:
    """Lightning's processes for further devices replay the command line: each would start the whole sweep anew."""
    for job in jobs:
        devices = OmegaConf.select(job, "trainer.devices", default=1)
        several = len(devices) > 1 if OmegaConf.is_list(devices) else str(devices) not in ("auto", "0", "1", "None")
        if several and (multirun or job.hydra.mode == RunMode.MULTIRUN):
            own = " ".join(task_overrides(job.hydra))
            yield (
                f"trainer.devices={devices} in a multirun (-m): use trainer.devices=1, or run the jobs one by one"
                f" without -m: {PROGRAM} {command} {own}"
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


def _run_job(cfg: DictConfig, command: str, argv: list[str], failed: list[str]) -> None:
    """One job in its run folder. Failures are told, recorded and added to `failed`; a multirun goes on."""
    settings = HydraConfig.get()
    run_dir = Path(settings.runtime.output_dir)
    log = run_dir / f"{settings.job.name}.log"
    swept = settings.mode == RunMode.MULTIRUN
    has_folder = "run_dir" in parameters(pkgutil.resolve_name(cfg._target_))
    recorded = has_folder and not cfg.get("plan")
    words = [command, *(task_overrides(settings) if swept else argv)]
    first = processes.is_first()
    if swept and recorded and _done_before(cfg, run_dir):
        print(f"job {settings.job.num} ({settings.job.override_dirname}) has finished before: {run_dir}")
        return
    choices = {g: c for g, c in settings.runtime.choices.items() if c and not g.startswith("hydra/")}
    status = Status(run_dir, words, choices, first, recorded, resumed=cfg.get("resume") is not None)
    if not first:
        log = log.with_suffix(f".{processes.name()}.log")
        _be_quiet(log)
    try:
        status.begin(OmegaConf.to_yaml(cfg, resolve=True))
        _seed(cfg.get("seed"))
        instantiate(cfg, _convert_="all", **({"run_dir": run_dir} if has_folder else {}))
    except Exception as error:
        from sam_distill.types import UserError  # brings torch, which --help should not wait for

        cause = _unwrap(error)
        expected = isinstance(cause, UserError)
        # A loader's worker process sends its traceback along, the message last.
        why = str(cause).rpartition("UserError: ")[2].strip() if expected else _describe(cause)
        if recorded or not expected:  # a command without records leaves no log behind for a user's mistake
            tracebacks.exception(why)
        failed.append(str(settings.job.num) if swept else command)
        if not first:
            time.sleep(1)  # where all processes fail alike, the first one says so
            why = f"{processes.name()}: {why}"
        if status.end(why):
            where = f"job {settings.job.num} ({settings.job.override_dirname}): " if swept else ""
            _say(where + why + ("" if expected else f" (traceback in {log})"))
    except BaseException as stop:  # a signal or sys.exit
        code = 130 if isinstance(stop, KeyboardInterrupt) else getattr(stop, "code", None)
        signalled = {130: "interrupted", 143: "interrupted by SIGTERM"}.get(code) if isinstance(code, int) else None
        if first and status.end(signalled or _describe(stop)) and signalled:
            goes_on = (run_dir / "checkpoints" / "last.ckpt").is_file()
            _say(signalled + (f"; resume={run_dir} goes on from the last checkpoint" if goes_on else ""))
        raise SystemExit(code) from stop
    else:
        status.end(None)
    finally:
        gc.collect()  # trainer and module refer to each other; the next job of a sweep needs their memory


def _done_before(cfg: DictConfig, run_dir: Path) -> bool:
    """A sweep that is run again in its folder does what is missing: jobs that were cut short go on where they were."""
    before = earlier(run_dir, OmegaConf.to_yaml(cfg, resolve=True))
    if before not in (None, "finished") and "resume" in cfg and (run_dir / "checkpoints" / "last.ckpt").is_file():
        cfg.resume = str(run_dir)
    return before == "finished"


def _be_quiet(log: Path) -> None:
    """The first process speaks for all; what another has to say goes to a log of its own."""
    handler = logging.FileHandler(log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for logger in (logging.getLogger(), tracebacks):
        logger.handlers[:] = [handler]
    logging.getLogger().setLevel(logging.WARNING)
    warnings.simplefilter("ignore")


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """SIGTERM, like Ctrl-C, unwinds the stack, so that whatever it ends is recorded; the engine refines this."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()  # only there Python allows it
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _seed(seed: int | None) -> None:
    """The same on every rank, so that all build the same model; 0 is a seed."""
    if seed is not None:
        import numpy as np
        import torch

        for start in (random.seed, np.random.seed, torch.manual_seed):
            start(seed)


def _unwrap(error: BaseException) -> BaseException:
    """The error that Hydra's instantiate wrapped."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _describe(error: BaseException) -> str:
    """Type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _fail(*lines: str, status: int = 1) -> int:
    """What all processes of a job have to say alike is said once."""
    if processes.is_first():
        _say(*lines)
    return status


def _say(*lines: str) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)


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
