"""Exported checkpoints, loaded by the code that they are made for."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import segment_anything
import torch

from sam_distill.data.photos import photo
from sam_distill.errors import UserError
from sam_distill.export.official import save_official, save_safetensors
from sam_distill.models.checkpoints import describe, load_sam
from sam_distill.models.encoders import SamViT, TimmEncoder, TinyViT
from sam_distill.models.sam import Sam
from sam_distill.predict.predictor import SamPredictor


def test_mobile_sams_own_predictor_gives_the_same_masks(mobile_sam: ModuleType, teacher: Sam, tmp_path: Path) -> None:
    assert save_official(teacher, tmp_path / "student.pt", "mobile_sam") == "vit_t"
    theirs = mobile_sam.SamPredictor(mobile_sam.sam_model_registry["vit_t"](checkpoint=tmp_path / "student.pt").eval())
    ours = SamPredictor(teacher)
    image = np.asarray(photo("coffee.png"))
    for predictor in (theirs, ours):
        predictor.set_image(image)
    for prompt in (
        {"point_coords": np.array([[300, 200]]), "point_labels": np.array([1])},
        {"box": np.array([60, 40, 500, 350])},
    ):
        expected, iou, _ = theirs.predict(**prompt)
        masks, our_iou, _ = ours.predict(**prompt)
        assert (masks == expected).mean() > 0.9999
        np.testing.assert_allclose(our_iou, iou, atol=1e-3)


def test_sams_own_code_loads_a_vit_b(tmp_path: Path) -> None:
    vit_b = SamViT(width=768, depth=12, heads=12, global_blocks=[2, 5, 8, 11])
    assert save_official(Sam(vit_b), tmp_path / "student.pth", "sam") == "vit_b"
    theirs = segment_anything.sam_model_registry["vit_b"](checkpoint=tmp_path / "student.pth")
    assert torch.equal(theirs.image_encoder.blocks[11].mlp.lin1.weight, vit_b.backbone.blocks[11].mlp.fc1.weight)


def test_layout_must_fit_the_encoder(tmp_path: Path) -> None:
    path = tmp_path / "student.pt"
    with pytest.raises(UserError, match=r"format=mobile_sam is for .*TinyViT\(size=11m\): take format=onnx or"):
        save_official(Sam(TinyViT("11m", pretrained=False)), path, "mobile_sam")
    with pytest.raises(UserError, match=r"format=sam is for .*TinyViT\(size=5m\): take format=mobile_sam"):
        save_official(Sam(TinyViT("5m", pretrained=False)), path, "sam")
    assert not path.exists()


def test_safetensors_are_loaded_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    sam = Sam(TimmEncoder("resnet18", pretrained=False), image_size=256)
    save_safetensors(sam, path)
    again = load_sam(path)
    assert describe(again) == describe(sam)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in sam.state_dict().items())
    whole = path.stat().st_size
    save_safetensors(sam, path, half=True)
    assert path.stat().st_size < 0.51 * whole
    for key, value in load_sam(path).state_dict().items():
        torch.testing.assert_close(value, sam.state_dict()[key], rtol=1e-3, atol=1e-6)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_sam(path)
