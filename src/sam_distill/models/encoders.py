"""Image encoders with one interface: [B, 3, S, S] -> [B, 256, 64, 64], for any S that is a multiple of 64.

Each consists of a timm backbone and a neck.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import timm
from timm.models import tiny_vit
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn import functional as F

from sam_distill.errors import UserError, did_you_mean
from sam_distill.models.layers import DepthwiseConv2d, LayerNorm2d
from sam_distill.models.pretrained import with_imagenet_weights
from sam_distill.types import EMBED_DIM, FRAME, GRID

Pretrained = bool | str  # ImageNet weights: True: from any source (see pretrained.py); False: none; str: of that file


class Neck(nn.Module):
    """Neck that fuses feature maps of one or more levels into one map of 256 channels.

    With one level this is SAM's neck (1x1, norm, 3x3, norm); several are resized to one grid and added after the 1x1.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(width, EMBED_DIM, kernel_size=1, bias=False) for width in widths)
        self.norm1 = LayerNorm2d(EMBED_DIM)
        self.conv = nn.Conv2d(EMBED_DIM, EMBED_DIM, kernel_size=3, padding=1, bias=False)
        self.norm2 = LayerNorm2d(EMBED_DIM)

    def forward(self, levels: Sequence[Tensor], grid: int) -> Tensor:
        """Return the fused map: levels [B, width, h, h] -> [B, 256, grid, grid]."""
        x = sum(_resize(reduce(level), grid) for reduce, level in zip(self.reduce, levels, strict=True))
        return self.norm2(self.conv(self.norm1(x)))


