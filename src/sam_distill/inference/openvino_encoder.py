"""Image encoder that runs in OpenVINO on a CPU."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sam_distill.errors import UserError


class OpenVinoEncoder(nn.Module):
    """OpenVINO version of a trained image encoder: fp32, or bfloat16 under `torch.autocast`, always on the CPU."""

    def __init__(self, encoder: nn.Module, image_size: int) -> None:
        super().__init__()
        try:
            import openvino
        except ImportError as error:
            raise UserError("OpenVINO is not installed: pip install 'sam-distill[openvino]'") from error
        example = torch.zeros(1, 3, image_size, image_size)
        with torch.no_grad():
            program = torch.export.export(encoder.cpu().float().eval(), (example,))
        graph = openvino.convert_model(program)

        @cache  # compiling takes seconds, at the first use of each precision
        def compiled(precision: str) -> Any:
            return openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": precision})

        self._compiled = compiled

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings: [B, 3, S, S], normalised -> [B, 256, 64, 64] float32."""
        run = self._compiled("bf16" if torch.is_autocast_enabled(x.device.type) else "f32")
        images = x.detach().float().cpu().contiguous().numpy()
        embeddings = [torch.from_numpy(run(images[i : i + 1])[0].copy()) for i in range(len(images))]
        return torch.cat(embeddings).to(x.device)
