"""Results of a benchmark, on the screen, as JSON and as markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sam_distill.benchmark.timing import Timing
from sam_distill.files import write_json, write_text
from sam_distill.report.tables import markdown_table

_SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
COLUMNS = ("", "time", "middle half", "per s", "vs peer", "memory")


@dataclass(frozen=True)
class Finding:
    """Result of one comparison.

    what: the subject, in words. unit: of work, to which the times refer. note: facts needed to read the numbers.
    metrics: the entries for metrics.json, which the report reads.

    The table has the median, the middle half of all turns, units per second, the speed-up over the peer, peak memory.
    """

    what: str
    unit: str = ""
    timings: Sequence[Timing] = ()
    note: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    def milliseconds(self, name: str) -> float:
        """Return the median time per unit of the contender `name`."""
        return 1e3 * next(timing.median for timing in self.timings if timing.name == name)

    @property
    def peer(self) -> Timing | None:
        return next((timing for timing in self.timings if not timing.ours), None)

    def rows(self) -> Iterable[tuple[str, ...]]:
        for timing in self.timings:
            faster = f"{self.peer.median / timing.median:.2f}x" if self.peer and timing is not self.peer else ""
            memory = "" if timing.memory is None else f"{timing.memory / 1e6:,.0f} MB"
            spread = f"{_time(timing.low)} to {_time(timing.high)}"
            yield timing.name, _time(timing.median), spread, f"{1 / timing.median:,.1f}", faster, memory

    @property
    def title(self) -> str:
        return f"{self.what}, per {self.unit}" if self.unit else self.what


def show(finding: Finding) -> None:
    if not finding.timings:
        Console().print(f"{finding.title}\n({finding.note})", highlight=False)
        return
    table = Table(*COLUMNS, title=finding.title, caption=finding.note or None)
    for row in finding.rows():
        table.add_row(*row)
    Console().print(table)


def write(findings: Sequence[Finding], facts: dict[str, Any], folder: Path) -> None:
    metrics = {name: value for finding in findings for name, value in finding.metrics.items()}
    write_json(folder / "metrics.json", metrics | facts)
    write_json(folder / "bench.json", {"facts": facts, "findings": [asdict(finding) for finding in findings]})
    lines = [", ".join(f"{name}: {value}" for name, value in facts.items()), ""]
    for finding in findings:
        lines += [f"**{finding.title}**", ""]
        lines += [markdown_table([COLUMNS, *finding.rows()])] if finding.timings else []
        lines += [finding.note, ""] if finding.note else []
    write_text(folder / "bench.md", "\n".join(lines))


def _time(seconds: float) -> str:
    scale, unit = next(((s, u) for s, u in _SCALES if seconds >= s), _SCALES[-1])
    return f"{seconds / scale:.3g} {unit}"
