"""Tests of all strategies: which weights change and which don't, targets, and whether the loss falls."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from sam_distill.errors import UserError
from sam_distill.models.encoders import TinyViT
from sam_distill.models.sam import Sam
from sam_distill.prompts.samplers import Points
from sam_distill.strategies.base import Strategy
from sam_distill.strategies.coupled import Coupled
from sam_distill.strategies.decoupled import Decoupled
from sam_distill.strategies.finetune_decoder import FinetuneDecoder
from sam_distill.strategies.finetune_joint import FinetuneJoint
from sam_distill.strategies.semi_coupled import SemiCoupled
from sam_distill.types import ALL, SINGLE, Batch, Masks, Prompts

ENCODER, DECODER, PROMPTS = "image_encoder.", "mask_decoder.", "prompt_encoder."
UNUSED_PROMPTS = (f"{PROMPTS}mask_downscaling.", f"{PROMPTS}pe_layer.")
STRATEGIES: dict[str, tuple[Strategy, tuple[str, ...]]] = {
    "decoupled": (Decoupled(), (ENCODER,)),
    "semi_coupled": (SemiCoupled(), (ENCODER,)),
    "coupled": (Coupled(), (ENCODER, DECODER)),
    "coupled, teacher's decoder": (Coupled(decoder="teacher"), (ENCODER, DECODER)),
    "coupled, prompts train": (Coupled(prompt_encoder="trains"), (ENCODER, DECODER, PROMPTS)),
    "finetune_decoder": (FinetuneDecoder(), (DECODER,)),
    "finetune_joint": (FinetuneJoint(), (ENCODER, DECODER)),
}


@pytest.fixture(scope="module")
def batch(teacher: Sam) -> Batch:
    """Images of two discs, with the teacher's embedding and masks, and one point prompt per image."""
    y, x = torch.meshgrid(torch.arange(1024), torch.arange(1024), indexing="ij")
    discs = [((x - cx) ** 2 + (y - cy) ** 2 < r**2) & (y < 640) for cx, cy, r in ((300, 300, 200), (600, 350, 250))]
    images = torch.stack([torch.where(disc, 220, 40).to(torch.uint8).expand(3, -1, -1) for disc in discs])
    images[:, :, 640:] = 0
    sizes = torch.tensor([[640, 1024]] * 2)
    with torch.no_grad():
        embedding = teacher.encode(images, sizes)

    def ask(prompts):
        with torch.no_grad():
            return teacher.decode(embedding, prompts, ALL)

    bare = Batch(["a", "b"], images, sizes, sizes, [0, 0], teacher_embedding=embedding, ask_teacher=ask)
    return replace(bare, prompts=Points(count=1, seed=0).draw(bare))


def new_student(teacher: Sam, strategy: Strategy) -> Sam:
    torch.manual_seed(0)
    encoder = TinyViT(pretrained=False)
    student = Sam(encoder, copy.deepcopy(teacher.prompt_encoder), copy.deepcopy(teacher.mask_decoder), image_size=64)
    strategy.prepare(student)
    return student


