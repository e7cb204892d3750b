"""SAM's mask decoder, batched over images and prompts. Parameter names are the official ones.

Legend: B images, P prompts, T tokens per prompt (1 for IoU, 4 for masks, N for the prompt), C = 256 channels,
L = 4096 cells of the image embedding, G = groups of prompts that see the same image features: 1 until the first
image-to-token attention makes them differ, P afterwards. What has G = 1 is computed once for all prompts of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_distill.models.layers import MLP, LayerNorm2d
from sam_distill.types import ABSENT, EMBED_DIM, GRID, Masks

NUM_MASKS = 4  # token 0: the single mask; tokens 1-3: whole, part, sub-part of an ambiguous prompt
HEADS = 8


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than C."""

    def __init__(self, inner_width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(EMBED_DIM, inner_width)
        self.k_proj = nn.Linear(EMBED_DIM, inner_width)
        self.v_proj = nn.Linear(EMBED_DIM, inner_width)
        self.out_proj = nn.Linear(inner_width, EMBED_DIM)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """q [B, Gq, Lq, C], k and v [B, Gk, Lk, C] with Gq, Gk in {1, P} -> [B, max(Gq, Gk), Lq, C].

        key_mask: [B, Gk, Lk] bool, False for keys nobody may look at.
        """
        q, k, v = self._heads(self.q_proj(q)), self._heads(self.k_proj(k)), self._heads(self.v_proj(v))
        batch, groups_q, _, length_q, _ = q.shape
        groups_k = k.shape[1]
        if groups_k == 1 and groups_q > 1:  # all prompts ask the same keys: one long row of queries
            out = F.scaled_dot_product_attention(q.transpose(1, 2).flatten(2, 3), k[:, 0], v[:, 0])
            out = out.unflatten(2, (groups_q, length_q)).transpose(1, 2)
        else:
            q = q.expand(-1, groups_k, -1, -1, -1).flatten(0, 1)
            mask = None if key_mask is None else key_mask.flatten(0, 1)[:, None, None, :]
            out = F.scaled_dot_product_attention(q, k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask)
            out = out.unflatten(0, (batch, groups_k))
        return self.out_proj(out.transpose(2, 3).flatten(3))

    @staticmethod
    def _heads(x: Tensor) -> Tensor:
        """[B, G, L, inner] -> [B, G, heads, L, inner / heads]."""
        return x.unflatten(-1, (HEADS, -1)).transpose(2, 3)


class FeedForward(nn.Module):
    def __init__(self, width_hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(EMBED_DIM, width_hidden)
        self.lin2 = nn.Linear(width_hidden, EMBED_DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens look at each other, then at the image; then the image looks at the tokens."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(EMBED_DIM)
        self.norm1 = nn.LayerNorm(EMBED_DIM)
        self.cross_attn_token_to_image = Attention(EMBED_DIM // 2)
        self.norm2 = nn.LayerNorm(EMBED_DIM)
        self.mlp = FeedForward(2048)
        self.norm3 = nn.LayerNorm(EMBED_DIM)
        self.norm4 = nn.LayerNorm(EMBED_DIM)
        self.cross_attn_image_to_token = Attention(EMBED_DIM // 2)

    def forward(
        self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """tokens, token_pe [B, P, T, C]; image [B, G, L, C]; image_pe [L, C]; token_mask [B, P, T] or None."""
        if self.first:  # SAM's rule: no positions and no residual in the very first self-attention
            tokens = self.self_attn(tokens, tokens, tokens, token_mask)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens, token_mask)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image + image_pe, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        answer = self.cross_attn_image_to_token(image + image_pe, tokens + token_pe, tokens, token_mask)
        return tokens, self.norm4(image + answer)


class TwoWayTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoWayBlock(first=True), TwoWayBlock(first=False)])
        self.final_attn_token_to_image = Attention(EMBED_DIM // 2)
        self.norm_final_attn = nn.LayerNorm(EMBED_DIM)

    def forward(
        self, tokens: Tensor, image: Tensor, image_pe: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, P, T, C], image [B, G, L, C] -> tokens [B, P, T, C], image [B, P, L, C]."""
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, token_mask)
        answer = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + answer), image


class MaskDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer()
        self.iou_token = nn.Embedding(1, EMBED_DIM)
        self.mask_tokens = nn.Embedding(NUM_MASKS, EMBED_DIM)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(EMBED_DIM, EMBED_DIM // 4, kernel_size=2, stride=2),
            LayerNorm2d(EMBED_DIM // 4),
            nn.GELU(),
            nn.ConvTranspose2d(EMBED_DIM // 4, EMBED_DIM // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(EMBED_DIM, EMBED_DIM, EMBED_DIM // 8, 3) for _ in range(NUM_MASKS)
        )
        self.iou_prediction_head = MLP(EMBED_DIM, EMBED_DIM, NUM_MASKS, 3)

    def forward(
        self, embedding: Tensor, image_pe: Tensor, tokens: Tensor, dense: Tensor, labels: Tensor | None, wanted: slice
    ) -> Masks:
        """Decode every prompt of every image in one pass.

        embedding: [B, 256, 64, 64]; image_pe: [4096, 256].
        tokens: [B, P, N, 256]; dense: [B, P, 256, 64, 64] or [1, 1, 256, 1, 1] (no mask prompt, shared).
        labels: [B, P, N], to keep ABSENT tokens out of attention; None: there are none (exporters can't look).
        wanted: the mask tokens to decode: SINGLE, MULTI or ALL.
        """
        batch, prompts = tokens.shape[:2]
        image = (embedding.unsqueeze(1) + dense).flatten(3).transpose(2, 3)
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(batch, prompts, -1, -1), tokens], dim=2)
        tokens, image = self.transformer(tokens, image, image_pe, _token_mask(labels, len(output_tokens)))

        mask_tokens = tokens[:, :, 1 : 1 + NUM_MASKS][:, :, wanted]
        filters = torch.stack(
            [mlp(mask_tokens[:, :, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps[wanted])], dim=2
        )
        image = image.transpose(2, 3).reshape(batch * prompts, EMBED_DIM, GRID, GRID)
        features = self.output_upscaling(image)
        low_res = torch.einsum("nmc,nchw->nmhw", filters.flatten(0, 1).float(), features.float())
        iou = self.iou_prediction_head(tokens[:, :, 0])[:, :, wanted]
        return Masks(low_res.unflatten(0, (batch, prompts)), iou.float())


def _token_mask(labels: Tensor | None, num_output_tokens: int) -> Tensor | None:
    """[B, P, T] bool, or None when every token is there (the common case, and the fast one)."""
    if labels is None:
        return None
    present = labels != ABSENT
    if bool(present.all()):
        return None
    return F.pad(present, (num_output_tokens, 0), value=True)
