"""Our models compared in fp32 with MobileSAM's and segment-anything's own code."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import segment_anything
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor

from sam_distill.models import checkpoints
from sam_distill.models.encoders import SamViT, TinyViT
from sam_distill.models.sam import Sam
from sam_distill.prompts.forms import box_prompts, point_prompts
from sam_distill.types import MULTI, SINGLE, Prompts

# Processors sum floats in different orders: on one of them, 1 of 400,000 pixels was 1.2e-4 off.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}
SIZE = (683, 1024)  # (height, width) in the frame of a 3:2 photograph


@pytest.fixture(scope="module")
def image() -> Tensor:
    """[1, 3, 683, 1024] uint8: smooth blobs with edges, so that masks are not trivial."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 7, 10, generator=generator) * 255
    blocks = torch.nn.functional.interpolate(coarse, scale_factor=103, mode="nearest")[..., : SIZE[0], : SIZE[1]]
    return (blocks + 10 * torch.randn(blocks.shape, generator=generator)).clamp(0, 255).byte()


def frame(image: Tensor) -> tuple[Tensor, Tensor]:
    height, width = image.shape[-2:]
    padded = torch.nn.functional.pad(image, (0, 1024 - width, 0, 1024 - height))
    return padded, torch.tensor([[height, width]])


@pytest.fixture(scope="module")
def reference(mobile_sam: ModuleType, mobile_sam_weights: str) -> torch.nn.Module:
    model = mobile_sam.sam_model_registry["vit_t"](checkpoint=mobile_sam_weights)
    return model.train().eval()  # its builder loads weights after eval(), which leaves attention biases stale


@pytest.fixture(scope="module")
def embedding(teacher: Sam, image: Tensor) -> Tensor:
    with torch.no_grad():
        return teacher.encode(*frame(image))


@torch.no_grad()
def test_mobile_sam_embedding(reference: Any, embedding: Tensor, image: Tensor) -> None:
    torch.testing.assert_close(embedding, reference.image_encoder(reference.preprocess(image)), **TOLERANCE)


POINTS = torch.tensor([[[300.0, 200.0], [700.0, 500.0], [40.0, 640.0]], [[512.0, 300.0], [100.0, 90.0], [900.0, 20.0]]])
LABELS = torch.tensor([[1, 0, 1], [1, 1, 0]])
BOXES = torch.tensor([[100.0, 80.0, 600.0, 400.0], [512.0, 10.0, 1000.0, 680.0]])


def batched(**parts: Tensor) -> dict[str, Tensor]:
    return {name: value.unsqueeze(0) for name, value in parts.items()}


PROMPTS: dict[str, tuple[Callable[[], Prompts], dict[str, Any]]] = {
    "one foreground point": (
        lambda: point_prompts(**batched(points=POINTS[:, :1], labels=LABELS[:, :1])),
        {"points": (POINTS[:, :1], LABELS[:, :1])},
    ),
    "one background point": (
        lambda: point_prompts(**batched(points=POINTS[:, 1:2], labels=torch.zeros(2, 1, dtype=torch.int64))),
        {"points": (POINTS[:, 1:2], torch.zeros(2, 1, dtype=torch.int64))},
    ),
    "several points": (
        lambda: point_prompts(**batched(points=POINTS, labels=LABELS)),
        {"points": (POINTS, LABELS)},
    ),
    "boxes": (lambda: box_prompts(**batched(boxes=BOXES)), {"boxes": BOXES}),
    "boxes and points": (
        lambda: box_prompts(**batched(boxes=BOXES, points=POINTS, labels=LABELS)),
        {"points": (POINTS, LABELS), "boxes": BOXES},
    ),
}


def official_decode(model: Any, embedding: Tensor, multimask: bool, **prompts: Any) -> tuple[Tensor, Tensor]:
    prompts = {"points": None, "boxes": None, "masks": None, **prompts}
    sparse, dense = model.prompt_encoder(**prompts)
    return model.mask_decoder(
        image_embeddings=embedding,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("name", PROMPTS)
def test_mobile_sam_masks(reference: Any, teacher: Sam, embedding: Tensor, name: str, multimask: bool) -> None:
    ours, theirs = PROMPTS[name]
    low_res, iou = official_decode(reference, embedding, multimask, **theirs)
    masks = teacher.decode(embedding, ours(), MULTI if multimask else SINGLE)
    torch.testing.assert_close(masks.low_res[0], low_res, **TOLERANCE)
    torch.testing.assert_close(masks.iou[0], iou, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True], ids=["single", "multi"])
