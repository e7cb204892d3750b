"""Training lets a GPU run ahead: nothing waits for it between log lines, and yet no broken weights are kept."""

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
from test_fit import Drawings, Stumbling, run, student

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


class Pretended(Hardware):
    """A GPU for Lightning's trainer."""

    kind, device_name, num_workers = "cuda", "a pretended GPU", 0  # type: ignore[assignment]

    def trainer_arguments(self) -> dict[str, Any]:
        class Accelerator(CPUAccelerator):
            def setup_device(self, device: torch.device) -> None:
                """Another than the CPU will do."""

        place = SingleDeviceStrategy(torch.device("cuda", 0), accelerator=Accelerator())
        return {"strategy": place, "precision": "bf16-mixed", "use_distributed_sampler": False}


class RandomTeacher(LiveTeacher):
    sha256 = "none"

    def __init__(self) -> None:
        super().__init__("random", memory_gb=0.1)
        self.sam = Sam(TinyViT(pretrained=False), image_size=64).requires_grad_(False).eval()  # type: ignore[misc]


@pytest.fixture
def one_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run of up to 50 steps."""
    monkeypatch.setattr(training, "LOG_LINES", 1)


@pytest.fixture
def teacher() -> LiveTeacher:
    """A new one for each test: a pretended GPU keeps what it gets."""
    torch.manual_seed(0)
    return RandomTeacher()


@pytest.mark.usefixtures("one_log_line")
def test_no_step_waits_between_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: LiveTeacher) -> None:
    """The whole loop, but for the backward pass, which pretended tensors can't do. Strategies have tests apart."""
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
            hardware=Pretended(precision="bf16"),
            validate_every="4 steps",
            **options,
        )
        assert len(begun) == 4
        assert gpu.waits[begun[0] : begun[3]] == []
        assert len(gpu.waits) > begun[3], "the last step is logged and judged"


def test_the_average_lies_where_training_is() -> None:
    """Which is where the module will be moved to."""
    module, averaged = pl.LightningModule(), Averaged(decay=0.9)
    module.layer = torch.nn.Linear(2, 2)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    with pretended_gpu():
        averaged.setup(trainer, module, "fit")
        assert averaged._average_model is not None
        assert all(value.is_cuda for value in averaged._average_model.parameters())


@pytest.mark.usefixtures("one_log_line")
def test_a_loss_that_is_no_number_is_found_before_anything_is_kept(tmp_path: Path, teacher: LiveTeacher) -> None:
    """And named with the step and the images of its time."""
    with pytest.raises(UserError, match=r"the loss is nan at step 1 \(images drawing\d, drawing\d\)"):
        run(tmp_path, teacher, student(teacher), strategy=Stumbling(2, nan=True))
    assert not (tmp_path / "student.pt").exists()
    assert not list(tmp_path.glob("checkpoints/*"))


class Overflowing(Decoupled):
    """At the third step the loss is a number, its gradient is not."""

    steps = 0

    def step(self, sam: Sam, batch: Batch) -> StepOutput:
        self.steps += 1
        loss = super().step(sam, batch).loss
        return StepOutput(loss if self.steps != 3 else loss + (loss - loss.detach()).abs().sqrt())


def test_weights_that_are_no_numbers_are_not_kept(tmp_path: Path, teacher: LiveTeacher) -> None:
    with pytest.raises(UserError, match="weights are no numbers any more after step 3, though all losses were"):
        run(tmp_path, teacher, student(teacher), strategy=Overflowing(), validate_every="3 steps", source=Drawings())
    assert not (tmp_path / "student.pt").exists()
    assert not list(tmp_path.glob("checkpoints/*"))
