"""Write a distillation cache: loader workers decode, the teacher encodes each image once, a writer thread packs."""

import hashlib
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sam_distill.data.annotations import check_json
from sam_distill.data.base import DataSource, collate, loader_worker
from sam_distill.data.cache import MANIFEST, ShardWriter, is_finished, read_manifest, tar_members, update_manifest
from sam_distill.data.embeddings import Dtype
from sam_distill.errors import UserError
from sam_distill.files import disk_is_full, file_sha256
from sam_distill.images import decode, to_frame, to_jpeg
from sam_distill.runs import processes
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.progress import CountProgress
from sam_distill.runs.status import only_process
from sam_distill.teachers import CachedTeacher, LiveTeacher, check_finite, save_teacher
from sam_distill.types import FRAME, Sample

log = logging.getLogger(__name__)

WAITING = 4  # batches that may wait for the writer thread


@dataclass(frozen=True)
class CacheBatch:
    """Batch of images for one tar. tar: its number.

    samples: as they will be read back, decoded from `jpgs`. errors: a line for each image that can't be read.
    """

    tar: int
    samples: list[Sample] = field(default_factory=list)
    jpgs: list[bytes] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples) + len(self.errors)


class CacheStream(IterableDataset[CacheBatch]):
    """Stream of image batches, tar by tar; loader workers take batches in turn, so that they arrive in order."""

    def __init__(self, job: "CacheJob", todo: list[int]) -> None:
        self.source, self.blocks, self.todo = job.source, job.blocks, todo
        self.batch_size, self.quality = job.batch_size, job.quality

    def __iter__(self) -> Iterator[CacheBatch]:
        worker, workers = loader_worker()
        turn = count()
        for number in self.todo:
            loads = self.source.loads(self.blocks[number])
            while batch := list(islice(loads, self.batch_size)):
                if next(turn) % workers == worker:
                    yield self._prepare(number, batch)

    def _prepare(self, tar: int, loads: Sequence[Callable[[], Sample]]) -> CacheBatch:
        images = CacheBatch(tar)
        for load in loads:
            try:
                sample = load()
                if sample.json:
                    check_json(sample.json, sample.key)
            except UserError as error:
                images.errors.append(str(error))
                continue
            jpg = to_jpeg(sample.image, self.quality)
            images.jpgs.append(jpg)
            images.samples.append(replace(sample, image=to_frame(decode(jpg)[0])))
        return images


@dataclass(frozen=True)
class CacheJob:
    """Images to cache, the teacher and the settings; conf/cache.yaml explains them."""

    source: DataSource
    teacher: LiveTeacher
    hardware: Hardware
    folder: Path
    dtype: Dtype
    quality: int
    batch_size: int
    tar_images: int

    @cached_property
    def blocks(self) -> list[Sequence[Any]]:
        """Images of each tar, as items of the source."""
        return self.source.blocks(self.tar_images)

    @property
    def images(self) -> int:
        return sum(map(self.source.count, self.blocks))

    def loader(self, todo: list[int]) -> DataLoader[CacheBatch]:
        """Return a loader of the batches for the tars with the numbers `todo`."""
        return self.hardware.loader(CacheStream(self, todo), batch_size=None)

    def members(self, images: CacheBatch, embeddings: Sequence[Tensor]) -> Iterator[dict[str, bytes]]:
        """Yield the tar members of each readable image: name -> content. embeddings: of these images, from `embed`."""
        for sample, jpg, embedding in zip(images.samples, images.jpgs, embeddings, strict=True):
            yield tar_members(sample, jpg, embedding, self.dtype)

    def embed(self, images: CacheBatch) -> Sequence[Tensor]:
        """Return the teacher's embeddings of the readable images, each [256, 64, 64] on the CPU."""
        if not images.samples:
            return []
        batch = collate(images.samples).to(self.hardware.kind)
        with self.hardware.autocast():
            embeddings = self.teacher.sam.encode(batch.images, batch.sizes).cpu()
        check_finite(batch.keys, teacher=embeddings)
        return list(embeddings)


@torch.inference_mode()
def write_cache(job: CacheJob) -> dict[str, Any]:
    """Write the missing tars of the cache and return its manifest. The processes divide the tars among them."""
    folder, blocks, hardware = job.folder, job.blocks, job.hardware
    facts = _facts(job)
    _open_folder(folder, facts, job.teacher)
    rank, ranks = processes.rank(hardware.devices), hardware.processes
    message = f"path={folder}: another process is writing this cache; wait for it, or stop it"
    with only_process(folder / f".writing-{rank}.lock", message):  # two processes would write the same tars
        job.teacher.sam.to(hardware.kind)
        todo = [number for number in range(rank, len(blocks), ranks) if not is_finished(folder, number)]
        log.info(
            "%s: %d images in %d tars, %d of them to be written by this process; %s on %s",
            folder, job.images, len(blocks), len(todo), hardware.resolved_precision, hardware.kind,
        )  # fmt: skip
        writer = _Writer(job, {n: job.source.count(blocks[n]) for n in todo}, facts)
        with CountProgress(sum(writer.expected.values()), "Caching") as progress, writer:
            for images in job.loader(todo):
                writer.add(images, job.embed(images))
                progress.add(len(images), f"{writer.bytes / 1e6:,.0f} MB")
    while rank == 0 and not all(is_finished(folder, number) for number in range(len(blocks))):
        time.sleep(0.5)  # the other processes are still writing
    return update_manifest(folder, facts)


