"""Complete training runs on six small drawings, with the real teacher."""

import csv
import hashlib
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from sam_distill.data.base import collate
from sam_distill.data.indexed import IndexedSource
from sam_distill.errors import UserError
from sam_distill.evaluate.agreement import Agreement
from sam_distill.evaluate.evaluation import evaluate_prompts
from sam_distill.evaluate.evaluator import Evaluator, blind
from sam_distill.evaluate.protocol import Outcome, Target
from sam_distill.evaluate.views import View
from sam_distill.images import to_frame
from sam_distill.loggers.history import CsvOnly
from sam_distill.models.checkpoints import load_sam
from sam_distill.models.encoders import SamViT, TinyViT
from sam_distill.models.sam import Sam
from sam_distill.prompts.samplers import Boxes, Points
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.processes import STOP_SIGNALS
from sam_distill.strategies.coupled import Coupled
from sam_distill.strategies.decoupled import Decoupled
from sam_distill.strategies.finetune_decoder import FinetuneDecoder
from sam_distill.strategies.finetune_joint import FinetuneJoint
from sam_distill.strategies.semi_coupled import SemiCoupled
from sam_distill.teachers import LiveTeacher
from sam_distill.training import callbacks, step_times
from sam_distill.training.fit import Options, Setup, _check_same_run, fit, new_student
from sam_distill.training.lightning_module import Distillation, silence_lightning
from sam_distill.training.optimizers import AdamW, Muon
from sam_distill.training.summary import _option
from sam_distill.types import Batch, Sample, StepOutput

HARDWARE = Hardware(accelerator="cpu", precision="fp32", workers=0)


class Drawings(IndexedSource[int]):
    def __init__(self, damaged: int | None = None) -> None:
        self.train, self.val = range(4), range(4, 6)
        self.damaged = damaged

    def keys(self, items: Sequence[int]) -> list[str]:
        return [f"drawing{item}" for item in items]

    def load(self, item: int) -> Sample:
        if item == self.damaged:
            raise UserError(f"drawing{item} is torn")
        image = Image.new("RGB", (96, 64), (40 * item, 120, 200))
        ImageDraw.Draw(image).ellipse((10 + 6 * item, 8, 50 + 6 * item, 50), fill=(200, 40 * item, 20))
        return Sample(f"drawing{item}", to_frame(image), (64, 96))


@pytest.fixture(scope="module")
def live() -> LiveTeacher:
    return LiveTeacher("mobile_sam")


def student(live: LiveTeacher) -> Sam:
    torch.manual_seed(0)
    return new_student(TinyViT(pretrained=False), live.sam, image_size=128, neck_from_teacher=False)


def run(run_dir: Path, live: LiveTeacher, sam: Sam, **changes: Any) -> dict[str, Any]:
    setup: dict[str, Any] = {
        "strategy": Decoupled(), "optim": AdamW(lr=1e-3), "protocol": Agreement(points=1), "hardware": HARDWARE,
        "logger": CsvOnly(), "prompts": Points(1, 0), "source": Drawings(),
    }  # fmt: skip
    options: dict[str, Any] = {"budget": "6 steps", "validate_every": "3 steps", "batch_size": 2}
    for name, value in changes.items():
        (setup if name in setup else options)[name] = value
    return fit(Setup(student=sam, teacher=live, **setup), Options(**options), run_dir)


def history(run_dir: Path, column: str) -> dict[int, float]:
    with (run_dir / "history.csv").open() as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def columns(run_dir: Path) -> list[str]:
    return (run_dir / "history.csv").read_text().splitlines()[0].split(",")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, live: LiveTeacher) -> tuple[Path, Sam]:
    run_dir, sam = tmp_path_factory.mktemp("run"), student(live)
    before = {key: value.clone() for key, value in live.sam.state_dict().items()}
    run(run_dir, live, sam)
    changed = [key for key, value in live.sam.state_dict().items() if not torch.equal(value, before[key])]
    assert not changed, "the teacher must be bit-identical after training"
    return run_dir, sam


