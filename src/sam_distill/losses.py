"""Distillation losses: pure functions, always in float32, each with its source.

Areas weigh cells, to keep the padding of the frame out, or down: [B, 1, h, w], 1 or True inside the image.
"""

from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss


def embedding_mse(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """Mean squared error between image embeddings: the paper's decoupled loss (section 3.2). Scalar.

    student, teacher: [B, 256, 64, 64]. area: every image counts the same however much of its frame is padding. The
    paper does not speak of padding; a 3:2 image is one third padding.
    """
    errors = F.mse_loss(student.float(), teacher.float(), reduction="none")
    return _mean_in_area(errors.mean(1), area).mean()


def embedding_smooth_l1(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """Huber's loss with its bend at 1, as NanoSAM trains; arguments as above. Scalar."""
    errors = F.smooth_l1_loss(student.float(), teacher.float(), reduction="none")
    return _mean_in_area(errors.mean(1), area).mean()


def embedding_norm(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """The length of each image's whole error vector, a root of a sum of squares, over images. Scalar.

    Its gradient has the same length for every image, however close the student is; the embeddings' size is in it.
    """
    errors = (student.float() - teacher.float()).square().sum(1, keepdim=True)
    return (errors if area is None else errors * area).sum((1, 2, 3)).clamp_min(1e-12).sqrt().mean()


def embedding_cosine(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """Mean cosine similarity of the cells' 256-vectors, arguments as above. Scalar: 1 is perfect."""
    return _mean_in_area(F.cosine_similarity(student.float(), teacher.float(), dim=1), area).mean()


def bce_dice(logits: Tensor, target: Tensor, area: Tensor | None = None) -> Tensor:
    """5 x binary cross-entropy + 5 x Dice of each mask, as EdgeSAM distils (Zhou et al., 2023).

    logits [B, P, M, h, w]; target [B, P, M or 1, h, w] bool -> [B, P, M].
    """
    truth = target.float().expand_as(logits)
    error = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")
    return 5 * _mean_in_area(error, area) + 5 * mask_dice(logits, target, area)


def focal_dice(logits: Tensor, target: Tensor, area: Tensor | None = None) -> Tensor:
    """20 x focal loss + 1 x Dice of each mask, as SAM trains on annotations (its appendix A); arguments as above.

    A student that is unsure answers background: alpha = 0.25 makes it three times as dear to miss.
    """
    return 20 * mask_focal(logits, target, area) + mask_dice(logits, target, area)


def mask_focal(logits: Tensor, target: Tensor, area: Tensor | None = None) -> Tensor:
    """Focal loss (Lin et al., 2017, eq. 5) of each mask, a mean over its cells; alpha = 0.25, gamma = 2 as SAM trains.

    logits [B, P, M, h, w], target [B, P, M or 1, h, w] bool -> [B, P, M].
    """
    truth = target.float().expand_as(logits)
    return _mean_in_area(sigmoid_focal_loss(logits.float(), truth, alpha=0.25, gamma=2), area)


def mask_dice(logits: Tensor, target: Tensor, area: Tensor | None = None) -> Tensor:
    """Dice loss (Milletari et al., 2016) of each mask, with 1 added above and below as SAM does; arguments as above."""
    probability, truth = logits.float().sigmoid(), target.float()
    if area is not None:
        probability, truth = probability * area.unsqueeze(1), truth * area.unsqueeze(1)
    overlap = (probability * truth).sum((-1, -2))
    return 1 - (2 * overlap + 1) / (probability.sum((-1, -2)) + truth.sum((-1, -2)) + 1)


def mean_per_prompt(values: Tensor, valid: Tensor) -> Tensor:
    """[B, P] and which of the prompts are there -> their mean, over all images alike. Scalar; 0 if there is none."""
    return (values * valid).sum() / valid.sum().clamp_min(1)


def _mean_in_area(values: Tensor, area: Tensor | None) -> Tensor:
    """[B, ..., h, w] -> [B, ...]: the mean over the cells within each image."""
    if area is None:
        return values.mean((-1, -2))
    weights = area.view(len(area), *[1] * (values.ndim - 3), *area.shape[-2:])
    return (values * weights).sum((-1, -2)) / weights.sum((-1, -2))
