"""Tests that need a GPU; `make gpu-check` runs them. Random weights, no network, seconds each.

SAM_DISTILL_GPU_TESTS=cpu runs them on the CPU instead, at small sizes, so that they are tried before there is a GPU.
"""

import copy
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fit import Drawings, FailingStrategy, history, run
from torch import Tensor, distributed, nn

from sam_distill.data.base import collate
from sam_distill.evaluate.everything import match_masks
from sam_distill.models.encoders import EfficientViT, ImageEncoder, SamViT, TinyViT
from sam_distill.models.sam import Sam
from sam_distill.predict.mask_generator import SamAutomaticMaskGenerator
from sam_distill.prompts.forms import box_prompts, point_prompts
from sam_distill.prompts.samplers import Boxes
from sam_distill.runs.hardware import Hardware
from sam_distill.strategies.base import Strategy
from sam_distill.strategies.coupled import Coupled
from sam_distill.strategies.decoupled import Decoupled
from sam_distill.strategies.finetune_decoder import FinetuneDecoder
from sam_distill.strategies.finetune_joint import FinetuneJoint
from sam_distill.strategies.semi_coupled import SemiCoupled
from sam_distill.teachers import LiveTeacher
from sam_distill.training.fit import new_student
from sam_distill.training.lightning_module import requirements
from sam_distill.training.sync_batchnorm import SyncBatchNorm
from sam_distill.types import ALL, Batch, Prompts

ASKED = os.environ.get("SAM_DISTILL_GPU_TESTS")
DEVICE = ASKED or "cuda"
ON_GPU = DEVICE == "cuda"
SIZE = 1024 if ON_GPU else 64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ASKED or torch.cuda.is_available()), reason="there is no GPU here"),
]

ENCODERS = {
    "tinyvit": lambda: TinyViT(pretrained=False),
    "efficientvit": lambda: EfficientViT("m0", pretrained=False),
    "vit": lambda: SamViT(width=768, depth=2, heads=12, global_blocks=[1]),
}
STRATEGIES: dict[str, Strategy] = {
    "decoupled": Decoupled(), "semi_coupled": SemiCoupled(rounds=2), "coupled": Coupled(decoder="teacher"),
    "finetune_decoder": FinetuneDecoder(), "finetune_joint": FinetuneJoint(),
}  # fmt: skip


class RandomTeacher(LiveTeacher):
    sha256 = "none"

    def __init__(self, sam: Sam) -> None:
        super().__init__(f"random {id(sam)}", memory_gb=0.1)
        self.sam = sam  # type: ignore[misc]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Turn off TF32 in matrix products and convolutions, so that fp32 means fp32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    torch.manual_seed(0)
    return RandomTeacher(Sam(TinyViT(pretrained=False), image_size=min(SIZE, 256)).requires_grad_(False).eval())


@pytest.fixture(scope="module")
def batch() -> Batch:
    return collate([Drawings().load(0), Drawings().load(3)])


def new_sam(encoder: ImageEncoder, size: int = SIZE) -> Sam:
    torch.manual_seed(0)
    return Sam(encoder, image_size=size).requires_grad_(False).eval()


def prompts() -> Prompts:
    """Return two prompts for each of two images, one of a point and a box, one of a point alone: labels [2, 2, 3]."""
    points = torch.tensor([[[300.0, 200.0]], [[700.0, 500.0]]]).expand(2, 2, 1, 2)
    boxes = torch.tensor([[100.0, 80.0, 600.0, 400.0], [torch.nan] * 4]).expand(2, 2, 4)
    return box_prompts(boxes, points, torch.ones(2, 2, 1, dtype=torch.int64))


def assert_close_to_cpu(on_device: Tensor, on_cpu: Tensor, share: float) -> None:
    """Assert that both differ by less than `share` of the CPU values' standard deviation."""
    assert on_device.device.type == DEVICE
    assert (on_device.cpu().float() - on_cpu).abs().max() < share * on_cpu.std(), (
        (on_device.cpu().float() - on_cpu).abs().max()
    )


