import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from sam_distill.data.annotations import draw_annotations
from sam_distill.data.base import collate
from sam_distill.data.sa1b import Sa1b
from sam_distill.errors import UserError
from sam_distill.images import Size
from sam_distill.types import Sample


def annotation(height: int, width: int, box: tuple[int, int, int, int], as_list: bool = False) -> dict:
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    if as_list:
        runs, flat = [], mask.T.flatten()
        borders = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
        runs = np.diff(borders).tolist()
        return {"segmentation": {"size": [height, width], "counts": [0] * int(flat[0]) + runs}}
    run_lengths = coco.encode(mask)
    return {"segmentation": {"size": [height, width], "counts": run_lengths["counts"].decode()}}


def content(*annotations: dict) -> bytes:
    return json.dumps({"annotations": annotations}).encode()


def draw(*annotations: dict, key: str = "a", epoch: int = 0, count: int = 5, size: Size = (64, 64)) -> torch.Tensor:
    sample = Sample(key, torch.empty(0), size, epoch, json=content(*annotations))
    return draw_annotations(sample, f"{key}.json", count, seed=0)


@pytest.mark.parametrize("as_list", [False, True], ids=["compressed", "list"])
def test_mask_keeps_its_place_in_the_image(as_list: bool) -> None:
    """An image of 300 x 400 pixels fills 768 x 1024 of the frame, 192 x 256 cells."""
    found = draw(annotation(300, 400, (100, 150, 400, 300), as_list), count=2, size=(300, 400))
    expected = torch.zeros(256, 256, dtype=torch.bool)
    expected[96:192, 64:256] = True
    assert torch.equal(found[0], expected)
    assert not found[1].any(), "there is only one"


def test_draws_repeat_nothing_and_change_with_the_epoch() -> None:
    many = [annotation(64, 64, (4 * i, 0, 4 * i + 4, 64)) for i in range(16)]
    first, again = (draw(*many) for _ in range(2))
    assert torch.equal(first, again)
    assert len({column.int().argmax().item() for column in first.any(1)}) == 5
    assert not torch.equal(first, draw(*many, epoch=1))
    assert not torch.equal(first, draw(*many, key="b"))


def test_mask_must_have_the_aspect_ratio_of_its_image() -> None:
    """The image may have been scaled since it was annotated, but not turned or cropped."""
    mask = annotation(301, 400, (100, 150, 400, 300))
    assert draw(mask, size=(150, 200)).any()
    with pytest.raises(UserError, match=r"a.json: .*a mask of \[301, 400\] pixels for an image of \(400, 301\)"):
        draw(mask, size=(400, 301))


@pytest.mark.parametrize(
    "damaged", [b"{", b"{}", b'{"annotations": [{"segmentation": {"size": [4, 4], "counts": 7}}]}']
)
def test_damaged_json_is_a_one_line_error(damaged: bytes) -> None:
    with pytest.raises(UserError, match=r"^sa_1.json: the annotations can't be read"):
        draw_annotations(Sample("sa_1", torch.empty(0), (4, 4), json=damaged), "sa_1.json", 1, 0)


@pytest.mark.parametrize("json_first", [False, True])
def test_a_source_pairs_images_with_annotations(
    make_tar: Callable[..., Path], jpeg: Callable[[int], bytes], json_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    members = {}
    for number in range(4):
        pair = {f"sa_{number}.jpg": jpeg(number)}
        if number != 2:
            pair[f"sa_{number}.json"] = content(annotation(48, 64 + number, (0, 0, 8 * number + 8, 48)))
        members |= dict(reversed(pair.items())) if json_first else pair
    members["sa_9.jpg"], members["sa_9.json"] = jpeg(9), b"damaged"
    photo = make_tar("val/photo.tar", {"photo.jpg": jpeg(7)})
    source = Sa1b(str(make_tar("sa_000000.tar", members)), val_path=str(photo))
    source.load_annotations(2, seed=0)
    assert [sample.key for sample in source.val_samples()] == ["photo"], "validation needs none"
    assert source.num_train_images == 4
    assert "1 training images have no annotations" in caplog.text
    stream = source.train_stream(start=0, seed=0, rank=0, world_size=1, batch_size=3)
    batch = collate(list(islice(stream, 6)))
    assert set(batch.keys) == {"sa_0", "sa_1", "sa_3"}
    assert sorted(batch.epochs) == [0, 0, 0, 1, 1, 1]
    assert batch.annotations is not None
    for key, masks in zip(batch.keys, batch.annotations, strict=True):
        number = int(key[-1])
        assert masks[0].any(0).sum().item() == pytest.approx(256 * (8 * number + 8) / (64 + number), abs=1)
        assert not masks[1].any()
    assert source.skipped == 1


def test_no_annotations_at_all(make_tar: Callable[..., Path], jpeg: Callable[[int], bytes]) -> None:
    source = Sa1b(str(make_tar("photos.tar", {f"{n}.jpg": jpeg(n) for n in range(3)})), val_images=1)
    with pytest.raises(UserError, match="not one training image has annotations"):
        source.load_annotations(2, seed=0)
