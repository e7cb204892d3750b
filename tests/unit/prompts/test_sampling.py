"""Random draws of prompts: they depend on (seed, key, epoch) alone, and never fall into the padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sam_distill.prompts.sampling import PromptRng, corrections, distant_points, jitter, points_in, uniform_points
from sam_distill.types import ABSENT, BACKGROUND, FOREGROUND, valid_area

sizes_of_images = st.lists(st.tuples(st.integers(1, 1024), st.integers(1, 1024)), min_size=1, max_size=3)


def rng(images: int, epoch: int = 0, seed: int = 0) -> PromptRng:
    return PromptRng([f"image{i}" for i in range(images)], [epoch] * images, seed)


def assert_inside(points: Tensor, sizes: Tensor) -> None:
    assert ((points >= 0) & (points <= (sizes.flip(-1) - 1).unsqueeze(1)) & (points == points.floor())).all()


@given(sizes_of_images, st.integers(0, 9))
def test_no_point_in_the_padding(given_sizes: list[tuple[int, int]], epoch: int) -> None:
    sizes, images = torch.tensor(given_sizes), len(given_sizes)
    points = uniform_points(rng(images, epoch), sizes, 5)
    assert_inside(points, sizes)
    assert_inside(distant_points(rng(images, epoch), points, sizes, 100, 500), sizes)
    everything = valid_area(sizes, 256).expand(-1, 4, -1, -1)
    inside, found = points_in(rng(images, epoch), everything, sizes)
    assert_inside(inside, sizes)
    assert (found == everything.any((-1, -2))).all()
    boxes = torch.cat([points, points], dim=-1)
    assert_inside(jitter(rng(images), boxes, sizes, 1, 500).unflatten(-1, (2, 2)).flatten(1, 2), sizes)


def test_draws_depend_on_seed_key_and_epoch_alone() -> None:
    sizes = torch.tensor([[600, 1024], [1024, 700]])
    points = uniform_points(PromptRng(["a", "b"], [0, 3], 0), sizes, 4)
    assert torch.equal(points.flip(0), uniform_points(PromptRng(["b", "a"], [3, 0], 0), sizes.flip(0), 4))
    assert torch.equal(points[:1], uniform_points(PromptRng(["a"], [0], 0), sizes[:1], 4))
    for other in (
        PromptRng(["a"], [0], 1),
        PromptRng(["a"], [1], 0),
        PromptRng(["c"], [0], 0),
        PromptRng(["a"], [0], 0, "click"),
    ):
        assert not torch.equal(points[:1], uniform_points(other, sizes[:1], 4))


def test_points_cover_the_image() -> None:
    points = uniform_points(rng(1), torch.tensor([[512, 1024]]), 20000)[0]
    torch.testing.assert_close(points.mean(0), torch.tensor([511.5, 255.5]), rtol=0.03, atol=0)


def test_points_in_a_mask_are_uniform_over_it() -> None:
    mask = torch.zeros(1, 1, 256, 256, dtype=torch.bool)
    mask[0, 0, 10:12, 20:30] = True  # 20 cells, and far away ...
    mask[0, 0, 100, 200] = True  # ... one more
    points, found = points_in(rng(1), mask.expand(-1, 6000, -1, -1), torch.tensor([[1024, 1024]]))
    cells = (points[0] // 4).long()
    assert found.all()
    assert mask[0, 0, cells[:, 1], cells[:, 0]].all()
    assert (cells[:, 0] == 200).float().mean().item() == pytest.approx(1 / 21, abs=0.01)
    assert points[0].remainder(4).mean().item() == pytest.approx(1.5, abs=0.05)


def test_an_empty_mask_has_no_point() -> None:
    _, found = points_in(rng(1), torch.zeros(1, 2, 256, 256, dtype=torch.bool), torch.tensor([[1024, 1024]]))
    assert not found.any()


def test_noise_on_boxes_follows_sams_rule() -> None:
    """The noise has a standard deviation of 10% of the box's side, and is at most 20 pixels."""
    boxes = torch.tensor([400.0, 300.0, 500.0, 600.0]).expand(1, 20000, 4)
    noise = jitter(rng(1), boxes, torch.tensor([[1024, 1024]]), 0.1, 20) - boxes
    assert noise.abs().max() == 20
    assert noise[..., 0].std().item() == pytest.approx(9.5, abs=0.3)  # 10 without the limit of 20
    assert (noise[..., 1].abs() == 20).float().mean().item() == pytest.approx(0.52, abs=0.02)  # sigma is 30


def test_a_missing_box_stays_missing() -> None:
    noisy = jitter(rng(1), torch.full((1, 1, 4), torch.nan), torch.tensor([[1024, 1024]]), 0.1, 20)
    assert noisy.isnan().all()


def test_distant_points_keep_the_given_distance() -> None:
    sizes = torch.tensor([[1024, 1024]])
    points = torch.tensor([[[512.0, 512.0], [0.0, 0.0]]]).repeat(1, 500, 1)
    distance = (distant_points(rng(1), points, sizes, 100, 300) - points).norm(dim=-1)
    assert distance.min().item() == pytest.approx(100, abs=3)
    assert distance.max().item() == pytest.approx(300, abs=3)
    assert distance.mean().item() == pytest.approx(200, abs=5)


def test_corrections_lie_where_the_mask_is_wrong() -> None:
    target = torch.zeros(1, 3, 256, 256, dtype=torch.bool)
    target[..., 50:100, 50:100] = True
    answer = target.clone()
    answer[0, 0, 50:100, 80:100] = False  # too small
    answer[0, 1, 10:20, 10:20] = True  # too large
    answer[0, 2, 200:, :] = True  # wrong only in the padding
    sizes = torch.tensor([[800, 1024]])
    points, labels = corrections(rng(1), answer, target, valid_area(sizes, 256), sizes)
    assert labels.tolist() == [[FOREGROUND, BACKGROUND, ABSENT]]
    (x0, y0), (x1, y1) = (points[0, :2] // 4).tolist()
    assert 80 <= x0 < 100
    assert 50 <= y0 < 100
    assert 10 <= x1 < 20
    assert 10 <= y1 < 20


def test_key_may_be_invalid_utf8() -> None:
    """Keys are file names, which need not be valid UTF-8."""
    assert PromptRng(["a\udcff"], [0], seed=0).uniform(1).shape == (1, 1)
