"""SA-1B as it is published: tars of sa_N.jpg and sa_N.json, streamed without unpacking or conversion.

The tars' headers are read first: they are enough to list the images, to choose those to hold out, and to find where a
resumed run continues. Training then reads each tar from front to back.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

from pydantic import Field
from torch.utils.data import IterableDataset

from sam_distill.data.annotations import draw_annotations
from sam_distill.data.base import DataSource, SkippedSamples, Split
from sam_distill.data.tar_stream import NOT_TRAINED_ON, EncodedSample, TarStream
from sam_distill.errors import UserError
from sam_distill.images import decode, to_frame
from sam_distill.selection import Fraction, Images, ValImages, fingerprint, limit_val_images
from sam_distill.tars.index import companion
from sam_distill.tars.shards import (
    Shard,
    all_digests,
    choose_images,
    filter_shards,
    first_images,
    index_tars,
    split_by_keys,
)
from sam_distill.types import Sample

log = logging.getLogger(__name__)


class Sa1b(DataSource[Shard]):
    """Data source for tars in SA-1B's layout; conf/data/sa1b.yaml explains each option.

    The first images of several evenly spaced tars are held out for validation: of `val_path` if given, else of `path`.
    """

    kinds: tuple[str, ...] = ()  # kinds of companions that are read with every image

    def __init__(
        self,
        path: str | list[str],
        val_images: ValImages = 16,
        val_path: str | list[str] | None = None,
        images: Images = None,
        fraction: Fraction = None,
        shuffle_buffer: Annotated[int, Field(ge=1)] = 100,
        local: str | None = None,
    ) -> None:
        shards, problems = index_tars(path, "data.path", local)
        if val_path is None:
            held_out, self.shortage = limit_val_images(self.count(shards), val_images, f"data.path={path}")
            val = first_images(shards, held_out)
        else:
            val_shards, val_problems = index_tars(val_path, "data.val_path", local)
            val = first_images(val_shards, val_images)
            problems += val_problems
        _, rest = split_by_keys(shards, set(self.keys(val)))
        self.path, self.images, self.fraction, self.shuffle_buffer = path, images, fraction, shuffle_buffer
        self._set_up(shards, val, rest, problems)

    def _set_up(self, shards: list[Shard], val: list[Shard], rest: list[Shard], problems: list[str]) -> None:
        """Validate on `val`, train on what `images` or `fraction` choose of `rest`. Raise UserError if it is empty."""
        if not rest:
            total = self.count(shards)
            raise UserError(f"data.path={self.path} leaves nothing to train on: all {total} images are held out")
        self.shards, self.val, self.train = shards, val, choose_images(rest, self.images, self.fraction)
        self.annotations: tuple[int, int] | None = None  # (number per image, seed to draw them with)
        for problem in problems:
            self.skipped_samples.report_other(problem)

    def count(self, items: Sequence[Shard]) -> int:
        return sum(map(len, items))

    def keys(self, items: Sequence[Shard]) -> list[str]:
        return [key for shard in items for key in shard.image_keys()]

    def loads(self, items: Sequence[Shard]) -> Iterator[Callable[[], Sample]]:
        for shard in items:
            missing = dict.fromkeys(shard.members())
            for member, contents in shard.read(list(missing), self.kinds):
                del missing[member]
                yield partial(self.decode, EncodedSample(NOT_TRAINED_ON, 0, shard, member, contents))
            for member in missing:
                yield partial(_raise_missing, shard, member)

    def train_stream(
        self, start: int, seed: int, rank: int, world_size: int, batch_size: int
    ) -> IterableDataset[Sample]:
        return TarStream(self, start, seed, rank, world_size, batch_size)

    def eval_items(self, split: Split) -> Sequence[Shard]:
        return self.val if split == "val" else choose_images(self.shards, self.images, self.fraction)

    def blocks(self, size: int) -> list[Sequence[Shard]]:
        self._read_json()
        shards = [*self.val, *self.train]
        return [[shard.select(slice(n, n + size))] for shard in shards for n in range(0, len(shard), size)]

    @property
    def fingerprint(self) -> str:
        return fingerprint(all_digests(self.train))

    @property
    def skipped_by_tar(self) -> dict[str, int]:
        flags = self.skipped_samples.unreadable.split([len(shard) for shard in self.train])
        return {str(s.tar): int(own.sum()) for s, own in zip(self.train, flags, strict=True) if own.any()}

    @property
    def has_annotations(self) -> bool:
        return any(shard.has_companion(".json").any() for shard in self.shards)

    def load_annotations(self, count: int, seed: int) -> None:
        annotated = filter_shards(self.train, (shard.has_companion(".json") for shard in self.train))
        if not annotated:
            raise UserError("not one training image has annotations: a JSON of the same name beside it in its tar")
        left_out = self.num_train_images - self.count(annotated)
        self.train, self.annotations = annotated, (count, seed)
        self._read_json()
        problems, self.skipped_samples = self.skipped_samples.other_reasons, SkippedSamples(self.num_train_images)
        self.skipped_samples.other_reasons |= problems
        if left_out:
            log.warning("%d training images have no annotations: left out", left_out)

    def load_json(self) -> None:
        if not self.has_annotations:
            raise UserError("not one image has annotations: a JSON of the same name beside it in its tar")
        self._read_json()

    def _read_json(self) -> None:
        self.kinds = tuple(dict.fromkeys([*self.kinds, ".json"]))

    def decode(self, encoded: EncodedSample) -> Sample:
        """Decode one image; raise UserError if it is damaged."""
        key = encoded.shard.key(encoded.member)
        picture, original_size = decode(encoded.contents[0], f"{key} in {encoded.shard.tar}")
        sample = Sample(key, to_frame(picture, original_size), original_size, encoded.epoch)
        return self.with_annotations(sample, encoded) if ".json" in self.kinds else sample

    def with_annotations(self, sample: Sample, encoded: EncodedSample) -> Sample:
        """Return the sample with its JSON (the last companion) and, after `load_annotations`, masks drawn from it."""
        sample = replace(sample, json=encoded.contents[-1])
        if self.annotations is None or encoded.index == NOT_TRAINED_ON:
            return sample
        name = f"{companion(encoded.member, '.json')} in {encoded.shard.tar}"
        return replace(sample, annotations=draw_annotations(sample, name, *self.annotations))


def _raise_missing(shard: Shard, member: str) -> Sample:
    raise UserError(f"{shard.key(member)} in {shard.tar}: the tar has changed or broken")
