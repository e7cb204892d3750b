"""Base class of the distillation strategies."""

import re
from abc import ABC, abstractmethod

from torch import nn

from sam_distill.models.sam import Sam
from sam_distill.types import Batch, StepOutput


class Strategy(nn.Module, ABC):
    """Distillation strategy: the loss, and the parts of the student to train. No trainer, logger or optimizer here.

    requires: the fields of `Batch` that a step reads besides the images; checked against data, teacher and prompts
        before step 0.
    finetunes: whether training starts from a student that is already distilled (`init=`).
    """

    requires: frozenset[str] = frozenset()
    finetunes: bool = False

    @property
    def name(self) -> str:
        """Return the strategy's name in `strategy=`."""
        return re.sub(r"\B(?=[A-Z])", "_", type(self).__name__).lower()

    def prepare(self, sam: Sam) -> None:
        """Change a new student before weights are loaded; it has the teacher's prompt encoder and mask decoder."""

    @abstractmethod
    def trainable(self, sam: Sam) -> dict[str, nn.Module]:
        """Return the parts to train, by name. Everything else is frozen: no gradients, and in eval mode."""

    @abstractmethod
    def step(self, sam: Sam, batch: Batch) -> StepOutput:
        """Return the loss and the logs of one batch."""
