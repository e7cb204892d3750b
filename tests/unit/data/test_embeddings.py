import pytest
import torch

from sam_distill.data.embeddings import Dtype, pack, unpack
from sam_distill.errors import UserError
from sam_distill.types import valid_area

SIZE = (683, 1024)  # 3:2
NOISE = torch.randn(256, 64, 64, generator=torch.Generator().manual_seed(0))
EMBEDDING = NOISE * torch.linspace(0.01, 3, 256)[:, None, None]


@pytest.mark.parametrize(("dtype", "megabytes"), [("int8", 0.72), ("fp16", 1.44), ("fp32", 4.2)])
@pytest.mark.parametrize("size", [SIZE, SIZE[::-1]], ids=["landscape", "portrait"])
def test_packed_size_and_rounding_error(dtype: Dtype, megabytes: float, size: tuple[int, int]) -> None:
    """At most 0.72 MB for a 3:2 image, as int8, which has a scale per channel."""
    content = pack(EMBEDDING, size, dtype)
    assert len(content) <= megabytes * 1e6
    error = (unpack(content, "a") - EMBEDDING).abs() * valid_area(torch.tensor([size]), 64)[0]
    step = EMBEDDING.abs().amax((1, 2)) / 127
    allowed = {"int8": 0.56 * step, "fp16": 5e-4 * 127 * step, "fp32": 0 * step}[dtype]
    assert (error.amax((1, 2)) <= allowed).all()


def test_padding_is_averaged_over_blocks_except_in_fp32() -> None:
    blocks = torch.arange(7 * 8.0).view(7, 8).repeat_interleave(3, 0).repeat_interleave(8, 1)  # blocks of 3 x 8 cells
    embedding = EMBEDDING.clone()
    embedding[:, 43:] = blocks
    torch.testing.assert_close(unpack(pack(embedding, SIZE, "fp16"), "a")[:, 43:], embedding[:, 43:])
    upright = embedding.transpose(1, 2)
    torch.testing.assert_close(unpack(pack(upright, SIZE[::-1], "fp16"), "a")[:, :, 43:], upright[:, :, 43:])
    assert torch.equal(unpack(pack(EMBEDDING, SIZE, "fp32"), "a"), EMBEDDING)


@pytest.mark.parametrize("size", [(1024, 1024), (1, 1024), (1023, 1024), (1024, 7)])
def test_any_shape_of_image(size: tuple[int, int]) -> None:
    assert unpack(pack(EMBEDDING, size, "int8"), "a").shape == (256, 64, 64)


def test_a_channel_of_zeros() -> None:
    assert not unpack(pack(torch.zeros(256, 64, 64), SIZE, "int8"), "a").any()


@pytest.mark.parametrize("damaged", [b"", b"no embedding", pack(EMBEDDING, SIZE, "int8")[:-5]])
def test_damaged_embedding_is_a_one_line_error(damaged: bytes) -> None:
    with pytest.raises(UserError, match=r"^sa_1.embedding: not an embedding"):
        unpack(damaged, "sa_1.embedding")
