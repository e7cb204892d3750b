"""Checks of README and docs/: commands compose, links lead somewhere, the listed packages are those of the code."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sam_distill.cli.app import default_conf_dir
from sam_distill.config.check import check
from sam_distill.config.compose import compose_jobs

ROOT = Path(__file__).parents[2]
NOT_IN_DOCS = ("README.md", "CONTRIBUTING.md", "weights/README.md")
GUIDES = [*(ROOT / page for page in NOT_IN_DOCS), *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", *sorted((ROOT / "experiments").rglob("README.md"))]
LINK = re.compile(r"\[[^\[\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:\btrain\.py|\bsam-distill (?P<command>[a-z]+))(?P<words>(?: .*)?)$")


def slug(heading: str) -> str:
    """Return the anchor that GitHub and MkDocs give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", lambda code: "" if "](" in code[0] else code[0], page.read_text())
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_page_is_in_the_site() -> None:
    class Loader(yaml.SafeLoader):
        """YAML loader that ignores MkDocs' own tags."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    nav: Any = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    pages = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_package_diagram_matches_the_import_contract() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    diagram = re.search(r"```\n(.*?)```", text, re.DOTALL)
    assert diagram
    drawn = [re.split(r" {2,}", line) for line in diagram[1].splitlines()]
    contract = re.search(r"layers = \[\n(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert contract
    layers = [re.findall(r"\w+", line) for line in contract[1].splitlines()]
    assert [row[:-1] for row in drawn] == layers, "each line: the packages, then a word on them"
    listed = re.findall(r"^\| \[`(\w+)`\]", text, re.MULTILINE)
    assert listed == [package for layer in layers for package in layer]


def commands() -> Iterator[tuple[str, str]]:
    """Yield (command, its words) of each command in code blocks and code spans of the guides, as a user types it."""
    seen = set()
    for page in GUIDES:
        text = page.read_text()
        blocks = re.findall(r"^```(\S*).*\n((?:.*\n)*?)```", text, re.MULTILINE)
        typed = [body.replace("\\\n", "") for language, body in blocks if language in ("", "bash")]
        lines = [line for block in typed for line in block.splitlines()]
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```(?:.*\n)*?```", "", text, flags=re.MULTILINE))
        for line in [*lines, *spans]:
            found = COMMAND.search(line.partition(" #")[0].strip())
            if found and found["words"] and "..." not in line and "--" not in found["words"]:
                pair = (found["command"] or "train", found["words"].strip())
                if pair not in seen:
                    seen.add(pair)
                    yield pair


BARE_WORDS = {"bench": "suite", "report": "runs"}  # the option that a word without = sets


def mistakes(command: str, words: str) -> list[str]:
    overrides = [word for word in shlex.split(words) if not word.startswith(("$", "-"))]
    overrides = [word if "=" in word else f"{BARE_WORDS[command]}={word}" for word in overrides]
    if command == "report":
        overrides = [word.replace("experiment=", "only=") for word in overrides]
    placeholder = r"^(checkpoint|init)=(RUN_DIR|outputs/\S+|student\.pt)$"
    overrides = [re.sub(placeholder, r"\1=mobile_sam", word) for word in overrides]
    jobs, lines = compose_jobs(default_conf_dir(), command, overrides, "-m" in shlex.split(words))
    return lines + [line for job in jobs for line in check(job)]


@pytest.mark.parametrize(("command", "words"), list(commands()))
def test_a_command_composes(command: str, words: str) -> None:
    assert mistakes(command, words) == []


def test_commands_in_the_docs_are_found() -> None:
    """`commands` finds those in code blocks and in tables, and `mistakes` finds a mistake."""
    found = list(commands())
    assert len(found) > 50
    assert ("train", "resume=RUN_DIR") in found
    assert ("evaluate", "checkpoint=RUN_DIR data=folder data.path=DIR") in found
    assert mistakes("train", "data=folder data.pth=DIR") != []


def test_code_and_experiments_name_pages_that_exist() -> None:
    files = subprocess.run(["git", "ls-files", "src", "scripts", "conf", "tests", "experiments"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    for file in files:
        if file.endswith((".py", ".yaml", ".md")):
            for page in re.findall(r"docs/[\w-]+\.(?:md|jpg|png)", (ROOT / file).read_text()):
                assert (ROOT / page).exists(), f"{file} names {page}"
