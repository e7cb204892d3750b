"""Compose a command's jobs before Hydra's own run does, so that every mistake in them can be told at once.

Hydra stops at the first bad override. Here each is tried by itself once composing them together has failed.
"""

from __future__ import annotations

import pkgutil
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_distill.cli.config import nearest, one_line, parameters


def _when(given: str, wanted: str | Sequence[str], value: Any, otherwise: Any = None) -> Any:
    """${when:given,wanted,value,otherwise}: where one choice follows another. wanted: one value, or a list of them."""
    choices = [wanted] if isinstance(wanted, str) else wanted
    return value if given in choices else otherwise


OmegaConf.register_new_resolver("when", _when, replace=True)


def _scaled(paper: Any, small: Any, *, _root_: DictConfig) -> Any:
    """${scaled:paper,small}: the paper's own number, or what a CPU can do in an hour, as `scale` says."""
    return small if _root_.get("scale") == "small" else paper


OmegaConf.register_new_resolver("scaled", _scaled, replace=True)

BAD_CONFIG = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)  # what composing raises


def compose_jobs(
    conf_dir: Path, command: str, overrides: list[str], multirun: bool = False
) -> tuple[list[DictConfig], list[str]]:
    """The jobs that a command line stands for (several only in a multirun), and one line for each mistake in it.

    Jobs keep their `hydra` node, and leave out the overrides that are mistakes. No jobs: the files themselves are bad.
    """
    with initialize_config_dir(str(conf_dir), job_name=command, version_base="1.3"):
        composer = _Composer(command)
        parsed = composer.parse(overrides)
        try:
            fixed = composer.compose_good([str(o.input_line) for o in parsed if not o.is_sweep_override()])
            swept = multirun or fixed.hydra.mode == RunMode.MULTIRUN  # an experiment can ask for a multirun, too
            jobs = composer.jobs(parsed, fixed) if swept else [composer.single(parsed)]
            configs = [composer.compose_good(job) for job in jobs]
        except BAD_CONFIG as error:
            return [], [*composer.mistakes, f"{conf_dir.name}/{command}.yaml: {_why(error)}"]
        return configs, list(dict.fromkeys(composer.mistakes))


