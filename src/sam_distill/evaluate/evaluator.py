"""Scores of a protocol over all batches, with a row per prompt and a few pictures: for validation and `evaluate`."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from sam_distill.evaluate.protocol import Comparison, Outcome, Protocol, Target
from sam_distill.evaluate.views import View
from sam_distill.losses import embedding_cosine, embedding_mse
from sam_distill.metrics import MeanIoU, bootstrap
from sam_distill.models.sam import Sam
from sam_distill.predict.overlays import STUDENT, TEACHER, column, prompt_overlay, side_by_side
from sam_distill.teachers import check_finite
from sam_distill.types import GRID, Batch, valid_area

BLIND = "an encoder that answers every image with the teacher's mean embedding of the others"
PICTURES = 8  # rows to draw: one prompt per image, the kinds of prompts in turn


@dataclass(frozen=True)
class Picture:
    """Outcome to draw. image: at original size; reference, student: masks at that size, [H, W] bool."""

    image: Image.Image
    comparison: Comparison
    reference: np.ndarray
    student: np.ndarray


TeacherBatch = tuple[Batch, Tensor, list[Target]]  # a batch, the teacher's embedding, the prompts and reference masks


def _of_all_ranks(rows: list[Comparison]) -> list[Comparison]:
    if not torch.distributed.is_initialized():
        return rows
    shares: list[list[Comparison]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, rows)
    return list(chain.from_iterable(shares))


class Evaluator(nn.Module):
    """Module that compares a student's masks with the reference masks, batch by batch, and computes the scores."""

    def __init__(self, protocol: Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        # Without torchmetrics' check for NaN, which would have to wait for the GPU.
        mean = partial(MeanMetric, nan_strategy="disable")
        self.miou = nn.ModuleDict({kind: MeanIoU() for kind in protocol.kinds})
        self.empty = nn.ModuleDict({kind: mean() for kind in protocol.kinds})
        self.errors = nn.ModuleDict({"embedding_mse": mean(), "embedding_cosine": mean()})
        self.reset()

    def reset(self) -> None:
        self.comparisons: list[Comparison] = []
        self.pictures: list[Picture] = []
        self._wanted: dict[str, str] = {}  # image -> the kind of prompt to draw; empty once it is drawn
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    @torch.no_grad()
    def update(self, student: View, teacher_embedding: Tensor, targets: list[Target]) -> None:
        """Add a batch. teacher_embedding: [B, 256, 64, 64]; targets: as returned by `protocol.make_targets`."""
        batch = student.batch
        if student.embedding is not None:
            check_finite(batch.keys, student=student.embedding, teacher=teacher_embedding)
            area = valid_area(batch.sizes, GRID)
            for name, measure in (("embedding_mse", embedding_mse), ("embedding_cosine", embedding_cosine)):
                error = measure(student.embedding, teacher_embedding, area)
                self.errors[name].update(error.expand(len(batch)))  # type: ignore[operator] # each image counts
        outcomes = [outcome for target in targets for outcome in self.protocol.compare(student, target)]
        for kind in self.protocol.kinds:
            rows = [outcome.comparison for outcome in outcomes if outcome.comparison.kind == kind]
            empty = [float(row.student_area == 0) for row in rows if row.teacher_area]
            self.miou[kind].update(torch.tensor([row.iou for row in rows]))  # type: ignore[operator]
            self.empty[kind].update(torch.tensor(empty))  # type: ignore[operator]
        for outcome in outcomes:
            self.comparisons.append(outcome.comparison)
            self._draw(outcome, student)

    def compute(self) -> dict[str, float]:
        """Return flat metrics by their names in metrics.json, over all ranks; `comparisons` then has all ranks' rows.

        empty/KIND: the share of the prompts/KIND for which the student's mask is empty. A prompt counts if its
        reference mask is not empty; a kind without a prompt that counts has no scores.
        """
        scores = {kind: metric.compute() for kind, metric in self.miou.items()}  # type: ignore[operator]
        counted = {kind: score for kind, score in scores.items() if score["prompts"] > 0}
        result = {f"miou/{kind}": float(score["miou"]) for kind, score in counted.items()}
        result |= {f"prompts/{kind}": int(score["prompts"]) for kind, score in counted.items()}
        result |= {f"empty/{kind}": float(self.empty[kind].compute()) for kind in counted}  # type: ignore[operator]
        seen = {name: metric for name, metric in self.errors.items() if metric.update_called}
        result |= {name: float(metric.compute()) for name, metric in seen.items()}  # type: ignore[operator]
        result["prompts"] = sum(int(score["prompts"]) for score in scores.values())
        result["prompts_skipped"] = sum(int(score["skipped"]) for score in scores.values())
        self.comparisons = _of_all_ranks(self.comparisons)
        return result

    def intervals(self) -> dict[str, float]:
        """Return, after `compute`, the 95% bootstrap interval of each mIoU over images, `miou/KIND/low` and `/high`."""
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
        self._wanted[row.image] = ""  # drawn
        i = batch.keys.index(row.image)
        (height, width), original_size = student.sizes[i]
        frame = batch.images[i, :, :height, :width].permute(1, 2, 0).cpu().numpy()
        original = Image.fromarray(frame).resize(original_size[::-1])
        reference, answer = outcome.teacher().cpu().numpy(), outcome.student().cpu().numpy()
        self.pictures.append(Picture(original, row, reference, answer))

    def sheet(self) -> Image.Image:
        """Return the pictures as rows: the image with its prompt, the reference mask, the student's mask."""
        rows = []
        for picture in self.pictures:
            row = picture.comparison
            captions = f"image and {row.kind}", self.protocol.reference, f"student   IoU {row.iou:.2f}"
            masks = [(None, TEACHER), (picture.reference, TEACHER), (picture.student, STUDENT)]
            panels = [prompt_overlay(picture.image, row.prompt, row.labels, mask, colour) for mask, colour in masks]
            rows.append(side_by_side(panels, captions))
        return column(rows)


def blind(
    evaluator: Evaluator, teacher: Sam, answers: Iterable[TeacherBatch], total: Tensor, images: int
) -> dict[str, float]:
    """Return the mIoU of an encoder that never looks: each image gets the teacher's mean embedding of the others.

    Large masks give a high IoU even so: a student has learned something only if it scores higher. A single image has
    no others and gets no score. total: sum of all embeddings, [256, 64, 64]; images: their number (over all ranks).
    """
    if images < 2:
        return {}
    for batch, embedding, targets in answers:
        others = (total - embedding.float()) / (images - 1)
        evaluator.update(evaluator.protocol.view(teacher, others, batch), embedding, targets)
    return {f"blind/{name}": value for name, value in evaluator.compute().items() if name.startswith("miou/")}
