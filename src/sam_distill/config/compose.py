"""Compose a command's jobs before Hydra does: Hydra stops at the first bad override, but all should be reported."""

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_distill.config.check import first_line, nearest, parameters
from sam_distill.config.signatures import resolve
from sam_distill.config.sources import leaves
from sam_distill.runs.overrides import quoted_override


def _when(given: str, wanted: str | Sequence[str], value: Any, otherwise: Any = None) -> Any:
    """Resolve ${when:given,wanted,value,otherwise}: one choice depends on another. wanted: one value, or a list."""
    choices = [wanted] if isinstance(wanted, str) else wanted
    return value if given in choices else otherwise


OmegaConf.register_new_resolver("when", _when, replace=True)


def _scaled(paper: Any, small: Any, *, _root_: DictConfig) -> Any:
    """Resolve ${scaled:paper,small} by `scale`: the paper's number, or one that lets a CPU finish in an hour."""
    return small if _root_.get("scale") == "small" else paper


OmegaConf.register_new_resolver("scaled", _scaled, replace=True)

BAD_CONFIG = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)  # raised while composing
_CHOICE_HINTS = {  # hints for a choice that does not exist, by group
    "hydra/launcher": "; pip install 'sam-distill[sweeps]' brings joblib and submitit_*",
    "teacher": "; for any other SAM give teacher.checkpoint=...",
    "data": "; for a folder of images give data=folder data.path=...",
}


def compose_jobs(
    conf_dir: Path, command: str, overrides: list[str], multirun: bool = False
) -> tuple[list[DictConfig], list[str]]:
    """Return the configuration of each job (several only in a multirun), and one line for each mistake.

    Configurations keep their `hydra` node and omit wrong overrides. If the files of conf/ are wrong, there are none.
    """
    with initialize_config_dir(str(conf_dir), job_name=command, version_base="1.3"):
        composer = _Composer(command)
        parsed = composer.parse(overrides)
        try:
            config = composer.compose_good([o for o in parsed if not o.is_sweep_override()])
            if multirun or config.hydra.mode == RunMode.MULTIRUN:  # an experiment can ask for a multirun, too
                configs = [composer.compose_good(job) for job in composer.jobs(parsed, config)]
            else:
                composer.refuse_sweeps(parsed)
                configs = [config]
        except BAD_CONFIG as error:
            return [], [*composer.mistakes, f"{conf_dir.name}/{command}.yaml: {_reason(error)}"]
        return configs, list(dict.fromkeys(composer.mistakes))


