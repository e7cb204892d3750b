"""Tests on a pretended GPU: no operation mixes devices, and none makes the CPU wait for the GPU without need.

All encoders, strategies, prompt samplers, optimizers and protocols of conf/ are built small and run on it. Encoders,
strategies and prediction run in fp32 and in bf16.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from pretended import PretendedGpu, pretended_gpu
from pycocotools import mask as coco
from torch import Tensor, nn

from sam_distill.cli.app import default_conf_dir
from sam_distill.config.compose import compose_jobs
from sam_distill.evaluate.evaluator import Evaluator, blind
from sam_distill.models.encoders import TinyViT
from sam_distill.models.sam import Sam
from sam_distill.predict.mask_generator import SamAutomaticMaskGenerator
from sam_distill.predict.predictor import SamPredictor
from sam_distill.prompts.samplers import Points
from sam_distill.strategies.semi_coupled import SemiCoupled
from sam_distill.teachers import LiveTeacher
from sam_distill.training.lightning_module import requirements
from sam_distill.types import Batch, upload

CONF = default_conf_dir()
DTYPES = pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
SMALL = {  # overrides for encoders that are otherwise too large for a quick test
    "vit": ["encoder.width=64", "encoder.depth=2", "encoder.heads=2", "encoder.global_blocks=[1]"],
    "timm": ["encoder.name=resnet18"],
}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def build(command: str, group: str, name: str, *overrides: str) -> Any:
    """Return the object that conf/GROUP/NAME.yaml describes."""
    mandatory = ["checkpoint=mobile_sam"] if command == "evaluate" else []
    (job,), mistakes = compose_jobs(CONF, command, [f"{group}={name}", *mandatory, *overrides])
    assert not mistakes
    return instantiate(job[group], _convert_="all")


def encoder(name: str) -> nn.Module:
    changes = SMALL["timm"] if name == "timm" else SMALL["vit"] if name.startswith("vit_") else []
    pretrained = ["encoder.pretrained=false"] if "pretrained" in (CONF / f"encoder/{name}.yaml").read_text() else []
    return build("train", "encoder", name, *changes, *pretrained)


class Teacher(LiveTeacher):
    """Live teacher that uses a SAM with random weights, at 64 px, instead of loading a checkpoint."""

    def __init__(self, sam: Sam, memory_gb: float = 0.0) -> None:
        super().__init__(f"random {id(sam)}", memory_gb)
        self.sam = sam  # type: ignore[misc]


@pytest.fixture(scope="module")
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu() as pretended:
        yield pretended


@pytest.fixture(scope="module")
def sam(gpu: PretendedGpu) -> Sam:
    """Return a SAM with random weights, at 64 px, on the GPU: the teacher, and the model that protocols evaluate."""
    torch.manual_seed(0)
    return Sam(TinyViT(pretrained=False), image_size=64).requires_grad_(False).eval().to("cuda")


@pytest.fixture(scope="module")
def learner(gpu: PretendedGpu) -> Sam:
    return Sam(TinyViT(pretrained=False), image_size=64).to("cuda")


@pytest.fixture
def student(learner: Sam) -> Sam:
    """Return the student, frozen as strategies get it. It is a new Sam, because they may replace its decoder."""
    learner.requires_grad_(False).eval()
    return Sam(learner.image_encoder, learner.prompt_encoder, learner.mask_decoder, learner.image_size)


@pytest.fixture(scope="module")
def batch(gpu: PretendedGpu) -> Batch:
    """Return a batch as a loader yields it: a landscape and a portrait with two annotations each."""
    numbers = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 1024, 1024), generator=numbers, dtype=torch.uint8)
    sizes, originals = torch.tensor([[683, 1024], [1024, 700]]), torch.tensor([[200, 300], [292, 200]])
    annotations = torch.zeros(2, 2, 256, 256, dtype=torch.bool)
    annotations[:, :, 40:100, 50:90] = True
    truth = []
    for size in originals.tolist():
        mask = np.zeros(size, np.uint8, order="F")
        mask[50:150, 60:140] = 1
        truth.append([coco.encode(mask)] * 2)
    on_host = Batch(["a", "b"], images, sizes, originals, [0, 1], annotations, truth=truth, checksums=[1, 2])
    return on_host.pin_memory().to("cuda")


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cuda", dtype=dtype, enabled=dtype is not None)


def is_on_gpu(value: Tensor) -> bool:
    return value.device.type == "cuda"


MIXES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a forgotten .to": lambda on_gpu, on_cpu: on_gpu + on_cpu,
    "a product with what is not there": lambda on_gpu, on_cpu: on_gpu @ on_cpu,
    "an index there, into what is here": lambda on_gpu, on_cpu: on_cpu[on_gpu.long() * 0],
    "values from here, put there": lambda on_gpu, on_cpu: on_gpu.index_put_((on_gpu.long()[:1, 0] * 0,), on_cpu[:1]),
    "numpy of what is there": lambda on_gpu, on_cpu: np.asarray(on_gpu),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_of_devices_is_found(name: str, gpu: PretendedGpu) -> None:
    on_cpu = torch.eye(3)
    with pytest.raises((RuntimeError, TypeError), match=r"CPU|numpy"):
        MIXES[name](on_cpu.to("cuda"), on_cpu)


WAITS: dict[str, tuple[Callable[[Tensor, Tensor], object], int]] = {
    "a number": (lambda on_gpu, on_cpu: float(on_gpu.sum()), 1),
    "a decision": (lambda on_gpu, on_cpu: bool((on_gpu > 0).any()), 1),
    "a list": (lambda on_gpu, on_cpu: on_gpu.tolist(), 1),
    "how many": (lambda on_gpu, on_cpu: on_gpu[on_gpu > 0], 1),
    "a copy to the CPU": (lambda on_gpu, on_cpu: on_gpu.cpu(), 1),
    "a copy from the CPU": (lambda on_gpu, on_cpu: on_cpu.to("cuda"), 1),
    "a pageable copy": (lambda on_gpu, on_cpu: on_cpu.to("cuda", non_blocking=True), 1),
    "a constant": (lambda on_gpu, on_cpu: torch.tensor([1, 2], device="cuda"), 1),
    "an index from the CPU": (lambda on_gpu, on_cpu: on_gpu[on_cpu[0].long()], 1),
    "a fill behind a mask": (lambda on_gpu, on_cpu: on_gpu.masked_fill(on_gpu > 0, 1.0), 0),
    "arithmetic": (lambda on_gpu, on_cpu: (on_gpu * 2 + 1).softmax(-1), 0),
    "a constant by `upload`": (lambda on_gpu, on_cpu: upload([1, 2], "cuda") + on_gpu[0, 0].long(), 0),
    "there and back by pinned memory": (
        lambda on_gpu, on_cpu: on_gpu.to("cpu", non_blocking=True).to("cuda", non_blocking=True), 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_waits_for_the_gpu_are_recorded(name: str, gpu: PretendedGpu) -> None:
    act, expected = WAITS[name]
    on_cpu = torch.eye(3)
    on_gpu = on_cpu.to("cuda")
    gpu.waits.clear()
    act(on_gpu, on_cpu)
    assert len(gpu.waits) == expected, gpu.waits


def test_pretended_gpu_computes_the_same_as_the_cpu(sam: Sam, batch: Batch) -> None:
    on_gpu = sam.encode(batch.images, batch.sizes)
    on_cpu = copy.deepcopy(sam).to("cpu").encode(batch.images.cpu(), batch.sizes.cpu())
    assert (is_on_gpu(on_gpu), is_on_gpu(on_cpu)) == (True, False)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", choices("encoder"))
def test_encoder_runs_without_waits(name: str, gpu: PretendedGpu, batch: Batch) -> None:
    student = Sam(encoder(name), image_size=64).to("cuda").to(memory_format=torch.channels_last)
    first = replace(batch, images=batch.images[:1], sizes=batch.sizes[:1])
    gpu.waits.clear()
    for training, dtype in ((False, None), (True, torch.bfloat16)):
        with autocast(dtype):
            embedding = student.train(training).encode(first.images.expand(2, -1, -1, -1), batch.sizes)
        assert is_on_gpu(embedding)
    assert gpu.waits == []


@DTYPES
@pytest.mark.parametrize("name", choices("strategy"))
def test_strategy_step_runs_without_waits(
    name: str, dtype: torch.dtype | None, sam: Sam, student: Sam, gpu: PretendedGpu, batch: Batch
) -> None:
    step(build("train", "strategy", name), Points(1, 0), sam, student, dtype, gpu, batch)


def step(strategy: Any, prompts: Any, teacher: Sam, student: Sam, dtype: Any, gpu: PretendedGpu, batch: Batch) -> None:
    """Check one step. If the teacher's embedding is required, check another one, in which it comes from memory."""
    decoder = student.mask_decoder
    strategy.prepare(student)
    if student.mask_decoder is not decoder:  # a new decoder, trained from scratch
        student.mask_decoder.to("cuda")
    for part in strategy.trainable(student).values():
        part.requires_grad_(True).train()
    live_teacher, requires = Teacher(teacher, memory_gb=0.1), requirements(strategy, prompts)
    gpu.waits.clear()
    for _ in range(2 if "teacher_embedding" in requires else 1):
        with autocast(dtype):
            filled = live_teacher.fill(batch, requires)
            if "prompts" in requires:
                filled = replace(filled, prompts=prompts.draw(filled))
            out = strategy.step(student, filled)
        assert all(is_on_gpu(value) for value in (out.loss, *out.logs.values()))
        assert out.loss.requires_grad
    assert gpu.waits == []


