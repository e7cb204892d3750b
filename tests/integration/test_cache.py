"""The distillation cache as users create and use it, with the real teacher."""

import contextlib
import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageDraw

from sam_distill.cli import app
from sam_distill.data.cache import Cache
from sam_distill.evaluate.agreement import Agreement
from sam_distill.loggers.history import CsvOnly
from sam_distill.models.encoders import TinyViT
from sam_distill.prompts.samplers import Points
from sam_distill.runs import status
from sam_distill.runs.hardware import Hardware
from sam_distill.strategies.semi_coupled import SemiCoupled
from sam_distill.teachers import CachedTeacher, LiveTeacher
from sam_distill.training.fit import Options, Setup, fit, new_student
from sam_distill.training.optimizers import AdamW

PROGRAM = Path(sys.executable).with_name("sam-distill")
QUICK = ["image_size=64", "batch_size=2", "trainer=cpu", "trainer.workers=0", "encoder.pretrained=false",
         "protocol.points=1", "logger=csv", "trainer.precision=fp32", "budget=3 steps"]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of ten drawings, and one file that is named .jpg but is no JPEG."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        image = Image.new("RGB", (96, 64), (25 * number, 120, 200))
        ImageDraw.Draw(image).ellipse((10 + 3 * number, 8, 50 + 4 * number, 50), fill=(200, 25 * number, 20))
        image.save(folder / f"{number}.png")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8 this was a photograph once")
    return folder


def command(images: Path, path: Path, *options: str) -> list[str]:
    data = ["data=folder", f"data.path={images}", "data.val_images=2", "trainer=cpu"]
    return ["cache", *data, f"path={path}", "tar_images=3", "batch_size=2", *options]


def hashes(folder: Path) -> dict[str, str]:
    return {tar.name: hashlib.sha256(tar.read_bytes()).hexdigest() for tar in folder.glob("cache-*.tar")}


