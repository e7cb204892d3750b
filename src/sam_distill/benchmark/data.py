"""Benchmarks of the data pipeline, from files on disk to the first training step."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import resize, to_pil_image

from sam_distill.benchmark.tables import Finding
from sam_distill.benchmark.timing import Contender, time_in_turns
from sam_distill.data.base import DataSource, collate
from sam_distill.data.cache import Cache, ShardWriter, tar_members, update_manifest
from sam_distill.data.embeddings import Dtype
from sam_distill.data.photos import Photos
from sam_distill.data.sa1b import Sa1b
from sam_distill.errors import UserError
from sam_distill.images import decode, to_frame, to_jpeg
from sam_distill.tars.index import TarIndex, cached_index, file_stamp
from sam_distill.types import EMBED_DIM, FRAME, GRID, Sample

IMAGES = 16  # in a batch, and images measured at most
SA1B = (2250, 1500)  # width and height of SA-1B's images, on average
SA1B_IMAGES, SA1B_TARS = 11_186_000, 1000


def bench_data(jpegs: list[bytes], workers: int, seconds: float) -> Iterator[Finding]:
    yield _decoding(jpegs, seconds)
    with TemporaryDirectory() as folder:
        yield _reading(jpegs, Path(folder), seconds)
        yield _loading(temporary_cache(Path(folder) / "loader", jpegs, "int8"), workers, seconds)
        yield _starting(Path(folder) / "start")


def temporary_cache(folder: Path, jpegs: list[bytes], dtype: Dtype) -> Cache:
    """Write a cache of these images with noise as embeddings; reading it takes as long as with real embeddings."""
    folder.mkdir()
    shard, noise = ShardWriter(folder, 0), torch.Generator().manual_seed(0)
    for number, jpeg in enumerate(jpegs):
        picture, size = decode(jpeg)
        framed, embedding = to_frame(picture, size), torch.randn(EMBED_DIM, GRID, GRID, generator=noise)
        shard.add(tar_members(Sample(f"{number:06d}", framed, size), to_jpeg(framed, 92), embedding, dtype))
    shard.finish()
    update_manifest(folder, {"tars": 1, "held_out": ["000000"], "annotations": False})
    return Cache(str(folder))


def _decoding(jpegs: list[bytes], seconds: float) -> Finding:
    our_jpegs, peer_jpegs = cycle(jpegs), cycle(jpegs)

    def ours() -> torch.Tensor:
        picture, size = decode(next(our_jpegs))
        return to_frame(picture, size)

    contenders = [Contender("sam-distill: scaled decoding, Pillow", ours)]
    note = ""
    try:
        import cv2
    except ImportError:
        note = "peers: not run, they need pip install 'sam-distill[bench]'"
    else:
        cv2.setNumThreads(1)

        def peers() -> np.ndarray[Any, Any]:
            bgr: Any = cv2.imdecode(np.frombuffer(next(peer_jpegs), np.uint8), cv2.IMREAD_COLOR)
            image = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
            scale = FRAME / max(image.shape[:2])
            size = [int(side * scale + 0.5) for side in image.shape[:2]]
            return np.array(resize(to_pil_image(image), size))

        contenders.append(Contender("peers: cv2, then torchvision's resize", peers, ours=False))
    sizes = {Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs}
    what = f"JPEG of {' or '.join(f'{w} x {h}' for w, h in sorted(sizes)[:3])} to the frame, one core"
    with _one_thread():
        return Finding(what, "image", time_in_turns(contenders, "cpu", seconds), note)


def _reading(jpegs: list[bytes], folder: Path, seconds: float) -> Finding:
    """Measure how fast one process reads and decodes images with their embeddings."""
    dtypes: tuple[Dtype, ...] = ("int8", "fp16", "fp32")
    contenders = []
    for dtype in dtypes:
        stream = iter(temporary_cache(folder / dtype, jpegs, dtype).train_stream(0, 0, 0, 1, 1))
        contenders.append(Contender(f"sam-distill: cache, {dtype}", lambda stream=stream: next(stream)))  # type: ignore[misc]
    array = folder / "embedding.npy"
    np.save(array, np.zeros((EMBED_DIM, GRID, GRID), np.float32))

    def peers() -> object:
        """Decode the original JPEG and load its embedding, a file of 4.19 MB."""
        picture, _ = decode(jpegs[0], full=True)
        return to_frame(picture), torch.from_numpy(np.load(array))

    contenders.append(Contender("peers: full JPEG and .npy, read by our decoder", peers, ours=False))
    with _one_thread():
        return Finding("Image and teacher's embedding, one core", "image", time_in_turns(contenders, "cpu", seconds))


def _loading(cache: Cache, workers: int, seconds: float) -> Finding:
    stream = cache.train_stream(0, 0, 0, 1, IMAGES)
    loader = DataLoader(stream, IMAGES, collate_fn=collate, num_workers=workers)
    batches = iter(loader)
    contender = Contender(f"sam-distill: loader, {workers} worker processes", lambda: next(batches), IMAGES)
    return Finding("Batches from the cache, int8", "image", time_in_turns([contender], "cpu", seconds))


def _starting(folder: Path) -> Finding:
    """Measure the work of a process before its first step. The tars are empty, but indexed as if they were SA-1B's."""
    folder.mkdir()
    each, random = SA1B_IMAGES // SA1B_TARS, np.random.default_rng(0)
    with patch.dict(os.environ, SAM_DISTILL_HOME=str(folder / "home")):
        for number in range(SA1B_TARS):
            tar, numbers = folder / f"sa_{number:06d}.tar", range(number * each, (number + 1) * each)
            tar.touch()
            arrays: dict[str, np.ndarray[Any, Any]] = {
                "names": np.frombuffer("\0".join(map("sa_{}.jpg".format, numbers)).encode(), np.uint8),
                "digests": random.integers(2**64, size=each, dtype=np.uint64),
                "beside": np.ones(each, np.uint8),
            }
            cached_index(str(tar), file_stamp(tar.stat()), partial(TarIndex, each, arrays))

        def start() -> object:
            source = Sa1b(str(folder))
            return source.fingerprint, source.skipped_samples, source.train_stream(0, 0, 0, 8, 8)

        timings = time_in_turns([Contender("sam-distill", start)], "cpu", turns=3)
    return Finding(f"Start on {SA1B_TARS * each:,} images in {SA1B_TARS:,} tars that were read before", timings=timings)


def example_jpegs(source: DataSource) -> list[bytes]:
    """Return JPEGs of `source` if it reads SA-1B, else built-in photographs resized to SA-1B's average size.

    Raise UserError if fewer than two of the source's images can be read.
    """
    if isinstance(source, Sa1b) and not isinstance(source, Cache):
        contents = chain.from_iterable(shard.read(shard.members()) for shard in [*source.train, *source.val])
        found = [content[0] for _, content in islice(contents, IMAGES)]
        if len(found) < 2:
            raise UserError("there are too few images that can be read: nothing to measure")
        return found
    samples = Photos(images=1, val_images=IMAGES).val_samples()
    return [to_jpeg(resize(sample.image, list(SA1B[::-1])), 95) for sample in samples]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