def test_smaller_inputs_first(tmp_path: Path, live: LiveTeacher) -> None:
    """The first shares of the steps use smaller inputs; validations and saved students use the student's own size."""
    sam = student(live)
    seen: dict[bool, list[int]] = {True: [], False: []}
    sam.image_encoder.register_forward_pre_hook(lambda part, args: seen[part.training].append(args[0].shape[-1]))
    run(tmp_path, live, sam, progressive_resizing={64: 0.3, 96: 0.3})
    assert seen[True] == [64, 64, 96, 96, 128, 128]
    assert set(seen[False]) == {128}
    assert {load_sam(tmp_path / name).image_size for name in ("student.pt", "checkpoints/last.ckpt")} == {128}


def test_gradients_are_clipped(tmp_path: Path, live: LiveTeacher) -> None:
    """By optim.clip or by an argument of Lightning's Trainer: gradients clipped far below AdamW's eps make no step."""
    key, changes = "image_encoder.neck.conv.weight", []
    limited = Hardware("cpu", precision="fp32", workers=0, gradient_clip_val=1e-14, deterministic=None)
    for clip, hardware in ((1e-14, HARDWARE), (1.0, limited)):
        sam = student(live)
        first = sam.state_dict()[key].clone()
        optim = AdamW(lr=1e-3, clip=clip, weight_decay=0, warmup=0)
        (tmp_path / f"{len(changes)}").mkdir()
        run(tmp_path / f"{len(changes)}", live, sam, optim=optim, hardware=hardware, budget="1 step")
        changes.append((sam.state_dict()[key] - first).abs().max().item())
    assert max(changes) < 1e-8


def test_messages_of_profilers_are_logged() -> None:
    """Lightning's other messages are silenced."""
    silence_lightning()
    assert logging.getLogger("pytorch_lightning.profilers.profiler").isEnabledFor(logging.INFO)
    assert not logging.getLogger("pytorch_lightning.trainer").isEnabledFor(logging.INFO)


def test_trainer_arguments_that_have_their_own_option_are_refused() -> None:
    with pytest.raises(UserError, match=r"trainer.max_steps: give budget=\.\.\. instead"):
        Hardware("cpu", max_steps=3)
    with pytest.raises(UserError, match=r"trainer.limit_val_batches: give data.val_images=\.\.\. instead"):
        Hardware("cpu", limit_val_batches=0)  # would leave neither a score nor a student


def test_a_compiled_student_is_saved_under_official_names(
    tmp_path: Path, live: LiveTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as usual, but run by the eager backend, as the C++ compiler takes minutes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    tiny = SamViT(width=16, depth=1, heads=1, global_blocks=[0])
    sam = new_student(tiny, live.sam, image_size=64, neck_from_teacher=False)
    keys = list(sam.state_dict())
    run(tmp_path, live, sam, compile=True, budget="1 step", validate_every="1 step", ema=0.9)
    assert sam.image_encoder._compiled_call_impl is not None
    assert list(load_sam(tmp_path).state_dict()) == keys


def test_resizing_shares_above_one_are_refused(tmp_path: Path, live: LiveTeacher) -> None:
    with pytest.raises(UserError, match=r"add up to 1\.3, which is more than 1"):
        run(tmp_path, live, student(live), progressive_resizing={64: 0.9, 96: 0.4})
    assert not list(tmp_path.iterdir())


def test_resizing_above_the_students_size_is_refused(tmp_path: Path, live: LiveTeacher) -> None:
    with pytest.raises(UserError, match=r"192 px is more than the student's own: image_size=128"):
        run(tmp_path, live, student(live), progressive_resizing={64: 0.3, 192: 0.4})
    assert not list(tmp_path.iterdir())


def test_run_folder(finished: tuple[Path, Sam]) -> None:
    run_dir, sam = finished
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert metrics["images"] == 12
    assert metrics["token"] == "single"
    assert {"miou/point", "miou/box", "before/miou/point", "embedding_mse", "seconds", "prompts"} <= metrics.keys()
    assert sorted(history(run_dir, "val/miou/point")) == [0, 3, 6]
    assert sorted(history(run_dir, "train/loss")) == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in (run_dir / "pictures").iterdir()} == {
        "curves.png", "masks_0000000.png", "masks_0000003.png", "masks_0000006.png",
    }  # fmt: skip
    assert len((run_dir / "prompts.csv").read_text().splitlines()) == 1 + metrics["prompts"]
    for name in ("student.pt", "checkpoints/last.ckpt"):
        again = load_sam(run_dir / name)
        for key, value in sam.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), (name, key)


