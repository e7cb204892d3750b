"""Writing and reading of Lightning checkpoints."""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from sam_distill.errors import UserError, one_line
from sam_distill.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that keeps the earlier checkpoint on a kill, power cut or full disk; Lightning's overwrites it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*.part"):  # of a run that was killed while writing
            stale.unlink()
        with atomic_write(path) as draft, draft.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except Exception as error:  # torch.load raises various errors for a damaged file
            advice = "init=RUN_DIR starts a new run from the student that a run has saved"
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"resume: {path} can't be read ({reason}); {advice}") from error
