"""Writing a model's graphs, running them in the format's own runtime, and comparing the results with PyTorch's."""

import logging
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sam_distill.errors import UserError
from sam_distill.export import check
from sam_distill.export.contract import CONTRACT, UPSCALING, Settings
from sam_distill.export.formats import FORMATS, load_format
from sam_distill.files import write_json
from sam_distill.models.sam import Sam
from sam_distill.types import Sample

log = logging.getLogger(__name__)


def export_graphs(sam: Sam, folder: Path, settings: Settings, least_iou: float, samples: list[Sample]) -> None:
    """Write the graphs and their contract to `folder`, and print how far they agree with PyTorch.

    samples: photographs to compare on. Raise UserError if there are none, or if the mean mask IoU or the lowest cosine
    of the embeddings is below `least_iou`.
    """
    module = load_format(settings.format)
    if not samples:
        raise UserError("data= has no held-out photograph to run the export on: it needs one at least")
    content = module.write(sam, folder, settings) | {"upscaling": UPSCALING}
    content["checked"] = _checked(sam, folder, settings, least_iou, samples)
    write_json(folder / CONTRACT, asdict(settings) | content)


def _checked(
    sam: Sam, folder: Path, settings: Settings, least_iou: float, samples: list[Sample]
) -> dict[str, object] | None:
    """Run the graphs in the format's runtime; return the comparison with PyTorch, or None if nothing here runs them."""
    module, runtime = load_format(settings.format), FORMATS[settings.format].runtime
    if runtime is None:
        log.warning("format=%s was not run: nothing here can. Compare its masks on a device", settings.format)
        return None
    found = check.compare(sam, module.open_runner(folder, settings), samples, settings.points)
    _show(found, runtime, least_iou)
    if not found.good(least_iou):
        agree = f"agree to a mask IoU of {found.mask_iou:.4f} and a cosine of {found.cosine:.4f} only"
        mend = "take another quantize= or a smaller least_iou="
        raise UserError(f"{runtime} and PyTorch {agree}, less than {least_iou:g}, so nothing was written: {mend}")
    return {"runtime": runtime, "least_iou": least_iou} | found.as_json()


def _show(found: check.ExportCheck, runtime: str, least_iou: float) -> None:
    title = f"{runtime} beside PyTorch, {found.images} photographs, {found.prompts} prompts"
    table = Table("", "", title=title, show_header=False)
    table.add_row("embeddings: largest difference, least cosine", f"{found.embedding:.1e}, {found.cosine:.5f}")
    table.add_row("masks: mean IoU, worst", f"{found.mask_iou:.4f}, {found.worst_mask_iou:.4f} ({least_iou:g} wanted)")
    table.add_row("predicted IoUs: largest difference", f"{found.predicted_iou:.1e}")
    speeds = found.pytorch_encoder_seconds / found.encoder_seconds, found.encoder_seconds * 1000
    table.add_row("a picture: time, against PyTorch's", f"{speeds[1]:.0f} ms, {speeds[0]:.2f}x as fast")
    speeds = found.pytorch_decoder_seconds / found.decoder_seconds, found.decoder_seconds * 1000
    table.add_row("a prompt: time, against PyTorch's", f"{speeds[1]:.0f} ms, {speeds[0]:.2f}x as fast")
    Console().print(table)