@pytest.fixture(scope="module")
def cached(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "fp32"
    assert app.main(command(images, folder, "dtype=fp32", "trainer.precision=fp32")) == 0
    return folder


def test_cache_and_check(cached: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((cached / "manifest.json").read_text())
    assert (manifest["images"], manifest["tars"]) == (10, 4)
    assert sum(len(line["skipped"]) for line in manifest["shards"].values()) == 1
    assert app.main(["cache", f"path={cached}", "check=true"]) == 0
    assert "is whole: 10 images; tars: 4" in capfd.readouterr().out

    spoilt = cached.parent / "spoilt"
    spoilt.mkdir()
    for file in cached.iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    (spoilt / "teacher.pt").write_bytes(b"x")
    assert app.main(["cache", f"path={spoilt}", "check=true"]) == 1
    assert "teacher.pt can't be read" in capfd.readouterr().err
    (spoilt / "teacher.pt").write_bytes((cached / "teacher.pt").read_bytes())
    tar = spoilt / "cache-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert app.main(["cache", f"path={spoilt}", "check=true"]) == 1
    assert "cache-000002.tar has changed. Delete" in capfd.readouterr().err
    tar.unlink()
    assert app.main(["train", "data=cache", f"data.path={spoilt}", *QUICK, f"hydra.run.dir={spoilt / 'run'}"]) == 1
    assert "1 of 4 tars are missing: run the sam-distill cache that began it again" in capfd.readouterr().err


def test_kill_at_any_moment(images: Path, cached: Path, tmp_path: Path) -> None:
    """A cache that was killed twice ends with the same bytes as one that was never interrupted."""
    path = tmp_path / "cache"
    arguments = command(images, path, "dtype=fp32", "trainer.precision=fp32", "trainer.workers=1")
    for tars in (1, 2):
        process = subprocess.Popen([sys.executable, PROGRAM, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 200
        while len(hashes(path)) < tars and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = hashes(path)
    assert len(before) < 4
    assert app.main(arguments) == 0
    assert hashes(path) == hashes(cached)
    assert not list(path.glob("*.part"))


def test_a_plan_writes_nothing(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert app.main(command(images, tmp_path / "cache", "plan=true")) == 0
    assert "What caching 11 images will take" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


def test_two_processes_share_the_work(images: Path, cached: Path, tmp_path: Path) -> None:
    arguments = command(images, tmp_path, "dtype=fp32", "trainer.precision=fp32", "trainer.devices=2")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, PROGRAM, *arguments], env=environment, check=True, timeout=300)
    assert hashes(tmp_path) == hashes(cached)


def test_a_killed_process_is_reported(images: Path, tmp_path: Path) -> None:
    arguments = command(images, tmp_path / "cache", "trainer.devices=2")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, PROGRAM, *arguments], env=environment, text=True, **pipes) as first:
        children, second = Path(f"/proc/{first.pid}/task/{first.pid}/children"), None
        while second is None and first.poll() is None:
            time.sleep(0.1)
            for child in children.read_text().split():
                with contextlib.suppress(OSError):  # a child that has ended by now
                    if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes():
                        second = int(child)
        assert second is not None
        os.kill(second, signal.SIGKILL)
        _, errors = first.communicate(timeout=300)
    assert first.returncode == 1
    assert "error: the process of device 1 was killed by SIGKILL" in errors


def test_only_one_process_writes_a_cache(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "PATIENCE", 0)
    with FileLock(tmp_path / ".writing-0.lock"):
        assert app.main(command(images, tmp_path)) == 1
    assert "another process is writing this cache" in capfd.readouterr().err


def test_caches_are_not_mixed(images: Path, cached: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = hashes(cached)
    assert app.main(command(images, cached, "dtype=int8", "trainer.precision=fp32")) == 1
    assert "holds another cache, and caches are not mixed: dtype fp32 there, int8 here" in capfd.readouterr().err
    assert hashes(cached) == before


def test_cached_teacher_gives_the_same_training_as_the_live_one(cached: Path, tmp_path: Path) -> None:
    """On the cache's own images; a cache in fp32 keeps every digit."""
    data, losses = Cache(str(cached)), []
    for teacher in (
        CachedTeacher(str(cached)),
        LiveTeacher("mobile_sam", memory_gb=0),
    ):  # with memory, it would round to fp16
        run_dir = tmp_path / type(teacher).__name__
        run_dir.mkdir()
        torch.manual_seed(0)
        setup = Setup(
            strategy=SemiCoupled(), teacher=teacher, prompts=Points(1, 0), source=data, optim=AdamW(),
            student=new_student(TinyViT(pretrained=False), teacher.sam, image_size=64, neck_from_teacher=True),
            protocol=Agreement(points=1), hardware=Hardware(accelerator="cpu", precision="fp32", workers=0),
            logger=CsvOnly(),
        )  # fmt: skip
        fit(setup, Options("3 steps", batch_size=2), run_dir)
        rows = csv.DictReader((run_dir / "history.csv").read_text().splitlines())
        losses.append([float(row[name]) for row in rows for name in ("train/loss", "val/miou/point") if row.get(name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_cache_of_another_teacher_is_refused(cached: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["train", "data=cache", f"data.path={cached}", "teacher=sam_vit_b", *QUICK, f"hydra.run.dir={tmp_path}"]
    assert app.main(arguments) == 1
    assert "holds the answers of mobile_sam, not of sam_vit_b: say teacher=mobile_sam" in capfd.readouterr().err


@pytest.mark.parametrize("strategy", ["decoupled", "semi_coupled"])
def test_train_and_evaluate_from_a_cache(strategy: str, cached: Path, tmp_path: Path) -> None:
    """The images that were held out when the cache was written are held out again."""
    run_dir = tmp_path / "run"
    options = [f"strategy={strategy}", "prompts.count=1", f"hydra.run.dir={run_dir}"]
    assert app.main(["train", "data=cache", f"data.path={cached}", *QUICK, *options]) == 0
    held_out = json.loads((cached / "manifest.json").read_text())["held_out"]
    rows = (run_dir / "prompts.csv").read_text().splitlines()[1:]
    assert {row.split(",")[0] for row in rows} <= set(held_out)
    evaluate = ["evaluate", f"checkpoint={run_dir}", "data=cache", f"data.path={cached}", "split=val", "trainer=cpu"]
    assert app.main([*evaluate, "protocol.points=1", f"hydra.run.dir={tmp_path / 'judged'}"]) == 0
    trained, evaluated = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "judged"))
    assert evaluated["miou/point"] == pytest.approx(trained["miou/point"], abs=1e-5)


def test_odd_names_and_annotations(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Names that are not UTF-8 work like all others; images with damaged JSON are skipped, the others are cached."""
    with tarfile.open(tmp_path / "sa.tar", "w") as tar:
        for number, about in enumerate((b'{"annotations": []}', b"{broken", b"[1]", b"", b"{}")):
            image = (images / f"{number}.png").read_bytes()
            for name, content in ((f"{number}\udcff.png", image), (f"{number}\udcff.json", about)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    options = ["data=sa1b", f"data.path={tmp_path / 'sa.tar'}", f"path={tmp_path / 'cache'}", "trainer=cpu"]
    assert app.main(["cache", *options, "teacher.checkpoint=pocket_sam"]) == 0
    assert capfd.readouterr().out.count(": the annotations can't be read (") == 2
    assert len(Cache(str(tmp_path / "cache")).manifest["shards"]) == 2
    assert Cache(str(tmp_path / "cache")).manifest["images"] == 3


def test_a_folder_with_other_files_is_no_place_for_a_cache(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "teacher.pt").write_text("somebody's own")
    assert app.main(command(images, tmp_path)) == 1
    assert f"path={tmp_path} holds other files than a cache: give it a folder of its own" in capfd.readouterr().err
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("teacher.pt", "somebody's own")]
