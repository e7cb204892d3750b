from __future__ import annotations

import pytest

from sam_distill.cli import app


def test_a_flags_value_is_not_taken_for_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "report"):
        assert app.main([command, "--cfg", "job"]) == 0
        assert "suite: job" not in (said := capsys.readouterr().out)
        assert "runs: job" not in said


def test_help_lists_the_commands_own_choices_and_explains_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert app.main(["segment", "--help"]) == 0
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "point=null [x, y] in the image's own pixels" in lines
    assert "trainer=auto the device: cpu, ddp, gpu" in lines
    assert "encoder=" not in said
    assert app.main(["train", "--help", "encoder=timm", "optim.lr=3e-3"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("encoder=timm the student's image encoder: efficientnet_lite0, ") for line in lines)
    assert "encoder.name=??? e.g. encoder.name=resnet18" in lines
    assert any(line.startswith("optim.lr=0.003 ") for line in lines)


def test_help_lists_the_commands_own_recipes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for command, own, other in (("bench", "table1_parameters", "loss"), ("train", "loss", "table1_parameters")):
        assert app.main([command, "--help"]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  experiment="))
        assert own in line
        assert other not in line


def test_help_shows_values_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert app.main(["segment", "--help"]) == 0
    said = capsys.readouterr().out
    assert "  generator.stability_score_thresh=0.95  " in said
    assert "look at 4 crops of the image as well," in " ".join(said.split())
