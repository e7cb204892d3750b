import sys

import pytest
import torch

from sam_distill.errors import UserError
from sam_distill.inference.optimize import optimize_for_inference
from sam_distill.models.encoders import ImageEncoder, TimmEncoder, TinyViT
from sam_distill.models.sam import Sam


@pytest.mark.parametrize("encoder", [TinyViT(pretrained=False), TimmEncoder("efficientnet_lite0", pretrained=False)])
def test_embeddings_stay_the_same(encoder: ImageEncoder) -> None:
    pytest.importorskip("openvino", reason="needs openvino: docs/use.md")
    sam = Sam(encoder, image_size=128).eval()
    images = torch.randint(256, (2, 3, 1024, 1024), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sizes = torch.tensor([[1024, 700], [333, 1024]])
    fast = optimize_for_inference(sam, "openvino")
    expected = sam.encode(images, sizes).detach()
    torch.testing.assert_close(fast.encode(images, sizes), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = fast.encode(images, sizes)
    assert rough.dtype == torch.float32
    assert torch.cosine_similarity(rough, expected, dim=1).mean() > 0.999


def test_missing_openvino_raises_error_with_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install"):
        optimize_for_inference(Sam(TinyViT(pretrained=False), image_size=64), "openvino")