class _Composer:
    """Wrapper of Hydra's compose that collects mistakes instead of raising; needs `initialize_config_dir` around it."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.mistakes: list[str] = []
        self.loader = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)

    def compose(self, overrides: Sequence[Override | str]) -> DictConfig:
        words = [o if isinstance(o, str) else str(o.input_line) for o in overrides]
        return compose(self.command, words, return_hydra_config=True)

    def parse(self, overrides: list[str]) -> list[Override]:
        parsed, words = [], list(overrides)
        while words:
            text = words.pop(0)
            if rest := _separated_by_spaces(text, words):
                del words[: len(rest)]
                together = "".join([text, *rest])
                self.mistakes.append(f"{' '.join([text, *rest])}: leave out the spaces: {shlex.quote(together)}")
                continue
            try:
                parsed.append(self.parser.parse_override(text))
            except HydraException as error:
                rest = _rest_of_list(text, words)
                del words[: len(rest)]
                self.mistakes.append(_unreadable(text, rest, first_line(error)))
        return parsed

    def refuse_sweeps(self, parsed: list[Override]) -> None:
        """Report each override that has several values: that needs -m."""
        for override in parsed:
            if override.is_sweep_override():
                key, value = override.get_key_element(), str(override.input_line).partition("=")[2]
                advice = f"several values need -m (a sweep); a list is {key}=[{value}], one value {key}='\"{value}\"'"
                self.mistakes.append(f"{override.input_line}: {advice}")

    def jobs(self, parsed: list[Override], config: DictConfig) -> list[list[Override]]:
        """Return each job's overrides as Hydra's own sweeper makes them, including the sweep of an experiment file."""
        swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        values: dict[str, list[str]] = {}
        for override in self.parser.parse_overrides(swept) + parsed:
            key = override.get_key_element()
            if override.is_sweep_override() and not override.is_discrete_sweep():
                self.mistakes.append(f"{override.input_line}: a range without steps needs another hydra/sweeper")
                return []
            one = [override.get_value_element_as_str()] if not override.is_sweep_override() else None
            values[key] = [f"{key}={value}" for value in one or override.sweep_string_iterator()]
        return [self.parser.parse_overrides(list(job)) for job in product(*values.values())]

    def compose_good(self, parsed: Sequence[Override]) -> DictConfig:
        """Compose with as many of the overrides as possible, and report the rest as mistakes."""
        # Only Hydra's compose sees the choices in additional folders, such as --config-dir.
        checkable = [] if any(override.key_or_group == "hydra.searchpath" for override in parsed) else parsed
        wrong = [(override, names[0]) for override in checkable if (names := self._wrong_choices(override))]
        self.mistakes += [f"{override.input_line}: {self._no_such_choice(override, name)}" for override, name in wrong]
        refused = [override for override, _ in wrong]
        rest = [override for override in parsed if not (override in refused or _is_within(override, refused))]
        with suppress(*BAD_CONFIG):
            return self.compose(rest)
        good: list[Override] = []
        config = self.compose(good)  # raises if the files themselves are wrong
        for override in sorted(rest, key=lambda o: not self._choices(o)):  # choices first: values may need them
            if _is_within(override, refused):
                continue
            try:
                config = self.compose([*good, override])
                good.append(override)
            except BAD_CONFIG as error:
                self.mistakes.append(f"{override.input_line}: {self._explain(override, error, config)}")
                refused.append(override)
        return config

    def _choices(self, override: Override) -> list[str]:
        return self.loader.get_group_options(str(override.key_or_group))

    def _wrong_choices(self, override: Override) -> list[str]:
        """Return the chosen names that their group does not have. Paths and interpolations are left to Hydra."""
        if not (choices := self._choices(override)) or override.is_sweep_override():
            return []
        value = override.value()
        chosen = [str(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
        return [name for name in chosen if name.removesuffix(".yaml") not in choices and not set(name) & set("/$")]

    def _no_such_choice(self, override: Override, wrong: str) -> str:
        key, choices = override.key_or_group, self._choices(override)
        guess = nearest(wrong, choices)
        more = _CHOICE_HINTS.get(key, "")
        return f"no such choice;{guess and f' did you mean {guess}?'} choices: {', '.join(choices)}{more}"

    def _explain(self, override: Override, error: Exception, cfg: DictConfig) -> str:
        key, value = str(override.key_or_group), override.value()
        known = _dotted_names(cfg)
        if isinstance(error, MissingConfigException) and isinstance(value, str) and self._choices(override):
            return self._no_such_choice(override, value)
        if isinstance(value, dict) and (wrong := [name for name in value if f"{key}.{name}" not in known]):
            there = [name.rpartition(".")[2] for name in sorted(known) if name.rpartition(".")[0] == key]
            return f"no such key: {wrong[0]}; there are {', '.join(there)}" if there else _reason(error)
        if self._choices(override) or key in known or key.startswith("hydra.") or override.is_add():
            return _reason(error)
        parent = key.rpartition(".")[0]
        allowed = _parameters_of(cfg, parent)
        if key in allowed:  # a parameter with a default, which no file mentions
            return f"in no file yet; add it with +{override.input_line}"
        if elsewhere := self._choices_with(key):
            return f"no such key with the {key.partition('.')[0]} chosen; there is one with {', '.join(elsewhere)}"
        guess = nearest(key, known | allowed)
        return f"no such key{guess and f'; did you mean {guess}?'}"

    def _choices_with(self, key: str) -> list[str]:
        """Return the choices that have this key, such as strategy=coupled, in the group that `key` begins with."""
        group, having = key.partition(".")[0], []
        for choice in self.loader.get_group_options(group):
            with suppress(*BAD_CONFIG):
                if key in _dotted_names(self.compose([f"{group}={choice}"])):
                    having.append(f"{group}={choice}")
        return having


def _is_within(override: Override, refused: Sequence[Override]) -> bool:
    """Whether the override belongs to a node that is missing because its choice was refused."""
    return any(str(override.key_or_group).startswith(f"{other.key_or_group}.") for other in refused)


def _separated_by_spaces(text: str, words: list[str]) -> list[str]:
    """Return the words that belong to `text`, as in `batch_size = 4`, which the shell splits at its spaces."""
    if "=" not in text and words and words[0].startswith("="):
        return words[:2] if words[0] == "=" else words[:1]
    lone = text.endswith("=") and bool(words) and "=" not in words[0] and not words[0].startswith(("-", "~"))
    return words[:1] if lone else []


def _rest_of_list(text: str, words: list[str]) -> list[str]:
    """Return the words that belong to `text`, as in `point=[10, 20]` unquoted, which the shell splits at its space."""
    ends = (end for end in range(1, len(words) + 1) if _open_brackets(" ".join([text, *words[:end]])) == 0)
    return words[: next(ends, 0)] if _open_brackets(text) > 0 else []


def _open_brackets(text: str) -> int:
    return sum((char in "[{(") - (char in ")}]") for char in text)


def _unreadable(text: str, rest: list[str], reason: str) -> str:
    """Return the message for an override that can't be parsed; its suggestion can be pasted into a shell."""
    together = " ".join([text, *rest])
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text}: not an override; write key=value"
    if rest:
        return f"{together}: torn apart at its spaces; leave them out, or quote it: {shlex.quote(together)}"
    if _open_brackets(text) > 0:
        return f"{text}: a bracket is not closed"
    if "(" in value and re.fullmatch(r"[-+\d.e,\s()\[\]]+", value):  # a tuple, as in Python
        listed = value.translate(str.maketrans("()", "[]"))
        return f"{text}: lists have square brackets: {shlex.quote(f'{key}={listed}')}"
    return f"{text}: can't be read ({reason}); quote it: " + shlex.quote(quoted_override(key, value))


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    return first_line(error.__cause__ or error)


def _dotted_names(cfg: DictConfig) -> set[str]:
    """Return the dotted names of all nodes and values, without Hydra's own."""
    paths = [key.split(".") for key, _ in leaves(OmegaConf.to_container(cfg, resolve=False))]
    names = {tuple(path[:end]) for path in paths for end in range(1, len(path) + 1) if path[0] != "hydra"}
    return {".".join(name) for name in names if not name[-1].startswith("_")}


def _parameters_of(cfg: DictConfig, parent: str) -> set[str]:
    """Return the dotted names of the parameters that the target of the node `parent` accepts."""
    node: Any = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else cfg
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return set()
    try:
        names = parameters(resolve(node._target_))
    except Exception:  # check() reports what is wrong with the target
        return set()
    return {f"{parent}.{name}" if parent else name for name in names}
