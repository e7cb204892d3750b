"""Indices of tars: read once from the tars' headers, and then stored on disk."""

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sam_distill.data.sa1b import Sa1b
from sam_distill.selection import choose
from sam_distill.tars import tar as tars
from sam_distill.tars.index import TarIndex, cached_index
from sam_distill.tars.shards import Shard, choose_images, split_by_keys
from sam_distill.tars.tar import LocalTar


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAM_DISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tars, "FEW_IMAGES", 1)
    return tmp_path / "home"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of tars whose headers have been read so far."""
    seen, headers = [], tars.read_headers

    def reading(file: object, size: int | None, where: str) -> TarIndex:
        seen.append(Path(where).name)
        return headers(file, size, where)

    monkeypatch.setattr(tars, "read_headers", reading)
    return seen


def test_a_tar_is_read_again_when_it_has_changed(
    make_shards: Callable[..., list[str]], read: list[str], batches: Callable[..., list[list[str]]]
) -> None:
    first, second = make_shards([4, 3])
    before = Sa1b([first, second], val_images=1)
    assert sorted(read) == ["sa_000000.tar", "sa_000001.tar"]
    read.clear()
    again = Sa1b([first, second], val_images=1)
    assert read == []
    assert (again.keys(again.train), again.keys(again.val)) == (before.keys(before.train), before.keys(before.val))
    assert batches(again, 6) == batches(before, 6)
    make_shards([5, 3])  # the second tar now holds other images in the same number of bytes
    os.utime(second, ns=(1, 1))
    changed = Sa1b([first, second], val_images=1)
    assert changed.keys(changed.train) == [f"sa_{number}" for number in range(1, 8)]
    assert sorted(read) == ["sa_000000.tar", "sa_000001.tar"]


def test_a_damaged_tar_is_not_remembered(make_shards: Callable[..., list[str]], read: list[str]) -> None:
    (tar,) = make_shards([4])
    Path(tar).write_bytes(Path(tar).read_bytes()[:6000])
    for _ in range(2):
        assert Sa1b(tar, val_images=0).skipped == 1
    assert len(read) == 2


def test_index_of_few_images_is_not_stored(
    make_shards: Callable[..., list[str]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "FEW_IMAGES", 5)
    Sa1b(make_shards([4, 5]), val_images=1)
    assert len(list((home / "index").iterdir())) == 1


def test_names_are_not_held_in_memory(make_tar: Callable[..., Path], batches: Callable[..., list[list[str]]]) -> None:
    tar = make_tar("a.tar", {f"folder/image_{number:05d}.jpg": b"" for number in range(3000)})
    source = Sa1b(str(tar), val_images=2)
    assert source.num_train_images == 2998
    held = len(pickle.dumps(source.train))  # what a loader worker is sent
    assert held < 2998 * 4 + 2000  # one number per image, as two images are held out
    assert len(pickle.dumps(source.shards)) < 2000


def test_unwritable_cache_folder_causes_one_warning(
    make_shards: Callable[..., list[str]], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert Sa1b(make_shards([4, 3]), val_images=1).num_train_images == 6
    assert caplog.text.count("their headers are read at every start") == 1


def test_names_are_read_back_from_the_stored_index() -> None:
    names = ["a/b.jpg", "é 1.png", "broken\udcff.jpg", "x.jpg"]
    held = cached_index("a tar", "1", lambda: TarIndex.from_members([*names, "a/b.json", "notes.txt", "x.embedding"]))
    assert isinstance(held.arrays, Path)
    assert (held.images, held.names()) == (4, names)
    assert held.has_companion(".json").tolist() == [True, False, False, False]
    assert held.has_companion(".embedding").tolist() == [False, False, False, True]


@pytest.mark.parametrize(("images", "fraction"), [(None, None), (1, None), (13, None), (40, None), (None, 0.3)])
def test_same_images_are_chosen_as_from_a_folder(images: int | None, fraction: float | None) -> None:
    """By the digests of their keys, also where a key needs its tar's name to be unique."""
    parts = [[f"{tar * 20 + n}.jpg" for n in range(20)] + ["same.jpg"] for tar in range(2)]
    tars_of = [LocalTar(f"{name}.tar") for name in "ab"]
    shards = [Shard(tar, TarIndex.from_members(part), {"same"}) for tar, part in zip(tars_of, parts, strict=True)]
    keys = [key for shard in shards for key in shard.image_keys()]
    assert {"a/same.jpg", "b/same.jpg"} < set(keys)
    found = [key for shard in choose_images(shards, images, fraction) for key in shard.image_keys()]
    assert found == [keys[index] for index in choose(keys, images, fraction)]
    some = set(keys[::7])
    having, others = split_by_keys(shards, some)
    assert [key for shard in having for key in shard.image_keys()] == keys[::7]
    assert [key for shard in others for key in shard.image_keys()] == [k for k in keys if k not in some]


def test_two_images_with_one_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told apart by their names; if both compete for the last place, the first is chosen."""
    index = TarIndex.from_members(["0.jpg", "1.jpg", "2.jpg"])
    assert not isinstance(index.arrays, Path)
    alike = TarIndex(3, {**index.arrays, "digests": np.array([7, 7, 3], np.uint64)})
    shard = Shard(LocalTar("a.tar"), alike)
    assert [s.image_keys() for s in choose_images([shard], 2, None)] == [["0", "2"]]
