"""The command `sam-distill demo`."""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from pydantic import Field

from sam_distill.data.photos import VAL_PHOTOS, photo
from sam_distill.errors import UserError
from sam_distill.inference.optimize import optimize_for_inference
from sam_distill.models.checkpoints import Checkpoint, load_sam
from sam_distill.runs.hardware import Hardware

log = logging.getLogger(__name__)


def demo(
    *,
    checkpoint: Checkpoint,
    compare: Checkpoint | None,
    trainer: Hardware,
    points_per_side: Annotated[int, Field(ge=1, le=64)],
    host: str,
    port: Annotated[int, Field(ge=1, le=65535)],
) -> None:
    """Serve a web page to try a student, until interrupted; conf/demo.yaml explains each option."""
    try:
        from sam_distill.demo.page import build
    except ImportError as error:
        raise UserError(f"the demo needs {error.name}: pip install 'sam-distill[demo]'") from error
    if compare == checkpoint:
        raise UserError(f"compare={compare} is the checkpoint itself: give another, or compare=null")
    chosen = [checkpoint] if compare is None else [checkpoint, compare]
    short = [Path(name).resolve().name for name in chosen]
    names = short if len(set(short)) == len(chosen) else chosen
    loaded = [optimize_for_inference(load_sam(source)).to(trainer.kind) for source in chosen]
    models = dict(zip(names, loaded, strict=True))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio sends requests to its own page at start-up
    with TemporaryDirectory() as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)  # the default, /tmp/gradio, belongs to its first user
        page = build(models, [photo(name) for name in VAL_PHOTOS], points_per_side)
        try:
            page.launch(server_name=host, server_port=port, quiet=True, prevent_thread_lock=True)
        except OSError:
            message = (
                f"port={port} of host={host} can't be had: another program listens there, or it is not this machine's"
            )
            raise UserError(message) from None
        log.info("The demo is at http://%s:%d; Ctrl-C ends it", host, port)
        page.block_thread()