def test_mobile_sam_mask_input(reference: Any, teacher: Sam, embedding: Tensor, multimask: bool) -> None:
    earlier, _ = official_decode(reference, embedding, False, points=(POINTS, LABELS))
    low_res, iou = official_decode(reference, embedding, multimask, points=(POINTS, LABELS), masks=earlier)
    ours = point_prompts(**batched(points=POINTS, labels=LABELS, masks=earlier))
    masks = teacher.decode(embedding, ours, MULTI if multimask else SINGLE)
    torch.testing.assert_close(masks.low_res[0], low_res, **TOLERANCE)
    torch.testing.assert_close(masks.iou[0], iou, **TOLERANCE)


@torch.no_grad()
def test_ragged_prompts_give_the_same_masks_as_each_image_alone(teacher: Sam, embedding: Tensor) -> None:
    """One image has one prompt of one point, the other two of three: the masks are those of each image alone."""
    absent_label = -2
    points = torch.zeros(2, 2, 3, 2)
    labels = torch.full((2, 2, 3), absent_label)
    points[0, 0, :1], labels[0, 0, :1] = POINTS[0, :1], LABELS[0, :1]
    points[1], labels[1] = POINTS, LABELS
    together = point_prompts(points, labels)
    assert together.valid.tolist() == [[True, False], [True, True]]
    images = torch.cat([embedding, embedding.flip(-1)])
    masks = teacher.decode(images, together)
    alone = teacher.decode(images[:1], point_prompts(**batched(points=POINTS[:1, :1], labels=LABELS[:1, :1])))
    torch.testing.assert_close(masks.low_res[0, :1], alone.low_res[0], **TOLERANCE)
    alone = teacher.decode(images[1:], point_prompts(**batched(points=POINTS, labels=LABELS)))
    torch.testing.assert_close(masks.low_res[1], alone.low_res[0], **TOLERANCE)


def test_mask_decoder_gradients_match_segment_anything(teacher: Sam, embedding: Tensor) -> None:
    """For every weight of the mask decoder, although ours computes the products in another order."""
    theirs = segment_anything.modeling.MaskDecoder(
        transformer_dim=256, transformer=segment_anything.modeling.TwoWayTransformer(2, 256, 8, 2048)
    )
    theirs.load_state_dict(teacher.mask_decoder.state_dict())
    ours = copy.deepcopy(teacher.mask_decoder).requires_grad_(True)
    prompts = point_prompts(**batched(points=POINTS, labels=LABELS))
    with torch.no_grad():
        tokens, dense = teacher.prompt_encoder(prompts)
        image_pe = teacher.prompt_encoder.dense_positions()
    masks = ours(embedding, image_pe, tokens, dense, prompts.labels, MULTI)
    pe_map, dense_map = image_pe.T.reshape(1, 256, 64, 64), dense.view(1, 256, 1, 1).expand(2, -1, 64, 64)
    low_res, iou = theirs(embedding, pe_map, tokens[0], dense_map, multimask_output=True)
    (masks.low_res.sigmoid().mean() + masks.iou.mean()).backward()
    (low_res.sigmoid().mean() + iou.mean()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        # The hypernetwork of a token that is not decoded has no gradient in our code, and zeros or none in theirs.
        given = (parameter.grad, expected[name])
        gradient, wanted = (torch.zeros_like(parameter) if g is None else g for g in given)
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-3, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
        )


@torch.no_grad()
def test_masks_below_min_pred_iou_are_zero(teacher: Sam, embedding: Tensor) -> None:
    prompts = point_prompts(**batched(points=POINTS, labels=LABELS))
    everything = teacher.decode(embedding, prompts, MULTI)
    best = everything.iou[0].amax(-1)
    filtered = teacher.decode(embedding, prompts, MULTI, min_pred_iou=float(best.mean()))
    torch.testing.assert_close(filtered.iou, everything.iou, rtol=0, atol=0)
    good = best > best.mean()
    torch.testing.assert_close(filtered.low_res[0, good], everything.low_res[0, good])
    assert not filtered.low_res[0, ~good].any()


