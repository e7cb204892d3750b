"""SAM's mask decoder, batched over images and prompts. Parameter names are the official ones.

Legend: B images, P prompts, T tokens per prompt (1 for IoU, 4 for masks, N for the prompt), C = 256 channels,
L = 4096 cells of the image embedding, h = 8 heads of width d, G = groups of prompts that see the same image features:
1 until the first image-to-token attention makes them differ, P afterwards. Values with G = 1 are computed once for all
prompts of an image.

An image has many cells and a prompt few tokens. So where the official code projects the image's side of an attention,
this code projects the tokens' side instead. The result is the same, q . (W k) = (W^T q) . k, with half the work.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_distill.models.layers import MLP, LayerNorm2d
from sam_distill.types import ABSENT, EMBED_DIM, GRID, LOW_RES, Masks

NUM_MASKS = 4  # token 0: the single mask; tokens 1-3: whole, part, sub-part of an ambiguous prompt
HEADS = 8
MASKED_SCORE = -1e4  # added to the attention scores of absent tokens; finite, because some runtimes have no infinity
# Number of prompts decoded at a time without gradients: their image features, 4 MB per prompt, should stay in a CPU's
# cache and fit into a GPU's memory.
CHUNK_CPU, CHUNK_GPU = 1, 64


class Attention(nn.Module):
    """Multi-head attention with an inner width that may be smaller than C."""

    def __init__(self, inner_width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(EMBED_DIM, inner_width)
        self.k_proj = nn.Linear(EMBED_DIM, inner_width)
        self.v_proj = nn.Linear(EMBED_DIM, inner_width)
        self.out_proj = nn.Linear(inner_width, EMBED_DIM)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Return the attended values: q, k, v [B, P, T, C] -> [B, P, T, C]. key_mask [B, P, T]: added to the scores."""
        batch = q.shape[:2]
        mask = None if key_mask is None else key_mask.flatten(0, 1)[:, None, None]
        q, k, v = self.q_proj(q.flatten(0, 1)), self.k_proj(k.flatten(0, 1)), self.v_proj(v.flatten(0, 1))
        out = F.scaled_dot_product_attention(_heads(q), _heads(k), _heads(v), attn_mask=mask)
        return self.out_proj(_merge(out)).unflatten(0, batch)


class TokenToImage(Attention):
    """Attention from the tokens to the image."""

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # type: ignore[override]
        """Return the attended values: tokens [B, P, T, C], keys and values [B, G, L, C] -> [B, P, T, C]."""
        batch = tokens.shape[:2]
        if keys.shape[1] < tokens.shape[1]:  # all prompts share the keys: one long row of queries
            q, k, v = self.q_proj(tokens.flatten(1, 2)), self.k_proj(keys[:, 0]), self.v_proj(values[:, 0])
            out = F.scaled_dot_product_attention(_heads(q), _heads(k), _heads(v))
            return self.out_proj(_merge(out)).unflatten(1, tokens.shape[1:3])
        q = _heads(self.q_proj(tokens.flatten(0, 1)))
        q = q * q.shape[-1] ** -0.5
        bias = (q * self.k_proj.bias.view(HEADS, 1, -1)).sum(-1, keepdim=True)
        q = _project_heads(q, self.k_proj.weight)
        scores = _products(q.flatten(1, 2), keys.flatten(0, 1)) + bias.flatten(1, 2)  # [BP, hT, L]
        attended = (scores.softmax(-1) @ values.flatten(0, 1)).unflatten(1, (HEADS, -1))
        out = attended @ self.v_proj.weight.unflatten(0, (HEADS, -1)).transpose(-2, -1)
        return self.out_proj(_merge(out) + self.v_proj.bias).unflatten(0, batch)


