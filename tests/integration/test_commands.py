"""Commands as users type them, on small data, with the real teacher."""

import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from sam_distill.cli import app
from sam_distill.data.annotations import draw_annotations
from sam_distill.models import weights
from sam_distill.types import Sample

ROOT = Path(__file__).parents[2]
QUICK = ["image_size=64", "batch_size=2", "trainer=cpu", "trainer.workers=0", "encoder.pretrained=false",
         "protocol.points=1", "data.val_images=2"]  # fmt: skip


def draw(path: Path, number: int) -> None:
    image = Image.new("RGB", (96, 64), (40 * number % 256, 120, 200))
    ImageDraw.Draw(image).ellipse((10 + 6 * number, 8, 50 + 6 * number, 50), fill=(200, 40 * number % 256, 20))
    image.save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of six drawings, and one file named .jpg that is no JPEG, which is in the training split."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        draw(folder / f"{number}.png", number)
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8 this was a photograph once")
    return folder


@pytest.fixture
def tar(tmp_path: Path, images: Path) -> Path:
    """Return a tar of the drawings that is truncated in the fifth one."""
    path = tmp_path / "sa_000000.tar"
    with tarfile.open(path, "w") as file:
        for number in range(6):
            file.add(images / f"{number}.png", f"sa_{number}.png")
            if number == 4:
                end = file.offset
    path.write_bytes(path.read_bytes()[: end - 600])
    return path


