"""The distillation cache: images with their teacher's embeddings in self-contained tars.

    manifest.json          the settings that made it, and every tar's image count, size and hash
    teacher.pt             the teacher without its backbone: all that is needed to turn an embedding into masks
    cache-000000.tar       key.jpg (resized to the frame), key.embedding (of that jpg), key.json (size, annotations)

A tar is written under a temporary name and renamed when complete. Before that, its manifest entry is written to a file
beside it, so that several processes can write at once and a killed one loses only its current tar.
"""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import Field

from sam_distill.data.embeddings import Dtype, pack, unpack
from sam_distill.data.sa1b import Sa1b
from sam_distill.data.tar_stream import EncodedSample
from sam_distill.errors import UserError
from sam_distill.files import file_sha256, write_json
from sam_distill.images import decode, to_frame
from sam_distill.selection import Fraction, Images
from sam_distill.tars.index import companion
from sam_distill.tars.shards import index_tars, split_by_keys
from sam_distill.types import Sample

MANIFEST = "manifest.json"


class Cache(Sa1b):
    """Cache that `sam-distill cache` wrote to `path`. It holds out the same images as the source it was made from."""

    kinds = (".embedding", ".json")
    path: str

    def __init__(
        self,
        path: str,
        images: Images = None,
        fraction: Fraction = None,
        shuffle_buffer: Annotated[int, Field(ge=1)] = 100,
    ) -> None:
        folder = Path(path).expanduser()
        self.manifest = read_manifest(folder)
        missing = self.manifest["tars"] - sum((folder / name).is_file() for name in self.manifest["shards"])
        if missing:
            raise UserError(
                f"data.path={path}: {missing} of {self.manifest['tars']} tars are missing: run the sam-distill cache"
                " that began it again, it goes on where it stopped"
            )
        shards, problems = index_tars(path, "data.path")
        val, rest = split_by_keys(shards, set(self.manifest["held_out"]))
        self.path, self.images, self.fraction, self.shuffle_buffer = path, images, fraction, shuffle_buffer
        self._set_up(shards, val, rest, problems)

    def load_annotations(self, count: int, seed: int) -> None:
        self.load_json()
        self.annotations = (count, seed)

    def load_json(self) -> None:
        if not self.has_annotations:
            raise UserError("the images of this cache have no annotations")

    @property
    def has_annotations(self) -> bool:
        return bool(self.manifest["annotations"])

    def decode(self, encoded: EncodedSample) -> Sample:
        jpg, embedding, metadata = encoded.contents
        key = encoded.shard.key(encoded.member)
        where = f"{key} in {encoded.shard.tar}"
        picture, _ = decode(jpg, where)
        try:
            height, width = json.loads(metadata)["original_size"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: its JSON can't be read ({error})") from None
        sample = Sample(key, to_frame(picture), (height, width), encoded.epoch)
        sample = replace(sample, teacher_embedding=unpack(embedding, companion(where, ".embedding")))
        return self.with_annotations(sample, encoded)


def tar_members(sample: Sample, jpg: bytes, embedding: Any, dtype: Dtype) -> dict[str, bytes]:
    """Return the tar members of one image: name -> content. embedding: [256, 64, 64] float32, of exactly that jpg."""
    metadata = json.loads(sample.json) if sample.json else {"annotations": []}
    metadata["original_size"] = list(sample.original_size)
    size = (sample.image.shape[1], sample.image.shape[2])
    return {
        f"{sample.key}.jpg": jpg,
        f"{sample.key}.embedding": pack(embedding, size, dtype),
        f"{sample.key}.json": json.dumps(metadata).encode(),
    }


class ShardWriter:
    """Writer of one tar of the cache, which appears under its final name only when it is complete."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / shard_name(number)
        self._part = self.path.with_suffix(".part")
        self._tar = tarfile.open(self._part, "w")  # noqa: SIM115 (closed by finish or abandon)
        self.images = 0
        self.skipped: list[str] = []

    def add(self, content: Mapping[str, bytes]) -> None:
        for name, data in content.items():
            info = tarfile.TarInfo(name)  # without time and owner: the same images give the same bytes
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.images += 1

    def finish(self) -> None:
        """Write the manifest entry beside the tar, then give the tar its final name."""
        self._tar.close()
        line = {"images": self.images, "bytes": self._part.stat().st_size, "sha256": file_sha256(self._part)}
        line["skipped"] = self.skipped
        write_json(self.path.with_suffix(".json"), line)
        self._part.replace(self.path)

    def abandon(self) -> None:
        self._tar.close()
        self._part.unlink(missing_ok=True)


def shard_name(number: int) -> str:
    return f"cache-{number:06d}.tar"


def is_finished(folder: Path, number: int) -> bool:
    tar = folder / shard_name(number)
    return tar.is_file() and tar.with_suffix(".json").is_file()


def update_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write and return the manifest: the entries of all finished tars, and `facts`, the settings that made them."""
    with FileLock(folder / ".manifest.lock"):
        lines = {p.name: json.loads(p.with_suffix(".json").read_text()) for p in sorted(folder.glob("cache-*.tar"))}
        manifest = {**facts, "images": sum(line["images"] for line in lines.values()), "shards": lines}
        write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no cache: there is no {MANIFEST} in it") from None
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} can't be read ({error})") from None
    if not isinstance(manifest, dict) or not {"tars", "shards", "held_out", "annotations"} <= manifest.keys():
        raise UserError(f"{folder} holds no cache: its {MANIFEST} is that of something else")
    return manifest
