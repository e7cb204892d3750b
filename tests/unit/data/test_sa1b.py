"""Tests of the SA-1B source: division among workers, resuming, and the kinds of tars that users have."""

import gzip
import tarfile
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from sam_distill.data.sa1b import Sa1b
from sam_distill.errors import UserError
from sam_distill.tars import tar as tars

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def keys_of(batches: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(batches))


def train_keys(source: Sa1b) -> set[str]:
    return set(source.keys(source.train))


def test_validation_set_is_spread_over_tars_and_disjoint_from_training(make_shards) -> None:
    source = Sa1b(make_shards([4, 4, 4, 4]), val_images=2)
    samples = source.val_samples()
    assert [sample.key for sample in samples] == ["sa_0", "sa_8"]
    assert samples[1].original_size == (48, 72)
    assert samples[1].image.shape == (3, 683, 1024)
    assert train_keys(source) == {f"sa_{number}" for number in range(16)} - {"sa_0", "sa_8"}
    assert (source.num_train_images, source.val_images) == (14, 2)
    assert [sample.key for sample in Sa1b(make_shards([4, 21]), val_images=5).val_samples()] == [
        f"sa_{number}" for number in (0, 1, 2, 4, 5)
    ]


def test_val_path_provides_the_validation_set(make_shards, make_tar, jpeg) -> None:
    val = make_tar("val/v.tar", {"x.jpg": jpeg(1), "sa_1.jpg": jpeg(2)})
    source = Sa1b(make_shards([4]), val_path=str(val))
    assert source.val_images == 2
    assert train_keys(source) == {"sa_0", "sa_2", "sa_3"}