@pytest.mark.parametrize("name", choices("prompts"))
def test_prompt_sampler_runs_without_waits(name: str, sam: Sam, student: Sam, gpu: PretendedGpu, batch: Batch) -> None:
    """Check its prompts and, except for the mixture, the clicks that a second round adds to them."""
    count = {"grid": ["prompts.side=1"], "mixture": []}.get(name, ["prompts.count=1"])
    sampler = build("train", "prompts", name, *count)
    step(SemiCoupled(rounds=1 if name == "mixture" else 2), sampler, sam, student, None, gpu, batch)


@pytest.mark.parametrize("name", ["boxes", "mask_points"])
def test_annotation_prompts_need_no_wait(name: str, sam: Sam, student: Sam, gpu: PretendedGpu, batch: Batch) -> None:
    sampler = build("train", "prompts", name, "prompts.count=2", "prompts.masks=annotations")
    step(SemiCoupled(targets="annotations", tokens="minimum"), sampler, sam, student, None, gpu, batch)


@pytest.mark.parametrize("name", choices("optim"))
def test_optimizer_step_runs_without_waits(name: str, gpu: PretendedGpu) -> None:
    optim, part = build("train", "optim", name), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to("cuda")
    optimizer, schedule = optim.build({"part": part}, total_steps=10)
    gpu.waits.clear()
    for _ in range(2):
        for parameter in part.parameters():
            parameter.grad = torch.ones_like(parameter)
        nn.utils.clip_grad_norm_(part.parameters(), optim.clip)
        optimizer.step()
        schedule.step()
    assert gpu.waits == []


