"""Run one job of a command and keep its record. A launcher such as joblib's runs the job in another process."""

import gc
import logging
import random
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sam_distill.cli.console import discard_output
from sam_distill.cli.resume import why_occupied
from sam_distill.config.check import RUN_DIR, keeps_run_folder
from sam_distill.config.sources import task_overrides
from sam_distill.errors import UserError
from sam_distill.files import LAST_CHECKPOINT, disk_is_full
from sam_distill.runs import joblib_workers, processes
from sam_distill.runs.status import Status, earlier_outcome, writing

tracebacks = logging.getLogger("sam_distill.tracebacks")  # goes to the log file only: conf/hydra/common.yaml


def register_folder_resolvers(token: str, name: str) -> None:
    """Register the values of ${run_token:} and ${run_name:}, which conf/ uses in folder names."""
    OmegaConf.register_new_resolver("run_token", lambda: token, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda: name, replace=True)


class Task:
    """Callable that Hydra runs for each job of a command; returns whether the job succeeded.

    argv: the command line. folders: the arguments of `register_folder_resolvers`.
    """

    def __init__(self, command: str, argv: list[str], folders: tuple[str, str]) -> None:
        self.command, self.argv, self.folders = command, argv, folders

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the task in a worker process and prepare that process, before Hydra composes the job there."""
        self.__dict__.update(state)
        register_folder_resolvers(*self.folders)
        if joblib_workers.is_worker():
            joblib_workers.set_up_worker()

    def __call__(self, cfg: DictConfig) -> bool:
        return (
            joblib_workers.run_unless_stopped(lambda: self._run(cfg)) if joblib_workers.is_worker() else self._run(cfg)
        )

    def _run(self, cfg: DictConfig) -> bool:
        """Return whether the job succeeded. Failures are printed and recorded, so that a multirun continues."""
        settings = HydraConfig.get()
        run_dir = Path(settings.runtime.output_dir)
        swept = settings.mode == RunMode.MULTIRUN
        has_folder = keeps_run_folder(cfg)
        recorded = has_folder and not cfg.get("plan")
        which = f"job {settings.job.num} ({settings.job.override_dirname})" if swept else ""
        if swept and recorded:  # the sweep may have run before
            outcome = earlier_outcome(run_dir, OmegaConf.to_yaml(cfg, resolve=True))
            if outcome == "finished":
                print(f"{which} has finished before: {run_dir}")
                return True
            if outcome is not None and "resume" in cfg and (run_dir / LAST_CHECKPOINT).is_file():
                cfg.resume = str(run_dir)
            if cfg.get("resume") is None and (line := why_occupied(run_dir, self.command)):
                print_errors(f"{which}: {line}")
                return False
        words = [self.command, *(task_overrides(settings) if swept else self.argv)]
        choices = {g: c for g, c in settings.runtime.choices.items() if c and not g.startswith("hydra/")}
        first = processes.is_first()
        status = Status(run_dir, words, choices, first, recorded, resumed=cfg.get("resume") is not None)
        log = run_dir / f"{settings.job.name}.log"
        if not first:
            log = log.with_suffix(f".{processes.rank_name()}.log")
            _log_to_file_only(log)
        supplied = {RUN_DIR: run_dir} if has_folder else {}
        Console.on_broken_pipe = discard_output  # type: ignore[assignment, method-assign]  # rich would end the job instead
        try:
            with writing(run_dir) if first and recorded else nullcontext():
                return _execute(cfg, supplied, status, log, f"{which}: " if swept else "")
        except UserError as error:  # another process is writing there; `_execute` reports errors of the job
            print_errors(str(error))
            return False


def _execute(cfg: DictConfig, supplied: dict[str, Path], status: Status, log: Path, prefix: str) -> bool:
    """Build the command's arguments and call it. supplied: arguments not in `cfg`. prefix: start of error messages."""
    run_dir, first, recorded = status.run_dir, status.first, status.recorded
    can_resume = (run_dir / LAST_CHECKPOINT).is_file
    try:
        status.begin(OmegaConf.to_yaml(cfg, resolve=True))
        _seed(cfg.get("seed"))
        instantiate(cfg, _convert_="all", **supplied)
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:  # Hydra wraps errors
            cause = cause.__cause__
        if not isinstance(cause, UserError) and disk_is_full(cause):
            cause = UserError(
                "the disk is full: make room" + (f", then resume={run_dir} goes on" if can_resume() else "")
            )
        expected = isinstance(cause, UserError)
        # An error in a loader worker arrives with the worker's traceback; its message comes last.
        why = str(cause).rpartition("UserError: ")[2].strip() if expected else describe_error(cause)
        where = "" if expected else f" (traceback in {log})"
        if recorded or not expected:  # a command without a record writes no log for a user's mistake
            try:
                tracebacks.exception(why)
            except OSError:  # no log can be written here
                traceback.print_exc()
                where = ""
        if not first:
            time.sleep(1)  # if all processes fail alike, the first one reports it
            why = f"{processes.rank_name()}: {why}"
        if status.end(why):
            print_errors(prefix + why + where)
        return False
    except BaseException as stop:  # a signal or sys.exit
        code = 130 if isinstance(stop, KeyboardInterrupt) else getattr(stop, "code", None)
        names = {128 + number: f"interrupted by {number.name}" for number in processes.STOP_SIGNALS}
        signalled = (names | {130: "interrupted"}).get(code) if isinstance(code, int) else None
        if first and status.end(signalled or describe_error(stop)) and signalled:
            print_errors(signalled + (f"; resume={run_dir} goes on from the last checkpoint" if can_resume() else ""))
        raise SystemExit(code) from stop
    else:
        status.end(None)
        return True
    finally:
        gc.collect()  # trainer and module form a reference cycle; the next job of a sweep needs their memory


def _log_to_file_only(log: Path) -> None:
    """Log to a file instead of the console, in all processes but the first."""
    handler = logging.FileHandler(log, delay=True, errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for logger in (logging.getLogger(), tracebacks):
        logger.handlers[:] = [handler]
    logging.getLogger().setLevel(logging.WARNING)
    warnings.simplefilter("ignore")


def _seed(seed: int | None) -> None:
    """Set the same seed on every rank, so that all build the same model. None: set no seed; 0 is a seed."""
    if seed is not None:
        import numpy as np
        import torch

        for start in (random.seed, np.random.seed, torch.manual_seed):
            start(seed)


def describe_error(error: BaseException) -> str:
    """Return an error's type and message on one line; for a file that can't be accessed, its name and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def print_errors(*lines: str) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