@pytest.mark.parametrize("sizes", [[6, 6, 6], [2] * 9])
def test_images_are_divided_evenly_over_ranks_and_workers(make_shards, batches, sizes: list[int]) -> None:
    """With 3 shards, the 4 workers divide the images of each shard; with 9 shards, they take whole shards."""
    source = Sa1b(make_shards(sizes), val_images=2, shuffle_buffer=4)
    ranks = [keys_of(batches(source, 32, workers=2, rank=rank, world_size=2)) for rank in range(2)]
    seen = Counter(chain.from_iterable(ranks))
    assert set(seen) == train_keys(source)
    assert {4 * 32 // 16 - 1, 4 * 32 // 16, 4 * 32 // 16 + 1} >= set(seen.values())


def test_divided_images_do_not_repeat_within_an_epoch(make_shards, batches) -> None:
    source = Sa1b(make_shards([6, 6, 6]), val_images=2, shuffle_buffer=2)
    ranks = [keys_of(batches(source, 4, workers=2, rank=rank, world_size=2)) for rank in range(2)]
    assert Counter(chain.from_iterable(ranks)) == Counter(train_keys(source))


def test_epochs_and_seeds_differ(make_shards, batches) -> None:
    source = Sa1b(make_shards([6, 6]), val_images=2)
    keys = keys_of(batches(source, 10))
    assert set(keys[:10]) == set(keys[10:]) == train_keys(source)
    assert keys[:10] != keys[10:]
    assert keys == keys_of(batches(source, 10)) != keys_of(batches(source, 10, seed=1))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("sizes", [[7, 5, 4], [4, 12]])
def test_a_resumed_stream_continues_exactly(make_shards, batches, sizes: list[int], workers: int) -> None:
    source = Sa1b(make_shards(sizes), val_images=1, shuffle_buffer=3)
    whole = batches(source, 16, workers)
    for done in (1, 9):
        assert batches(source, 16 - done, workers, start=2 * done) == whole[done:]


def test_fewer_images_than_workers(make_shards, batches) -> None:
    source = Sa1b(make_shards([3]), val_images=1)
    assert set(keys_of(batches(source, 3, workers=3))) == {"sa_1", "sa_2"}


def test_images_and_fraction_limit_the_training_images(make_shards, batches) -> None:
    shards = make_shards([6, 6, 6])
    four, half = Sa1b(shards, val_images=2, images=4), Sa1b(shards, val_images=2, fraction=0.5)
    assert (four.num_train_images, half.num_train_images) == (4, 8)
    assert train_keys(four) < train_keys(half)
    assert set(keys_of(batches(four, 4, workers=2))) == train_keys(four)


def test_a_damaged_image_is_skipped_and_counted(make_tar, batches, caplog: pytest.LogCaptureFixture, jpeg) -> None:
    tar = make_tar("a.tar", {f"{number}.jpg": jpeg(number)[: 300 if number == 3 else None] for number in range(6)})
    source = Sa1b(str(tar), val_images=1)
    assert Counter(keys_of(batches(source, 4))) == dict.fromkeys(("1", "2", "4", "5"), 2)
    assert source.skipped == 1
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert f"skipped: 3 in {tar}: cannot be decoded" in caplog.text


def test_truncated_tar_yields_its_complete_images(make_tar, batches, caplog: pytest.LogCaptureFixture, jpeg) -> None:
    tar = make_tar("a.tar", {f"{number}.jpg": jpeg(number) for number in range(6)})
    content = tar.read_bytes()
    tar.write_bytes(content[: content.index(b"4.jpg") + 700])
    source = Sa1b(str(tar), val_images=1)
    assert set(keys_of(batches(source, 6, workers=2))) == {"1", "2", "3"}
    assert source.skipped == 1
    assert f"{tar} after 4 files (truncated in 4.jpg)" in caplog.text
    tar.write_bytes(content[: content.index(b"4.jpg") + 100])
    assert (Sa1b(str(tar), val_images=1).num_train_images, Sa1b(str(tar), val_images=1).skipped) == (3, 1)
    tar.write_bytes(content[: content.index(b"4.jpg")] + b"garbage" * 1000)
    assert (Sa1b(str(tar), val_images=1).num_train_images, Sa1b(str(tar), val_images=1).skipped) == (3, 1)


def test_a_tar_that_breaks_during_training(make_shards, batches) -> None:
    first, second = make_shards([3, 3])
    source = Sa1b([first, second], val_images=0)
    Path(second).write_bytes(Path(second).read_bytes()[:1000])
    assert set(keys_of(batches(source, 6, workers=2))) == {"sa_0", "sa_1", "sa_2"}
    assert source.skipped == 3
    assert source.skipped_by_tar == {second: 3}


@pytest.mark.parametrize("workers", [0, 2])
def test_error_if_all_training_images_are_damaged(make_tar, batches, workers: int) -> None:
    source = Sa1b(str(make_tar("a.tar", {f"{number}.jpg": b"no" for number in range(5)})), val_images=1)
    with pytest.raises(UserError, match="not one of 4 training images can be read"):
        batches(source, 1, workers)
    assert source.val_samples() == []


def test_keys_stay_unique(make_tar, jpeg) -> None:
    make_tar("s/a.tar", {"0.jpg": jpeg(0), "x/0.png": jpeg(1)})
    source = Sa1b(str(make_tar("s/b.tar", {"0.jpg": jpeg(2)}).parent), val_images=0)
    assert train_keys(source) == {"a/0.jpg", "b/0.jpg", "x/0"}
    again = make_tar("t/a.tar", {"0.jpg": jpeg(0)})
    with pytest.raises(UserError, match="rename one of them"):
        Sa1b([str(again), str(again.parent.parent / "s")])


@pytest.mark.parametrize("folder", ["a[1]", "a{1}", "a{1,2}"])
def test_names_with_brackets(make_tar, jpeg, folder: str) -> None:
    """The name of an existing folder or tar is not expanded as a pattern."""
    tar = make_tar(f"{folder}/b[{{x}}].tar", {f"{number}.jpg": jpeg(number) for number in range(3)})
    for path in (tar, tar.parent):
        assert Sa1b(str(path), val_images=0).num_train_images == 3


def test_images_that_differ_in_suffix_share_their_json(make_tar, jpeg) -> None:
    """a.jpg and a.png share one a.json, wherever it is in the tar; files in hidden folders are not images."""
    beside = b'{"annotations": []}'
    members = {
        "a.jpg": jpeg(1),
        "a.json": beside,
        "a.png": jpeg(2),
        "b.json": beside,
        "b.jpg": jpeg(3),
        "b.png": jpeg(4),
    }
    members |= {"c.jpg": jpeg(5), "./d.jpg": jpeg(6), ".cache/e.jpg": jpeg(7)}
    source = Sa1b(str(make_tar("twins.tar", members)), val_images=0)
    source.load_json()
    samples = {sample.key: sample.json for sample in (load() for load in source.loads(source.eval_items("all")))}
    assert samples == dict.fromkeys(
        ["twins/a.jpg", "twins/a.png", "twins/b.jpg", "twins/b.png"], beside
    ) | dict.fromkeys(["c", "./d"], b"")


def test_compressed_tar_is_an_error_with_advice(make_tar, tmp_path: Path, jpeg) -> None:
    packed = tmp_path / "sa.tar.gz"
    packed.write_bytes(gzip.compress(make_tar("sa.tar", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)}).read_bytes()))
    with pytest.raises(UserError, match=r"sa.tar.gz is compressed with gzip: unpack it, or read it by a command"):
        Sa1b(str(packed))
    assert Sa1b(f"pipe:gunzip -c {packed}", val_images=0).num_train_images == 2


