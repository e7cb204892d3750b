"""MkDocs hook that makes links out of docs/, to code or experiments, work on the site as in the repository.

They become links to `repo_url`, or plain text if it is not set. A link to a missing file causes a warning, on which
`mkdocs build --strict` fails.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.docs_links")

LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\./[^)\s]+)\)")  # [text](../...), but no image


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    root = Path(config.config_file_path).parent
    here = Path(page.file.abs_src_path).parent

    def outside(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, _, anchor = target.partition("#")
        place = Path(os.path.normpath(here / path))
        if not place.exists():
            log.warning("%s: %s does not exist", page.file.src_uri, target)
        if not config.repo_url:
            return text
        kind = "tree" if place.is_dir() else "blob"
        address = f"{config.repo_url.rstrip('/')}/{kind}/main/{place.relative_to(root).as_posix()}"
        return f"[{text}]({address}{anchor and '#' + anchor})"

    return LINK.sub(outside, markdown)