def test_train_evaluate_segment(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir, picture = tmp_path / "run", tmp_path / "out" / "cut.png"
    data = ["data=folder", f"data.path={images}"]
    assert app.main(["train", *data, *QUICK, "logger=csv", "budget=4 steps", f"hydra.run.dir={run_dir}"]) == 0
    said = capfd.readouterr()
    assert "mIoU, one point" in said.out
    assert (said.out + said.err).count("skipped: ") == 1
    assert "damaged.jpg" in said.out + said.err
    assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"
    assert json.loads((run_dir / "metrics.json").read_text())["steps"] == 4

    evaluation = tmp_path / "judged"
    command = ["evaluate", f"checkpoint={run_dir}", *data, "trainer=cpu", f"hydra.run.dir={evaluation}"]
    assert app.main(command) == 0
    metrics = json.loads((evaluation / "metrics.json").read_text())
    assert (metrics["images"], metrics["images_skipped"]) == (6, 1)
    assert 0 <= metrics["blind/miou/point"] <= 1
    said = capfd.readouterr()
    assert said.out.count(f"split=all judges on images that {run_dir} was trained on") == 1
    assert "held out" not in said.out

    command = ["segment", f"image={images / '3.png'}", "point=[48,28]", f"path={picture}"]
    assert app.main(command) == 0
    assert set(picture.parent.iterdir()) == {picture, picture.with_suffix(".json")}
    (record,) = json.loads(picture.with_suffix(".json").read_text())["annotations"]
    assert coco.area(record["segmentation"]) == record["area"] > 0
    assert not list(tmp_path.glob("**/segment*"))
    changed = np.asarray(Image.open(picture)).astype(int) - np.asarray(Image.open(images / "3.png"))
    assert (changed[28, 40] != 0).any(), "the ellipse is tinted"
    assert (changed[2, 2] == 0).all(), "the background is not"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data=folder", "data.path=/nowhere"], "data.path=/nowhere does not exist; expected a folder of images"),
        (["data=sa1b", "data.path=/nowhere/*.tar"], "there is no /nowhere/*.tar"),
        (
            ["encoder=tinyvit_11m", "init=mobile_sam"],
            "holds the encoder TinyViT(size=5m), but this is TinyViT(size=11m)",
        ),
        (["trainer=gpu"], "this machine has none that PyTorch can use; try trainer=cpu"),
        (["encoder=timm", "encoder.name=resnet81"], "timm has no such model"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    overrides: list[str], complaint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "trainer=cpu", "logger=csv", "encoder.pretrained=false", *overrides]
    assert app.main([*command, f"hydra.run.dir={tmp_path}"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert complaint in lines[0]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed"
    assert f"error: {status['why']}" == lines[0]
    assert status["choices"]["strategy"] == "decoupled"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["train", "init=/nowhere.pt"], "no checkpoint /nowhere.pt: it is neither a file, a run folder nor a name"),
        (["train", "teacher.checkpoint=mobil_sam"], "did you mean mobile_sam?"),
        (["train", "resume=/nowhere"], "resume=/nowhere: there is no such folder"),
        (["evaluate", "checkpoint=mobil_sam"], "did you mean mobile_sam?"),
        (["train", "data=sa1b", "data.path=a_{0..9}.tar"], "quote it: 'data.path=\"a_{0..9}.tar\"'"),
        (["segment", "image=x.png", "path=y.png", "point=[10,", "20]"], "quote it: 'point=[10, 20]'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_told_before_there_is_a_run(
    argv: list[str], complaint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.main(argv) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert complaint in line
    assert not list(tmp_path.iterdir())


def test_segment_errors_are_one_line(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["segment", "trainer=cpu", "checkpoint=pocket_sam"]
    for options, complaint in {
        ("box=[30,20,10,40]", "path=a.png"): "error: box=[30, 20, 10, 40]: expected [x0,y0,x1,y1] with x0 < x1",
        ("box=[30,20,10,40]", "path=new/a.png"): "error: box=[30, 20, 10, 40]: expected [x0,y0,x1,y1] with x0 < x1",
        ("box=[3,2,10,400]", "path=new/a.png"): "error: (10, 400) lies outside ",
        ("box=[3,2,10,40]", "path=/proc/a/b.png"): "error: path=/proc/a/b.png: cannot be written (",
        ("box=[3,2,10,40]", "path=a.psd"): "error: path=a.psd: pictures end in .png or .jpg",
        (
            "box=[3,2,10,40]",
            "path=a.png",
            "image=https://x.org/a.jpg",
        ): "error: image=https://x.org/a.jpg is an address",
    }.items():
        image = [] if any(option.startswith("image=") for option in options) else [f"image={images / '3.png'}"]
        assert app.main([*command, *image, *options]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(complaint)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_segment_everything_in_a_folder(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image gets a picture and a JSON like SA-1B's; a damaged image is reported, the others are processed."""
    monkeypatch.chdir(tmp_path)
    for number in (2, 3, 4, 5):
        (images / f"{number}.png").unlink()
    out = tmp_path / "out"
    command = ["segment", f"image={images}", "everything=true", "generator.points_per_side=3", "trainer=cpu"]
    assert app.main([*command, f"path={out}"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"error: 1 of 3 images were skipped, see above; {out} holds the others"
    assert sorted(path.name for path in out.iterdir()) == ["0.jpg", "0.json", "1.jpg", "1.json"]
    for number in (0, 1):
        written = json.loads((out / f"{number}.json").read_text())
        assert written["image"] == {"image_id": number, "width": 96, "height": 64, "file_name": f"{number}.png"}
        sample = Sample("0", torch.empty(0), (64, 96), json=(out / f"{number}.json").read_bytes())
        masks = draw_annotations(sample, "0", 4, 0)
        assert masks[0].any(), "the annotations are read as SA-1B's"
        assert {
            "id",
            "segmentation",
            "area",
            "bbox",
            "predicted_iou",
            "point_coords",
            "stability_score",
            "crop_box",
        } == (written["annotations"][0].keys())
        changed = np.asarray(Image.open(out / f"{number}.jpg")).astype(int) - Image.open(images / f"{number}.png")
        assert np.abs(changed).max() > 60

    for options, complaint in {
        ("everything=true", "point=[1,2]", f"path={out}"): "everything=true takes no prompts",
        ("everything=true", f"path={images}"): "would lie over an image or its JSON: give another path",
        ("everything=true", "path=a.png"): f"path=a.png: image={images} is more than one, so path= is the folder",
        (f"path={out}",): "nothing to segment",
    }.items():
        assert app.main(["segment", f"image={images}", "trainer=cpu", *options]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert complaint in line
    assert app.main(["segment", f"image={images}/*.gif", "everything=true", f"path={out}"]) == 1
    assert "there is no image" in capfd.readouterr().err


def test_truncated_tar_and_wandb_offline(
    tar: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # the real home might hold a .netrc with a key
    monkeypatch.setenv("SAM_DISTILL_HOME", str(weights.fetch("mobile_sam").parents[1]))
    run_dir = tmp_path / "run"
    command = ["train", "data=sa1b", f"data.path={tar}", *QUICK, "budget=2 steps", f"hydra.run.dir={run_dir}"]
    assert app.main(command) == 0
    said = capfd.readouterr()
    assert f"skipped: the rest of {tar}" in said.out + said.err
    assert "1 damaged images or tars skipped" in said.out
    (offline,) = run_dir.glob("wandb/offline-run-*")
    assert list(offline.glob("*.wandb"))


def test_a_run_is_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"precious")
    assert app.main(["train", f"hydra.run.dir={tmp_path}"]) == 2
    assert f"holds a run already: resume={tmp_path} goes on with it" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_full_disk_is_one_line(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    command = ["train", "data=folder", f"data.path={images}", *QUICK, "logger=csv", "budget=1 step"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        assert app.main([*command, f"hydra.run.dir={run_dir}"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [line for line in capfd.readouterr().err.splitlines() if "error" in line] == [
        "error: the disk is full: make room"
    ]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["why"]) == ("failed", "the disk is full: make room")
    assert not [*run_dir.rglob("*.part"), *run_dir.rglob("last.ckpt")]


def test_kill_and_resume(images: Path, tmp_path: Path) -> None:
    """A training killed by SIGKILL goes on with `resume=RUN_DIR`, without its other options."""
    (images / "damaged.jpg").unlink()
    run_dir = tmp_path / "run"
    options = ["data=folder", f"data.path={images}", *QUICK, "logger=csv", "budget=400 steps", "validate_every=3 steps"]
    start = [sys.executable, "train.py", *options, f"hydra.run.dir={run_dir}"]
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not (run_dir / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, "training ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((run_dir / "status.json").read_text())["status"] == "running"

    assert app.main(["train", f"resume={run_dir}", "budget=9 steps"]) == 0
    assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["steps"] == 9
    steps = [int(line.split(",")[0]) for line in (run_dir / "history.csv").read_text().splitlines()[1:]]
    assert steps == sorted(set(steps))
    assert steps[-6:] == [4, 5, 6, 7, 8, 9], "the run went on after its checkpoint at step 3"


def test_two_processes_evaluate_like_one(images: Path, tmp_path: Path) -> None:
    """Data-parallel on the CPU: there is one run folder, and its scores cover the validation images of both ranks."""
    (images / "damaged.jpg").unlink()
    for number in range(6, 16):
        draw(images / f"{number}.png", number)
    rows, metrics = [], []
    for devices in (1, 2):
        run_dir = tmp_path / f"{devices}"
        options = ["data=folder", f"data.path={images}", *QUICK, "data.val_images=3", "logger=csv", "budget=2 steps"]
        command = [sys.executable, "train.py", *options, f"trainer.devices={devices}", f"hydra.run.dir={run_dir}"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        metrics.append(json.loads((run_dir / "metrics.json").read_text()))
        rows.append((run_dir / "prompts.csv").read_text().splitlines())
    alone, together = metrics
    assert together["images"] == 2 * alone["images"]
    for name in ("before/miou/point", "before/miou/box", "blind/miou/point", "blind/miou/box", "prompts"):
        assert together[name] == pytest.approx(alone[name], abs=1e-6), name
    assert len(rows[0]) == len(rows[1]) == 1 + alone["prompts"]
    assert {row.split(",")[0] for row in rows[0]} == {row.split(",")[0] for row in rows[1]}
