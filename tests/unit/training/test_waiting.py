"""Training does not wait for the GPU between log lines, and still never saves weights with NaN or infinity."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pretended import pretended_gpu
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from test_fit import Drawings, FailingStrategy, run, student

from sam_distill.errors import UserError
from sam_distill.evaluate.agreement import Agreement
from sam_distill.models.encoders import TinyViT
from sam_distill.models.sam import Sam
from sam_distill.runs.hardware import Hardware
from sam_distill.strategies.decoupled import Decoupled
from sam_distill.teachers import LiveTeacher
from sam_distill.training import fit as training
from sam_distill.training.callbacks import Averaged
from sam_distill.training.lightning_module import Distillation
from sam_distill.types import Batch, StepOutput


class PretendedHardware(Hardware):
    """Hardware that looks like a GPU to Lightning's trainer."""

    kind, device_name, num_workers = "cuda", "a pretended GPU", 0  # type: ignore[assignment]

    def trainer_arguments(self) -> dict[str, Any]:
        class Accelerator(CPUAccelerator):
            def setup_device(self, device: torch.device) -> None:
                """Accept devices other than the CPU."""

        place = SingleDeviceStrategy(torch.device("cuda", 0), accelerator=Accelerator())
        return {"strategy": place, "precision": "bf16-mixed", "use_distributed_sampler": False}


class RandomTeacher(LiveTeacher):
    sha256 = "none"

    def __init__(self) -> None:
        super().__init__("random", memory_gb=0.1)
        self.sam = Sam(TinyViT(pretrained=False), image_size=64).requires_grad_(False).eval()  # type: ignore[misc]


@pytest.fixture
def one_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write only one log line in a run of up to 50 steps."""
    monkeypatch.setattr(training, "LOG_LINES", 1)


@pytest.fixture
def teacher() -> LiveTeacher:
    """Return a new teacher for each test, as the pretended GPU keeps the tensors that are moved to it."""
    torch.manual_seed(0)
    return RandomTeacher()


@pytest.mark.usefixtures("one_log_line")
def test_no_step_waits_between_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: LiveTeacher) -> None:
    """The whole loop except the backward pass, which pretended tensors can't do. Other tests cover the strategies."""
    begun: list[int] = []

    def backward(self: Distillation, loss: torch.Tensor) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    with pretended_gpu() as gpu:
        step: Callable[..., Any] = Distillation.training_step

        def training_step(self: Distillation, *args: Any) -> torch.Tensor:
            begun.append(len(gpu.waits))
            return step(self, *args)

        monkeypatch.setattr(Distillation, "backward", backward)
        monkeypatch.setattr(Distillation, "training_step", training_step)
        options: dict[str, Any] = {"protocol": Agreement(points=1, kinds=["point"]), "budget": "4 steps"}
        run(
            tmp_path,
            teacher,
            student(teacher),
            hardware=PretendedHardware(precision="bf16"),
            validate_every="4 steps",
            **options,
        )
        assert len(begun) == 4
        assert gpu.waits[begun[0] : begun[3]] == []
        assert len(gpu.waits) > begun[3], "the last step is logged and judged"


def test_averaged_weights_lie_on_the_training_device() -> None:
    """The module itself is moved there later."""
    module, averaged = pl.LightningModule(), Averaged(decay=0.9)
    module.layer = torch.nn.Linear(2, 2)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    with pretended_gpu():
        averaged.setup(trainer, module, "fit")
        assert averaged._average_model is not None
        assert all(value.is_cuda for value in averaged._average_model.parameters())


@pytest.mark.usefixtures("one_log_line")
def test_nan_loss_is_found_before_anything_is_saved(tmp_path: Path, teacher: LiveTeacher) -> None:
    """The message names the step and the images of that loss, although it is found later."""
    with pytest.raises(UserError, match=r"the loss is nan at step 1 \(images drawing\d, drawing\d\)"):
        run(tmp_path, teacher, student(teacher), strategy=FailingStrategy(2, nan=True))
    assert not (tmp_path / "student.pt").exists()
    assert not list(tmp_path.glob("checkpoints/*"))


class Overflowing(Decoupled):
    """Decoupled strategy whose loss at the third step is a number, but whose gradient is not."""

    steps = 0

    def step(self, sam: Sam, batch: Batch) -> StepOutput:
        self.steps += 1
        loss = super().step(sam, batch).loss
        return StepOutput(loss if self.steps != 3 else loss + (loss - loss.detach()).abs().sqrt())


def test_nan_weights_are_not_saved(tmp_path: Path, teacher: LiveTeacher) -> None:
    with pytest.raises(UserError, match="weights are no numbers any more after step 3, though all losses were"):
        run(tmp_path, teacher, student(teacher), strategy=Overflowing(), validate_every="3 steps", source=Drawings())
    assert not (tmp_path / "student.pt").exists()
    assert not list(tmp_path.glob("checkpoints/*"))
