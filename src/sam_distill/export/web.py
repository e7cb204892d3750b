"""format=web: a folder that any static server can serve; the visitor's browser runs the model, in onnxruntime-web.

The page is in page/: plain modules, copied unchanged. The runtime is fetched from npm once, to $SAM_DISTILL_HOME.
"""

import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sam_distill.errors import UserError
from sam_distill.export.contract import Settings
from sam_distill.export.graphs import Decoder, Encoder, prepared
from sam_distill.export.onnx import DECODER, ENCODER, open_session, write_graph
from sam_distill.export.runner import ContractRunner, Run, Runner
from sam_distill.models.sam import Sam
from sam_distill.models.weights import home

PAGE = Path(__file__).parent / "page"
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def write(sam: Sam, folder: Path, settings: Settings) -> dict[str, Any]:
    """Write the page, the runtime, and the contract's graphs as ONNX files; raise UserError for normalize=outside."""
    if settings.normalize == "outside":
        raise UserError("normalize=outside does not go with format=web: its page gives the graph plain colours")
    shutil.copytree(_runtime(), folder / "runtime")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    sam = prepared(sam)
    return {
        "encoder": write_graph(Encoder(sam, settings.normalize), folder / ENCODER, settings.quantize),
        "decoder": write_graph(Decoder(sam, settings.points), folder / DECODER, settings.quantize),
    }


def open_runner(folder: Path, settings: Settings) -> Runner:
    """Return a runner of the files in ONNX Runtime; onnxruntime-web is the same code, built for browsers."""
    return ContractRunner(_open(folder / ENCODER), _open(folder / DECODER), settings)


def _open(path: Path) -> Run:
    session = open_session(path)
    names = [tensor.name for tensor in session.get_inputs()]
    return lambda values: session.run(None, dict(zip(names, values, strict=True)))


def _runtime() -> Path:
    """Return the folder with onnxruntime-web's files; fetch them with npm if they are missing."""
    kept = home() / RUNTIME.replace("@", "-")
    if kept.is_dir():
        return kept
    if shutil.which("npm") is None:
        raise UserError(f"format=web fetches {RUNTIME} with npm, which is not installed: apt-get install npm")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=kept.parent) as place:
        fetched = subprocess.run(["npm", "pack", "--silent", RUNTIME], cwd=place, capture_output=True, text=True)
        if fetched.returncode:
            reason = (fetched.stderr or fetched.stdout).strip().split("\n")[-1]
            raise UserError(f"npm could not fetch {RUNTIME} ({reason})")
        draft = Path(place) / "runtime"
        draft.mkdir()
        with tarfile.open(next(Path(place).glob("*.tgz"))) as archive:
            for name in RUNTIME_FILES:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None
                (draft / name).write_bytes(member.read())
        draft.replace(kept)
    return kept
