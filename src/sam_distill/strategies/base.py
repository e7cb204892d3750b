"""What a distillation strategy is."""

import re
from abc import ABC, abstractmethod

from torch import nn

from sam_distill.models.sam import Sam
from sam_distill.types import Batch, StepOutput


class Strategy(nn.Module, ABC):
    """What is compared, and what learns from it. No trainer, logger or optimizer here.

    requires: the fields of `Batch` that a step reads beyond the images; checked against data, teacher and prompts
        before step 0.
    finetunes: begins with a student that has been distilled already (`init=`).
    """

    requires: frozenset[str] = frozenset()
    finetunes: bool = False

    @property
    def name(self) -> str:
        """As `strategy=` names it."""
        return re.sub(r"\B(?=[A-Z])", "_", type(self).__name__).lower()

    def prepare(self, sam: Sam) -> None:
        """Change a new student, which has the teacher's prompt encoder and mask decoder, before weights are loaded."""

    @abstractmethod
    def trainable(self, sam: Sam) -> dict[str, nn.Module]:
        """The parts that learn, by name. Everything else is frozen: no gradients, and in eval mode."""

    @abstractmethod
    def step(self, sam: Sam, batch: Batch) -> StepOutput:
        """Loss and logs of one batch."""