def freeze(student: Sam, strategy: Strategy) -> list[nn.Parameter]:
    """Freeze all but the trainable parts, as training does; return the trainable parameters."""
    student.requires_grad_(False).eval()
    for part in strategy.trainable(student).values():
        part.requires_grad_(True).train()
    return [p for p in student.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", STRATEGIES)
def test_exactly_the_declared_parts_change(name: str, teacher: Sam, batch: Batch) -> None:
    strategy, expected = STRATEGIES[name]
    student = new_student(teacher, strategy)
    parameters = freeze(student, strategy)
    before = copy.deepcopy(student.state_dict())
    theirs = copy.deepcopy(teacher.state_dict())
    strategy.step(student, batch).loss.backward()
    # Each parameter that requires a gradient must get one, or DDP would wait for it for ever.
    assert all(p.grad is not None for p in parameters)
    torch.optim.SGD(parameters, lr=1.0, weight_decay=0.1).step()
    for key, value in student.state_dict().items():
        trains = key.startswith(expected) and not key.startswith(UNUSED_PROMPTS)
        constant = "attention_bias_idxs" in key or ((value == before[key]).all() and not before[key].any())
        assert torch.equal(value, before[key]) != trains or (trains and constant), key
    assert all(torch.equal(value, theirs[key]) for key, value in teacher.state_dict().items()), (
        "the teacher is untouched"
    )


@pytest.mark.parametrize("name", ["semi_coupled", "coupled", "finetune_decoder", "finetune_joint"])
def test_one_batch_can_be_overfitted(name: str, teacher: Sam, batch: Batch) -> None:
    strategy, _ = STRATEGIES[name]
    student = new_student(teacher, strategy)
    optimizer = torch.optim.AdamW(freeze(student, strategy), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        out = strategy.step(student, batch)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert min(losses[-3:]) < 0.75 * losses[0], losses
    assert out.loss.dtype == torch.float32


def test_coupled_starts_its_decoder_from_scratch_or_not(teacher: Sam) -> None:
    theirs = teacher.mask_decoder.state_dict()
    scratch = new_student(teacher, Coupled()).mask_decoder.state_dict()
    assert not any(torch.equal(scratch[key], value) for key, value in theirs.items() if value.ndim > 1)
    kept = new_student(teacher, Coupled(decoder="teacher")).mask_decoder.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("tokens", ["all", "chosen", "minimum"])
def test_loss_of_a_copy_of_the_teacher_is_small(tokens: str, teacher: Sam, batch: Batch) -> None:
    """Focal and dice loss of confident masks against themselves are small; those of a new student are not."""
    strategy = SemiCoupled(tokens=tokens)  # type: ignore[arg-type]
    with torch.no_grad():
        own = strategy.step(teacher, batch)
        other = strategy.step(new_student(teacher, strategy).eval(), batch)
    assert own.logs["miou"] == pytest.approx(1 if tokens != "minimum" else 0.95, abs=0.06)
    assert own.loss < 0.3 * other.loss


@pytest.mark.parametrize("tokens", ["all", "chosen"])
def test_logged_miou_is_computed_as_in_validation(tokens: str, teacher: Sam, batch: Batch) -> None:
    """IoU of the two masks of token 0 at low resolution; prompts with an empty teacher's mask are left out."""

    def ask(prompts: Prompts) -> Masks:
        masks = batch.ask_teacher(prompts)  # type: ignore[misc]
        low_res = masks.low_res.clone()
        low_res[1, :, 0] = -1
        return Masks(low_res, masks.iou)

    with torch.no_grad():
        student = new_student(teacher, SemiCoupled()).eval()
        out = SemiCoupled(tokens=tokens).step(student, replace(batch, ask_teacher=ask))  # type: ignore[arg-type]
        assert batch.prompts is not None
        answer = student.decode(student.encode(batch.images, batch.sizes), batch.prompts, SINGLE)
        ours, theirs = ((masks.low_res[0, 0, 0, :160] > 0) for masks in (answer, ask(batch.prompts)))
    assert out.logs["miou"].item() == pytest.approx(((ours & theirs).sum() / (ours | theirs).sum()).item(), abs=1e-6)


def test_minimum_loss_follows_sams_rule(teacher: Sam, batch: Batch) -> None:
    """Mean of the losses of token 0 and of the best other token against one target, recomputed mask by mask."""
    from torchvision.ops import sigmoid_focal_loss

    student = new_student(teacher, SemiCoupled()).eval()
    with torch.no_grad():
        out = SemiCoupled(tokens="minimum", mask_loss="focal_dice", iou=0).step(student, batch)
        assert batch.prompts is not None
        assert batch.ask_teacher is not None
        answer = student.decode(student.encode(batch.images, batch.sizes), batch.prompts, ALL).low_res[..., :160, :]
        theirs = batch.ask_teacher(batch.prompts)
    expected = []
    for i in range(2):
        for p in range(1):
            token = 1 + theirs.iou[i, p, 1:].argmax()
            target = (theirs.low_res[i, p, token, :160] > 0).float()
            each = []
            for mask in answer[i, p]:
                overlap, total = (mask.sigmoid() * target).sum(), mask.sigmoid().sum() + target.sum()
                dice = 1 - (2 * overlap + 1) / (total + 1)
                each.append(20 * sigmoid_focal_loss(mask, target, reduction="mean") + dice)
            expected.append((each[0] + min(each[1:])) / 2)
    torch.testing.assert_close(out.loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)


def test_annotations_as_targets(teacher: Sam, batch: Batch) -> None:
    """The teacher is not needed, and missing annotations do not count."""
    annotations = torch.zeros(2, 2, 256, 256, dtype=torch.bool)
    annotations[:, 0, 30:60, 30:90] = True
    with_masks = replace(batch, annotations=annotations, ask_teacher=None, teacher_embedding=None)
    strategy = SemiCoupled(targets="annotations", tokens="minimum")
    assert strategy.requires == {"prompts", "annotations"}
    out = strategy.step(new_student(teacher, strategy).eval(), with_masks)
    assert 0 < out.loss < 20
    with pytest.raises(UserError, match="for targets=annotations take minimum"):
        SemiCoupled(targets="annotations")


def test_rounds_add_clicks(teacher: Sam, batch: Batch) -> None:
    """In each round student and teacher decode again, with one more point where the student was wrong."""
    asked = []

    def ask(prompts):
        asked.append(prompts)
        return batch.ask_teacher(prompts)  # type: ignore[misc]

    strategy = SemiCoupled(rounds=3)
    student = new_student(teacher, strategy).eval()
    with torch.no_grad():
        strategy.step(student, replace(batch, ask_teacher=ask))
        first_prompts, asked = asked, []
        strategy.step(student, replace(batch, ask_teacher=ask))
    assert [prompts.labels.shape[-1] for prompts in asked] == [2, 3, 4]
    assert all(torch.equal(a.points, b.points) for a, b in zip(asked, first_prompts, strict=True))
    assert (asked[1].points[:, :, 1:] == asked[0].points).all()
