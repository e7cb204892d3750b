"""Where the teacher's answer comes from: they fill in the batch what a strategy requires."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sam_distill.models.checkpoints import Checkpoint, load_sam
from sam_distill.types import ALL, EMBED_DIM, GRID, Batch, Masks, Prompts

log = logging.getLogger(__name__)

_EMBEDDING_BYTES = 2 * EMBED_DIM * GRID * GRID  # as kept: float16
_memory: dict[tuple[object, ...], Tensor] = {}  # of all teachers of this process: the jobs of a multirun share it


class LiveTeacher:
    """A SAM that is asked during training.

    checkpoint: a name (`mobile_sam`, `sam_vit_h`, ...), a file or a run folder.
    memory_gb: embeddings of images already seen are kept in memory up to this size, so that on a small data set the
        teacher runs once, in the first epoch. They are kept in float16.
    """

    provides = frozenset({"teacher_embedding", "ask_teacher"})

    def __init__(self, checkpoint: Checkpoint, memory_gb: Annotated[float, Field(ge=0)] = 2.0) -> None:
        log.info("Loading the teacher %s", checkpoint)
        self.checkpoint = checkpoint
        self.sam = load_sam(checkpoint).requires_grad_(False).to(memory_format=torch.channels_last)
        self.capacity = int(memory_gb * 1e9) // _EMBEDDING_BYTES  # images that it can remember

    def __deepcopy__(self, _: object) -> LiveTeacher:
        return self  # weight averaging copies the module that holds us

    @torch.no_grad()
    def fill(self, batch: Batch, requires: Collection[str]) -> Batch:
        """The batch with what is required of `provides`; the encoder runs on the images it doesn't remember."""
        if not self.provides & set(requires):
            return batch
        self.sam.to(batch.images.device)
        embedding = self._embed(batch)

        @torch.no_grad()
        def ask(prompts: Prompts) -> Masks:
            return self.sam.decode(embedding, prompts, ALL)

        return replace(batch, teacher_embedding=embedding, ask_teacher=ask)

    def _embed(self, batch: Batch) -> Tensor:
        if not self.capacity:
            return self.sam.encode(batch.images, batch.sizes)
        marks = self._marks(batch)
        new = [i for i, mark in enumerate(marks) if mark not in _memory]
        embedding = torch.empty(len(batch), EMBED_DIM, GRID, GRID, device=batch.images.device)
        if new:
            embedding[new] = self.sam.encode(batch.images[new], batch.sizes[new])
        for i, mark in enumerate(marks):
            if i not in new:
                embedding[i] = _memory[mark].to(embedding)
            elif len(_memory) < self.capacity:
                _memory[mark] = embedding[i].to("cpu", torch.float16)
        return embedding

    def _marks(self, batch: Batch) -> list[tuple[object, ...]]:
        """What tells embeddings apart; the sum of the pixels does where another source has an image of this name."""
        precise = not torch.is_autocast_enabled(batch.images.device.type)
        sums, sizes = batch.images.flatten(1).sum(1).tolist(), batch.sizes.tolist()
        return [
            (self.checkpoint, precise, key, *size, total)
            for key, size, total in zip(batch.keys, sizes, sums, strict=True)
        ]
