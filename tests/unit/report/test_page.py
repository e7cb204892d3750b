import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sam_distill.cli import app


def report(*words: str) -> int:
    return app.main(["report", *words])


class Tags(HTMLParser):
    """HTML parser that collects all tags and asserts that each opened tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained(runs: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(f"t2_{seed}", experiment="table2_strategies", seed=seed, score=0.3 + seed / 10)
        make_run(f"t4_{seed}", experiment="table4_compute", seed=seed)
    make_run("mine", batch_size=3)
    make_run("theirs", batch_size=5)
    make_run("<b>bad", status="failed", why="a < b & c")
    assert report(str(runs), f"path={tmp_path / 'out'}") == 0
    html = (tmp_path / "out" / "report.html").read_text()
    tags = Tags(html)
    assert tags.open == []
    assert not [tag for tag, _ in tags.found if tag in ("script", "link", "iframe")]
    for tag, attributes in tags.found:
        outside = [
            v for k, v in attributes.items() if k in ("src", "href", "xlink:href") and v and v.startswith("http")
        ]
        assert tag == "a" or not outside, (tag, attributes)
    assert not re.search(r"url\((?!#)", html)
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids)), "the plots of a page don't take each other's parts"
    for words in (
        "Coupled against decoupled distillation",
        "0.7447",
        "not run",
        "a &lt; b &amp; c",
        "0.350",
        "Table 7",
    ):
        assert words in html, words
    assert "<b>bad" not in html
    assert sum(tag == "svg" for tag, _ in tags.found) >= 5
    assert (
        len([a for tag, a in tags.found if tag == "img" and str(a["src"]).startswith("data:image/jpeg;base64,")]) == 3
    )


def test_pictures_in_the_markdown_exist(runs: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("a", experiment="table2_strategies")
    assert report(str(runs), f"path={tmp_path / 'out'}") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert len(pictures) == 3
    assert all((tmp_path / "out" / picture).is_file() for picture in pictures)
    assert "| decoupled | 0.75 |" in text


def test_one_experiment_alone(
    runs: Path,
    make_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("a", experiment="loss")
    make_run("b", experiment="padding_mask")
    make_run("c", experiment="padding_mask", status="failed", why="no disk")
    assert report("experiment=loss", "path=experiments/loss") == 0
    out = tmp_path / "experiments" / "loss"
    assert (out / "results.csv").read_text().count("\n") == 2
    assert (out / "history.csv").is_file()
    assert "| strategy" not in (out / "table.md").read_text()
    assert "Padding" not in (out / "report.html").read_text()
    assert "no disk" not in (out / "report.html").read_text()
    assert report("experiments", "path=page") == 0
    assert "The loss between embeddings" in (tmp_path / "page" / "report.html").read_text()
    capsys.readouterr()
    assert report("experiment=resolution", "path=nowhere") == 1
    assert (
        "experiment=resolution: no finished run of it in outputs; there: loss, padding_mask" in capsys.readouterr().err
    )
    assert not (tmp_path / "nowhere").exists()


def test_run_folders_take_precedence_over_committed_rows(
    runs: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    make_run("a", experiment="loss", score=0.5)
    (runs / "loss").mkdir()
    (runs / "loss" / "results.csv").write_text("run,strategy.loss,miou/point\nold,mse,0.125\n")
    assert report(str(runs), f"path={tmp_path / 'out'}") == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert "the 1 rows of loss/results.csv are not counted" in html
    assert "0.125" not in html


@pytest.mark.parametrize("folder", ["outputs", "nowhere"])
def test_nothing_to_report_is_one_line(
    runs: Path, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(folder) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: runs={folder}")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_damaged_picture_is_left_out(runs: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    (make_run("a") / "pictures" / "masks_0000004.png").write_bytes(b"\x89PNG once")
    assert report(str(runs), f"path={tmp_path / 'out'}") == 0
    assert "<img" not in (tmp_path / "out" / "report.html").read_text()


def test_undescribed_experiment_is_introduced_by_its_readme(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "my_own"
    folder.mkdir(parents=True)
    (folder / "results.csv").write_text("run,prompts.kind,miou/point\na,$x$,0.5\nb,$\\frac,nan\n")
    readme = "# Mine\n\n**Claim**: see [this](that.md)\nalone.\n\n**It does.** By [much](m.md).\n"
    (folder / "README.md").write_text(readme)
    assert report(str(tmp_path / "experiments"), f"path={tmp_path / 'out'}") == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<p>Claim: see this alone.</p>" in html
    assert "<p><b>It does.</b> By much.</p>" in html
    assert "nan" not in html.partition("<tbody>")[2].partition("</tbody>")[0]
