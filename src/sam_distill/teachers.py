"""Where the teacher's answer comes from: they fill in the batch what a strategy requires."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sam_distill.models.checkpoints import load_sam
from sam_distill.types import EMBED_DIM, GRID, Batch

log = logging.getLogger(__name__)

_EMBEDDING_BYTES = 2 * EMBED_DIM * GRID * GRID  # as kept: float16


class LiveTeacher:
    """A SAM that is asked during training.

    checkpoint: a name (`mobile_sam`, `sam_vit_h`, ...), a file or a run folder.
    memory_gb: embeddings of images already seen are kept in memory up to this size, so that on a small data set the
        teacher runs once, in the first epoch. They are kept in float16.
    """

    provides = frozenset({"teacher_embedding"})

    def __init__(self, checkpoint: str, memory_gb: Annotated[float, Field(ge=0)] = 2.0) -> None:
        log.info("Loading the teacher %s", checkpoint)
        self.checkpoint = checkpoint
        self.sam = load_sam(checkpoint).requires_grad_(False).to(memory_format=torch.channels_last)
        self._memory: dict[str, Tensor] = {}
        self._capacity = int(memory_gb * 1e9) // _EMBEDDING_BYTES

    @torch.no_grad()
    def fill(self, batch: Batch) -> Batch:
        """The batch with `teacher_embedding`; the teacher runs on the images it doesn't remember."""
        self.sam.to(batch.images.device)
        new = [i for i, key in enumerate(batch.keys) if key not in self._memory]
        embedding = torch.empty(len(batch), EMBED_DIM, GRID, GRID, device=batch.images.device)
        if new:
            embedding[new] = self.sam.encode(batch.images[new], batch.sizes[new])
        for i, key in enumerate(batch.keys):
            if i not in new:
                embedding[i] = self._memory[key].to(embedding)
            elif len(self._memory) < self._capacity:
                self._memory[key] = embedding[i].to("cpu", torch.float16)
        return replace(batch, teacher_embedding=embedding)
