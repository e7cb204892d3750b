"""Distillation losses: pure functions, always in float32, each with its source."""

from __future__ import annotations

from torch import Tensor


def embedding_mse(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """Mean squared error between image embeddings: the paper's decoupled loss (section 3.2). Scalar.

    student, teacher: [B, 256, 64, 64]. area: [B, 1, 64, 64] bool, the cells that count; every image counts the same
    however much of its frame is padding. The paper does not speak of padding; a 3:2 image is one third padding.
    """
    return _mean_per_image((student.float() - teacher.float()).square().mean(1, keepdim=True), area)


def embedding_cosine(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """Mean cosine similarity of the cells' 256-vectors, arguments as above. Scalar: 1 is perfect."""
    student, teacher = student.float(), teacher.float()
    dot = (student * teacher).sum(1, keepdim=True)
    norms = student.norm(dim=1, keepdim=True) * teacher.norm(dim=1, keepdim=True)
    return _mean_per_image(dot / norms.clamp_min(1e-12), area)


def _mean_per_image(values: Tensor, area: Tensor | None) -> Tensor:
    """[B, 1, h, w] -> scalar: the mean over each image's area, then over images."""
    if area is None:
        return values.mean()
    return ((values * area).sum((1, 2, 3)) / area.sum((1, 2, 3))).mean()
