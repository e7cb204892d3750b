"""Benchmark of segmenting everything: its speed, and whether the masks are the same."""

from dataclasses import replace
from typing import Any

import numpy as np

from sam_distill.benchmark.models import FP32
from sam_distill.benchmark.peers import MISSING, peer_of
from sam_distill.benchmark.tables import Finding
from sam_distill.benchmark.timing import Contender, time_in_turns
from sam_distill.evaluate.everything import Records, match_masks
from sam_distill.inference.optimize import optimize_for_inference
from sam_distill.models.sam import Sam
from sam_distill.predict.mask_generator import SamAutomaticMaskGenerator


def bench_everything(sam: Sam, image: np.ndarray[Any, Any], points_per_side: int, device: str) -> Finding:
    """Measure segmenting everything in `image`, [H, W, 3] uint8. One turn each, since it takes seconds to minutes."""
    folded = optimize_for_inference(sam).to(device)
    options: dict[str, Any] = {"points_per_side": points_per_side, "output_mode": "coco_rle"}
    found: dict[str, Records] = {}

    def keep(name: str, generator: Any) -> None:
        found[name] = generator.generate(image)

    ours = SamAutomaticMaskGenerator(folded, **options)
    fast = SamAutomaticMaskGenerator(folded, **options, fast=True)
    contenders = [
        Contender(FP32, lambda: keep("ours", ours)),
        Contender("sam-distill, fp32, fast", lambda: keep("fast", fast)),
    ]
    note, peer = MISSING, peer_of(sam, device)
    if peer is not None:
        theirs = peer.package.SamAutomaticMaskGenerator(peer.model, **options)
        contenders.append(Contender(peer.name, lambda: keep("theirs", theirs), ours=False))
    height, width = image.shape[:2]
    what = f"Segment everything, {points_per_side} x {points_per_side} points, {width} x {height} pixels, {device}"
    timings = time_in_turns(contenders, device, turns=1)
    if "theirs" in found:
        note = similarity(found["ours"], found["theirs"])
    note += f"\nfast: {similarity(found['fast'], found['ours'])}"
    finding = Finding(what, "image", timings, note)
    return replace(finding, metrics={"everything_ms": finding.milliseconds(FP32), "masks": len(found["ours"])})


def similarity(ours: Records, theirs: Records) -> str:
    """Describe two sets of masks (coco_rle): their counts, and the mean IoU of each of `theirs` with our nearest."""
    counts = f"{len(ours)} masks, theirs {len(theirs)}"
    if not ours or not theirs:
        return counts
    iou = np.mean([row.iou for row in match_masks("", theirs, ours)])
    return f"{counts}; mean IoU of theirs with our nearest: {iou:.4f}"
