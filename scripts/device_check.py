"""Run an export on another device, and compare its masks with PyTorch's here, as `sam-distill export` does.

The device needs scripts/device_worker.py, Python 3.10 or later, numpy and the runtime: ai-edge-litert; executorch and
torch; or onnxruntime for format=web. The words after `--` are the command that starts the worker there:

    scp scripts/device_worker.py pi:
    python scripts/device_check.py student_litert RUN_DIR -- ssh pi python3 device_worker.py

Exits with 1 if masks or embeddings agree less than the export's contract.json asks for.
"""

import argparse
import dataclasses
import pickle
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from sam_distill.data.folder import Folder
from sam_distill.data.photos import Photos
from sam_distill.errors import UserError
from sam_distill.export.check import compare
from sam_distill.export.contract import CONTRACT, Settings
from sam_distill.export.formats import FORMATS
from sam_distill.export.runner import ContractRunner, Run
from sam_distill.files import write_json
from sam_distill.models.checkpoints import load_sam
from sam_distill.types import Sample

READY = b"device_worker.py is ready\n"  # its first line
FORMATS_RUN = ("litert", "executorch", "web")  # those with the contract's two graphs that have a runtime on Linux


class Device:
    """Worker on a device. seconds: how long each run of a graph took there, by file name."""

    def __init__(self, command: Sequence[str], format: str, files: Sequence[Path]) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        content = {file.name: file.read_bytes() for file in files}
        try:
            self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from error
        try:
            if READY not in self._worker.stdout:  # reads lines up to it: a login shell may print some first
                raise self._ended()
            self._send((format, content))
        except BaseException:
            self.close()
            raise

    def graph(self, name: str) -> Run:
        def run(values: Sequence[np.ndarray]) -> list[np.ndarray]:
            self._send((name, [(value.shape, np.ascontiguousarray(value, np.float32).tobytes()) for value in values]))
            try:
                outputs, seconds = pickle.load(self._worker.stdout)
            except (EOFError, pickle.UnpicklingError) as error:
                raise self._ended() from error
            self.seconds[name].append(seconds)
            return [np.frombuffer(content, np.float32).reshape(shape).copy() for shape, content in outputs]

        return run

    def close(self) -> None:
        self._worker.stdout.close()  # ends a worker that is still answering, too
        with suppress(BrokenPipeError):
            self._worker.stdin.close()
        self._worker.wait()

    def _send(self, message: Any) -> None:
        try:
            pickle.dump(message, self._worker.stdin)
            self._worker.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def _ended(self) -> UserError:
        self.close()
        status = self._worker.returncode
        return UserError(f"the worker has ended with exit status {status}; its own message, if any, is above")


def open_export(folder: Path) -> tuple[Settings, Path, Path, float]:
    """Return an export's settings, its encoder and decoder, and the agreement that it has to reach."""
    if not (folder / CONTRACT).is_file():
        raise UserError(f"{folder}: no {CONTRACT} there; sam-distill export format=litert, for one, writes it")
    settings, content = Settings.read(folder / CONTRACT)
    if settings.format not in FORMATS_RUN:
        raise UserError(f"{folder} has format={settings.format}: this script runs {', '.join(FORMATS_RUN)}")
    encoder, decoder = (folder / content[part]["file"] for part in ("encoder", "decoder"))
    if missing := [str(file) for file in (encoder, decoder) if not file.is_file()]:
        raise UserError(f"{', '.join(missing)}: missing, so the export is not complete")
    return settings, encoder, decoder, content["checked"]["least_iou"]


def check(folder: Path, checkpoint: str, samples: Sequence[Sample], command: Sequence[str]) -> dict[str, Any]:
    """Return contract.json's entry `checked`, with the times of the device, and whether it is `good`; print it."""
    settings, encoder, decoder, least_iou = open_export(folder)
    sam, runtime = load_sam(checkpoint), FORMATS[settings.format].runtime
    if sam.image_size != settings.image_size:
        raise UserError(f"{checkpoint} is for {sam.image_size} px, {folder} for {settings.image_size}: not the same")
    device = Device(command, settings.format, [encoder, decoder])
    try:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            counted = bar.add_task("photographs", total=len(samples))
            encode = device.graph(encoder.name)

            def encode_next(values: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
                bar.advance(counted)
                return encode(values)

            runner = ContractRunner(encode_next, device.graph(decoder.name), settings)
            found = compare(sam, runner, samples, settings.points)
    finally:
        device.close()
    seconds = [median(device.seconds[file.name]) for file in (encoder, decoder)]
    print(
        f"{runtime} on the device and PyTorch here, {found.images} photographs, {found.prompts} prompts\n"
        f"masks: mean IoU {found.mask_iou:.4f}, worst {found.worst_mask_iou:.3f} ({least_iou:g} wanted)\n"
        f"embeddings: least cosine {found.cosine:.5f}, largest difference {found.embedding:.1e}\n"
        f"on the device: {1000 * seconds[0]:.0f} ms a photograph, {1000 * seconds[1]:.0f} ms a prompt"
    )
    found = dataclasses.replace(found, encoder_seconds=seconds[0], decoder_seconds=seconds[1])
    return {"runtime": runtime, "least_iou": least_iou, "good": found.good(least_iou)} | found.as_json()


def photographs(folder: str | None, number: int) -> list[Sample]:
    """Return the first images of a folder, or of the built-in ones; held-out ones come first."""
    source = Folder(folder, val_images=number) if folder else Photos(val_images=number)
    samples = list(islice(source.readable(source.loads([*source.val, *source.train])), number))
    if not samples:
        raise UserError("no photograph to compare on: --photographs needs a readable one")
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path, help="folder of an export")
    parser.add_argument("checkpoint", help="what was exported: a run folder, a checkpoint, pocket_sam, ...")
    parser.add_argument("--photographs", metavar="DIR", help="folder of images; without it, ours")
    parser.add_argument("--images", type=int, default=10, help="how many of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    parser.add_argument("command", nargs="+", help="starts device_worker.py on the device")
    options = parser.parse_args()
    try:
        samples = photographs(options.photographs, options.images)
        found = check(options.exported, options.checkpoint, samples, options.command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        write_json(options.json, found)
    if not found["good"]:
        print(f"error: masks or embeddings agree less than {found['least_iou']:g}, the least wanted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
