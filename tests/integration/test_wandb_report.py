"""scripts/wandb_report.py, as far as it can be tested without W&B's server."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sam_distill.report.experiments import known

SCRIPT = Path(__file__).parents[2] / "scripts" / "wandb_report.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wandb_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["table2_strategies", "table4_compute", "resolution"])
def test_content_of_the_report(script: ModuleType, name: str) -> None:
    model = script.report(known()[name], "project", "team")._to_model()
    blocks = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))["blocks"]
    settings, each = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    for grid in (settings, each):
        assert "'group'" in str(grid["runSets"][0]["filters"])
        assert f"'{name}'" in str(grid["runSets"][0]["filters"])
    grouping = str(settings["runSets"][0]["grouping"])
    assert {"table2_strategies": "choices.value.strategy", "table4_compute": "batch_size.value"}.get(
        name, "image_size.value"
    ) in grouping
    panels = settings["panelBankSectionConfig"]["panels"]
    curves = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert [curve["metrics"] for curve in curves][:3] == [["val/miou/point"], ["val/miou/box"], ["val/embedding_mse"]]
    assert {curve["xAxis"] for curve in curves} == {"trainer/global_step"}
    best = [panel["config"]["metrics"][0] for panel in panels if panel["viewType"] == "Bar Chart"]
    assert best[0] == "summary_metrics.val/miou/point.max"
    assert ("0.7447" in str(blocks)) == (name == "table4_compute"), "the paper's number"


def run(*argv: str, **environment: str) -> tuple[int, str]:
    env = {key: value for key, value in os.environ.items() if key != "WANDB_API_KEY"} | environment
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300, env=env)
    return done.returncode, done.stderr


def test_missing_key_or_package_is_one_error_line(tmp_path: Path) -> None:
    status, said = run(str(SCRIPT), "table4_compute", HOME=str(tmp_path))
    assert (status, said) == (1, "error: W&B wants a key: wandb login, or WANDB_API_KEY=...\n")
    without = f"import sys, runpy; sys.modules['wandb_workspaces'] = None; runpy.run_path({str(SCRIPT)!r})"
    status, said = run("-c", without)
    assert status == 1
    assert said == ("error: this needs the package wandb-workspaces: pip install 'sam-distill[wandb-workspaces]'\n")
