"""Fixtures: images and tars made on the fly, and the batches of a loader."""

import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from sam_distill.data.base import DataSource, collate


@pytest.fixture
def jpeg() -> Callable[[int], bytes]:
    """Return jpeg(seed), which makes a small JPEG; its width in pixels is 64 + seed."""

    def make(seed: int) -> bytes:
        coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
        buffer = BytesIO()
        Image.fromarray(coarse).resize((64 + seed, 48)).save(buffer, "JPEG")
        return buffer.getvalue()

    return make


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., Path]:
    """Return make_tar(name, {member: content}), which writes a tar and returns its path."""

    def make(name: str, members: dict[str, bytes]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        with tarfile.open(path, "w") as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
        return path

    return make


@pytest.fixture
def make_shards(make_tar: Callable[..., Path], jpeg: Callable[[int], bytes]) -> Callable[[Sequence[int]], list[str]]:
    """Return make_shards: make_shards([5, 4]) writes two tars in SA-1B's layout with sa_0 to sa_4 and sa_5 to sa_8."""

    def make(sizes: Sequence[int]) -> list[str]:
        numbers, paths = iter(range(sum(sizes))), []
        for shard, size in enumerate(sizes):
            members = {}
            for number in islice(numbers, size):
                members |= {f"sa_{number}.jpg": jpeg(number), f"sa_{number}.json": b"not even json"}
            paths.append(str(make_tar(f"shards/sa_{shard:06d}.tar", members)))
        return paths

    return make


@pytest.fixture
def batches() -> Callable[..., list[list[str]]]:
    """Return a function that returns the keys of the first `number` batches of one rank's loader."""

    def run(source: DataSource, number: int, workers: int = 0, start: int = 0, **options: int) -> list[list[str]]:
        options = {"seed": 0, "rank": 0, "world_size": 1, "batch_size": 2} | options
        stream = source.train_stream(start=start, **options)
        loader = DataLoader(stream, options["batch_size"], num_workers=workers, collate_fn=collate)
        iterator = iter(loader)
        try:
            return [batch.keys for batch in islice(iterator, number)]
        finally:
            if workers:  # otherwise they end only when garbage is collected, which takes 5 seconds
                iterator._shutdown_workers()  # type: ignore[attr-defined]

    return run
