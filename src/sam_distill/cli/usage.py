"""What `sam-distill COMMAND --help` shows: its choices and its keys, with the comments that conf/ has beside them."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_distill.config.check import show
from sam_distill.config.sources import Sources, leaves


def print_usage(cfg: DictConfig) -> None:
    """cfg: a composed command, with its `hydra` node."""
    sources = Sources(cfg)
    choices = [(g, chosen) for g, chosen in reversed(sources.choices.items()) if not g.startswith("hydra/")]
    console = Console(highlight=False)
    console.print(cfg.hydra.help.header, markup=False, soft_wrap=True)
    if choices:
        console.print("\nChoices (group=choice), and what is chosen now:")
        others = {g: ", ".join(option for option in sources.options(g) if option != c) for g, c in choices}
        console.print(_table((g, c, f"{sources.comment(g)}: {others[g]}") for g, c in choices))
    console.print("\nKeys (key=value), and their values with these choices:")
    given = leaves(OmegaConf.to_container(cfg, resolve=False))
    keys = [(key, value) for key, value in given if not key.startswith("hydra.") and "._" not in f".{key}"]
    keys.sort(key=lambda leaf: "." in leaf[0])
    console.print(_table((key, value, sources.comment(key)) for key, value in keys))
    console.print(f"\n{cfg.hydra.help.footer}", markup=False, soft_wrap=True)


def _table(rows: Iterator[tuple[str, Any, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, value, comment in rows:
        table.add_row(Text(f"  {key}={show(value)}", overflow="fold"), Text(comment.strip(": ")))
    return table