def test_links_in_a_tar_are_reported(make_tar, tmp_path: Path, caplog: pytest.LogCaptureFixture, jpeg) -> None:
    """A file that tar has already written under another name is stored as a link."""
    path = make_tar("a.tar", {f"{number}.jpg": jpeg(number) for number in range(3)})
    for name, kind in {"b.jpg": tarfile.LNKTYPE, "c.jpg": tarfile.SYMTYPE, "notes": tarfile.SYMTYPE}.items():
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.jpg"
            tar.addfile(member)
    source = Sa1b(str(path), val_images=1)
    assert (source.num_train_images, source.skipped) == (2, 1)
    assert f"skipped: 2 images of {path}, which are links: tar --dereference" in caplog.text


def test_every_way_to_name_tars(make_shards, tmp_path: Path) -> None:
    make_shards([2, 2, 2])
    folder = f"{tmp_path}/shards"
    for path, images in {
        folder: 6,
        f"{folder}/sa_000001.tar": 2,
        f"{folder}/*.tar": 6,
        f"{folder}/sa_{{000000..000001}}.tar": 4,
    }.items():
        assert Sa1b(path, val_images=0).num_train_images == images
    assert Sa1b([f"{folder}/sa_000001.tar", f"{folder}/*.tar"], val_images=0).num_train_images == 6


def test_mistakes_in_the_path(make_tar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "RETRY_AFTER", (0, 0, 0))
    (tmp_path / "no.tar").write_text("not a tar" * 100)
    make_tar("text/a.tar", {"a.txt": b""})
    for path, line in {
        f"{tmp_path}/none": "there is no",
        f"{tmp_path}/sa_{{0..3}}.tar": r"there is no \S+/sa_0.tar; expected",
        f"{tmp_path}/sa_{{0..3.tar": "Unbalanced braces",
        f"{tmp_path}/no.tar": r"no image in 1 tars \(the rest of \S+no.tar after 0",
        f"{tmp_path}/text": "none of them holds",
        "https://localhost:1/sa_000000.tar": "https://localhost:1/sa_000000.tar: no connection",
        "pipe:cat /nowhere": r"no image in 1 tars \(.* after 0 files \(given up after 4 attempts: exit status 1",
        "s4://bucket/a.tar": "Protocol not known: s4; http.s., s3, gs and hf addresses and pipe: commands can be read",
    }.items():
        with pytest.raises(UserError, match=line) as caught:
            Sa1b(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no"):
        Sa1b(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="names no tar"):
        Sa1b([])