class ImageToToken(Attention):
    """Attention from the image to the tokens, added to the image features."""

    def forward(  # type: ignore[override]
        self, image: Tensor, queries: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        """Return image + attended values [B, P, L, C]; image and queries [B, G, L, C], keys and values [B, P, T, C].

        key_mask: [B, P, T], added to each token's scores.
        """
        batch, prompts = keys.shape[:2]
        k, v = _heads(self.k_proj(keys.flatten(0, 1))), _heads(self.v_proj(values.flatten(0, 1)))
        k = k * k.shape[-1] ** -0.5
        bias = (k * self.q_proj.bias.view(HEADS, 1, -1)).sum(-1, keepdim=True)
        k = _project_heads(k, self.q_proj.weight)
        rows = k.reshape(batch, image.shape[1], -1, EMBED_DIM)  # one product for all prompts that see the same image
        scores = _products(rows, queries).reshape(*k.shape[:3], -1) + bias  # [BP, h, T, L]
        if key_mask is not None:
            scores = scores + key_mask.flatten(0, 1)[:, None, :, None]
        attention = scores.softmax(-2).flatten(1, 2)
        # A cell's attention weights sum to 1 in each head, so each head adds 1 / HEADS of the bias.
        answers = _project_heads(v, self.out_proj.weight.transpose(-2, -1)) + self.out_proj.bias / HEADS
        image = image.expand(-1, prompts, -1, -1).flatten(0, 1)
        attended = torch.baddbmm(image, attention.transpose(-2, -1), answers.flatten(1, 2))
        return attended.unflatten(0, (batch, prompts))


def _heads(x: Tensor) -> Tensor:
    """Split into heads: [n, L, inner] -> [n, h, L, d]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """Join the heads: [n, h, L, d] -> [n, L, inner]."""
    return x.transpose(1, 2).flatten(2)


def _project_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each head of x with its rows of the weight: [n, h, T, d], weight [inner, C] -> [n, h, T, C]."""
    return x @ weight.unflatten(0, (HEADS, -1))


def _products(few: Tensor, cells: Tensor) -> Tensor:
    """Return few @ cells^T: [..., n, C], [..., L, C] -> [..., n, L]; computed so, a CPU does not copy cells in bf16."""
    return (cells @ few.transpose(-2, -1)).transpose(-2, -1)


class FeedForward(nn.Module):
    def __init__(self, width_hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(EMBED_DIM, width_hidden)
        self.lin2 = nn.Linear(width_hidden, EMBED_DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, then attention from tokens to image, then from image to tokens."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(EMBED_DIM)
        self.norm1 = nn.LayerNorm(EMBED_DIM)
        self.cross_attn_token_to_image = TokenToImage(EMBED_DIM // 2)
        self.norm2 = nn.LayerNorm(EMBED_DIM)
        self.mlp = FeedForward(2048)
        self.norm3 = nn.LayerNorm(EMBED_DIM)
        self.norm4 = nn.LayerNorm(EMBED_DIM)
        self.cross_attn_image_to_token = ImageToToken(EMBED_DIM // 2)

    def update_tokens(
        self, tokens: Tensor, token_pe: Tensor, image: Tensor, image_keys: Tensor, token_mask: Tensor | None
    ) -> Tensor:
        """Return the new tokens: tokens, token_pe [B, P, T, C]; image, image_keys (image + positions) [B, G, L, C]."""
        if self.first:  # as in SAM: no positions and no residual in the very first self-attention
            tokens = self.self_attn(tokens, tokens, tokens, token_mask)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens, token_mask)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image_keys, image))
        return self.norm3(tokens + self.mlp(tokens))

    def update_image(
        self, tokens: Tensor, token_pe: Tensor, image: Tensor, image_keys: Tensor, token_mask: Tensor | None
    ) -> Tensor:
        """Return the new image features [B, P, L, C]; arguments as in `update_tokens`."""
        keys = tokens + token_pe
        return self.norm4(self.cross_attn_image_to_token(image, image_keys, keys, tokens, token_mask))


class TwoWayTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoWayBlock(first=True), TwoWayBlock(first=False)])
        self.final_attn_token_to_image = TokenToImage(EMBED_DIM // 2)
        self.norm_final_attn = nn.LayerNorm(EMBED_DIM)

    def forward(
        self, tokens: Tensor, image: Tensor, image_pe: Tensor, token_mask: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the new tokens [B, p, T, C] and image features [B, p, L, C], p prompts at a time.

        tokens [B, P, T, C], image [B, G, L, C], image_pe [L, C], token_mask [B, P, T] (see `_token_mask`) or None.
        """
        first, second = cast(Iterable[TwoWayBlock], self.layers)
        token_pe, image_keys = tokens, image + image_pe
        tokens = first.update_tokens(tokens, token_pe, image, image_keys, token_mask)
        for part in _parts(tokens):
            t, pe = tokens[:, part], token_pe[:, part]
            mask = None if token_mask is None else token_mask[:, part]
            seen, keys = (x if x.shape[1] == 1 else x[:, part] for x in (image, image_keys))
            seen = first.update_image(t, pe, seen, keys, mask)
            keys = seen + image_pe
            t = second.update_tokens(t, pe, seen, keys, mask)
            seen = second.update_image(t, pe, seen, keys, mask)
            answer = self.final_attn_token_to_image(t + pe, seen + image_pe, seen)
            yield self.norm_final_attn(t + answer), seen


def _parts(tokens: Tensor) -> Iterator[slice]:
    """Yield the slices of P to decode at a time, tokens [B, P, T, C]; with gradients all: features are kept anyway."""
    if torch.compiler.is_compiling():  # an exported graph has no loops
        yield slice(None)
        return
    batch, prompts = tokens.shape[:2]
    chunk = CHUNK_CPU if tokens.device.type == "cpu" else max(1, CHUNK_GPU // batch)
    step = max(1, prompts) if torch.is_grad_enabled() else chunk
    for start in range(0, prompts, step):
        yield slice(start, start + step)


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
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(EMBED_DIM // 8) for _ in range(NUM_MASKS))
        self.iou_prediction_head = MLP(NUM_MASKS)

    def forward(
        self,
        embedding: Tensor,
        image_pe: Tensor,
        tokens: Tensor,
        dense: Tensor,
        labels: Tensor | None,
        wanted: slice,
        min_pred_iou: float | None = None,
    ) -> Masks:
        """Decode every prompt of every image in one pass.

        embedding: [B, 256, 64, 64]; image_pe: [4096, 256].
        tokens: [B, P, N, 256]; dense: [B, P, 4096, 256] or [1, 1, 1, 256] (no mask prompt, shared).
        labels: [B, P, N], to keep ABSENT tokens out of attention; None: no token is absent.
        wanted: the mask tokens to decode: SINGLE, MULTI or ALL.
        min_pred_iou: a prompt gets zeros for masks if none of its predicted IoUs exceeds this: masks are half the work.
        """
        batch, prompts = tokens.shape[:2]
        image = embedding.flatten(2).transpose(-2, -1).unsqueeze(1) + dense
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(batch, prompts, -1, -1), tokens], dim=2)
        parts = self.transformer(tokens, image, image_pe, _token_mask(labels, len(output_tokens)))
        answers = [self._predict(tokens, image, wanted, min_pred_iou) for tokens, image in parts]
        return Masks(*(torch.cat(each, dim=1) for each in zip(*answers, strict=True)))

    def _predict(
        self, tokens: Tensor, image: Tensor, wanted: slice, min_pred_iou: float | None
    ) -> tuple[Tensor, Tensor]:
        """Return masks [B, p, M, 256, 256], predicted IoUs [B, p, M] from tokens [B, p, T, C], image [B, p, L, C]."""
        iou = self.iou_prediction_head(tokens[:, :, 0])[:, :, wanted].float()
        mask_tokens = tokens[:, :, 1 : 1 + NUM_MASKS][:, :, wanted]
        if min_pred_iou is None:
            masks = self._predict_masks(mask_tokens.flatten(0, 1), image.flatten(0, 1), wanted)
            return masks.unflatten(0, iou.shape[:2]), iou
        masks = iou.new_zeros(*iou.shape, LOW_RES, LOW_RES)
        good = (iou > min_pred_iou).any(-1).nonzero(as_tuple=True)
        if len(good[0]):
            masks[good] = self._predict_masks(mask_tokens[good], image[good], wanted)
        return masks, iou

    def _predict_masks(self, tokens: Tensor, image: Tensor, wanted: slice) -> Tensor:
        """Return mask logits [n, M, 256, 256] float32 from mask tokens [n, M, C] and image [n, L, C].

        Each cell becomes 2 x 2 pixels, and each of those 2 x 2 again; only the finished masks are rearranged to images.
        Under autocast all products have the lower precision, even the last one: that only rounds the logits.
        """
        first, norm, gelu, second, _ = cast(Iterable[Any], self.output_upscaling)
        image = gelu(norm.over_last(_upscale_cells(image, first))).flatten(1, 2)
        image = gelu(_upscale_cells(image, second)).flatten(1, 2)
        mlps = self.output_hypernetworks_mlps[wanted]
        filters = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(mlps)], dim=1)
        masks = _products(filters, image).float()  # last dimension: cells, then the 4 x 4 pixels of each
        pixels = masks.reshape(-1, GRID, 2, 8).transpose(1, 2).reshape(-1, 2 * GRID, 2, 2).transpose(1, 2)
        return pixels.reshape(*filters.shape[:2], LOW_RES, LOW_RES)


def _upscale_cells(x: Tensor, conv: nn.ConvTranspose2d) -> Tensor:
    """Apply a transposed convolution of stride 2: [n, L, C] -> [n, L, 4, c], the 2 x 2 pixels of each cell."""
    assert conv.bias is not None
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return F.linear(x, weight, conv.bias.repeat(4)).unflatten(-1, (4, -1))


def _token_mask(labels: Tensor | None, num_output_tokens: int) -> Tensor | None:
    """Return [B, P, T]: MASKED_SCORE for absent tokens, else 0. On a CPU None if no token is absent: it is faster.

    On a GPU this check would have to wait for the labels; an exported graph can't branch on them.
    """
    if labels is None:
        return None
    present = labels != ABSENT
    if not torch.compiler.is_compiling() and labels.device.type == "cpu" and bool(present.all()):
        return None
    return F.pad((1 - present.float()) * MASKED_SCORE, (num_output_tokens, 0))
