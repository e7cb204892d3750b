"""Griffe extension that shows the fields of our docstrings, `name: meaning`, as lists in the API reference."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

FIELD = re.compile(r"^([A-Za-z_][\w]*(?:, [A-Za-z_][\w]*)*): (?=\S)")


class Fields(Extension):
    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is None:
            return
        lines: list[str] = []
        for line in obj.docstring.value.splitlines():
            if field := FIELD.match(line):
                if lines and lines[-1] and not lines[-1].startswith(("- ", "    ")):
                    lines.append("")
                names = ", ".join(f"`{name}`" for name in field[1].split(", "))
                line = f"- {names}: {line[field.end() :]}"
            lines.append(line)
        obj.docstring.value = "\n".join(lines)