class _Writer:
    """Writer that packs and writes the batches in its own thread; at most WAITING batches wait for it."""

    def __init__(self, job: CacheJob, expected: dict[int, int], facts: dict[str, Any]) -> None:
        self.job, self.folder, self.expected, self.facts = job, job.folder, expected, facts
        self.bytes, self.images = 0, 0
        self._shard: ShardWriter | None = None
        self._seen = 0
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._pending and kind is None:
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
            if self._shard is not None:
                self._shard.abandon()

    def add(self, images: CacheBatch, embeddings: Sequence[Tensor]) -> None:
        self._pending.append(self._pool.submit(self._write, images, embeddings))
        while len(self._pending) > WAITING:
            self._wait()

    def _wait(self) -> None:
        try:
            self._pending.popleft().result()
        except OSError as error:
            if not disk_is_full(error):
                raise
            left = sum(self.expected.values()) - self.images
            wanted = left * self.bytes / max(1, self.images) / 1e9
            free = shutil.disk_usage(self.folder).free / 1e9
            raise UserError(
                f"{self.folder}: the disk is full; the {left} images left need about {wanted:.1f} GB, {free:.1f} GB are"
                " free. Make room and run the same command again: it goes on where it stopped"
            ) from error

    def _write(self, images: CacheBatch, embeddings: Sequence[Tensor]) -> None:
        if self._shard is None:
            self._shard, self._seen = ShardWriter(self.folder, images.tar), 0
        for message in images.errors:
            log.warning("skipped: %s", message)
        self._shard.skipped += images.errors
        for content in self.job.members(images, embeddings):
            self._shard.add(content)
            self.bytes += sum(map(len, content.values()))
        self._seen += len(images)
        self.images += len(images)
        if self._seen == self.expected[images.tar]:
            self._shard.finish()
            self._shard = None
            update_manifest(self.folder, self.facts)


def verify(folder: Path) -> dict[str, int]:
    """Check every tar against the manifest, and load the teacher; raise a UserError that names what is wrong."""
    manifest = read_manifest(folder)
    wrong = []
    with CountProgress(len(manifest["shards"]), "Verifying") as progress:
        for name, line in manifest["shards"].items():
            tar = folder / name
            if not tar.is_file():
                wrong.append(f"{name} is missing")
            elif tar.stat().st_size != line["bytes"] or file_sha256(tar) != line["sha256"]:
                wrong.append(f"{name} has changed")
            progress.add(1)
    missing = manifest["tars"] - len(manifest["shards"])
    if wrong:
        raise UserError(f"{folder}: {'; '.join(wrong)}. Delete what has changed and run sam-distill cache again")
    if missing:
        message = f"{missing} of {manifest['tars']} tars have not been written yet; the others are whole"
        raise UserError(f"{folder}: {message}. Run the same sam-distill cache again: it goes on where it stopped")
    _ = CachedTeacher(str(folder)).sam  # raises UserError if the teacher can't be read
    return {"images": manifest["images"], "tars": manifest["tars"]}


def _facts(job: CacheJob) -> dict[str, Any]:
    """Return everything that the content of a cache depends on."""
    keys = hashlib.sha256()
    for number, block in enumerate(job.blocks):
        keys.update(("\n" * (number > 0) + "\n".join(job.source.keys(block))).encode(errors="surrogateescape"))
    return {
        "format": 1,
        "teacher": job.teacher.checkpoint,
        "teacher_sha256": job.teacher.sha256,
        "precision": job.hardware.resolved_precision,
        "frame": FRAME,
        "resize": "Pillow, bilinear, antialiased; sides int(x + 0.5)",
        "quality": job.quality,
        "dtype": job.dtype,
        "keys": keys.hexdigest(),
        "tars": len(job.blocks),
        "held_out": job.source.keys(job.source.val),
        "annotations": job.source.has_annotations,
        "tar_images": job.tar_images,
    }


def _open_folder(folder: Path, facts: dict[str, Any], teacher: LiveTeacher) -> None:
    """Prepare the cache folder; raise UserError if it holds another cache, or anything else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"path={folder}: cannot be written ({error.strerror})") from error
    if (folder / MANIFEST).is_file():
        existing = read_manifest(folder)
        other = [name for name, value in facts.items() if name != "teacher" and existing.get(name) != value]
        if other:
            message = ", ".join(
                f"{name} {_short(existing.get(name))} there, {_short(facts[name])} here" for name in other
            )
            raise UserError(f"path={folder} holds another cache, and caches are not mixed: {message}")
    elif any(not file.name.startswith(".") for file in folder.iterdir()):
        raise UserError(f"path={folder} holds other files than a cache: give it a folder of its own")
    update_manifest(folder, facts)  # first: from then on the folder counts as this cache
    save_teacher(teacher.sam, folder)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "..."