PROMPT_COUNTS = {  # options for few and for more prompts
    "agreement": ("protocol.points=1", "protocol.points=2"),
    "ground_truth": ("protocol.annotations=1", "protocol.annotations=2"),
    "point_pairs": ("protocol.pairs=1", "protocol.pairs=2"),
}


@pytest.mark.parametrize("name", choices("protocol"))
def test_a_protocol_waits_a_few_times_for_each_batch(name: str, sam: Sam, gpu: PretendedGpu, batch: Batch) -> None:
    """The number of waits is the same for few and for more prompts."""
    if name == "everything":
        loose = ["protocol.generator.pred_iou_thresh=-1", "protocol.generator.stability_score_thresh=0"]
        protocol = build("evaluate", "protocol", name, "protocol.generator.points_per_side=1", *loose)
        assert protocol.masks(sam, np.zeros((64, 96, 3), np.uint8))
        return
    counted = []
    for options in PROMPT_COUNTS[name]:
        short = ["protocol.distances=[50,100]"] if name == "point_pairs" else []
        protocol = build("evaluate", "protocol", name, options, *short)
        with torch.no_grad():
            embedding = sam.encode(batch.images, batch.sizes)
            evaluator = Evaluator(protocol).to("cuda")
            gpu.waits.clear()
            targets = protocol.make_targets(protocol.view(sam, embedding, batch))
            student = protocol.view(sam, embedding.flip(0), batch)
            evaluator.update(student, embedding, targets)
            counted.append(len([wait for wait in gpu.waits if "  evaluator.py" not in wait]))  # it draws a few pictures
            assert evaluator.comparisons
            assert evaluator.compute()["prompts"]
    with torch.no_grad():
        blind(Evaluator(protocol).to("cuda"), sam, [(batch, embedding, targets)], embedding.sum(0), 2)
    assert counted[0] == counted[1]
    kinds, clicks = len(protocol.kinds), max(getattr(protocol, "clicks", [1])) - 1
    assert counted[0] <= 3 + 3 * kinds + clicks * (1 + 2), gpu.waits


@DTYPES
def test_predictor_and_generator(dtype: torch.dtype | None, sam: Sam, gpu: PretendedGpu) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    with autocast(dtype):
        predictor = SamPredictor(sam)
        predictor.set_image(image)
        masks, _, low_res = predictor.predict(np.array([[40, 30]]), np.array([1]), box=np.array([10, 10, 60, 50]))
        assert masks.shape == (3, 60, 90)
        predictor.predict(mask_input=low_res[:1])
        options: dict[str, Any] = {"pred_iou_thresh": -1, "stability_score_thresh": 0, "min_mask_region_area": 9}
        found = SamAutomaticMaskGenerator(sam, points_per_side=1, **options).generate(image)
    assert found
