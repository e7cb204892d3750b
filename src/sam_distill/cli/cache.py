"""The command `sam-distill cache`: write, plan or verify a cache of teacher embeddings."""

import logging
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sam_distill.caching.plan import plan_cache
from sam_distill.caching.write_cache import CacheJob, verify, write_cache
from sam_distill.data.base import DataSource
from sam_distill.data.embeddings import Dtype
from sam_distill.errors import UserError
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.launch import all_processes
from sam_distill.teachers import LiveTeacher

log = logging.getLogger(__name__)


def cache(
    *,
    data: DataSource,
    teacher: LiveTeacher,
    trainer: Hardware,
    path: str,
    dtype: Dtype,
    quality: Annotated[int, Field(ge=50, le=100)],
    batch_size: Annotated[int, Field(gt=0)],
    tar_images: Annotated[int, Field(gt=0)],
    check: bool,
    plan: bool,
) -> None:
    """Write the embeddings of `teacher` for `data` to `path`; conf/cache.yaml says what each option means."""
    folder = Path(path).expanduser()
    if check:
        found = verify(folder)
        log.info("%s is whole: %d images; tars: %d", folder, found["images"], found["tars"])
        return
    if data.shortage:
        log.warning(data.shortage)
    job = CacheJob(data, teacher, trainer, folder, dtype, quality, batch_size, tar_images)
    if plan:
        if not plan_cache(job):
            raise UserError(f"path={path}: its disk is too small; data.images or data.fraction take fewer images")
        return
    try:
        with all_processes(trainer, folder):
            manifest = write_cache(job)
    except (KeyboardInterrupt, SystemExit):
        log.warning("%s is not complete: the same command goes on where this one stopped", folder)
        raise
    tars = manifest["shards"].values()
    total, skipped = sum(tar["bytes"] for tar in tars), sum(len(tar["skipped"]) for tar in tars)
    log.info(
        "%s: %d images in %d of %d tars, %.2f GB, %.0f kB per image%s",
        folder, manifest["images"], len(tars), manifest["tars"], total / 1e9, total / 1e3 / max(1, manifest["images"]),
        f"; {skipped} damaged images skipped" if skipped else "",
    )  # fmt: skip
