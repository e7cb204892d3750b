"""The command `sam-distill bench`."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from rich.console import Console

from sam_distill.benchmark.data import bench_data, example_jpegs, temporary_cache
from sam_distill.benchmark.everything import bench_everything
from sam_distill.benchmark.models import bench_decoder, bench_encoder, bench_fastsam, bench_image, parameter_finding
from sam_distill.benchmark.peak import bench_peak
from sam_distill.benchmark.steps import bench_step
from sam_distill.benchmark.tables import Finding, show, write
from sam_distill.data.base import DataSource
from sam_distill.errors import UserError
from sam_distill.evaluate.agreement import Agreement
from sam_distill.export.contract import CONTRACT, contracts
from sam_distill.fastsam.model import FastSam, SamOrFastSam, is_fastsam
from sam_distill.images import decode
from sam_distill.models.checkpoints import load_sam
from sam_distill.models.encoders import ImageEncoder
from sam_distill.models.sam import Sam
from sam_distill.prompts.samplers import Points
from sam_distill.runs.hardware import Hardware
from sam_distill.strategies.decoupled import Decoupled
from sam_distill.teachers import CachedTeacher, save_teacher
from sam_distill.training.datamodule import DistillationData
from sam_distill.training.lightning_module import Distillation
from sam_distill.training.optimizers import AdamW


def bench(
    *,
    suite: Literal["all", "data", "step", "parameters", "encoder", "decoder", "image", "everything"],
    data: DataSource,
    checkpoint: SamOrFastSam,
    encoder: ImageEncoder | None = None,
    trainer: Hardware,
    batch_size: Annotated[int, Field(gt=0)],
    points_per_side: Annotated[int, Field(ge=1)],
    seconds: Annotated[float, Field(gt=0)],
    compiled: bool,
    exported: str | None,
    scale: Literal["paper", "small"],
    run_dir: Path,
) -> None:
    """Measure speed side by side with the reference implementations; conf/bench.yaml explains each option."""
    del scale  # only experiments read it
    kind, fastsam = trainer.kind, is_fastsam(checkpoint)
    folder = None if exported is None else Path(exported).expanduser()
    if folder and not contracts(folder):
        raise UserError(f"exported={exported}: no {CONTRACT} there; sam-distill export format=onnx, for one, writes it")
    if fastsam and suite != "image":
        raise UserError(f"checkpoint={checkpoint}: of a FastSAM only suite=image can be measured")

    def chosen(name: str) -> bool:
        return suite in (name, "all")

    @cache
    def jpegs() -> list[bytes]:
        return example_jpegs(data)

    @cache
    def photograph() -> np.ndarray:
        return np.asarray(decode(jpegs()[0], full=True)[0])

    def findings() -> Iterator[Finding]:
        if chosen("data"):
            yield from bench_data(jpegs(), trainer.num_workers, seconds)
        if fastsam:
            yield bench_fastsam(FastSam(checkpoint), photograph(), kind, seconds)
            return
        sam = load_sam(checkpoint) if encoder is None else Sam(encoder)
        yield parameter_finding(sam)
        if chosen("encoder") or chosen("decoder"):
            peak = bench_peak(kind, seconds)
            yield peak
        if chosen("encoder"):
            yield bench_encoder(sam, kind, compiled, encoder is None, folder, peak, seconds)
        if chosen("decoder"):
            yield from bench_decoder(sam, kind, peak, seconds)
        if chosen("image"):
            yield bench_image(sam, photograph(), kind, seconds)
        if chosen("everything"):
            yield bench_everything(sam, photograph(), points_per_side, kind)
        if chosen("step"):
            yield _step(load_sam(checkpoint) if encoder is None else sam, jpegs(), trainer, batch_size)

    facts = {"device": trainer.device_name, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    found: list[Finding] = []
    Console().print(", ".join(f"{name}: {value}" for name, value in facts.items()), highlight=False)
    for finding in findings():
        show(finding)
        found.append(finding)
        write(found, facts, run_dir)
    Console().print(f"table  {run_dir / 'bench.md'}", highlight=False, soft_wrap=True, markup=False)


def _step(sam: Sam, jpegs: list[bytes], trainer: Hardware, batch_size: int) -> Finding:
    """Measure a training step of decoupled distillation into `sam`, with teacher embeddings from a temporary cache."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        source = temporary_cache(path, jpegs, "int8")
        save_teacher(sam, path)
        module = Distillation(sam, Decoupled(), CachedTeacher(str(path)), Points(1, 0), AdamW(), Agreement())
        return bench_step(module, DistillationData(source, batch_size, 0, trainer), trainer)
