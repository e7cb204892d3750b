"""Find the file that set a key of a composed configuration, or the command line: Hydra does not keep this."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def task_overrides(hydra: Any) -> list[str]:
    """Return a job's overrides as typed; their interpolations refer to the job, not to Hydra's node."""
    return list(OmegaConf.to_container(hydra.overrides.task, resolve=False))  # type: ignore[arg-type]


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; a dict that is empty, or has keys that are not strings, is a value."""
    for key, value in node.items():
        if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@lru_cache
def _content(text: str) -> dict[str, Any]:
    """Return the content of a configuration file as plain YAML, which is enough to look up keys."""
    return yaml.load(text, _LOADER) or {}


class _Source(NamedTuple):
    """Configuration file and the dotted key under which its content is placed ("" is the root)."""

    name: str
    text: str
    package: str

    def own_key(self, key: str) -> str | None:
        """Return the key as written in the file itself, or None if the file's content is placed elsewhere."""
        if not self.package or key == self.package:
            return key.removeprefix(self.package)
        return key.removeprefix(self.package + ".") if key.startswith(self.package + ".") else None

    def defines(self, key: str) -> bool:
        own = self.own_key(key)
        if not own:
            return own == ""
        node: Any = _content(self.text)
        for part in own.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True


def _bases(path: Path) -> list[Path]:
    """Return the files of the same group that a choice includes in its defaults, as muon.yaml does adamw.yaml."""
    defaults = _content(path.read_text()).get("defaults") or []
    named = [name for name in defaults if isinstance(name, str) and "/" not in name]
    return [base for name in named if (base := path.with_name(f"{name}.yaml")).is_file()]


class Sources:
    """Files that one composed configuration was made from. cfg: with its `hydra` node."""

    def __init__(self, cfg: DictConfig) -> None:
        hydra = cfg.hydra
        self.choices: dict[str, Any] = dict(hydra.runtime.choices)
        self._target = cfg.get("_target_")
        self._overridden = {text.lstrip("+~").partition("=")[0] for text in task_overrides(hydra)} - set(self.choices)
        self._roots = [Path(s.path) for s in hydra.runtime.config_sources if s.schema == "file"]
        chosen = {hydra.job.config_name: ""} | {
            f"{group.partition('@')[0]}/{choice}": group.rpartition("@")[2].replace("/", ".")
            for group, choice in self.choices.items()
            if isinstance(choice, str) and not group.startswith("hydra/")
        }
        self._files = [
            _Source(f"{root.name}/{file.relative_to(root)}", text, "" if "@package _global_" in text else package)
            for name, package in chosen.items()
            for root in self._roots
            if (path := root / f"{name}.yaml").is_file()
            for file in [*_bases(path), path]
            for text in [file.read_text()]
        ]

    def where(self, key: str) -> str:
        """Return the last file that defines the key, or "command line"; for a missing key, the file of its node."""
        if any(f"{key}.".startswith(f"{override}.") for override in self._overridden):
            return "command line"
        return self._defining(key)[-1].name

    def comment(self, key: str) -> str:
        """Return the comment beside a key, or beside a group in the command's defaults list; "" if there is none."""
        name = re.escape(key.rpartition(".")[2])
        for file in reversed(self._files[:1] if key in self.choices else self._defining(key)):
            line = re.search(rf"^\s*(?:- )?(?:optional )?{name}:.*?#\s*(.+)$", file.text, re.MULTILINE)
            if line:
                return line.group(1).strip()
        return ""

    def options(self, group: str) -> list[str]:
        """Return the choices of a group, without experiments for other commands."""
        files = [path for root in self._roots for path in (root / group).glob("*.yaml")]
        if group == "experiment":
            files = [path for path in files if _content(path.read_text()).get("_target_") in (None, self._target)]
        return sorted({path.stem for path in files})

    def _defining(self, key: str) -> list[_Source]:
        """Return the files that define `key`, the effective one last; else the file of the node it would belong to."""
        inside = [file for file in self._files if file.own_key(key) is not None]
        return [file for file in inside if file.defines(key)] or [max(inside, key=lambda file: len(file.package))]
