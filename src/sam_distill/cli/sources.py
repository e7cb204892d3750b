"""Which file, or the command line, gave a key of a composed configuration: Hydra doesn't keep it, messages need it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf


def task_overrides(hydra: Any) -> list[str]:
    """A job's own overrides as typed: their interpolations belong to the job, not to Hydra's node."""
    return list(OmegaConf.to_container(hydra.overrides.task, resolve=False))  # type: ignore[arg-type]


class _Source(NamedTuple):
    """One configuration file and the dotted place its content went to ("" is the root)."""

    path: Path
    shown: str
    package: str

    def keys_of(self, key: str) -> str | None:
        """The key as the file itself spells it, or None if its content lies elsewhere."""
        if not self.package or key == self.package:
            return key.removeprefix(self.package)
        return key.removeprefix(self.package + ".") if key.startswith(self.package + ".") else None

    def defines(self, key: str) -> bool:
        local = self.keys_of(key)
        if not local:
            return local == ""
        node: Any = OmegaConf.to_container(OmegaConf.load(self.path), resolve=False)
        for part in local.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True


def _bases(path: Path) -> list[Path]:
    """The files of the same group that a choice begins with, as muon.yaml does with adamw.yaml."""
    defaults = OmegaConf.select(OmegaConf.load(path), "defaults") or []
    named = [name for name in defaults if isinstance(name, str) and "/" not in name]
    return [base for name in named if (base := path.with_name(f"{name}.yaml")).is_file()]


class Sources:
    """The files of one composed configuration; `cfg` still has its `hydra` node."""

    def __init__(self, cfg: DictConfig) -> None:
        hydra = cfg.hydra
        self.choices: dict[str, Any] = dict(hydra.runtime.choices)
        self._target = cfg.get("_target_")
        self.overrides = [text.lstrip("+~").partition("=")[0] for text in task_overrides(hydra)]
        self.roots = [Path(s.path) for s in hydra.runtime.config_sources if s.schema == "file"]
        chosen = {hydra.job.config_name: ""} | {
            f"{group.partition('@')[0]}/{choice}": group.rpartition("@")[2].replace("/", ".")
            for group, choice in self.choices.items()
            if isinstance(choice, str) and not group.startswith("hydra/")
        }
        self.files = [
            _Source(
                file,
                f"{root.name}/{file.relative_to(root)}",
                "" if "@package _global_" in file.read_text() else package,
            )
            for name, package in chosen.items()
            for root in self.roots
            if (path := root / f"{name}.yaml").is_file()
            for file in [*_bases(path), path]
        ]

    def where(self, key: str) -> str:
        """The last to define the key; for a key that nobody gave, the file of the node it is missing from."""
        if any(key == o or key.startswith(o + ".") for o in self.overrides if o not in self.choices):
            return "command line"
        return self._file(key).shown

    def comment(self, key: str) -> str:
        """The comment beside a key's line, or beside a group's in the command's defaults; "" if there is none."""
        name = re.escape(key.rpartition(".")[2])
        files = self.files[:1] if key in self.choices else self._defining(key) or [self._file(key)]
        for file in reversed(files):
            line = re.search(rf"^\s*(?:- )?(?:optional )?{name}:.*?#\s*(.+)$", file.path.read_text(), re.MULTILINE)
            if line:
                return line.group(1).strip()
        return ""

    def options(self, group: str) -> list[str]:
        """The choices there are, without recipes for other commands."""
        files = [path for root in self.roots for path in (root / group).glob("*.yaml")]
        if group == "experiment":
            targets = {path: OmegaConf.select(OmegaConf.load(path), "_target_") for path in files}
            files = [path for path in files if targets[path] in (None, self._target)]
        return sorted({path.stem for path in files})

    def _defining(self, key: str) -> list[_Source]:
        return [file for file in self.files if file.defines(key)]

    def _file(self, key: str) -> _Source:
        inside = [file for file in self.files if file.keys_of(key) is not None]
        defining = self._defining(key)
        return defining[-1] if defining else max(inside, key=lambda file: len(file.package))
