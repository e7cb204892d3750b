from __future__ import annotations

import torch

from sam_distill.losses import embedding_cosine, embedding_mse
from sam_distill.models.sam import valid_area


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 256, 64, 64, generator=generator), torch.randn(2, 256, 64, 64, generator=generator)


def test_mse_is_the_mean_over_everything_without_an_area() -> None:
    a, b = embeddings()
    torch.testing.assert_close(embedding_mse(a, b), torch.nn.functional.mse_loss(a, b))


def test_padding_does_not_count() -> None:
    """The loss of a padded image is that of its valid part cut out, and each image weighs the same."""
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
