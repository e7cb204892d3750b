"""The exported page in a real browser: masks of a click and a box by mouse, compared with Python's masks."""

import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import Chromium
from PIL import Image

from sam_distill.cli import app
from sam_distill.data.photos import photo
from sam_distill.images import upscale_masks
from sam_distill.models.checkpoints import load_sam, save_sam
from sam_distill.models.sam import Sam
from sam_distill.predict.predictor import SamPredictor

missing = [program for program in ("chromium", "npm") if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}: apt-get install chromium npm")


STATUS = 'document.getElementById("status").textContent'


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Isolated(Quiet):
    """Handler that sends the headers for threads itself, so that the page need not load twice."""

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@contextmanager
def served(site: Path, handler: type[Quiet] = Quiet) -> Iterator[str]:
    server = ThreadingHTTPServer(("localhost", 0), partial(handler, directory=str(site / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def site(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    save_sam(Sam(teacher.image_encoder, teacher.prompt_encoder, teacher.mask_decoder, 256), place / "student.pt")
    photo("coffee.png").save(place / "photo.png")
    words = ["export", f"checkpoint={place / 'student.pt'}", "format=web", "quantize=fp16", "data.val_images=1"]
    assert app.main([*words, f"path={place / 'web'}"]) == 0
    return place


def drawn(page: Chromium) -> np.ndarray:
    """Return the pixels that the page draws in the mask's blue: [h, w] bool."""
    runs = page.evaluate(
        """(() => {
          const canvas = document.getElementById("masks");
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const runs = [canvas.height, canvas.width];
          let last = false, length = 0;
          for (let i = 0; i < data.length; i += 4) {
            const on = data[i] < 100 && data[i + 2] > 200 && data[i + 3] > 0;
            if (on !== last) { runs.push(length); length = 0; last = on; }
            length++;
          }
          runs.push(length);
          return runs;
        })()"""
    )
    height, width, *lengths = runs
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return values.reshape(height, width)


def iou(a: np.ndarray, b: np.ndarray, marks: Sequence[tuple[int, int]] = ()) -> float:
    """Return the IoU of two masks. marks: (x, y) of clicks; their marks cover the mask, so they are left out."""
    y, x = np.mgrid[: a.shape[0], : a.shape[1]]
    free = np.all([np.hypot(x - mark[0], y - mark[1]) > 9 for mark in marks], axis=0) if marks else True
    return (a & b & free).sum() / ((a | b) & free).sum()


def in_frame(low_res: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask as the page shows it: logits [1, 256, 256] -> [height, width] bool."""
    return upscale_masks(torch.from_numpy(low_res), (height, width), (height, width))[0].numpy() > 0


def test_click_and_box_by_mouse_and_tap(site: Path, tmp_path: Path) -> None:
    picture = Image.open(site / "photo.png")
    width, height = (int(side * 1024 / max(picture.size) + 0.5) for side in picture.size)
    predictor = SamPredictor(load_sam(site / "student.pt"))
    predictor.set_image(picture)
    scale = max(picture.size) / 1024

    with served(site) as address, Chromium(address, tmp_path / "profile") as page:
        page.wait(f'{STATUS}.includes("Drop a photograph")', 300)
        assert page.evaluate("crossOriginIsolated"), "the service worker sends the headers for threads"
        page.choose("#file", site / "photo.png")
        page.wait(f'{STATUS}.includes("Looked at")', 300)
        area = page.evaluate("(({left, top, width}) => [left, top, width])(masks.getBoundingClientRect())")

        def to_window(x: float, y: float) -> tuple[float, float]:
            return area[0] + x * area[2] / width, area[1] + y * area[2] / width

        page.mouse("Pressed", *to_window(800, 150))
        page.mouse("Released", *to_window(800, 150))
        page.wait(f'{STATUS}.startsWith("Mask in")', 120)
        _, scores, low_res = predictor.predict(np.array([[800, 150]]) * scale, np.array([1]))
        best = scores.argmax()
        assert iou(drawn(page), in_frame(low_res[best : best + 1], height, width), marks=[(800, 150)]) > 0.99
        assert re.search(r"expected IoU [01]\.\d\d", page.evaluate(STATUS))
        page.screenshot(site / "click.png")

        page.evaluate('document.getElementById("clear").click()')
        assert not drawn(page).any()
        page.mouse("Pressed", *to_window(120, 80))
        page.mouse("Moved", *to_window(400, 300))
        page.mouse("Moved", *to_window(800, 600))
        page.mouse("Released", *to_window(800, 600))
        page.wait(f'{STATUS}.startsWith("Mask in")', 120)
        _, _, low_res = predictor.predict(box=np.array([120, 80, 800, 600]) * scale, multimask_output=False)
        assert iou(drawn(page), in_frame(low_res, height, width)) > 0.99

        page.evaluate('document.getElementById("exclude").click()')
        page.tap(*to_window(300, 300))
        page.wait(f'!{STATUS}.startsWith("…")', 120)
        box = {"box": np.array([120, 80, 800, 600]) * scale, "multimask_output": False}
        _, _, low_res = predictor.predict(np.array([[300, 300]]) * scale, np.array([0]), **box)
        assert iou(drawn(page), in_frame(low_res, height, width), marks=[(300, 300)]) > 0.99

        page.evaluate('document.getElementById("everything").click()')
        assert page.evaluate(STATUS).startswith("Segmenting everything"), "from the first moment"
        assert not page.evaluate('document.getElementById("progress").hasAttribute("value")')


@pytest.mark.parametrize("handler", [Quiet, Isolated])
def test_offline_after_the_first_visit(site: Path, tmp_path: Path, handler: type[Quiet]) -> None:
    with served(site, handler) as address, Chromium(address, tmp_path / "profile") as page:
        page.wait(f'{STATUS}.includes("Drop a photograph")', 300)
    with Chromium(address, tmp_path / "profile") as page:  # the server has been stopped
        page.wait(f'{STATUS}.includes("Drop a photograph")', 300)
        assert page.evaluate("crossOriginIsolated")
        page.choose("#file", site / "photo.png")
        page.wait(f'{STATUS}.includes("Looked at")', 300)
