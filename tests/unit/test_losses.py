from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from sam_distill.losses import (
    bce_dice,
    embedding_cosine,
    embedding_mse,
    embedding_norm,
    embedding_smooth_l1,
    focal_dice,
    mask_dice,
    mask_focal,
    mean_per_prompt,
)
from sam_distill.types import valid_area


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 256, 64, 64, generator=generator), torch.randn(2, 256, 64, 64, generator=generator)


def test_mse_is_the_mean_over_everything_without_an_area() -> None:
    a, b = embeddings()
    torch.testing.assert_close(embedding_mse(a, b), torch.nn.functional.mse_loss(a, b))


def test_padding_does_not_count() -> None:
    """The loss is the mean over images of the loss on the valid part alone, so every image counts the same."""
    a, b = embeddings()
    sizes = torch.tensor([[640, 1024], [1024, 256]])
    expected = [torch.nn.functional.mse_loss(a[0, :, :40], b[0, :, :40])]
    expected.append(torch.nn.functional.mse_loss(a[1, :, :, :16], b[1, :, :, :16]))
    loss = embedding_mse(a, b, valid_area(sizes, 64))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    a[0, :, 40:] += 100  # in the padding
    torch.testing.assert_close(embedding_mse(a, b, valid_area(sizes, 64)), loss)


def test_losses_are_computed_in_float32() -> None:
    a, b = embeddings()
    half = embedding_mse(a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, torch.nn.functional.mse_loss(a.bfloat16().float(), b.bfloat16().float()))


def test_cosine() -> None:
    a, b = embeddings()
    torch.testing.assert_close(embedding_cosine(a, 3 * a), torch.tensor(1.0))
    torch.testing.assert_close(embedding_cosine(a, -a), torch.tensor(-1.0))
    torch.testing.assert_close(embedding_cosine(a, b), torch.cosine_similarity(a, b, dim=1).mean())


def test_smooth_l1_and_norm_against_torch() -> None:
    a, b = embeddings()
    torch.testing.assert_close(embedding_smooth_l1(a, b), torch.nn.functional.smooth_l1_loss(a, b))
    torch.testing.assert_close(embedding_norm(a, b), (a - b).flatten(1).norm(dim=1).mean(), rtol=1e-4, atol=0)
    area = valid_area(torch.tensor([[640, 1024], [1024, 256]]), 64)
    cut = torch.stack([(a[0] - b[0])[:, :40].norm(), (a[1] - b[1])[:, :, :16].norm()]).mean()
    torch.testing.assert_close(embedding_norm(a, b, area), cut, rtol=1e-4, atol=0)


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [2, 3, 4, 16, 16] and targets [2, 3, 1, 16, 16] bool."""
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 3, 4, 16, 16, generator=generator), torch.rand(2, 3, 1, 16, 16, generator=generator) > 0.6


AREA = valid_area(torch.tensor([[640, 1024], [1024, 256]]), 16)  # 10 x 16 and 16 x 4 cells


def test_focal_loss_equals_torchvisions() -> None:
    logits, target = masks()
    expected = sigmoid_focal_loss(logits, target.float().expand_as(logits), alpha=0.25, gamma=2)
    torch.testing.assert_close(mask_focal(logits, target), expected.mean((-1, -2)))
    torch.testing.assert_close(mask_focal(logits, target, AREA)[0], expected[0, :, :, :10].mean((-1, -2)))
    torch.testing.assert_close(mask_focal(logits, target, AREA)[1], expected[1, ..., :4].mean((-1, -2)))


def test_dice_loss_equals_numpy() -> None:
    logits, target = masks()
    p, t = 1 / (1 + np.exp(-logits[0, 1, 2, :10].double().numpy())), target[0, 1, 0, :10].numpy()
    expected = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    assert mask_dice(logits, target, AREA)[0, 1, 2].item() == pytest.approx(expected, rel=1e-5)
    assert mask_dice(logits, target).shape == (2, 3, 4)


def test_combined_mask_losses_weigh_their_terms_as_published() -> None:
    logits, target = masks()
    error = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[0, ..., :10, :], target[0, ..., :10, :].float().expand(3, 4, 10, 16), reduction="none"
    ).mean((-1, -2))
    dice = mask_dice(logits, target, AREA)
    torch.testing.assert_close(bce_dice(logits, target, AREA)[0], 5 * error + 5 * dice[0])
    torch.testing.assert_close(focal_dice(logits, target, AREA), 20 * mask_focal(logits, target, AREA) + dice)


def test_focal_loss_but_not_bce_pulls_an_unsure_student_to_background() -> None:
    """If a cell is foreground half of the time, cross-entropy is lowest at 0.5, and SAM's focal loss below 0.5."""
    probabilities = torch.linspace(0.05, 0.95, 19)
    logits = probabilities.logit().view(1, 19, 1, 1, 1).expand(-1, -1, -1, 16, 16)
    target = (torch.arange(256) % 2 == 0).view(1, 1, 1, 16, 16)
    best = {loss: probabilities[loss(logits, target).flatten().argmin()].item() for loss in (mask_focal, bce_dice)}
    assert best[mask_focal] < 0.4
    assert best[bce_dice] > 0.5


@pytest.mark.parametrize("loss", [mask_focal, mask_dice, bce_dice, focal_dice])
def test_a_perfect_mask_costs_nothing_and_padding_never_counts(loss: Callable[..., torch.Tensor]) -> None:
    logits, target = masks()
    perfect = torch.where(target, 100.0, -100.0)
    assert loss(perfect, target, AREA).max() < 1e-6
    spoilt = torch.where(AREA.unsqueeze(1), logits, -logits)
    torch.testing.assert_close(loss(spoilt, target, AREA), loss(logits, target, AREA))
    assert not torch.allclose(loss(spoilt, target), loss(logits, target))


def test_absent_prompts_do_not_count() -> None:
    values, valid = torch.tensor([[1.0, 5.0], [3.0, 100.0]]), torch.tensor([[True, True], [True, False]])
    assert mean_per_prompt(values, valid) == 3
    assert mean_per_prompt(values, torch.zeros_like(valid)) == 0
