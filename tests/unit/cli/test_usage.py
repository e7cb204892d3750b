from collections.abc import Callable

import pytest

from sam_distill.cli import app


def test_a_flags_value_is_not_taken_for_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "report"):
        assert app.main([command, "--cfg", "job"]) == 0
        assert "suite: job" not in (output := capsys.readouterr().out)
        assert "runs: job" not in output


@pytest.fixture
def usage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return usage(columns, *words): the lines of `sam-distill WORDS --help` on a terminal `columns` wide."""

    def run(columns: int, *words: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        assert app.main([*words, "--help"]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_help_lists_the_commands_own_choices_and_explains_keys(usage: Callable[..., list[str]]) -> None:
    lines = [" ".join(line.split()) for line in usage(200, "segment")]
    assert "point=null [x, y] in the image's own pixels" in lines
    assert "trainer=auto the device: cpu, ddp, gpu" in lines
    assert not any("encoder=" in line for line in lines)
    lines = [" ".join(line.split()) for line in usage(200, "train", "encoder=timm", "optim.lr=3e-3")]
    assert any(line.startswith("encoder=timm the student's image encoder: efficientnet_lite0, ") for line in lines)
    assert "encoder.name=??? e.g. encoder.name=resnet18" in lines
    assert any(line.startswith("optim.lr=0.003 ") for line in lines)


def test_help_lists_the_commands_own_recipes(usage: Callable[..., list[str]]) -> None:
    for command, own, other in (("bench", "table1_parameters", "loss"), ("train", "loss", "table1_parameters")):
        (line,) = (line for line in usage(400, command) if line.startswith("  experiment="))
        assert own in line
        assert other not in line


def test_help_shows_values_whole_on_a_narrow_terminal(usage: Callable[..., list[str]]) -> None:
    output = "\n".join(usage(80, "segment"))
    assert "  generator.stability_score_thresh=0.95  " in output
    assert "look at 4 crops of the image as well," in " ".join(output.split())
