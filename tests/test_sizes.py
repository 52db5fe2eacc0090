"""Sizes of original images, and the messages about cropping and resizing them."""

import logging
import zipfile

import numpy as np
import pytest
from data_files import encoded, pictures, tiff
from PIL import ExifTags, Image
from test_small_runs import tiny

import datasets
import run_lib
from configs.pfgmpp import images16_ddpmpp
from sources import sizes
from sources.folder import open_folder

SHAPES = [(20, 20), (20, 31), (9, 9), (16, 16), (8, 40), (300, 200)]


def configured(path, size=16):
    config = images16_ddpmpp.get_config()
    config.data.path, config.data.image_size, config.data.num_channels = str(path), size, 3
    config.data.num_workers = 0
    return config


def write(folder, shapes=SHAPES):
    """Images of `shapes` to train on, and one to test on."""
    for split, split_shapes in (("train", shapes), ("test", shapes[:1])):
        (folder / split).mkdir(parents=True)
        for i, (height, width) in enumerate(split_shapes):
            content = encoded(pictures(1, height, width)[0])
            (folder / split / f"{i:03}.png").write_bytes(content)
    return folder


def described(path, size=16):
    config = configured(path, size)
    data = datasets.Data(config.data)
    return data.describe(data.get("train"), data.get("test"))


@pytest.mark.parametrize("packed", [False, True])
def test_the_data_line_counts_what_is_cut_and_resized(tmp_path, packed):
    path = write(tmp_path / "photos")
    if packed:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
            for member in sorted(path.rglob("*.png")):
                file.write(member, member.relative_to(path).as_posix())
        path = tmp_path / "photos.zip"
    line = described(path)
    assert "; made of 9 x 9 to 300 x 200 pixels: " in line
    assert "3 of 6 cut to the central square" in line
    assert "3 of 6 reduced to 16 x 16" in line
    assert "2 of 6 enlarged to 16 x 16" in line
    assert "\n" not in line


def test_images_of_the_configured_size_need_no_words(tmp_path):
    assert "made of" not in described(write(tmp_path / "photos", [(16, 16)] * 3))


@pytest.mark.parametrize("shape, words", [((12, 16), "4 of 4 cut"), ((9, 9), "4 of 4 enlarged")])
def test_arrays_say_it_too(tmp_path, shape, words):
    np.save(tmp_path / "images.npy", pictures(5, *shape))
    line = described(tmp_path / "images.npy")
    assert f"made of {shape[0]} x {shape[1]} pixels: {words}" in line


def test_of_many_images_a_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "FEW", 20)
    monkeypatch.setattr(sizes, "SAMPLED", 5)
    path = write(tmp_path / "photos", [(20, 20 + i % 2) for i in range(21)])
    assert "of those looked at, 5 in all: 2 of 5 cut" in described(path)


def test_a_damaged_image_is_not_counted(tmp_path):
    path = write(tmp_path / "photos")
    (path / "train/001.png").write_bytes(b"no image")
    assert "2 of 5 cut to the central square" in described(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_in_headers_are_those_of_decoded_images(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name in "ab":
        image = Image.fromarray(pictures(1, 20, 30)[0])
        image.save(tmp_path / f"{name}.{kind.lower()}", kind, exif=exif)
    view = open_folder(configured(tmp_path).data, "train")
    (size,) = sizes.sizes_of(view)
    assert sorted(size) == [20, 30]
    if kind != "PNG":
        assert size == view.source[0].shape[:2]


def test_a_size_behind_the_pixels_is_found(tmp_path):
    """The size is read from a TIFF whose directory follows its pixels."""
    for name in "ab":
        (tmp_path / f"{name}.tif").write_bytes(tiff(pictures(1, 300, 200)[0]))
    view = open_folder(configured(tmp_path).data, "train")
    assert sizes.sizes_of(view) == [(300, 200)]


def test_images_to_restore_of_any_size_are_said(tmp_path, caplog):
    """One line for each kind of mismatch; images of the right size need none."""
    caplog.set_level(logging.INFO)
    config = tiny("edm/digits_ddpmpp.py", tmp_path)
    assert run_lib.train(config, tmp_path / "run")
    (tmp_path / "images").mkdir()
    for i, shape in enumerate([(8, 8), (4, 4), (9, 12), (30, 30)]):
        image = encoded(pictures(1, *shape, channels=1)[0, ..., 0])
        (tmp_path / f"images/{i}.png").write_bytes(image)
    config.eval.enable_loss = config.eval.enable_sampling = False
    config.sampling.update(restore="inpaint", restore_mask="0,0,4,4", ode_solver="heun")

    def lines(path):
        caplog.clear()
        config.sampling.restore_path = str(tmp_path / path)
        run_lib.evaluate(config, tmp_path / "run")
        messages = [r.getMessage() for r in caplog.records]
        return [line for line in messages if line.startswith("sampling.restore_path")]

    start = "sampling.restore_path, images of 4 x 4 to 30 x 30 pixels: "
    assert lines("images") == [
        start + "1 of 4 cut to the central square",
        start + "2 of 4 reduced to 8 x 8",
        start + "1 of 4 enlarged to 8 x 8",
    ]
    assert lines("images/0.png") == []
