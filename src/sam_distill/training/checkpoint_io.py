"""How checkpoints are written and read."""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from sam_distill.errors import UserError, one_line
from sam_distill.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """A kill, a power cut or a full disk leaves the earlier checkpoint as it was; Lightning writes over it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.part"):  # by a run that was killed while it wrote
            left.unlink()
        with atomic_write(path) as draft, draft.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except Exception as error:  # torch.load raises whatever a torn file makes it raise
            advice = "init=RUN_DIR starts a new run from the student that a run has saved"
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"resume: {path} can't be read ({reason}); {advice}") from error
