"""Real runs of `sam-distill bench`, with hardly any time for each compared implementation."""

import json
from pathlib import Path

import pytest

from sam_distill.benchmark import timing as speed
from sam_distill.cli.app import main

COMPARED = ("peers: cv2", "bare PyTorch loop", "MobileSAM's code, vit_t, fp32")


def test_all_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed, "MIN_ROUNDS", 1)
    monkeypatch.setattr("sam_distill.benchmark.steps.STEPS", 1)
    monkeypatch.setattr("sam_distill.benchmark.steps.TURNS", 1)
    monkeypatch.setattr("sam_distill.benchmark.data.SA1B_TARS", 2)
    monkeypatch.setattr("sam_distill.benchmark.data.SA1B_IMAGES", 1000)
    words = ["bench", "seconds=0.001", "batch_size=1", "points_per_side=2", "trainer=cpu"]
    assert main([*words, f"hydra.run.dir={tmp_path}"]) == 0
    findings = json.loads((tmp_path / "bench.json").read_text())["findings"]
    timings = [timing for finding in findings for timing in finding["timings"]]
    assert len(findings) == 12
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["peak_gflops/fp32"] > 1
    assert sum("large matrices' products would take" in finding["note"] for finding in findings) == 3
    for compared in COMPARED:
        assert any(timing["name"].startswith(compared) and not timing["ours"] for timing in timings)
    assert all(timing["median"] > 0 for timing in timings)
    report = (tmp_path / "bench.md").read_text()
    assert all(timing["name"] in report for timing in timings)
    assert "--- |\n| ---" not in report
    assert "bench.md" in capfd.readouterr().out


def test_shorthand_for_a_suite_is_checked(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "coffee"]) == 2
    assert "error: suite=coffee" in capfd.readouterr().err