@contextmanager
def never_waiting() -> Iterator[None]:
    """Raise an error wherever the CPU would have to wait for the GPU."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_match_the_cpu(name: str, batch: Batch) -> None:
    sam = new_sam(ENCODERS[name]())
    on_cpu = sam.encode(batch.images, batch.sizes)
    sam, on_device = sam.to(DEVICE).to(memory_format=torch.channels_last), batch.to(DEVICE)
    assert_close_to_cpu(sam.encode(on_device.images, on_device.sizes), on_cpu, 5e-3)
    with torch.autocast(DEVICE, torch.bfloat16):
        half = sam.encode(on_device.images, on_device.sizes)
    assert torch.cosine_similarity(half.cpu(), on_cpu, dim=1).mean() > 0.99


@torch.no_grad()
def test_masks_match_the_cpu(batch: Batch) -> None:
    """Some prompts have absent points, which a GPU masks and a CPU may leave out."""
    sam, embedding = new_sam(TinyViT(pretrained=False)), torch.randn(2, 256, 64, 64)
    on_cpu = sam.decode(embedding, prompts(), ALL)
    sam = sam.to(DEVICE)
    on_device = sam.decode(embedding.to(DEVICE), prompts().to(DEVICE), ALL)
    assert_close_to_cpu(on_device.low_res, on_cpu.low_res, 1e-2)
    assert_close_to_cpu(on_device.iou, on_cpu.iou, 1e-2)
    with torch.autocast(DEVICE, torch.bfloat16):
        half = sam.decode(embedding.to(DEVICE), prompts().to(DEVICE), ALL)
    assert_close_to_cpu(half.low_res, on_cpu.low_res, 0.5)
    assert half.low_res.dtype == torch.float32


@torch.no_grad()
def test_many_prompts_at_a_time_and_one_by_one() -> None:
    sam, embedding = new_sam(TinyViT(pretrained=False)).to(DEVICE), torch.randn(1, 256, 64, 64, device=DEVICE)
    points = torch.rand(1, 70 if ON_GPU else 3, 1, 2, device=DEVICE) * 1000
    labels = torch.ones(points.shape[:3], dtype=torch.int64, device=DEVICE)
    together = sam.decode(embedding, point_prompts(points, labels))
    last = sam.decode(embedding, point_prompts(points[:, -1:], labels[:, -1:]))
    assert_close_to_cpu(together.low_res[:, -1], last.low_res[:, 0].cpu(), 1e-2)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_step_matches_the_cpu(name: str, dtype: torch.dtype | None, teacher: LiveTeacher, batch: Batch) -> None:
    """The loss is that of the CPU, gradients are finite, and neither the forward nor the backward pass waits."""
    strategy, sampler = STRATEGIES[name], Boxes(count=2, seed=0)
    requires = requirements(strategy, sampler)
    torch.manual_seed(1)  # other weights than the teacher's
    student = new_student(TinyViT(pretrained=False), teacher.sam.cpu(), min(SIZE, 256), neck_from_teacher=True)
    strategy.prepare(student)
    student.requires_grad_(False).eval()
    losses = []
    for device in ("cpu", DEVICE):
        student, device_batch = student.to(device), batch.to(device)
        teacher.sam.to(device)
        parameters = [p for part in strategy.trainable(student).values() for p in part.requires_grad_().parameters()]
        with never_waiting() if device == "cuda" else nullcontext():
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                filled = teacher.fill(device_batch, requires)
                if "prompts" in requires:
                    filled = replace(filled, prompts=sampler.draw(filled))
                loss = strategy.step(student, filled).loss
            loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        losses.append(loss.item())
        student.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if dtype is None else 0.1)


class OneDevice(Hardware):
    """Hardware of one process of a data-parallel run, with all that this involves, such as NCCL on a GPU."""

    def trainer_arguments(self) -> dict[str, Any]:
        return super().trainer_arguments() | {"strategy": "ddp"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set address and port of a process group of one process; destroy the group after the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def train(run_dir: Path, teacher: LiveTeacher, hardware: Hardware, **options: Any) -> None:
    torch.manual_seed(0)
    student = new_student(TinyViT(pretrained=False), teacher.sam, 64, neck_from_teacher=False)
    run(run_dir, teacher, student, hardware=hardware, budget="4 steps", validate_every="2 steps", **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run(precision: Any, teacher: LiveTeacher, tmp_path: Path) -> None:
    """Losses and scores are the same whether the run was interrupted or not, with averaged weights."""
    hardware = Hardware("gpu" if ON_GPU else "cpu", precision=precision, workers=2 if ON_GPU else 0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    train(whole, teacher, hardware, ema=0.9)
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, teacher, hardware, ema=0.9, strategy=FailingStrategy(4))
    train(broken, teacher, hardware, ema=0.9, resume=str(broken))
    for column in ("train/loss", "val/embedding_mse"):
        expected = pytest.approx(history(whole, column), rel=1e-3 if precision == "fp32" else 3e-2)
        assert history(broken, column) == expected


@pytest.mark.usefixtures("alone")
def test_data_parallel_on_one_device(teacher: LiveTeacher, tmp_path: Path) -> None:
    """Ranks agree on whether to stop and combine their losses and metrics; here there is only one rank."""
    for name, kind in (("plain", Hardware), ("ddp", OneDevice)):
        (tmp_path / name).mkdir()
        train(tmp_path / name, teacher, kind("gpu" if ON_GPU else "cpu", precision="fp32", workers=0))
    for column in ("train/loss", "val/embedding_mse"):
        assert history(tmp_path / "ddp", column) == pytest.approx(history(tmp_path / "plain", column), rel=1e-3)


@pytest.mark.usefixtures("alone")
def test_batchnorm_over_all_ranks(tmp_path: Path) -> None:
    distributed.init_process_group("nccl" if ON_GPU else "gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    layer, x = nn.BatchNorm2d(4).to(DEVICE), torch.randn(3, 4, 5, 6, device=DEVICE)
    plain, twin = copy.deepcopy(layer), x.clone().requires_grad_()
    x.requires_grad_()
    plain(twin).square().sum().backward()
    with SyncBatchNorm():
        layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-3, atol=1e-4)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_compiled_encoder(batch: Batch) -> None:
    if not ON_GPU:
        pytest.skip("a CPU needs a compiler for that")
    encoder, pixels = (
        new_sam(TinyViT(pretrained=False)).image_encoder.to(DEVICE),
        torch.randn(1, 3, 256, 256).to(DEVICE),
    )
    torch.testing.assert_close(torch.compile(encoder)(pixels), encoder(pixels), rtol=1e-2, atol=1e-2)


def test_segment_everything_finds_the_cpus_masks() -> None:
    """In fp32 the number of masks is the CPU's within a tenth, and the mean IoU with them is above 0.95."""
    sam, image = new_sam(TinyViT(pretrained=False)), np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    options: dict[str, Any] = {"pred_iou_thresh": -10.0, "stability_score_thresh": 0.0, "output_mode": "coco_rle"}
    options |= {"points_per_side": 4 if ON_GPU else 1, "box_nms_thresh": 1.0}
    on_cpu = SamAutomaticMaskGenerator(sam, **options).generate(image)
    on_device = SamAutomaticMaskGenerator(sam.to(DEVICE), **options).generate(image)
    assert len(on_device) == pytest.approx(len(on_cpu), rel=0.1)
    assert np.mean([row.iou for row in match_masks("", on_cpu, on_device)]) > 0.95
