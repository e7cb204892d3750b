"""What a model can be exported to for use without PyTorch. Each format is a module with two functions:

write(sam, folder, settings) -> the graphs' parts of contract.json
open_runner(folder, settings) -> a `runner.Runner` that runs what was written in its runtime, if it has one here
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sam_distill.types import UserError


@dataclass(frozen=True)
class Format:
    """extra: of pyproject.toml, and the packages that it brings. runtime: what an export is run in, if anything is."""

    extra: str
    packages: tuple[str, ...]
    runtime: str | None


FORMATS = {
    "onnx": Format("export", ("onnx", "onnxruntime", "onnxscript"), "ONNX Runtime"),
    "litert": Format("litert", ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"), "LiteRT"),
    "executorch": Format("executorch", ("executorch", "torchao"), "ExecuTorch"),
    "coreml": Format("coreml", ("coremltools",), None),
    "web": Format("export", ("onnx", "onnxruntime", "onnxscript"), "ONNX Runtime"),
}


def load_format(name: str) -> Any:
    """The module, if what it needs is installed."""
    known = FORMATS[name]
    if missing := [package for package in known.packages if find_spec(package) is None]:
        raise UserError(f"format={name} needs {', '.join(missing)}: pip install 'sam-distill[{known.extra}]'")
    return import_module(f"sam_distill.export.{name}")
