import gzip
from functools import partial
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import save_file

from sam_distill.errors import UserError
from sam_distill.export.official import save_safetensors
from sam_distill.models import checkpoints
from sam_distill.models.encoders import TimmEncoder, TinyViT
from sam_distill.models.sam import Sam


def test_official_names_and_tensors_survive_a_round_trip(teacher: Sam, mobile_sam_weights: str) -> None:
    official = torch.load(mobile_sam_weights, weights_only=True)
    ours = checkpoints.official_state(teacher)
    assert ours.keys() == official.keys()
    for key, value in official.items():
        if "image_encoder.head" not in key and "image_encoder.norm_head" not in key:
            assert torch.equal(ours[key], value), key
        assert ours[key].shape == value.shape


def test_another_architecture_is_refused(mobile_sam_weights: str) -> None:
    with pytest.raises(UserError, match=r"holds the encoder TinyViT\(size=5m\), but this is TinyViT\(size=11m\)"):
        checkpoints.load_weights(Sam(TinyViT("11m", pretrained=False)), mobile_sam_weights)


def test_a_file_with_tensors_missing_is_refused(teacher: Sam, tmp_path: Path) -> None:
    state = checkpoints.official_state(teacher)
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(UserError, match=r"1 tensors missing \(mask_decoder.iou_token.weight, \.\.\.\)"):
        checkpoints.load_sam(tmp_path / "broken.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_refused(teacher: Sam, tmp_path: Path, value: float) -> None:
    """Such a model would score 0 without any message."""
    state = checkpoints.official_state(teacher)
    state["image_encoder.neck.0.weight"] = torch.full_like(state["image_encoder.neck.0.weight"], value)
    torch.save(state, tmp_path / "broken.pt")
    for load in (checkpoints.load_sam, partial(checkpoints.load_weights, teacher)):
        with pytest.raises(UserError, match=r"NaN or infinity in 1 tensors \(image_encoder.neck.reduce.0.weight"):
            load(tmp_path / "broken.pt")


def test_file_format_is_detected_whatever_the_suffix(tmp_path: Path) -> None:
    sam = Sam(TimmEncoder("resnet18", pretrained=False))
    save_safetensors(sam, tmp_path / "tensors.pt")
    checkpoints.save_sam(sam, tmp_path / "pickled.safetensors")
    for name in ("tensors.pt", "pickled.safetensors"):
        loaded = checkpoints.load_sam(tmp_path / name).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in sam.state_dict().items())


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.pt").write_text("hello")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 JFIF")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save({"patch_embed.weight": torch.zeros(1)}, tmp_path / "encoder.pt")
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "nested.pt")
    torch.save({f"{part}.a": torch.zeros(1) for part in ("image_encoder", "mask_decoder")}, tmp_path / "sam3.pt")
    (tmp_path / "sam.tar.gz").write_bytes(gzip.compress(b"whatever"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.pt").touch()
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pt")
    torch.save({"image_encoder.patch_embed.seq.0.c.weight": 1, "image_encoder.neck.0.weight": 2}, tmp_path / "ints.pt")
    torch.save({checkpoints.DESCRIPTION: {}, "state_dict": 3}, tmp_path / "strange.ckpt")
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors", {checkpoints.DESCRIPTION: "{nope"})
    save_file({"a": torch.zeros(1)}, tmp_path / "list.safetensors", {checkpoints.DESCRIPTION: "[1]"})
    for name, complaint in {
        "photo.jpg": r"photo.jpg is not a PyTorch checkpoint that loads safely \(Weights only load failed\)$",
        "notes.pt": r"not a PyTorch checkpoint that loads safely \([A-Za-z]{3}",
        "nothing.pt": "nothing.pt is empty",
        "numbers.pt": "holds a dict, not a state dict, which is tensors by their names",
        "ints.pt": "holds no SAM we know: an image encoder alone, it seems",
        "strange.ckpt": "holds no SAM we know",
        "no.safetensors": "is not a safetensors file",
        "list.safetensors": r"describes its model as no version of sam-distill does \(\[1\]\)",
        "encoder.pt": r"an image encoder alone, it seems \(patch_embed.weight, ...\), without prompt_encoder",
        "nested.pt": "it holds model and other things, not the tensors themselves: save model alone",
        "sam3.pt": "holds no SAM we know: its tensors match neither",
        "sam.tar.gz": "sam.tar.gz is compressed with gzip: unpack it first",
        "empty": "not a run folder",
        "mobil_sam": "neither a file, a run folder nor a name",
    }.items():
        with pytest.raises(UserError, match=complaint):
            checkpoints.load_sam(tmp_path / name)
        with pytest.raises(UserError, match=complaint):
            checkpoints.load_weights(Sam(TimmEncoder("resnet18", pretrained=False)), tmp_path / name)
    with pytest.raises(UserError, match="did you mean mobile_sam"):
        checkpoints.load_sam("mobil_sam")


@pytest.mark.parametrize("encoder", [{"class": "Later"}, {"class": "TinyViT", "later": 1}, {}])
def test_checkpoint_of_a_later_version_is_refused(tmp_path: Path, encoder: dict[str, object]) -> None:
    held = {"state_dict": {}, checkpoints.DESCRIPTION: {"encoder": encoder, "image_size": 64}}
    torch.save(held, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="holds a model that this version of sam-distill can't build"):
        checkpoints.load_sam(tmp_path / "last.ckpt")


def test_file_from_before_the_neck_option_has_a_coarse_neck(tmp_path: Path) -> None:
    sam = Sam(TimmEncoder("resnet18", pretrained=False, neck="coarse"), image_size=64)
    description = {"encoder": {"class": "TimmEncoder", "name": "resnet18"}, "image_size": 64}
    held = {
        "state_dict": {f"student.{k}": v for k, v in sam.state_dict().items()},
        checkpoints.DESCRIPTION: description,
    }
    torch.save(held, tmp_path / "last.ckpt")
    assert not checkpoints.load_sam(tmp_path / "last.ckpt").image_encoder.fine_neck
    checkpoints.load_weights(sam, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="holds the encoder TimmEncoder"):
        checkpoints.load_weights(Sam(TimmEncoder("resnet18", pretrained=False), image_size=64), tmp_path / "last.ckpt")


def test_a_foreign_loader_sees_a_plain_state_dict(tmp_path: Path) -> None:
    """The model description in the file must not break strict loading by other code."""
    sam = Sam(TimmEncoder("resnet18", pretrained=False))
    checkpoints.save_sam(sam, tmp_path / "student.pt")
    state = torch.load(tmp_path / "student.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    Sam(TimmEncoder("resnet18", pretrained=False)).load_state_dict(state, strict=True)


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sam = Sam(TimmEncoder("resnet18", pretrained=False))
    checkpoints.save_sam(sam, tmp_path / "student.pt")
    before = (tmp_path / "student.pt").read_bytes()

    def write_half(_: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save_sam(sam, tmp_path / "student.pt")
    assert (tmp_path / "student.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt"]