def test_only_the_encoder_learns(finished: tuple[Path, Sam], live: LiveTeacher) -> None:
    _, sam = finished
    for part in ("prompt_encoder", "mask_decoder"):
        theirs = getattr(live.sam, part).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(sam, part).state_dict().items())
    untrained = student(live).image_encoder.state_dict()
    same = [key for key, value in sam.image_encoder.state_dict().items() if torch.equal(value, untrained[key])]
    assert not same, f"never changed: {same}"


def test_teacher_is_not_in_the_checkpoint(finished: tuple[Path, Sam]) -> None:
    run_dir, sam = finished
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"student.{key}" for key in sam.state_dict()}


def test_one_batch_can_be_overfitted(tmp_path: Path, live: LiveTeacher) -> None:
    run(tmp_path, live, student(live), budget="40 steps", validate_every="40 steps", batch_size=4)
    losses = history(tmp_path, "train/loss")
    assert losses[40] < 0.35 * losses[1]


class FailingStrategy(Decoupled):
    """Decoupled strategy that fails at a given step, with an exception or with a NaN loss."""

    def __init__(self, fail_at: int, nan: bool = False) -> None:
        super().__init__()
        self.steps_left, self.nan = fail_at, nan

    def step(self, sam: Sam, batch: Batch) -> StepOutput:
        self.steps_left -= 1
        out = super().step(sam, batch)
        if self.steps_left:
            return out
        if self.nan:
            return StepOutput(out.loss * torch.nan)
        raise RuntimeError("power cut")


def test_a_resumed_run_follows_the_same_curve(finished: tuple[Path, Sam], tmp_path: Path, live: LiveTeacher) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, live, student(live), strategy=FailingStrategy(5))
    torch.manual_seed(123)
    run(tmp_path, live, student(live), resume=str(tmp_path))
    for column in ("train/loss", "val/miou/point", "train/lr"):
        assert history(tmp_path, column) == pytest.approx(history(finished[0], column), rel=1e-4), column
    assert "before/miou/point" in json.loads((tmp_path / "metrics.json").read_text())


class InterruptedAgreement(Agreement):
    """Agreement protocol that raises an exception in the middle of a validation, at call `at`."""

    def __init__(self, at: int) -> None:
        super().__init__(points=1)
        self.calls_left = at

    def compare(self, student: View, target: Target) -> Iterator[Outcome]:
        self.calls_left -= 1
        if not self.calls_left:
            raise RuntimeError("power cut")
        return super().compare(student, target)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_no_score_is_lost(finished: tuple[Path, Sam], tmp_path: Path, live: LiveTeacher, ema: float | None) -> None:
    """Each validation compares two kinds of prompts, the first also for the blind baseline. Step 3's is cut short."""
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, live, student(live), protocol=InterruptedAgreement(at=6), ema=ema)
    assert sorted(history(tmp_path, "val/miou/point")) == [0]
    for cut in (2, 99):  # the first resumed run is cut short at step 3 again
        with nullcontext() if cut == 99 else pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path, live, student(live), protocol=InterruptedAgreement(at=cut), resume=str(tmp_path), ema=ema)
    assert sorted(history(tmp_path, "val/miou/point")) == [0, 3, 6]
    assert sorted(history(tmp_path, "train/loss")) == [1, 2, 3, 4, 5, 6]
    if ema is None:
        for column in ("train/loss", "val/miou/point", "val/embedding_mse"):
            assert history(tmp_path, column) == pytest.approx(history(finished[0], column), rel=1e-4), column
    assert (tmp_path / "pictures/masks_0000003.png").is_file()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_damaged_training_image_is_left_out(
    tmp_path: Path, live: LiveTeacher, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hardware = Hardware(accelerator="cpu", precision="fp32", workers=workers)
    run(tmp_path, live, student(live), source=Drawings(damaged=1), hardware=hardware, validate_every=None)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["steps"], metrics["images_skipped"]) == (6, 1)
    assert "The first 4 images wait for the teacher" in caplog.text


