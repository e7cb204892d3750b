"""Teachers: live or cached sources of the teacher embedding and masks that a strategy requires."""

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

TEACHER_FILE = "teacher.pt"  # file in a cache: its teacher without the backbone
_EMBEDDING_BYTES = 2 * EMBED_DIM * GRID * GRID  # of one image, kept in float16
_memory: dict[tuple[object, ...], Tensor] = {}  # shared by all teachers of this process, so by all jobs of a multirun


class Teacher(ABC):
    """Source of teacher embeddings and masks.

    sam: its prompt encoder and mask decoder are complete; of its image encoder only the neck is always there.
    provides: the fields of `Batch` that it can fill.
    capacity: number of images for which it keeps the embeddings in memory.
    """

    provides = frozenset({"teacher_embedding", "ask_teacher"})
    capacity = 0

    @cached_property
    @abstractmethod
    def sam(self) -> Sam:
        """Return the teacher's SAM, loaded on first use."""

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """Return the exact embeddings: [B, 256, 64, 64]."""

    def embed_cached(self, batch: Batch) -> Tensor:
        """Return the embeddings, possibly from memory with lower precision."""
        return self.embed(batch)

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Return the sha256 of the checkpoint that embeddings and masks come from."""

    def __deepcopy__(self, _: object) -> "Teacher":
        return self  # weight averaging copies the module that holds the teacher

    @torch.no_grad()
    def fill(self, batch: Batch, requires: Collection[str]) -> Batch:
        """Return the batch with the teacher's fields filled in, if `requires` names any of `provides`."""
        if not self.provides & set(requires):
            return batch
        self.sam.to(batch.images.device)
        embedding = self.embed_cached(batch)

        @torch.no_grad()
        def ask(prompts: Prompts) -> Masks:
            return self.sam.decode(embedding, prompts, ALL)

        return replace(batch, teacher_embedding=embedding, ask_teacher=ask)


class LiveTeacher(Teacher):
    """Teacher whose SAM runs during training.

    checkpoint: a name (`mobile_sam`, `sam_vit_h`, ...), a file or a run folder.
    memory_gb: size up to which embeddings of images already seen are kept in memory, so that on a small data set the
        teacher runs in the first epoch only. They are kept in float16, those of a GPU in pinned memory. In a
        data-parallel run each process keeps only the embeddings that it computed, but images are assigned to processes
        anew in each epoch: there a cache saves far more.
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

    def embed_cached(self, batch: Batch) -> Tensor:
        """Return the embeddings, rounded to float16 if a memory is kept; the encoder runs only on images not in it."""
        if not self.capacity:
            return self.embed(batch)
        device = batch.images.device
        precise = not torch.is_autocast_enabled(device.type)
        memory_keys = [(self.checkpoint, precise, *each) for each in zip(batch.keys, batch.checksums, strict=True)]
        found: list[Tensor | None] = [_memory.get(memory_key) for memory_key in memory_keys]
        new = [i for i, known in enumerate(found) if known is None]
        if new:
            images, sizes = (torch.stack([values[i] for i in new]) for values in (batch.images, batch.sizes))
            embeddings = self.sam.encode(images, sizes).half()  # as remembered, so that a resumed run gets the same
            for i, embedding in zip(new, embeddings, strict=True):
                found[i] = embedding
                if len(_memory) < self.capacity:
                    # The GPU's queue runs this copy to pinned memory before any later copy back from it.
                    _memory[memory_keys[i]] = embedding.to("cpu", non_blocking=True)
        return torch.stack([known.to(device, non_blocking=True).float() for known in found if known is not None])


class CachedTeacher(Teacher):
    """Teacher of a distillation cache: the embeddings come with the data, so its backbone is not even built.

    path: the cache, which holds the rest of the teacher.
    """

    def __init__(self, path: str) -> None:
        self.checkpoint = str(Path(path).expanduser() / TEACHER_FILE)
        if not Path(self.checkpoint).is_file():
            raise UserError(f"{path} holds no whole cache: there is no {TEACHER_FILE} in it")

    @cached_property
    def sam(self) -> Sam:
        sam = _without_backbone()
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
        assert batch.teacher_embedding is not None  # the data come from the cache itself
        return batch.teacher_embedding


def _without_backbone() -> Sam:
    """Return a new SAM, its image encoder reduced to the part of the neck that has the same shape in all encoders."""
    return Sam(nn.ModuleDict({"neck": Neck([])}))


def save_teacher(sam: Sam, cache: Path) -> None:
    """Write a teacher without its backbone into the folder of a cache, for `CachedTeacher`."""
    ours = _without_backbone().state_dict().keys()
    with atomic_write(cache / TEACHER_FILE) as draft, draft.open("wb") as file:
        torch.save({key: value.detach().cpu() for key, value in sam.state_dict().items() if key in ours}, file)


def check_finite(keys: Sequence[str], **embeddings: Tensor) -> None:
    """Raise UserError if an embedding [B, 256, 64, 64] holds NaN or infinity; it names the model and one of the B keys.

    Masks from it would be empty. The device is queried once.
    embeddings: named by model, such as student and teacher.
    """
    finite = torch.stack([given.isfinite().flatten(1).all(1) for given in embeddings.values()]).tolist()
    for name, flags in zip(embeddings, finite, strict=True):
        if not all(flags):
            raise UserError(
                f"the {name}'s embedding of {keys[flags.index(False)]} holds NaN or infinity: its weights are broken,"
                " or trainer.precision is too low for them"
            )
