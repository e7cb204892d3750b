import pytest

from sam_distill.training.durations import in_steps


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("8 epochs", 100), ("1 epoch", 13), ("0.5 epochs", 7), ("50000 steps", 50000), ("81 images", 11), ("1 image", 1)],
)
def test_any_unit(duration: str, steps: int) -> None:
    assert in_steps(duration, images_per_step=8, images_per_epoch=100) == steps


@pytest.mark.parametrize("duration", ["8", "8 weeks", "-1 steps", "0 steps", ""])
def test_invalid_durations_are_refused(duration: str) -> None:
    with pytest.raises(ValueError, match="should be a duration like '8 epochs'"):
        in_steps(duration, 8, 100)