class _Composer:
    """Hydra's loader within `initialize_config_dir`, collecting mistakes instead of raising them."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.mistakes: list[str] = []
        self.loader: ConfigLoader = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)

    def compose(self, overrides: list[str]) -> DictConfig:
        return self.loader.load_configuration(self.command, overrides, run_mode=RunMode.RUN, from_shell=False)

    def parse(self, overrides: list[str]) -> list[Override]:
        parsed, words = [], list(overrides)
        while words:
            text = words.pop(0)
            if apart := _set_apart(text, words):
                del words[: len(apart)]
                together = "".join([text, *apart])
                self.mistakes.append(f"{' '.join([text, *apart])}: leave out the spaces: {shlex.quote(together)}")
                continue
            try:
                parsed.append(self.parser.parse_override(text))
            except HydraException as error:
                torn = _torn_off(text, words)
                del words[: len(torn)]
                self.mistakes.append(_unreadable(text, torn, one_line(error)))
        return parsed

    def single(self, parsed: list[Override]) -> list[str]:
        """One job's overrides: without -m, nothing may have several values."""
        for override in parsed:
            if override.is_sweep_override():
                key, value = override.get_key_element(), str(override.input_line).partition("=")[2]
                said = f"several values need -m (a sweep); a list is {key}=[{value}], one value {key}='\"{value}\"'"
                self.mistakes.append(f"{override.input_line}: {said}")
        return [str(override.input_line) for override in parsed if not override.is_sweep_override()]

    def jobs(self, parsed: list[Override], fixed: DictConfig) -> list[list[str]]:
        """Each job's overrides, as Hydra's own sweeper makes them, the sweep of an experiment file included."""
        swept = [f"{key}={value}" for key, value in (fixed.hydra.sweeper.get("params") or {}).items()]
        try:
            return BasicSweeper.split_arguments(self.parser.parse_overrides(swept) + parsed, None)[0]
        except HydraException as error:  # a continuous range, which needs another sweeper
            self.mistakes.append(f"-m: {one_line(error)}")
            return []

    def compose_good(self, overrides: list[str]) -> DictConfig:
        """Compose with as many of the overrides as can be; the rest are mistakes."""
        try:
            return self.compose(overrides)
        except BAD_CONFIG:
            good = self.compose([])  # raises if the files themselves are at fault
        parsed = self.parser.parse_overrides(overrides)
        kept: list[str] = []
        refused: list[str] = []
        for override in sorted(parsed, key=lambda o: not self._choices(o)):  # values may need the choices
            if any(str(override.key_or_group).startswith(group + ".") for group in refused):
                continue  # about a node that isn't there for another reason
            try:
                good = self.compose([*kept, str(override.input_line)])
                kept.append(str(override.input_line))
            except BAD_CONFIG as error:
                self.mistakes.append(f"{override.input_line}: {self._explain(override, error, good)}")
                refused.append(str(override.key_or_group))
        return good

    def _choices(self, override: Override) -> list[str]:
        return self.loader.get_group_options(str(override.key_or_group))

    def _explain(self, override: Override, error: Exception, cfg: DictConfig) -> str:
        key, choices = str(override.key_or_group), self._choices(override)
        value = override.value()
        wrong = [str(v) for v in (value if isinstance(value, list) else [value]) if v not in choices]
        if choices and wrong:
            guess = nearest(wrong[0], choices)
            more = "; pip install 'sam-distill[sweeps]' brings joblib and submitit_*" if key == "hydra/launcher" else ""
            return f"no such choice;{guess and f' did you mean {guess}?'} choices: {', '.join(choices)}{more}"
        known = set(_dotted_names(cfg))
        if choices or key in known or key.startswith("hydra.") or override.is_add():
            return _why(error)
        parent = key.rpartition(".")[0]
        allowed = _parameters_of(cfg, parent)
        if key in allowed:  # a parameter with a default of its own, that no file mentions
            return f"in no file yet; add it with +{override.input_line}"
        if elsewhere := self._choices_with(key):
            return f"no such key with the {key.partition('.')[0]} chosen; there is one with {', '.join(elsewhere)}"
        guess = nearest(key, known | allowed)
        return f"no such key{guess and f'; did you mean {guess}?'}"

    def _choices_with(self, key: str) -> list[str]:
        """Choices of the group that `key` begins with, such as strategy=coupled, that do have this key."""
        group, having = key.partition(".")[0], []
        for choice in self.loader.get_group_options(group):
            with suppress(*BAD_CONFIG):
                if key in _dotted_names(self.compose([f"{group}={choice}"])):
                    having.append(f"{group}={choice}")
        return having


def _set_apart(text: str, words: list[str]) -> list[str]:
    """What belongs to `text`, as in `batch_size = 4`, which the shell takes apart at its spaces."""
    if "=" not in text and words and words[0].startswith("="):
        return words[:2] if words[0] == "=" else words[:1]
    lone = text.endswith("=") and bool(words) and "=" not in words[0] and not words[0].startswith(("-", "~"))
    return words[:1] if lone else []


def _torn_off(text: str, words: list[str]) -> list[str]:
    """The words that belong to `text`, as in `point=[10, 20]` without quotes, which the shell splits at its space."""
    ends = (end for end in range(1, len(words) + 1) if _open_brackets(" ".join([text, *words[:end]])) == 0)
    return words[: next(ends, 0)] if _open_brackets(text) > 0 else []


def _open_brackets(text: str) -> int:
    return sum((char in "[{(") - (char in ")}]") for char in text)


def _unreadable(text: str, torn: list[str], reason: str) -> str:
    """A line about an override that isn't one; what it says to write works when pasted into a shell."""
    whole = " ".join([text, *torn])
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text}: not an override; write key=value"
    if torn:
        return f"{whole}: torn apart at its spaces; leave them out, or quote it: {shlex.quote(whole)}"
    if _open_brackets(text) > 0:
        return f"{text}: a bracket is not closed"
    quoted = value.replace('"', '\\"')
    return f"{text}: can't be read ({reason}); quote it: " + shlex.quote(f'{key}="{quoted}"')


def _why(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    return one_line(error.__cause__ or error)


def _dotted_names(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        name = prefix + str(key)
        if name == "hydra" or str(key).startswith("_"):
            continue
        yield name
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from _dotted_names(child, name + ".")


def _parameters_of(cfg: DictConfig, parent: str) -> set[str]:
    """Dotted names of what the target of the node `parent` accepts."""
    node: Any = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else cfg
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return set()
    try:
        names = parameters(pkgutil.resolve_name(node._target_))
    except Exception:  # check() tells what is wrong with the target
        return set()
    return {f"{parent}.{name}" if parent else name for name in names}
