"""One job of a command: build it, call it, keep its record. A launcher such as joblib's runs it in another process."""

from __future__ import annotations

import gc
import logging
import pkgutil
import random
import sys
import time
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sam_distill.cli import joblib_workers
from sam_distill.cli.config import parameters
from sam_distill.cli.resume import LAST, taken
from sam_distill.cli.sources import task_overrides
from sam_distill.files import disk_is_full
from sam_distill.runs import processes
from sam_distill.runs.status import Status, earlier, writing

tracebacks = logging.getLogger("sam_distill.tracebacks")  # goes to the log file only: conf/hydra/common.yaml


def name_folders(token: str, name: str) -> None:
    """What ${run_token:} and ${run_name:} of conf/ stand for."""
    OmegaConf.register_new_resolver("run_token", lambda: token, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda: name, replace=True)


class Task:
    """What Hydra calls for each job of a command; answers whether the job was done.

    argv: the command line. folders: the arguments of `name_folders`.
    """

    def __init__(self, command: str, argv: list[str], folders: tuple[str, str]) -> None:
        self.command, self.argv, self.folders = command, argv, folders

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker process, before Hydra composes the job there."""
        self.__dict__.update(state)
        name_folders(*self.folders)
        if joblib_workers.is_worker():
            joblib_workers.set_up_worker()

    def __call__(self, cfg: DictConfig) -> bool:
        return joblib_workers.unless_stopped(lambda: self._run(cfg)) if joblib_workers.is_worker() else self._run(cfg)

    def _run(self, cfg: DictConfig) -> bool:
        """Failures are told and recorded; a multirun goes on."""
        settings = HydraConfig.get()
        run_dir = Path(settings.runtime.output_dir)
        swept = settings.mode == RunMode.MULTIRUN
        has_folder = "run_dir" in parameters(pkgutil.resolve_name(cfg._target_))
        recorded = has_folder and not cfg.get("plan")
        words = [self.command, *(task_overrides(settings) if swept else self.argv)]
        first = processes.is_first()
        which = f"job {settings.job.num} ({settings.job.override_dirname})" if swept else ""
        if swept and recorded and _done_before(cfg, run_dir):
            print(f"{which} has finished before: {run_dir}")
            return True
        if swept and recorded and cfg.get("resume") is None and (line := taken(run_dir, self.command)):
            say(f"{which}: {line}")
            return False
        choices = {g: c for g, c in settings.runtime.choices.items() if c and not g.startswith("hydra/")}
        status = Status(run_dir, words, choices, first, recorded, resumed=cfg.get("resume") is not None)
        log = run_dir / f"{settings.job.name}.log"
        if not first:
            log = log.with_suffix(f".{processes.name()}.log")
            _be_quiet(log)
        with ExitStack() as held:
            try:
                held.enter_context(writing(run_dir) if first and recorded else nullcontext())
            except Exception as busy:
                say(str(busy))
                return False
            return _carry_out(
                cfg, {"run_dir": run_dir} if has_folder else {}, status, log, f"{which}: " if swept else ""
            )


def _carry_out(cfg: DictConfig, given: dict[str, Path], status: Status, log: Path, where: str) -> bool:
    """given: arguments beside `cfg`. where: begins what is told."""
    run_dir, first, recorded = status.run_dir, status.first, status.recorded
    try:
        status.begin(OmegaConf.to_yaml(cfg, resolve=True))
        _seed(cfg.get("seed"))
        instantiate(cfg, _convert_="all", **given)
    except Exception as error:
        from sam_distill.types import UserError  # brings torch, which --help should not wait for

        cause = _unwrap(error)
        if not isinstance(cause, UserError) and disk_is_full(cause):
            again = f", then resume={run_dir} goes on" if (run_dir / LAST).is_file() else ""
            cause = UserError(f"the disk is full: make room{again}")
        expected = isinstance(cause, UserError)
        # A loader's worker process sends its traceback along, the message last.
        why = str(cause).rpartition("UserError: ")[2].strip() if expected else describe(cause)
        if recorded or not expected:  # a command without records leaves no log behind for a user's mistake
            tracebacks.exception(why)
        if not first:
            time.sleep(1)  # where all processes fail alike, the first one says so
            why = f"{processes.name()}: {why}"
        if status.end(why):
            say(where + why + ("" if expected else f" (traceback in {log})"))
        return False
    except BaseException as stop:  # a signal or sys.exit
        code = 130 if isinstance(stop, KeyboardInterrupt) else getattr(stop, "code", None)
        signalled = {130: "interrupted", 143: "interrupted by SIGTERM"}.get(code) if isinstance(code, int) else None
        if first and status.end(signalled or describe(stop)) and signalled:
            goes_on = (run_dir / LAST).is_file()
            say(signalled + (f"; resume={run_dir} goes on from the last checkpoint" if goes_on else ""))
        raise SystemExit(code) from stop
    else:
        status.end(None)
        return True
    finally:
        gc.collect()  # trainer and module refer to each other; the next job of a sweep needs their memory


def _done_before(cfg: DictConfig, run_dir: Path) -> bool:
    """A sweep that is run again in its folder does what is missing: jobs that were cut short go on where they were."""
    before = earlier(run_dir, OmegaConf.to_yaml(cfg, resolve=True))
    if before not in (None, "finished") and "resume" in cfg and (run_dir / LAST).is_file():
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


def describe(error: BaseException) -> str:
    """Type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def say(*lines: str) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
