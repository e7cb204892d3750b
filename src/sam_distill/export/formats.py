"""Export formats for use without PyTorch. Each format is a module with two functions:

write(sam, folder, settings) -> the graphs' parts of contract.json
open_runner(folder, settings) -> a `runner.Runner` for the written graphs; only if a runtime for them exists here
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sam_distill.errors import UserError


@dataclass(frozen=True)
class Format:
    """Export format. extra: its extra in pyproject.toml. packages: those that the extra installs.

    runtime: name of the runtime that runs the export here, or None.
    """

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
    """Return the format's module; raise UserError if a package that it needs is not installed."""
    known = FORMATS[name]
    if missing := [package for package in known.packages if find_spec(package) is None]:
        raise UserError(f"format={name} needs {', '.join(missing)}: pip install 'sam-distill[{known.extra}]'")
    return import_module(f"sam_distill.export.{name}")
