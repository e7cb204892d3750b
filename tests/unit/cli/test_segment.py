import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_distill.cli.segment import _save


def test_a_full_disk_leaves_the_earlier_picture(tmp_path: Path) -> None:
    target, limits = tmp_path / "seen.png", resource.getrlimit(resource.RLIMIT_FSIZE)
    target.write_text("earlier")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            _save(picture, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("seen.png", "earlier")]
    _save(picture, target)
    assert Image.open(target).size == (90, 90)
