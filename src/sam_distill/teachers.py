"""Where the teacher's answer comes from: they fill in the batch what a strategy requires."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from sam_distill.errors import UserError, one_line
from sam_distill.files import atomic_write
from sam_distill.inference.optimize import optimize_for_inference
from sam_distill.models.checkpoints import Checkpoint, fingerprint, load_sam
from sam_distill.models.encoders import Neck
from sam_distill.models.sam import Sam
from sam_distill.types import ALL, EMBED_DIM, GRID, Batch, Masks, Prompts

log = logging.getLogger(__name__)

TEACHER_FILE = "teacher.pt"  # what a cache keeps of its teacher
_EMBEDDING_BYTES = 2 * EMBED_DIM * GRID * GRID  # as kept: float16
_memory: dict[tuple[object, ...], Tensor] = {}  # of all teachers of this process: the jobs of a multirun share it


class Teacher(ABC):
    """sam: its prompt encoder and mask decoder answer prompts; only its neck is sure to be there of its encoder.

    provides: the fields of `Batch` that it can fill. capacity: images that it remembers.
    """

    provides = frozenset({"teacher_embedding", "ask_teacher"})
    capacity = 0

    @cached_property
    @abstractmethod
    def sam(self) -> Sam:
        """Loaded when it is first needed."""

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """Its embeddings, exactly: [B, 256, 64, 64]."""

    def recall(self, batch: Batch) -> Tensor:
        """Its embeddings, perhaps from a memory of lower precision."""
        return self.embed(batch)

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Of the checkpoint that its answers come from."""

    def __deepcopy__(self, _: object) -> "Teacher":
        return self  # weight averaging copies the module that holds us

    @torch.no_grad()
    def fill(self, batch: Batch, requires: Collection[str]) -> Batch:
        """The batch with what is required of `provides`."""
        if not self.provides & set(requires):
            return batch
        self.sam.to(batch.images.device)
        embedding = self.recall(batch)

        @torch.no_grad()
        def ask(prompts: Prompts) -> Masks:
            return self.sam.decode(embedding, prompts, ALL)

        return replace(batch, teacher_embedding=embedding, ask_teacher=ask)


class LiveTeacher(Teacher):
    """A SAM that is asked during training.

    checkpoint: a name (`mobile_sam`, `sam_vit_h`, ...), a file or a run folder.
    memory_gb: embeddings of images already seen are kept in memory up to this size, so that on a small data set the
        teacher runs once, in the first epoch. They are kept in float16, those of a GPU in pinned memory. Each process
        of a data-parallel run remembers what it has asked itself, of images dealt anew in each epoch: there a cache
        saves far more.
    """

    def __init__(self, checkpoint: Checkpoint, memory_gb: Annotated[float, Field(ge=0)] = 2.0) -> None:
        self.checkpoint = checkpoint
        self.capacity = int(memory_gb * 1e9) // _EMBEDDING_BYTES

    @cached_property
    def sam(self) -> Sam:
        log.info("Loading the teacher %s", self.checkpoint)
        return optimize_for_inference(load_sam(self.checkpoint)).to(memory_format=torch.channels_last)

    @property
    def sha256(self) -> str:
        return fingerprint(self.checkpoint)

    def embed(self, batch: Batch) -> Tensor:
        return self.sam.encode(batch.images, batch.sizes)

    def recall(self, batch: Batch) -> Tensor:
        """The encoder runs on the images that are not remembered."""
        if not self.capacity:
            return self.embed(batch)
        device = batch.images.device
        precise = not torch.is_autocast_enabled(device.type)
        marks = [(self.checkpoint, precise, *each) for each in zip(batch.keys, batch.checksums, strict=True)]
        found: list[Tensor | None] = [_memory.get(mark) for mark in marks]
        new = [i for i, known in enumerate(found) if known is None]
        if new:
            images, sizes = (torch.stack([values[i] for i in new]) for values in (batch.images, batch.sizes))
            answers = self.sam.encode(images, sizes).half()  # as they are remembered: a resumed run has to ask again
            for i, answer in zip(new, answers, strict=True):
                found[i] = answer
                if len(_memory) < self.capacity:
                    # A GPU's queue brings it to pinned memory, and the next time back from there, in this order.
                    _memory[marks[i]] = answer.to("cpu", non_blocking=True)
        return torch.stack([known.to(device, non_blocking=True).float() for known in found if known is not None])


class CachedTeacher(Teacher):
    """The teacher of a distillation cache, whose embeddings come with the data. Its backbone is not even built.

    path: the cache, which holds the rest of the teacher.
    """

    def __init__(self, path: str) -> None:
        self.checkpoint = str(Path(path).expanduser() / TEACHER_FILE)
        if not Path(self.checkpoint).is_file():
            raise UserError(f"{path} holds no whole cache: there is no {TEACHER_FILE} in it")

    @cached_property
    def sam(self) -> Sam:
        sam = Sam(_NoEncoder())
        try:
            sam.load_state_dict(torch.load(self.checkpoint, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load raises whatever a broken file makes it raise
            advice = "the sam-distill cache that wrote it, run again, mends it"
            raise UserError(f"{self.checkpoint} can't be read ({one_line(error)}): {advice}") from error
        return sam.requires_grad_(False).eval()

    @property
    def sha256(self) -> str:
        manifest = Path(self.checkpoint).with_name("manifest.json").read_text()
        return str(json.loads(manifest)["teacher_sha256"])

    def embed(self, batch: Batch) -> Tensor:
        assert batch.teacher_embedding is not None  # the data are the cache itself
        return batch.teacher_embedding


class _NoEncoder(nn.Module):
    """What is left of an image encoder: the part of its neck that has the same shape in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = Neck([])


def save_teacher(sam: Sam, cache: Path) -> None:
    """All of a teacher but its backbone, for the `CachedTeacher` of that cache."""
    ours = Sam(_NoEncoder()).state_dict().keys()
    with atomic_write(cache / TEACHER_FILE) as draft, draft.open("wb") as file:
        torch.save({key: value.detach().cpu() for key, value in sam.state_dict().items() if key in ours}, file)


def check_finite(keys: Sequence[str], **embeddings: Tensor) -> None:
    """A UserError names whose embedding, of those given [B, 256, 64, 64], is broken for which of the B keys.

    The masks would be empty. The device is asked once.
    """
    finite = torch.stack([given.isfinite().flatten(1).all(1) for given in embeddings.values()]).tolist()
    for name, flags in zip(embeddings, finite, strict=True):
        if not all(flags):
            raise UserError(
                f"the {name}'s embedding of {keys[flags.index(False)]} holds NaN or infinity: its weights are broken,"
                " or trainer.precision is too low for them"
            )
