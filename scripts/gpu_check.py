"""Checks that need a GPU: tests, speed measurements, and the training of a student at 1024 px. `make gpu-check`.

Parts run one after another, each as its own command. Each result is saved in experiments/gpu at once, so an interrupted
run continues where it stopped. It takes at most nine minutes on an H200. Arguments after the options are passed to the
training, such as data=folder data.path=DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sam_distill.errors import UserError
from sam_distill.files import write_json, write_text
from sam_distill.models import weights
from sam_distill.models.checkpoints import save_sam
from sam_distill.models.encoders import SamViT, TinyViT
from sam_distill.models.sam import Sam
from sam_distill.report.tables import markdown_table
from sam_distill.runs.status import version

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from sam_distill.cli.app import main; raise SystemExit(main())"]
TESTS = "tests/unit/training/test_gpu.py"
TAIL = 30  # lines of a part's output in the results
AROUND = 45  # seconds that a training needs beside its steps: to start, validate, draw and save


SMALL = 64  # image size with --toy, pixels


@dataclass(frozen=True)
class Setting:
    """Options of all parts. toy: tiny, on the CPU, to test the script. place: for checkpoints, caches and run folders.

    training: overrides for the training.
    """

    toy: bool
    place: Path
    training: Sequence[str]

    @property
    def trainer(self) -> str:
        return "trainer=cpu" if self.toy else "trainer=gpu"

    @property
    def teacher(self) -> str:
        """Checkpoint of MobileSAM; random weights if `toy` or if it can't be fetched, as the table then states."""
        if not self.toy:
            try:
                return str(weights.fetch("mobile_sam"))
            except UserError:
                pass
        return self._random("tinyvit", SMALL if self.toy else 1024)

    @property
    def heavy(self) -> str:
        """Checkpoint of a ViT-H with random weights, as slow as SAM's; of a TinyViT if `toy`."""
        return self._random("tinyvit" if self.toy else "vit_h", SMALL if self.toy else 1024)

    def _random(self, name: str, size: int) -> str:
        path = self.place / f"random_{name}.pt"
        if not path.is_file():
            vit_h = {"width": 1280, "depth": 32, "heads": 16, "global_blocks": [7, 15, 23, 31]}
            save_sam(Sam(SamViT(**vit_h) if name == "vit_h" else TinyViT(pretrained=False), image_size=size), path)
        return str(path)


@dataclass(frozen=True)
class Part:
    """Part of the check. seconds: its time limit. least: seconds that must be left to start it."""

    name: str
    what: str
    seconds: float
    least: float


PARTS = (
    Part("tests", "the tests marked gpu", 200, 60),
    Part("encoder", "speed of the image encoder", 50, 20),
    Part("decoder", "speed of the mask decoder", 50, 20),
    Part("everything", "speed of segmenting everything", 70, 30),
    Part("step", "speed of a training step, 8 images at 1024 px", 80, 30),
    Part("cache", "speed of caching a ViT-H's embeddings", 90, 40),
    Part("train", "a training at 1024 px for the minutes left", 540, 90),
)


def words_of(part: str, setting: Setting, seconds: float, found: dict[str, Any]) -> list[str]:
    """Return the command line of a part. seconds: time left for it. found: results of the earlier parts."""
    run_dir, toy = f"hydra.run.dir={setting.place / part}", setting.toy
    if part == "tests":
        chosen = ["-k", "masks or batchnorm"] if toy else []
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-rs", "-p", "no:cacheprovider", TESTS, *chosen]
    if part == "cache":
        images = ["data.images=4", "data.val_images=1", "trainer.workers=0"] if toy else ["data.images=160"]
        size = f"batch_size={1 if toy else 8}"
        wanted = [f"teacher.checkpoint={setting.heavy}", f"path={setting.place / 'cache'}", "plan=true"]
        return [*COMMAND, "cache", *images, size, *wanted, setting.trainer]
    if part == "train":
        return [*COMMAND, "train", *_training(setting, seconds, found), run_dir]
    options = ["seconds=2", "points_per_side=32", "batch_size=8"]
    if toy:  # these run at 1024 px, minutes on a CPU, so all but `step` only compose their config
        options = ["seconds=0.001", "batch_size=1", "trainer.workers=0", *([] if part == "step" else ["--cfg=job"])]
    return [*COMMAND, "bench", part, f"checkpoint={setting.teacher}", setting.trainer, *options, run_dir]


def _training(setting: Setting, seconds: float, found: dict[str, Any]) -> list[str]:
    """Return the training's overrides, with as many steps as fit into `seconds` by the measured time of a step."""
    shared = ["strategy=decoupled", "encoder=tinyvit", "encoder.pretrained=false", "logger=csv", setting.trainer]
    shared += [f"teacher.checkpoint={setting.teacher}"]
    if setting.toy:
        small = [f"image_size={SMALL}", "batch_size=1", "budget='2 steps'", "data.images=2", "data.val_images=2"]
        return [*shared, *small, "protocol.points=1", "trainer.workers=0", *setting.training]
    a_step = 8 * found.get("step", {}).get("seconds_per_image", 0.05)
    steps = max(20, int((seconds - AROUND) / a_step))
    size = ["image_size=1024", "batch_size=8", f"budget='{steps} steps'", f"validate_every='{-(-steps // 2)} steps'"]
    return [*shared, *size, *setting.training]