def test_nan_loss_stops_the_run(tmp_path: Path, live: LiveTeacher) -> None:
    with pytest.raises(UserError, match=r"the loss is nan at step 1 \(images drawing\d, drawing\d\)"):
        run(tmp_path, live, student(live), strategy=FailingStrategy(2, nan=True))


class Demanding(Decoupled):
    requires = frozenset({"teacher_embedding", "moonlight"})


def test_unavailable_requirement_is_refused_before_step_0(tmp_path: Path, live: LiveTeacher) -> None:
    with pytest.raises(UserError, match="needs moonlight, which no one provides"):
        run(tmp_path, live, student(live), strategy=Demanding())


PARTS = {
    "semi_coupled": (SemiCoupled(), ("image_encoder.",)),
    "coupled": (Coupled(), ("image_encoder.", "mask_decoder.")),
    "finetune_decoder": (FinetuneDecoder(), ("mask_decoder.",)),
    "finetune_joint": (FinetuneJoint(), ("image_encoder.", "mask_decoder.")),
}


@pytest.mark.parametrize("name", PARTS)
def test_mask_strategy_in_training(name: str, finished: tuple[Path, Sam], tmp_path: Path, live: LiveTeacher) -> None:
    """It starts from a distilled run. Only its own parts change, no BatchNorm statistics of others. All is saved."""
    strategy, trains = PARTS[name]
    theirs = {key: value.clone() for key, value in live.sam.state_dict().items()}
    start, sam = load_sam(finished[0]).state_dict(), student(live)
    run(tmp_path, live, sam, strategy=strategy, budget="2 steps", init=str(finished[0]), step_times=True)
    saved = load_sam(tmp_path).state_dict()
    assert all(torch.equal(value, sam.state_dict()[key]) for key, value in saved.items())
    for part in ("image_encoder.", "prompt_encoder.", "mask_decoder."):
        changed = [key for key, value in start.items() if key.startswith(part) and not torch.equal(value, saved[key])]
        assert bool(changed) == (part in trains), changed[:5]
    assert all(torch.equal(value, theirs[key]) for key, value in live.sam.state_dict().items())
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == {f"student.{key}" for key in saved}
    assert {"train/mask_loss", "train/iou_error", "train/miou"} <= set(columns(tmp_path))


def test_finetuning_without_init_is_refused(tmp_path: Path, live: LiveTeacher) -> None:
    with pytest.raises(UserError, match="strategy=finetune_decoder starts from a distilled student: give init=RUN_DIR"):
        run(tmp_path, live, student(live), strategy=FinetuneDecoder())


def test_targets_of_annotations_need_annotated_data(tmp_path: Path, live: LiveTeacher) -> None:
    strategy = SemiCoupled(targets="annotations", tokens="minimum")
    with pytest.raises(UserError, match=r"take prompts=boxes .* with prompts.masks=annotations"):
        run(tmp_path, live, student(live), strategy=strategy)
    with pytest.raises(UserError, match="these data have no annotations: take data=sa1b"):
        run(tmp_path, live, student(live), strategy=strategy, prompts=Boxes(1, 0, masks="annotations"))


def test_batches_accumulate(tmp_path: Path, live: LiveTeacher) -> None:
    """Two batches of two images make one step of four images."""
    run(tmp_path, live, student(live), accumulate=2, budget="8 images", validate_every="1 step")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["steps"], metrics["images"], metrics["images_per_step"]) == (2, 8, 4)
    assert sorted(history(tmp_path, "val/miou/point")) == [0, 1, 2]


