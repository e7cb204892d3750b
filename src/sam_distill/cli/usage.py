"""Output of `sam-distill COMMAND --help`: the choices and keys of a command, with the comments beside them in conf/."""

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_distill.config.check import show
from sam_distill.config.sources import Sources, leaves


def print_usage(cfg: DictConfig) -> None:
    """Print the help of a command. cfg: its composed configuration, with the `hydra` node."""
    sources = Sources(cfg)
    choices = [(g, chosen) for g, chosen in reversed(sources.choices.items()) if not g.startswith("hydra/")]
    console = Console(highlight=False)
    console.print(cfg.hydra.help.header, markup=False, soft_wrap=True)
    if choices:
        console.print("\nChoices (group=choice), and what is chosen now:")
        others = {g: ", ".join(option for option in sources.options(g) if option != c) for g, c in choices}
        console.print(_table(console, ((g, c, f"{sources.comment(g)}: {others[g]}") for g, c in choices)))
    console.print("\nKeys (key=value), and their values with these choices:")
    given = leaves(OmegaConf.to_container(cfg, resolve=False))
    keys = [(key, value) for key, value in given if not key.startswith("hydra.") and "._" not in f".{key}"]
    keys.sort(key=lambda leaf: "." in leaf[0])
    console.print(_table(console, ((key, value, sources.comment(key)) for key, value in keys)))
    console.print(f"\n{cfg.hydra.help.footer}", markup=False, soft_wrap=True)


def _table(console: Console, rows: Iterable[tuple[str, Any, str]]) -> Table:
    cells = [(f"  {key}={show(value)}", comment.strip(": ")) for key, value, comment in rows]
    table = Table.grid(padding=(0, 2))
    table.add_column(width=min(console.width // 2, max((len(cell) for cell, _ in cells), default=0)), overflow="fold")
    for cell, comment in cells:
        table.add_row(Text(cell), Text(comment))
    return table
