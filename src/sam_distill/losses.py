"""Distillation losses: pure functions, always in float32, each with its source.

`area` weighs the cells, to exclude the frame's padding or reduce its weight: [B, 1, h, w], 1 or True inside the image.
"""

from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss


def embedding_mse(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """Return the mean squared error between image embeddings: the paper's decoupled loss (section 3.2). Scalar.

    student, teacher: [B, 256, 64, 64]. With `area`, every image counts the same, however much of its frame
    is padding. The paper does not mention padding; one third of a 3:2 image's frame is padding.
    """
    errors = F.mse_loss(student.float(), teacher.float(), reduction="none")
    return _mean_in_area(errors.mean(1), area).mean()


def embedding_smooth_l1(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """Return the Huber loss with threshold 1, as in NanoSAM's training; arguments as in `embedding_mse`. Scalar."""
    errors = F.smooth_l1_loss(student.float(), teacher.float(), reduction="none")
    return _mean_in_area(errors.mean(1), area).mean()


def embedding_norm(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """Return the length of each image's whole error vector (root of the sum of squares), averaged over images. Scalar.

    Its gradient is equally long for every image, however close the student is. The loss grows with embedding size.
    """
    errors = (student.float() - teacher.float()).square().sum(1, keepdim=True)
    return (errors if area is None else errors * area).sum((1, 2, 3)).clamp_min(1e-12).sqrt().mean()


def embedding_cosine(student: Tensor, teacher: Tensor, area: Tensor | None = None) -> Tensor:
    """Return the mean cosine similarity of the cells' 256-vectors; arguments as in `embedding_mse`. Scalar, best 1."""
    return _mean_in_area(F.cosine_similarity(student.float(), teacher.float(), dim=1), area).mean()


def bce_dice(logits: Tensor, target: Tensor, area: Tensor | None = None) -> Tensor:
    """Return 5 x binary cross-entropy + 5 x Dice loss of each mask, as in EdgeSAM (Zhou et al., 2023).

    logits [B, P, M, h, w]; target [B, P, M or 1, h, w] bool -> [B, P, M].
    """
    truth = target.float().expand_as(logits)
    error = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")
    return 5 * _mean_in_area(error, area) + 5 * mask_dice(logits, target, area)


def focal_dice(logits: Tensor, target: Tensor, area: Tensor | None = None) -> Tensor:
    """Return 20 x focal loss + 1 x Dice loss of each mask, as in SAM (its appendix A); arguments as in `bce_dice`.

    An unsure student predicts background: with alpha = 0.25, errors there cost three times as much as in the object.
    """
    return 20 * mask_focal(logits, target, area) + mask_dice(logits, target, area)


def mask_focal(logits: Tensor, target: Tensor, area: Tensor | None = None) -> Tensor:
    """Return the focal loss (Lin et al., 2017, eq. 5) of each mask, mean over cells; alpha = 0.25, gamma = 2 as in SAM.

    logits [B, P, M, h, w], target [B, P, M or 1, h, w] bool -> [B, P, M].
    """
    truth = target.float().expand_as(logits)
    return _mean_in_area(sigmoid_focal_loss(logits.float(), truth, alpha=0.25, gamma=2), area)


def mask_dice(logits: Tensor, target: Tensor, area: Tensor | None = None) -> Tensor:
    """Return each mask's Dice loss (Milletari et al., 2016), numerator and denominator +1 as in SAM; see `bce_dice`."""
    probability, truth = logits.float().sigmoid(), target.float()
    if area is not None:
        probability, truth = probability * area.unsqueeze(1), truth * area.unsqueeze(1)
    overlap = (probability * truth).sum((-1, -2))
    return 1 - (2 * overlap + 1) / (probability.sum((-1, -2)) + truth.sum((-1, -2)) + 1)


def mean_per_prompt(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean over the valid prompts of all images: values, valid [B, P]. Scalar; 0 if no prompt is valid."""
    return (values * valid).sum() / valid.sum().clamp_min(1)


def _mean_in_area(values: Tensor, area: Tensor | None) -> Tensor:
    """Return the mean over the cells, weighted by `area`: [B, ..., h, w] -> [B, ...]."""
    if area is None:
        return values.mean((-1, -2))
    weights = area.view(len(area), *[1] * (values.ndim - 3), *area.shape[-2:])
    return (values * weights).sum((-1, -2)) / weights.sum((-1, -2))
