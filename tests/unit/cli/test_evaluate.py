from pathlib import Path

import pytest

from sam_distill.cli.evaluate import _data, _seen_in_training


@pytest.mark.parametrize("content", ["", "- a", "data: photos", "{", "data: {path: null}"])
def test_config_yaml_without_data_is_ignored(tmp_path: Path, content: str) -> None:
    """The config.yaml beside a checkpoint may belong to any program."""
    (tmp_path / "config.yaml").write_text(content)
    assert _data(tmp_path) == ([], None)


def test_data_options_are_read_from_the_run_folder(tmp_path: Path) -> None:
    assert _data(tmp_path) == ([], None)
    (tmp_path / "config.yaml").write_text("data: {path: [/a, /b], val_images: 4}")
    assert _data(tmp_path) == (["/a", "/b"], 4)


def test_warning_if_images_may_have_been_trained_on(tmp_path: Path) -> None:
    """If another number of images is held out now, some of them are training images of the run."""
    run, now = tmp_path / "run", tmp_path / "now"
    for folder, data in ((run, "{path: /a, val_images: 4}"), (now, "{path: /a, val_images: 16}")):
        folder.mkdir()
        (folder / "config.yaml").write_text(f"data: {data}")
    assert "split=val does not" in _seen_in_training(str(run), "all", now)
    assert "holds 16 images out, but" in (line := _seen_in_training(str(run), "val", now))
    assert "was trained with data.val_images=4" in line
    assert _seen_in_training(str(run), "val", run) == ""
    (now / "config.yaml").write_text("data: {path: /b, val_images: 16}")
    assert _seen_in_training(str(run), "val", now) == _seen_in_training("mobile_sam", "all", now) == ""
