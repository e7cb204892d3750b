"""A protocol's comparisons summed up over batches, with a row per prompt and a few pictures: validation, `evaluate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam_distill.evaluate.protocol import Comparison, Outcome, Protocol, Target
from sam_distill.evaluate.views import View
from sam_distill.losses import embedding_cosine, embedding_mse
from sam_distill.metrics import bootstrap
from sam_distill.models.sam import Sam
from sam_distill.predict.overlays import column, comparison
from sam_distill.teachers import check_finite
from sam_distill.types import GRID, Batch, valid_area

BLIND = "an encoder that answers every image with the teacher's mean embedding of the others"
PICTURES = 8  # rows drawn per judgement: one prompt per image, of one kind and another in turn


@dataclass(frozen=True)
class Picture:
    """An outcome that is drawn. image: of the original size, and so are the masks, [H, W] bool."""

    image: Image.Image
    comparison: Comparison
    reference: np.ndarray
    student: np.ndarray


Answer = tuple[Batch, Tensor, list[Target]]  # the teacher's embedding and the right masks


T = TypeVar("T")


def _of_all_ranks(rows: list[T]) -> list[T]:
    if not torch.distributed.is_initialized():
        return rows
    shares: list[list[T]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, rows)
    return list(chain.from_iterable(shares))


class Judge:
    """Compares students with the answers of one teacher."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.reset()

    def reset(self) -> None:
        self.comparisons: list[Comparison] = []
        self.pictures: list[Picture] = []
        self._errors: list[tuple[Tensor, int]] = []  # of embeddings: a batch's mean MSE and cosine [2], its images
        self._wanted: dict[str, str] = {}  # image -> the kind of prompt to draw

    @torch.no_grad()
    def update(self, student: View, teacher_embedding: Tensor, targets: list[Target]) -> None:
        """teacher_embedding: [B, 256, 64, 64]; targets: the right answers, from `protocol.ask`."""
        batch = student.batch
        if student.embedding is not None:
            check_finite(batch.keys, student=student.embedding, teacher=teacher_embedding)
            given = student.embedding, teacher_embedding, valid_area(batch.sizes, GRID)
            self._errors.append((torch.stack([embedding_mse(*given), embedding_cosine(*given)]), len(batch)))
        for target in targets:
            for outcome in self.protocol.compare(student, target):
                self.comparisons.append(outcome.comparison)
                self._draw(outcome, student)

    def compute(self) -> dict[str, float]:
        """Flat metrics by their names in metrics.json, over all ranks; `comparisons` then has all ranks' rows, too.

        miou/KIND: the mean over prompts (not over images, not pooled over pixels). A prompt whose right mask is empty
        counts for nothing but `prompts_skipped`; an empty answer to any other is an IoU of 0.
        empty/KIND: the share of the prompts/KIND to which the student's mask is empty. A kind without a prompt that
        counts has no scores.
        """
        self.comparisons = _of_all_ranks(self.comparisons)
        errors = np.array(_of_all_ranks([(*means.tolist(), images) for means, images in self._errors]))
        counted: dict[str, list[Comparison]] = {}
        for kind in self.protocol.kinds:
            if rows := [row for row in self.comparisons if row.kind == kind and row.teacher_area]:
                counted[kind] = rows
        result: dict[str, float] = {f"miou/{kind}": fmean(row.iou for row in rows) for kind, rows in counted.items()}
        result |= {f"prompts/{kind}": len(rows) for kind, rows in counted.items()}
        result |= {f"empty/{kind}": fmean(row.student_area == 0 for row in rows) for kind, rows in counted.items()}
        if len(errors):
            mse, cosine = np.average(errors[:, :2], 0, weights=errors[:, 2]).tolist()
            result |= {"embedding_mse": mse, "embedding_cosine": cosine}
        result["prompts"] = sum(map(len, counted.values()))
        result["prompts_skipped"] = len(self.comparisons) - result["prompts"]
        return result

    def intervals(self) -> dict[str, float]:
        """After `compute`: the middle 95% of each mIoU over images drawn anew, `miou/KIND/low` and `miou/KIND/high`."""
        bounds: dict[str, float] = {}
        for kind in self.protocol.kinds:
            rows = [row for row in self.comparisons if row.kind == kind]
            interval = bootstrap([row.image for row in rows], [row.iou for row in rows])
            if interval:
                bounds |= {f"miou/{kind}/low": interval[0], f"miou/{kind}/high": interval[1]}
        return bounds

    def _draw(self, outcome: Outcome, student: View) -> None:
        row, batch = outcome.comparison, student.batch
        if row.image not in self._wanted and len(self._wanted) < PICTURES:
            self._wanted[row.image] = self.protocol.kinds[len(self._wanted) % len(self.protocol.kinds)]
        if self._wanted.get(row.image) != row.kind:
            return
        self._wanted[row.image] = ""  # done
        i = batch.keys.index(row.image)
        (height, width), original_size = student.sizes[i]
        frame = batch.images[i, :, :height, :width].permute(1, 2, 0).cpu().numpy()
        original = Image.fromarray(frame).resize(original_size[::-1])
        reference, answer = outcome.teacher().cpu().numpy(), outcome.student().cpu().numpy()
        self.pictures.append(Picture(original, row, reference, answer))

    def sheet(self) -> Image.Image:
        """Each of the pictures as a row: the image with its prompt, the right mask, the student's."""
        rows = []
        for picture in self.pictures:
            row = picture.comparison
            captions = f"image and {row.kind}", self.protocol.reference, f"student   IoU {row.iou:.2f}"
            masks = picture.reference, picture.student
            rows.append(comparison(picture.image, *masks, row.prompt, row.labels, captions))
        return column(rows)


def blind(judge: Judge, teacher: Sam, answers: Iterable[Answer], total: Tensor, images: int) -> dict[str, float]:
    """What an encoder scores that never looks: it answers each image with the teacher's mean embedding of the others.

    Large masks forgive a lot, so a student has learned something only as far as it beats this. A single image has no
    others, and gets no score. total: the sum of all embeddings, [256, 64, 64]; images: how many (over all ranks).
    """
    if images < 2:
        return {}
    for batch, embedding, targets in answers:
        others = (total - embedding.float()) / (images - 1)
        judge.update(judge.protocol.see(teacher, others, batch), embedding, targets)
    return {f"blind/{name}": value for name, value in judge.compute().items() if name.startswith("miou/")}
