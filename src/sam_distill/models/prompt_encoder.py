"""SAM's prompt encoder, batched over images and prompts. Parameter names are the official ones."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from sam_distill.models.layers import LayerNorm2d
from sam_distill.types import BOX_BOTTOM_RIGHT, EMBED_DIM, FRAME, GRID, NOT_A_POINT, Prompts


class RandomFourierFeatures(nn.Module):
    """Encoder of positions in [0, 1]^2: sines and cosines of random projections (SAM's `PositionEmbeddingRandom`)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def forward(self, positions: Tensor) -> Tensor:
        """Return the encoding of (x, y) in [0, 1]: [..., 2] -> [..., 2 * features] float32."""
        matrix: Tensor = self.positional_encoding_gaussian_matrix  # type: ignore[assignment]
        # Not a matmul: autocast would round the phases to bfloat16.
        x, y = (2 * positions - 1).split(1, dim=-1)
        phase = 2 * math.pi * (x * matrix[0] + y * matrix[1])
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Encoder of points, boxes and masks into tokens and dense embeddings for the mask decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.pe_layer = RandomFourierFeatures(EMBED_DIM // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, EMBED_DIM) for _ in range(BOX_BOTTOM_RIGHT + 1))
        self.not_a_point_embed = nn.Embedding(1, EMBED_DIM)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, kernel_size=2, stride=2),
            LayerNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 16, kernel_size=2, stride=2),
            LayerNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, EMBED_DIM, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, EMBED_DIM)

    def forward(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return tokens [B, P, N, 256] and dense embeddings: [B, P, 4096, 256] or, without masks, [1, 1, 1, 256]."""
        dense = self.no_mask_embed.weight.view(1, 1, 1, EMBED_DIM)
        if prompts.masks is not None:
            dense = self.embed_masks(prompts.masks.flatten(0, 1)).unflatten(0, prompts.masks.shape[:2])
        return self._tokens(prompts), dense

    def dense_positions(self) -> Tensor:
        """Return [4096, 256]: the positional encoding of the centres of the image embedding's cells, row by row."""
        centres = (torch.arange(GRID, device=self.no_mask_embed.weight.device) + 0.5) / GRID
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.pe_layer(torch.stack([x, y], dim=-1)).flatten(0, 1)

    def _tokens(self, prompts: Prompts) -> Tensor:
        position = self.pe_layer((prompts.points + 0.5) / FRAME)  # as in SAM, a point means the centre of its pixel
        labels = prompts.labels.unsqueeze(-1)
        nothing = torch.zeros_like(self.not_a_point_embed.weight)  # not 0.0: Core ML's `where` takes tensors only
        tokens = torch.where(labels >= 0, position, nothing)
        tokens = tokens + torch.where(labels == NOT_A_POINT, self.not_a_point_embed.weight, nothing)
        for label, embedding in enumerate(self.point_embeddings):
            tokens = tokens + torch.where(labels == label, cast(Tensor, embedding.weight), nothing)
        return tokens

    def embed_masks(self, masks: Tensor) -> Tensor:
        """Return the dense embeddings of mask logits: [n, 1, 256, 256] -> [n, 4096, 256]."""
        return self.mask_downscaling(masks).flatten(2).transpose(-2, -1)