class ImageEncoder(nn.Module):
    """Image encoder made of a backbone and a neck. `spec` tells how to build it again: class name and arguments.

    fine_neck: fuse the levels at 64 x 64 for every S, as in EfficientViT-SAM (Zhang et al., 2024), so that at S = 512
        the features of stride 8 keep their detail. Otherwise fuse at stride 16 and up-sample the embedding: cheaper.
    """

    spec: dict[str, Any]
    fine_neck = False
    img_size = FRAME  # long side that ResizeLongestSide resizes to; the name is segment-anything's

    def __init__(self, backbone: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        DepthwiseConv2d.replace_in(backbone)
        self.backbone = backbone
        self.neck = Neck(widths)

    def features(self, x: Tensor) -> Sequence[Tensor]:
        return [self.backbone(x)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings: [B, 3, S, S] -> [B, 256, 64, 64]."""
        grid = GRID if self.fine_neck else x.shape[-1] // (FRAME // GRID)
        return _resize(self.neck(self.features(x), grid), GRID)


class TinyViT(ImageEncoder):
    """TinyViT 5M/11M/21M (Wu et al., ECCV 2022) with its last stage at stride 16, as in MobileSAM (section 4.1)."""

    def __init__(self, size: Literal["5m", "11m", "21m"] = "5m", pretrained: Pretrained = True) -> None:
        name = f"tiny_vit_{size}_224"
        # From timm's module, not from its registry: importing MobileSAM's code overwrites the registry's entry.
        backbone: Any = with_imagenet_weights(name, partial(getattr(tiny_vit, name), num_classes=0), pretrained)
        backbone.stages[-1].downsample.conv2.conv.stride = (1, 1)
        backbone.head = nn.Identity()
        super().__init__(backbone, [backbone.num_features])
        self.spec = {"class": "TinyViT", "size": size}
        self.register_load_state_dict_post_hook(_clear_attention_bias_cache)


class SamViT(ImageEncoder):
    """SAM's ViT (Kirillov et al. 2023): attention in windows of 14, but global in the blocks `global_blocks`.

    It starts from random weights: SAM's own ViT-B is itself the paper's coupled baseline (Table 2), so a student
    starts from SAM's weights only if `init=` asks for it.
    """

    def __init__(self, width: int, depth: int, heads: int, global_blocks: list[int]) -> None:
        backbone: Any = VisionTransformerSAM(
            img_size=FRAME,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
            use_rel_pos=True,
            window_size=14,
            global_attn_indexes=tuple(global_blocks),
        )
        backbone.neck = nn.Identity()
        nn.init.trunc_normal_(backbone.pos_embed, std=0.02)
        super().__init__(backbone, [width])
        self.spec = {"class": "SamViT", "width": width, "depth": depth, "heads": heads}
        self.spec["global_blocks"] = list(global_blocks)

    def features(self, x: Tensor) -> Sequence[Tensor]:
        with x.device if x.is_cuda else nullcontext():  # else timm builds its tables of relative positions on the CPU
            return [self.backbone.forward_features(x)]  # type: ignore[operator]


class TimmEncoder(ImageEncoder):
    """Any timm backbone with feature maps; the neck fuses its last three levels.

    neck: fine or coarse, see fine_neck of `ImageEncoder`.
    """

    def __init__(self, name: str, pretrained: Pretrained = True, neck: Literal["fine", "coarse"] = "fine") -> None:
        if not timm.is_model(name.split(".")[0]):
            hint = did_you_mean(name, timm.list_models(), "`timm.list_models()` names them all", most=3)
            raise UserError(f"encoder.name={name}: timm has no such model; {hint}")
        backbone = with_imagenet_weights(name, partial(_feature_maps, name), pretrained)
        super().__init__(backbone, backbone.feature_info.channels())  # type: ignore[operator, union-attr]
        self.fine_neck = neck == "fine"
        self.spec = {"class": "TimmEncoder", "name": name, "neck": neck}

    def features(self, x: Tensor) -> Sequence[Tensor]:
        return self.backbone(x)


class EfficientViT(TimmEncoder):
    """EfficientViT by MSRA (Liu et al., CVPR 2023), which the paper cites: strides 16, 32, 64."""

    def __init__(
        self,
        size: Literal["m0", "m1", "m2", "m3", "m4", "m5"] = "m5",
        pretrained: Pretrained = True,
        neck: Literal["fine", "coarse"] = "fine",
    ) -> None:
        super().__init__(f"efficientvit_{size}", pretrained, neck)


class EfficientViTMIT(TimmEncoder):
    """EfficientViT by MIT (Cai et al., ICCV 2023), which EfficientViT-SAM uses: strides 8, 16, 32."""

    def __init__(
        self,
        size: Literal["b0", "b1", "b2", "b3", "l1", "l2", "l3"] = "b1",
        pretrained: Pretrained = True,
        neck: Literal["fine", "coarse"] = "fine",
    ) -> None:
        super().__init__(f"efficientvit_{size}", pretrained, neck)


def build_encoder(spec: dict[str, Any]) -> ImageEncoder:
    """Return the encoder that `spec` describes, with random weights."""
    kinds = {kind.__name__: kind for kind in (TinyViT, SamViT, TimmEncoder)}
    arguments = {name: value for name, value in spec.items() if name != "class"}
    if spec["class"] != "SamViT":
        arguments["pretrained"] = False
    return kinds[spec["class"]](**arguments)


def _resize(x: Tensor, side: int) -> Tensor:
    if x.shape[-1] > side:
        return F.adaptive_avg_pool2d(x, side)
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bilinear")


def _clear_attention_bias_cache(encoder: nn.Module, _: Any) -> None:
    """Clear the attention biases that TinyViT caches in eval mode: after new weights are loaded they are stale."""
    mode = encoder.training
    encoder.train(True).train(mode)


def _feature_maps(name: str, **options: Any) -> nn.Module:
    """Return timm's model as an extractor of its last three levels; UserError if timm can't build that."""
    options |= {"features_only": True, "out_indices": (-3, -2, -1)}
    try:
        try:
            return timm.create_model(name, dynamic_img_size=True, **options)  # else plain ViTs accept only 224
        except TypeError:
            return timm.create_model(name, **options)
    except (RuntimeError, AttributeError, AssertionError, IndexError) as error:
        if options["pretrained"]:
            raise
        raise UserError(f"encoder.name={name}: timm gives no feature maps of this model ({error})") from error
