"""Tests of the folder source and, through it, of everything that `IndexedSource` promises."""

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image

from sam_distill.data.folder import Folder
from sam_distill.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def photos(tmp_path: Path, jpeg) -> Path:
    """Return a folder with 14 images at several depths; with val_images=2, 12 are left to train on."""
    for number in range(14):
        path = tmp_path / "photos" / ("", "a", "a/b")[number % 3] / f"{number}.{('jpg', 'JPEG')[number % 2]}"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(jpeg(number))
    return tmp_path / "photos"


def keys_of(batches: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(batches))


def test_every_image_is_found(photos: Path) -> None:
    Image.new("RGB", (9, 9)).save(photos / "0.png")
    Image.new("RGB", (9, 9)).save(photos / "deep.TIFF")
    (photos / "notes.txt").write_text("no image")
    (photos / "._0.jpg").write_text("no image")
    source = Folder(str(photos), val_images=4)
    keys = {file.key for file in [*source.train, *source.val]}
    assert len(keys) == source.num_train_images + source.val_images == 16
    assert {"0.jpg", "0.png", "deep", "a/1", "a/b/2"} < keys


def test_links_are_followed_but_no_image_is_found_twice(photos: Path) -> None:
    for name in (".thumbnails", "a/.ipynb_checkpoints"):
        (photos / name).mkdir()
        (photos / name / "0.jpg").write_bytes((photos / "0.jpg").read_bytes())
    elsewhere = photos.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "more.jpg").write_bytes((photos / "0.jpg").read_bytes())
    (photos / "a/b/loop").symlink_to(photos)
    (photos / "a/alias").symlink_to(photos / "a/b")
    (photos / "beside").symlink_to(elsewhere)
    source = Folder(str(photos), val_images=2)
    keys = [file.key for file in source.files]
    assert len(keys) == 15
    assert "beside/more" in keys
    assert not any("alias" in key or "loop" in key or "/." in f"/{key}" for key in keys)


def test_validation_set_is_fixed_and_disjoint_from_training(photos: Path, jpeg) -> None:
    source = Folder(str(photos), val_images=2)
    held_out = {sample.key for sample in source.val_samples()}
    assert len(held_out) == 2
    assert held_out.isdisjoint(file.key for file in source.train)
    (photos / "new.jpg").write_bytes(jpeg(99))
    smaller = Folder(str(photos), val_images=2, images=3)
    assert smaller.num_train_images == 3
    assert len(held_out & {sample.key for sample in smaller.val_samples()}) >= 1
    sample = source.val_samples()[0]
    assert sample.image.shape[-1] == 1024
    assert sample.original_size[0] == 48


def test_once_per_epoch_over_ranks_and_workers(photos: Path, batches) -> None:
    source = Folder(str(photos), val_images=2)
    ranks = [keys_of(batches(source, 6, workers=2, rank=rank, world_size=2)) for rank in range(2)]
    epochs = [[key for keys in ranks for key in keys[first : first + 6]] for first in (0, 6)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(file.key for file in source.train)
    assert epochs[0] != epochs[1]
    assert keys_of(batches(source, 6, seed=1)) != keys_of(batches(source, 6))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_resumed_stream_continues_exactly(photos: Path, batches, workers: int) -> None:
    source = Folder(str(photos), val_images=2)
    whole = batches(source, 14)
    assert batches(source, 7, workers, start=14) == whole[7:]


def test_damaged_images_are_skipped_and_counted_once(photos: Path, batches, caplog: pytest.LogCaptureFixture) -> None:
    source = Folder(str(photos), val_images=2)
    broken = source.train[3]
    broken.path.write_bytes(broken.path.read_bytes()[:300])
    keys = Counter(keys_of(batches(source, 12)))
    assert sorted(keys) == sorted(file.key for file in source.train if file != broken)
    assert keys.total() == 24
    assert min(keys.values()) == 2, "another image stands in for it in each epoch"
    assert source.skipped == 1
    assert [str(broken.path) in record.message for record in caplog.records] == [True]
    assert len(keys_of(batches(source, 12, workers=2))) == 24
    assert source.skipped == 1


def test_damage_changes_neither_the_order_nor_where_a_run_resumes(photos: Path, batches) -> None:
    source = Folder(str(photos), val_images=2)
    for file in source.train[2:8:2]:
        file.path.write_bytes(b"")
    whole = batches(source, 14)
    assert batches(source, 14, workers=3) == whole
    assert batches(source, 7, start=14) == whole[7:]


def test_workers_count_damage_for_the_main_process(photos: Path, batches) -> None:
    source = Folder(str(photos), val_images=2)
    for file in source.train[:5]:
        file.path.write_bytes(b"")
    batches(source, 7, workers=2)
    assert source.skipped == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_error_if_all_training_images_are_damaged(photos: Path, batches, workers: int) -> None:
    source = Folder(str(photos), val_images=2)
    for file in [*source.train, source.val[0]]:
        file.path.write_bytes(b"")
    with pytest.raises(UserError, match="not one of 12 training images can be read"):
        batches(source, 1, workers)
    assert len(source.val_samples()) == 1
    assert source.skipped == 13


def test_few_images(tmp_path: Path, jpeg) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    source = Folder(str(tmp_path))
    assert (source.num_train_images, source.val_images) == (4, 1)
    assert "only 5 images" in source.shortage


def test_mistakes_in_the_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.path=\S+/none does not exist; expected a folder of images"):
        Folder(str(tmp_path / "none"))
    (tmp_path / "file.jpg").touch()
    with pytest.raises(UserError, match="is not a folder"):
        Folder(str(tmp_path / "file.jpg"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image; expected jpg"):
        Folder(str(tmp_path / "empty"))


def test_pictures_drawn_by_runs_are_not_found(photos: Path) -> None:
    """Otherwise, with data.path=., a second run would train on the pictures of the first one."""
    before = [file.key for file in Folder(str(photos)).files]
    run = photos / "outputs/train/first"
    for folder in ("pictures", "wandb/files"):
        (run / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(run / folder / "masks.png")
    for name in ("status.json", "config.yaml"):
        (run / name).touch()
    assert [file.key for file in Folder(str(photos)).files] == before
