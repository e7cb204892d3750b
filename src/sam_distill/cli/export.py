"""`sam-distill export`: a model for use elsewhere, whole and checked, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sam_distill.data.base import DataSource, collate
from sam_distill.evaluate.agreement import Agreement
from sam_distill.export.official import save_official, save_safetensors
from sam_distill.metrics import MeanIoU
from sam_distill.models.checkpoints import Checkpoint, load_sam
from sam_distill.models.sam import Sam
from sam_distill.types import FRAME, Sample, UserError

log = logging.getLogger(__name__)

ENCODER, INT8_ENCODER, DECODER = "encoder.onnx", "encoder.int8.onnx", "decoder.onnx"
CHECKED = 4  # images that ONNX Runtime and PyTorch must agree on
CALIBRATED_ON = 8  # training images that show int8 what values there are
EXTRA = ("onnx", "onnxruntime", "onnxscript")  # packages that only format=onnx needs


def export(
    *,
    checkpoint: Checkpoint,
    format: Literal["mobile_sam", "sam", "onnx", "safetensors"],
    quantize: Literal["int8"] | None,
    data: DataSource,
    protocol: Agreement,
    path: str,
) -> None:
    """Write `checkpoint` to `path`; conf/export.yaml says what each option means."""
    if quantize and format != "onnx":
        raise UserError(f"quantize={quantize} goes with format=onnx, not with format={format}")
    if format == "onnx" and (missing := [name for name in EXTRA if find_spec(name) is None]):
        raise UserError(f"format=onnx needs {', '.join(missing)}: pip install 'sam-distill[export]'")
    sam = load_sam(checkpoint).requires_grad_(False)
    target = Path(path).expanduser()
    with _arriving(target, folder=format == "onnx") as draft:
        if format == "onnx":
            samples = data.val_samples()
            _export_onnx(sam, draft, samples[:CHECKED])
            if quantize:
                _export_int8(sam, draft, data, samples, protocol)
        elif format == "safetensors":
            save_safetensors(sam, draft)
        else:
            name = save_official(sam, draft, format)
            log.info('for sam_model_registry["%s"](checkpoint="%s")', name, path)
            _warn_of_image_size(sam)
    for file in sorted(target.glob("*.onnx*")) if target.is_dir() else [target]:
        log.info("%s: %.1f MB", file, file.stat().st_size / 1e6)


def _export_onnx(sam: Sam, folder: Path, samples: list[Sample]) -> None:
    from sam_distill.export import check, onnx

    onnx.write_encoder(sam, folder / ENCODER)
    onnx.write_decoder(sam, folder / DECODER)
    encoder, decoder = onnx.open_session(folder / ENCODER), onnx.open_session(folder / DECODER)
    found = check.compare(sam, encoder, decoder, samples)
    table = Table("", "largest", "allowed", title=f"ONNX Runtime minus PyTorch, {len(samples)} images")
    for difference in found:
        table.add_row(difference.output, f"{difference.largest:.1e}", f"{difference.allowed:.0e}")
    Console().print(table)
    if bad := [difference.output for difference in found if not difference.tolerated]:
        raise UserError(
            f"ONNX Runtime and PyTorch disagree in {', '.join(bad)}, so nothing was written; please report it with"
            " the versions of torch, onnxscript and onnxruntime"
        )


@torch.no_grad()
def _export_int8(sam: Sam, folder: Path, data: DataSource, samples: list[Sample], protocol: Agreement) -> None:
    """Write the encoder once more, and tell what 8 bits cost in masks and gain in time and space."""
    from sam_distill.export import onnx
    from sam_distill.export.quantize import quantize_encoder

    stream = data.train_stream(start=0, seed=0, rank=0, world_size=1, batch_size=1)
    calibration = [onnx.encoder_input(sample) for sample in islice(stream, CALIBRATED_ON)]
    converted, layers = quantize_encoder(folder / ENCODER, folder / INT8_ENCODER, calibration)

    files = [folder / ENCODER, folder / INT8_ENCODER]
    sessions, seconds = [onnx.open_session(file) for file in files], []
    miou = {"point": MeanIoU(), "box": MeanIoU()}
    for sample in samples:
        batch, embeddings, took = collate([sample]), [], []
        for session in sessions:  # in turn, so that both see the same machine
            started = perf_counter()
            embeddings.append(torch.from_numpy(session.run(None, onnx.encoder_input(sample))[0]))
            took.append(perf_counter() - started)
        seconds.append(took)
        exact, rounded = (protocol.see(sam, embedding, batch) for embedding in embeddings)
        for target in protocol.ask(exact):
            for outcome in protocol.compare(rounded, target):
                miou[target.kind].update(torch.tensor(outcome.comparison.iou))
    table = Table("", "int8", title=f"int8 against fp32, {len(samples)} images")
    table.add_row("layers in int8", f"{converted} of {layers}")
    for kind, metric in miou.items():
        table.add_row(f"mIoU, one {kind}", f"{metric.compute()['miou']:.4f}")
    whole, small = np.median(seconds, axis=0)
    table.add_row("speed", f"{whole / small:.2f}x")
    table.add_row("size", f"{files[1].stat().st_size / files[0].stat().st_size:.2f}x")
    Console().print(table)


def _warn_of_image_size(sam: Sam) -> None:
    if sam.image_size != FRAME:
        log.warning(
            "this student sees images at %d pixels, but MobileSAM's and SAM's code run every encoder at 1024, where its"
            " masks are worse: train at image_size=1024 for use there, or take format=onnx",
            sam.image_size,
        )


@contextmanager
def _arriving(target: Path, folder: bool) -> Iterator[Path]:
    """A draft of a file or folder beside its final place, where it is moved when all went well."""
    if target.exists() and target.is_dir() != folder:
        is_one, expected = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UserError(f"path={target} is {is_one}: expected {expected}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            draft = Path(place) / target.name
            if folder:
                draft.mkdir()
            yield draft
            if folder:
                target.mkdir(exist_ok=True)
                for file in sorted(draft.iterdir(), reverse=True):  # weights before the graph that names them
                    file.replace(target / file.name)
            else:
                draft.replace(target)
    except OSError as error:
        raise UserError(f"path={target}: cannot be written ({error.strerror or error})") from error