def numbers_of(part: str, place: Path, output: str) -> dict[str, Any]:
    """Return the numbers that a part has measured."""
    if part == "tests":
        return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    if part == "cache":
        rates = re.findall(r"at ([\d.]+) images/s", output)
        return {"images_per_second": float(rates[-1])} if rates else {}
    if part == "train":
        metrics = json.loads((place / part / "metrics.json").read_text())
        return {name: value for name, value in metrics.items() if isinstance(value, float | int)}
    if not (place / part / "bench.json").is_file():  # only composed
        return {}
    timings = [t for f in json.loads((place / part / "bench.json").read_text())["findings"] for t in f["timings"]]
    first = {"seconds_per_image": timings[0]["median"]} if part == "step" else {}
    return first | {"milliseconds": {t["name"]: round(1000 * t["median"], 4) for t in timings}}


def run(part: Part, setting: Setting, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    """Run a part, for `seconds` at most, and return its result: state, duration, numbers, command, last output."""
    words = words_of(part.name, setting, seconds, found)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    environment |= {"SAM_DISTILL_GPU_TESTS": "cpu"} if setting.toy else {}
    begun = time.monotonic()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=seconds)
        state = "passed" if process.returncode == 0 else f"failed: exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        state = f"failed: not done after {seconds:.0f} seconds"
    finally:
        if process.poll() is None:  # Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
    numbers = numbers_of(part.name, setting.place, output) if state == "passed" else {}
    kept = {
        "command": _without_local_paths(words, setting),
        "tail": [_without_local_paths([line], setting) for line in output.splitlines()[-TAIL:]],
    }
    return {"state": state, "seconds": round(time.monotonic() - begun, 1), **numbers, **kept}


def _without_local_paths(words: Sequence[str], setting: Setting) -> str:
    """Return the words as one line, without the paths of this machine."""
    line = " ".join("sam-distill" if word == COMMAND[-1] else word for word in words)
    line = line.replace(f"{sys.executable} -c sam-distill", "sam-distill").replace(sys.executable, "python")
    for path, name in ((setting.place, "TMP"), (weights.home(), "$SAM_DISTILL_HOME"), (ROOT, ".")):
        line = line.replace(str(path), name)
    return line


def write(results: dict[str, Any], out: Path) -> None:
    """Write results.json, and a README.md with the same results as a table."""
    write_json(out / "results.json", results)
    rows = [["part", "state", "seconds", "found"], ["---"] * 4]
    for part in PARTS:
        result = results["parts"].get(part.name, {"state": "not run"})
        facts = {n: v for n, v in result.items() if n not in ("state", "seconds", "command", "tail", "milliseconds")}
        facts |= {f"{name}, ms": value for name, value in result.get("milliseconds", {}).items()}
        shown = "; ".join(f"{name} {value:.4g}" for name, value in facts.items())
        rows.append([part.what, result["state"], str(result.get("seconds", "")), shown])
    facts = ", ".join(f"{name}: {value}" for name, value in results["machine"].items())
    intro = "# On a GPU\n\n```\nmake gpu-check\n```\n\nWritten by it. What stands as not run has not been run.\n"
    write_text(out / "README.md", f"{intro}\n{facts}\n\n{markdown_table(rows)}\n")


def machine(toy: bool, teacher: str) -> dict[str, str]:
    device = "CPU, toy sizes: no numbers to go by" if toy else torch.cuda.get_device_name()
    random = " (random weights: MobileSAM's can't be had here)" if "random" in teacher else ""
    return {
        "device": device,
        "torch": str(torch.__version__),
        "version": version(),
        "teacher": Path(teacher).name + random,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--minutes", type=float, default=9, help="for all together (9)")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "gpu")
    parser.add_argument("--again", action="store_true", help="also what has passed already")
    parser.add_argument("--toy", action="store_true", help="on the CPU, tiny: only whether the script works")
    options, training = parser.parse_known_args(argv)
    if not options.toy and not torch.cuda.is_available():
        print("error: there is no GPU here that PyTorch can use; --toy tries the script on the CPU", file=sys.stderr)
        return 1
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        setting = Setting(options.toy, Path(place), training)
        results = _before(options.out, machine(options.toy, setting.teacher), options.again)
        for part in PARTS:
            if options.parts and part.name not in options.parts:
                continue
            left = min(part.seconds, end - time.monotonic())
            if results["parts"].get(part.name, {}).get("state") == "passed":
                print(f"{part.name}: passed before")
                continue
            result = {"state": "not run: no time left"}
            if left >= part.least or options.toy:
                print(f"{part.name}: {part.what}", flush=True)
                result = run(part, setting, left, results["parts"])
            results["parts"][part.name] = result
            write(results, options.out)
            print("\n".join(result.get("tail", [])), f"\n{part.name}: {result['state']}", flush=True)
    states = [results["parts"].get(part.name, {"state": "not run"})["state"] for part in PARTS]
    print(f"table  {options.out / 'README.md'}")
    return int(any(state.startswith("failed") for state in states))


def _before(out: Path, here: dict[str, str], again: bool) -> dict[str, Any]:
    """Return the results of an earlier run if version and machine are the same and not `again`; else empty results."""
    file = out / "results.json"
    if file.is_file() and not again:
        results: dict[str, Any] = json.loads(file.read_text())
        if _without_dirty_suffix(results["machine"]) == _without_dirty_suffix(here):
            return results
    return {"machine": here, "parts": {}}


def _without_dirty_suffix(machine: dict[str, str]) -> dict[str, str]:
    """Remove `-dirty` from the version: the results, once written, are themselves a change of the checkout."""
    return machine | {"version": machine["version"].removesuffix("-dirty")}


if __name__ == "__main__":
    sys.exit(main())