class Clock:
    """Stands in for the module `time`: only what a test says takes time."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[..., None]:
        """Return a hook of a module or method whose every call takes `seconds`."""

        def hook(*_: Any, **__: Any) -> None:
            self.now += seconds

        return hook


def in_turn(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: (first(), then(*args, **kwargs))[1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (callbacks, step_times):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_accumulated_batches_are_logged_as_one_step(
    tmp_path: Path, live: LiveTeacher, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    """The loss is the mean over the batches, the images of all batches count, and each step has one log line."""

    class Recorder(Decoupled):
        losses: list[float] = []  # noqa: RUF012

        def step(self, sam: Sam, batch: Batch) -> StepOutput:
            out = super().step(sam, batch)
            self.losses.append(out.loss.item())
            return out

    caplog.set_level(logging.INFO)
    sam = student(live)
    sam.image_encoder.register_forward_hook(clock.takes(2))
    run(tmp_path, live, sam, strategy=Recorder(), accumulate=3, budget="3 steps", step_times=True, ema=0.9)
    expected = [sum(Recorder.losses[first : first + 3]) / 3 for first in (0, 3, 6)]
    assert list(history(tmp_path, "train/loss").values()) == pytest.approx(expected, rel=1e-4)
    assert [line.partition("  ")[0] for line in caplog.messages if "images/s" in line] == [
        f"step {number}/3" for number in (1, 2, 3)
    ]
    assert set(history(tmp_path, "train/images_per_second").values()) == {1.0}  # 2 images in 2 seconds
    assert history(tmp_path, "time/encoder") == {3: 6000}  # milliseconds per step


def test_stopped_between_two_batches_of_a_step(tmp_path: Path, live: LiveTeacher) -> None:
    """The step is finished and logged first; the resumed run then gives the same losses as an undisturbed one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    asked: dict[str, Any] = {"accumulate": 3, "budget": "4 steps", "validate_every": "4 steps"}
    run(whole, live, student(live), strategy=StoppedBySignal(at=0), **asked)
    with pytest.raises(SystemExit):
        run(broken, live, student(live), strategy=StoppedBySignal(at=5), **asked)
    assert torch.load(broken / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert sorted(history(broken, "train/loss")) == [1, 2]
    run(broken, live, student(live), strategy=StoppedBySignal(at=0), resume=str(broken), **asked)
    for column in ("train/loss", "train/luck"):
        assert history(broken, column) == pytest.approx(history(whole, column), rel=1e-4), column


class StoppedBySignal(Decoupled):
    """Decoupled strategy that sends its own process a stop signal at batch number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.calls_left = at

    def step(self, sam: Sam, batch: Batch) -> StepOutput:
        self.calls_left -= 1
        if not self.calls_left:
            os.kill(os.getpid(), STOP_SIGNALS[-1])  # SIGHUP, unless this process ignores it
        out = super().step(sam, batch)
        return replace(out, logs={"luck": torch.rand(())})


def test_random_numbers_differ_by_rank_step_and_batch(live: LiveTeacher) -> None:
    """At the same place they repeat exactly. Outputs of a student with DropPath show which blocks were left out."""
    sam = new_student(TinyViT("11m", pretrained=False), live.sam, image_size=64, neck_from_teacher=False)
    module = Distillation(sam, Decoupled(), live, Points(1, 0), AdamW(), Agreement())
    batch: Any = collate([Drawings().load(0), Drawings().load(3)])

    def output(rank: int, step: int, part: int) -> tuple[float, ...]:
        trainer: Any = SimpleNamespace(global_rank=rank, global_step=step, accumulate_grad_batches=2)
        module._trainer = trainer
        module.on_train_batch_start(batch, 2 * step + part)
        with torch.no_grad():
            return tuple(module.student.encode(batch.images, batch.sizes)[:, 0, 5, 5].tolist())

    places = [(rank, step, part) for rank in (0, 1) for step in (0, 1) for part in (0, 1)]
    seen = [output(*place) for place in places]
    assert len(set(seen)) == len(places)
    assert [output(*place) for place in places] == seen


def test_parts_learn_at_their_own_rates(finished: tuple[Path, Sam], tmp_path: Path, live: LiveTeacher) -> None:
    optim = AdamW(lr=1e-3, scale={"mask_decoder": 0.1})
    run(tmp_path, live, student(live), strategy=Coupled(), optim=optim, budget="1 step", accumulate=1)
    rate, slow = (history(tmp_path, f"train/lr/{part}")[1] for part in ("image_encoder", "mask_decoder"))
    assert slow == pytest.approx(0.1 * rate)
    with pytest.raises(UserError, match=r"optim.scale names mask_decoder; what trains is image_encoder"):
        run(tmp_path, live, student(live), optim=optim)


def test_averaged_weights_are_evaluated_and_saved(tmp_path: Path, live: LiveTeacher) -> None:
    """Training itself goes on with the plain weights, also after a crash; Muon's momentum must be restored as well."""
    asked: dict[str, Any] = {"ema": 0.9, "optim": Muon(lr=1e-3)}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(whole, live, student(live), **asked)
    kept = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    key = "image_encoder.neck.conv.weight"
    average, last = kept["state_dict"][f"student.{key}"], kept["current_model_state"][f"student.{key}"]
    assert not torch.equal(average, last)
    assert torch.equal(load_sam(whole).state_dict()[key], average)
    metrics = evaluate_prompts(
        student=load_sam(whole), teacher=live, source=Drawings(), split="val", protocol=Agreement(points=1),
        hardware=HARDWARE, batch_size=2, run_dir=tmp_path,
    )  # fmt: skip
    assert metrics["embedding_mse"] == pytest.approx(history(whole, "val/embedding_mse")[6], rel=1e-5)
    with pytest.raises(RuntimeError, match="power cut"):
        run(broken, live, student(live), strategy=FailingStrategy(5), **asked)
    run(broken, live, student(live), resume=str(broken), **asked)
    for column in ("train/loss", "val/embedding_mse"):
        assert history(broken, column) == pytest.approx(history(whole, column), rel=1e-4), column


def test_a_long_average_forgets_the_first_weights(tmp_path: Path, live: LiveTeacher) -> None:
    sam, key = student(live), "image_encoder.neck.conv.weight"
    first = sam.state_dict()[key].clone()
    run(tmp_path, live, sam, ema=0.9999)
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    average, last = kept["state_dict"][f"student.{key}"], kept["current_model_state"][f"student.{key}"]
    assert (average - last).norm() < 0.5 * (first - last).norm()


def test_step_times(
    tmp_path: Path, live: LiveTeacher, clock: Clock, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Each part has its own time, forward and backward; validations count nowhere, and an average is no data wait."""
    sam, strategy = student(live), Coupled(decoder="teacher")  # a new decoder would have no hooks
    for owner, name, seconds in ((Drawings, "load", 1), (callbacks.Averaged, "on_train_batch_end", 2)):
        monkeypatch.setattr(owner, name, in_turn(clock.takes(seconds), getattr(owner, name)))
    request.addfinalizer(live.sam.mask_decoder.register_forward_hook(clock.takes(4)).remove)
    sam.image_encoder.register_forward_hook(clock.takes(8))
    sam.mask_decoder.register_forward_hook(clock.takes(16))
    sam.image_encoder.neck.register_full_backward_hook(clock.takes(32))
    sam.mask_decoder.transformer.norm_final_attn.register_full_backward_hook(clock.takes(64))
    run(tmp_path, live, sam, strategy=strategy, budget="4 steps", validate_every="3 steps", step_times=True, ema=0.9)
    # On a CPU, decoders run once per image where no gradient is needed.
    expected = {"data": 2, "teacher": 2 * 4, "encoder": 8 + 32, "decoder": 16 + 64, "loss": 0, "optimizer": 2}
    assert {f"time/{part}" for part in expected} == {name for name in columns(tmp_path) if name.startswith("time/")}
    for part, seconds in expected.items():
        assert history(tmp_path, f"time/{part}")[4] == pytest.approx(1000 * seconds), part
    assert history(tmp_path, "train/images_per_second")[4] == pytest.approx(2 / sum(expected.values()))
    assert history(tmp_path, "train/data_wait")[4] == pytest.approx(2 / sum(expected.values()))


def test_a_plan_trains_nothing(tmp_path: Path, live: LiveTeacher, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, live, student(live), plan=True, budget="500 steps", accumulate=2) == {}
    said = capfd.readouterr().out
    assert "What 500 steps will take" in said
    assert "2000, 500.0 epochs of 4" in said
    assert not list(tmp_path.iterdir())


def test_resume_without_a_checkpoint_is_refused(tmp_path: Path, live: LiveTeacher) -> None:
    with pytest.raises(UserError, match=r"there is no .*last\.ckpt"):
        run(tmp_path, live, student(live), resume=str(tmp_path))


def test_a_resumed_run_takes_new_rates_but_no_other_images(
    finished: tuple[Path, Sam], tmp_path: Path, live: LiveTeacher
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    there: dict[str, Any] = {"resume": str(finished[0]), "init": "what it began with is gone"}
    run(tmp_path / "run", live, student(live), budget="8 steps", optim=AdamW(lr=1e-5, weight_decay=0.5), **there)
    assert history(tmp_path / "run", "train/lr")[7] <= 1e-5
    groups = torch.load(tmp_path / "run/checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    with pytest.raises(UserError, match="2 images per step then, 4 now"):
        run(tmp_path / "run", live, student(live), batch_size=4, **there)
    other = Drawings()
    other.train = range(3)
    with pytest.raises(UserError, match="the images to train on are not those that the run began with; init="):
        run(tmp_path / "run", live, student(live), source=other, **there)


def test_runs_with_the_old_hash_of_keys_can_be_resumed(tmp_path: Path) -> None:
    """Early runs recorded a hash of all keys instead of the data's fingerprint."""
    source, other = Drawings(), Drawings()
    other.train = range(3)
    keys = "\n".join(sorted(source.keys(source.train))).encode()
    (tmp_path / "metrics.json").write_text(json.dumps({"data_keys": hashlib.sha256(keys).hexdigest()}))
    facts = {"images_per_step": 2}
    _check_same_run(tmp_path, facts | {"data_keys": source.fingerprint}, source)
    with pytest.raises(UserError, match="the images to train on are not those"):
        _check_same_run(tmp_path, facts | {"data_keys": other.fingerprint}, other)


def test_empty_validation_set_is_refused(finished: tuple[Path, Sam], tmp_path: Path, live: LiveTeacher) -> None:
    source = Drawings()
    source.val = range(0)
    with pytest.raises(UserError, match=r"data\.val_images: 0 images are held out to judge the student on"):
        run(tmp_path, live, student(live), source=source, plan=True)
    with pytest.raises(UserError, match=r"split=val: there is no such image; are any held out, by data\.val_images"):
        evaluate_prompts(
            student=live.sam, teacher=live, source=source, split="val", protocol=Agreement(points=1),
            hardware=HARDWARE, batch_size=2, run_dir=tmp_path,
        )  # fmt: skip


def test_nan_embeddings_are_an_error_not_a_score_of_zero(live: LiveTeacher) -> None:
    batch = collate([Drawings().load(0), Drawings().load(3)])
    agreement = Agreement(points=1)
    own = torch.zeros(2, 256, 64, 64)
    broken = own.clone()
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="the student's embedding of drawing3 holds NaN or infinity"):
        Evaluator(agreement).update(agreement.view(live.sam, broken, batch), own, [])
    with pytest.raises(UserError, match="the teacher's embedding of drawing3 holds NaN"):
        Evaluator(agreement).update(agreement.view(live.sam, own, batch), broken, [])


def test_resuming_another_architecture(finished: tuple[Path, Sam], tmp_path: Path, live: LiveTeacher) -> None:
    other = new_student(TinyViT("11m", pretrained=False), live.sam, image_size=128, neck_from_teacher=False)
    with pytest.raises(UserError, match="resume: the checkpoint holds"):
        run(tmp_path, live, other, resume=str(finished[0]))


def test_printed_options_are_quoted_for_the_shell() -> None:
    assert _option("checkpoint", Path("outputs/a_1-b.c")) == "checkpoint=outputs/a_1-b.c"
    assert shlex.split(_option("checkpoint", Path("my runs/seed=0"))) == ['checkpoint="my runs/seed=0"']


def test_the_teacher_agrees_with_itself(tmp_path: Path, live: LiveTeacher) -> None:
    metrics = evaluate_prompts(
        student=load_sam("mobile_sam"), teacher=live, source=Drawings(), split="val", protocol=Agreement(points=2),
        hardware=HARDWARE, batch_size=2, run_dir=tmp_path,
    )  # fmt: skip
    assert metrics["miou/point"] == metrics["miou/box"] == 1.0
    assert metrics["embedding_mse"] < 1e-9, "the teacher's layers are folded"


def test_validation_and_evaluate_say_the_same(finished: tuple[Path, Sam], tmp_path: Path, live: LiveTeacher) -> None:
    metrics = evaluate_prompts(
        student=load_sam(finished[0]), teacher=live, source=Drawings(), split="val", protocol=Agreement(points=1),
        hardware=HARDWARE, batch_size=2, run_dir=tmp_path,
    )  # fmt: skip
    trained = json.loads((finished[0] / "metrics.json").read_text())
    for name in ("miou/point", "miou/box", "embedding_mse", "blind/miou/point", "blind/miou/box"):
        assert metrics[name] == pytest.approx(trained[name], abs=1e-6)
    assert metrics["blind/images"] == 2


def test_validation_and_evaluate_say_the_same_in_bf16(tmp_path: Path, live: LiveTeacher) -> None:
    hardware = Hardware(accelerator="cpu", precision="bf16", workers=0)
    trained = run(tmp_path, live, student(live), hardware=hardware, budget="1 step", validate_every="1 step")
    metrics = evaluate_prompts(
        student=load_sam(tmp_path), teacher=live, source=Drawings(), split="val", protocol=Agreement(points=1),
        hardware=hardware, batch_size=2, run_dir=tmp_path,
    )  # fmt: skip
    for name in ("miou/point", "miou/box", "embedding_mse"):
        assert metrics[name] == pytest.approx(trained[name], abs=1e-6), name


def test_a_single_image_has_no_blind_baseline(tmp_path: Path, live: LiveTeacher) -> None:
    source = Drawings()
    source.val = range(5, 6)
    metrics = evaluate_prompts(
        student=live.sam, teacher=live, source=source, split="val", protocol=Agreement(points=1),
        hardware=HARDWARE, batch_size=2, run_dir=tmp_path,
    )  # fmt: skip
    assert metrics["images"] == 1
    assert not any("blind" in name for name in metrics)


def test_the_blind_baseline_leaves_out_the_image_itself(live: LiveTeacher) -> None:
    """With two images, each is decoded from the other's embedding, in whatever order they come."""
    batch = collate([Drawings().load(0), Drawings().load(3)])
    agreement = Agreement(points=2)
    own = live.sam.encode(batch.images, batch.sizes)
    targets = agreement.make_targets(agreement.view(live.sam, own, batch))
    swapped = Evaluator(agreement)
    swapped.update(agreement.view(live.sam, own.flip(0), batch), own, targets)
    expected = {f"blind/{name}": value for name, value in swapped.compute().items() if "miou" in name}
    assert blind(Evaluator(agreement), live.sam, [(batch, own, targets)], own.sum(0), 2) == pytest.approx(
        expected, abs=0.02
    )