def test_student_file_loads_strictly_in_mobile_sam(
    mobile_sam: ModuleType, teacher: Sam, embedding: Tensor, image: Tensor, tmp_path: Any
) -> None:
    checkpoints.save_sam(teacher, tmp_path / "student.pt")
    theirs = mobile_sam.sam_model_registry["vit_t"](checkpoint=str(tmp_path / "student.pt")).train().eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs.image_encoder(theirs.preprocess(image)), embedding, **TOLERANCE)


def randomise(model: torch.nn.Module) -> None:
    """Set all parameters to random values: zero-initialised tables would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)


@pytest.mark.parametrize(
    ("width", "heads", "global_blocks"),
    [(768, 12, [1]), (1024, 16, [1]), (1280, 16, [0])],
    ids=["vit_b", "vit_l", "vit_h"],
)
def test_sam_vit(width: int, heads: int, global_blocks: list[int], image: Tensor, tmp_path: Any) -> None:
    """SAM's ViTs with two blocks: each code loads the other's file strictly and computes the same embedding."""
    theirs = segment_anything.modeling.Sam(
        image_encoder=ImageEncoderViT(
            depth=2, embed_dim=width, num_heads=heads, mlp_ratio=4, qkv_bias=True, use_rel_pos=True, window_size=14,
            global_attn_indexes=global_blocks, norm_layer=lambda n: torch.nn.LayerNorm(n, eps=1e-6), out_chans=256,
        ),
        prompt_encoder=segment_anything.modeling.PromptEncoder(256, (64, 64), (1024, 1024), 16),
        mask_decoder=segment_anything.modeling.MaskDecoder(
            num_multimask_outputs=3, transformer_dim=256, iou_head_depth=3, iou_head_hidden_dim=256,
            transformer=segment_anything.modeling.TwoWayTransformer(2, 256, 8, 2048),
        ),
    )  # fmt: skip
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "official.pth")
    ours = checkpoints.load_sam(tmp_path / "official.pth")
    assert isinstance(ours.image_encoder, SamViT)
    with torch.no_grad():
        expected = theirs.image_encoder(theirs.preprocess(image))
        torch.testing.assert_close(ours.encode(*frame(image)), expected, **TOLERANCE)
    checkpoints.save_sam(ours, tmp_path / "ours.pth")
    theirs.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), strict=True)


@pytest.mark.parametrize("size", ["5m", "11m", "21m"])
def test_tiny_vit_sizes(mobile_sam: ModuleType, size: str, tmp_path: Any) -> None:
    """All three sizes, compared with MobileSAM's TinyViT class at the published dimensions of each size."""
    dims, heads = {
        "5m": ([64, 128, 160, 320], [2, 4, 5, 10]),
        "11m": ([64, 128, 256, 448], [2, 4, 8, 14]),
        "21m": ([96, 192, 384, 576], [3, 6, 12, 18]),
    }[size]
    theirs = mobile_sam.modeling.TinyViT(
        img_size=1024, embed_dims=dims, depths=[2, 2, 6, 2], num_heads=heads, window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    )  # fmt: skip
    ours = Sam(TinyViT(size, pretrained=False)).eval()
    randomise(ours)
    checkpoints.save_sam(ours, tmp_path / "student.pt")
    state = torch.load(tmp_path / "student.pt", weights_only=True)
    encoder = {k.removeprefix("image_encoder."): v for k, v in state.items() if k.startswith("image_encoder.")}
    theirs.load_state_dict(encoder, strict=True)
    theirs.train().eval()
    x = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.image_encoder(x), theirs(x), **TOLERANCE)


def test_attention_biases_are_fresh_after_every_load(teacher: Sam) -> None:
    """Weights that are loaded after a forward pass in eval mode must take effect."""
    student = Sam(TinyViT("5m", pretrained=False)).eval()
    x = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        student.image_encoder(x)
        student.load_state_dict(teacher.state_dict())
        torch.testing.assert_close(student.image_encoder(x), teacher.image_encoder(x), rtol=0, atol=0)
