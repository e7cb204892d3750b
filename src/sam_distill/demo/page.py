"""Web page of the demo: click on an image to see the masks of a student and its teacher. The only Gradio code."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from sam_distill.images import to_rgb
from sam_distill.metrics import mask_iou
from sam_distill.models.sam import Sam
from sam_distill.predict.mask_generator import SamAutomaticMaskGenerator
from sam_distill.predict.overlays import STUDENT, TEACHER, masks_overlay, overlay
from sam_distill.predict.predictor import SamPredictor

FOREGROUND, BACKGROUND, BOX = "point on it", "point beside it", "box: two corners"
HINT = "Click on a picture."
COLOURS = (STUDENT, TEACHER)
LONG_SIDE = 1600  # pixels; larger images are reduced, for a faster transfer to the browser and back


@dataclass
class Visit:
    """One visitor's image and the prompts given so far."""

    image: Image.Image
    predictors: dict[str, SamPredictor]
    points: list[tuple[int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    corners: list[tuple[int, int]] = field(default_factory=list)

    @property
    def box(self) -> list[int] | None:
        """Return [x0, y0, x1, y1], or None until there are two corners that differ in x and y."""
        if len(self.corners) < 2:
            return None
        (left, right), (top, bottom) = (sorted(side) for side in zip(*self.corners, strict=True))
        return [left, top, right, bottom] if left < right and top < bottom else None

    def take(self, x: int, y: int, mode: str) -> None:
        if mode == BOX:
            self.corners = [*self.corners, (x, y)] if len(self.corners) == 1 else [(x, y)]
        else:
            self.points.append((x, y))
            self.labels.append(int(mode == FOREGROUND))

    def clear(self) -> None:
        self.points, self.labels, self.corners = [], [], []


def build(models: Mapping[str, Sam], examples: Sequence[Image.Image], points_per_side: int) -> gr.Blocks:
    """Return the page. models: by name, the student first. points_per_side: of the grid for "segment everything"."""
    with gr.Blocks(title="sam-distill", analytics_enabled=False) as page:
        visit = gr.State()
        gr.Markdown(f"## sam-distill\n**{'** beside **'.join(models)}**. Load an image, then click on it.")
        with gr.Row():
            source = gr.Image(type="pil", image_mode=None, label="image", sources=["upload", "clipboard"], height=420)
            views = [gr.Image(label=name, interactive=False, format="png", height=420) for name in models]
        with gr.Row():
            mode = gr.Radio([FOREGROUND, BACKGROUND, BOX], value=FOREGROUND, label="what a click means", scale=3)
            again = gr.Button("start over")
            everything = gr.Button("segment everything")
        message = gr.Markdown(HINT, elem_id="message")
        gr.Examples([[example] for example in examples], source)
        shown = [visit, *views, message]

        def empty(text: str) -> list[Any]:
            return [None, *[None] * len(models), text]

        def load(image: Image.Image | None) -> list[Any]:
            return empty(HINT) if image is None else _begin(image, models)

        def click(visit: Visit | None, mode: str, event: gr.SelectData) -> list[Any]:
            if visit is None:
                return empty("Load an image first.")
            x, y = event.index
            visit.take(x, y, mode)
            return _answer(visit)

        def clear(visit: Visit | None) -> list[Any]:
            if visit is None:
                return empty(HINT)
            visit.clear()
            return [visit, *[visit.image] * len(models), HINT]

        def segment_everything(visit: Visit | None) -> list[Any]:
            if visit is None:
                return empty("Load an image first.")
            return _everything(visit, points_per_side)

        source.change(load, source, shown)
        for surface in (source, *views):
            surface.select(click, [visit, mode], shown)
        again.click(clear, visit, shown)
        everything.click(segment_everything, visit, shown)
    return page


def _begin(image: Image.Image, models: Mapping[str, Sam]) -> list[Any]:
    image = to_rgb(image)
    image.thumbnail((LONG_SIDE, LONG_SIDE))
    visit = Visit(image, {name: SamPredictor(model) for name, model in models.items()})
    times = {}
    for name, predictor in visit.predictors.items():
        started = time.perf_counter()
        predictor.set_image(np.asarray(image))
        times[name] = time.perf_counter() - started
    return [visit, *[image] * len(models), f"Image encoded: {_timings(times)}. {HINT}"]


def _answer(visit: Visit) -> list[Any]:
    """Predict and draw the masks for the clicks so far."""
    drawn: dict[str, Any] = {"points": visit.points + visit.corners, "box": visit.box}
    drawn["labels"] = visit.labels + [1] * len(visit.corners)
    if not visit.points and visit.box is None:
        return [visit, *[overlay(visit.image, **drawn)] * len(visit.predictors), "Now the opposite corner."]
    times, masks = {}, []
    for name, predictor in visit.predictors.items():
        started = time.perf_counter()
        mask, _ = predictor.predict_best(visit.points, visit.labels, visit.box)
        times[name] = time.perf_counter() - started
        masks.append(mask)
    views = [overlay(visit.image, mask, colour, **drawn) for mask, colour in zip(masks, COLOURS, strict=False)]
    return [visit, *views, f"{_agreement(masks)}{_timings(times)}."]


def _everything(visit: Visit, points_per_side: int) -> list[Any]:
    visit.clear()
    times, views = {}, []
    for name, predictor in visit.predictors.items():
        started = time.perf_counter()
        found = SamAutomaticMaskGenerator(predictor.model, points_per_side).generate(np.asarray(visit.image))
        times[f"{name}, {len(found)} masks"] = time.perf_counter() - started
        views.append(masks_overlay(visit.image, found))
    return [visit, *views, f"Everything: {_timings(times)}."]


def _agreement(masks: Sequence[np.ndarray]) -> str:
    if len(masks) < 2:
        return ""
    iou = float(mask_iou(*map(torch.from_numpy, masks)))
    return f"**IoU {iou:.2f}** between the two masks; ".replace("nan", "unknown: the second is empty")


def _timings(times: Mapping[str, float]) -> str:
    return ", ".join(f"{name} in {1000 * seconds:.0f} ms" for name, seconds in times.items())
