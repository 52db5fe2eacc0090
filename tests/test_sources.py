"""Data read from disk against those written, by other programs where there are any."""

import io
import itertools
import json
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, run_program
from data_files import (
    encoded,
    example,
    pictures,
    stylegan_example,
    tfrecord,
    write_tree,
    write_zip,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from warm_start import Program

import datasets
from configs.poisson import digits_ddpmpp
from sources import files, folder, stylegan, tfrecords
from sources.base import Unreadable
from sources.codec import from_config as get_codec
from sources.images import (
    cropped_then_resized,
    decode_image,
    face,
    resized_then_cropped,
    resized_whole,
)
from sources.preparation import Preparation
from sources.splits import held_out


def config_of(dataset, size=8, channels=3, **data):
    config = digits_ddpmpp.get_config()
    config.data.update({"dataset": dataset, "image_size": size, "num_channels": channels, **data})
    return config


def all_of(source):
    return np.stack([source[i] for i in range(len(source))])


def both_splits(config):
    """Train and test images, (n, C, H, W), as one set of byte strings and their numbers."""
    splits = [datasets.get_dataset(config, split)[:] for split in ("train", "test")]
    return [image.numpy().tobytes() for split in splits for image in split], map(len, splits)


# --- cutting and resizing -------------------------------------------------------------------------


def reference_resize(image, size, kernel, support):
    """The definition of an antialiased resize: a kernel as wide as a new pixel, in float64."""

    def matrix(n):
        scale = max(n / size, 1)
        centers = (np.arange(size)[:, None] + 0.5) * n / size
        weights = kernel((np.arange(n) + 0.5 - centers) / scale)
        weights[np.abs((np.arange(n) + 0.5 - centers) / scale) >= support] = 0
        return weights / weights.sum(1, keepdims=True)

    rows, columns = matrix(image.shape[0]), matrix(image.shape[1])
    return np.einsum("hi,wj,ijc->hwc", rows, columns, image.astype(float)).clip(0, 255)


def triangle(x):
    return np.maximum(1 - np.abs(x), 0)


def cubic(x):
    """Keys' kernel with a = -1/2, the bicubic of tf.image.resize with antialias."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@pytest.mark.parametrize("channels", [1, 3])
def test_published_crops(channels):
    (image,) = pictures(1, 218, 178, channels)
    (wide,) = pictures(1, 100, 151, channels)
    expected = {
        "face": reference_resize(image[39:179, 19:159], 64, triangle, 1),
        "whole": reference_resize(image, 32, triangle, 1),
        "lsun": reference_resize(wide[:, 25:125], 48, cubic, 2),
    }
    actual = {
        "face": face(image, 64),
        "whole": resized_whole(image, 32),
        "lsun": cropped_then_resized(wide, 48),
    }
    for name, pixels in actual.items():
        assert pixels.dtype == np.uint8
        assert np.abs(pixels - expected[name]).max() <= 1.5  # rounded after each direction
        assert np.abs(pixels - expected[name]).mean() < 0.35


def test_the_shorter_side_then_the_centre():
    columns = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (50, 100, 3))
    out = resized_then_cropped(columns, 25)
    assert out.shape == (25, 25, 3)
    assert abs(out[0, 0, 0].astype(int) - 25) <= 2  # every second column, from a quarter on
    assert abs(out[0, -1, 0].astype(int) - 74) <= 2


# --- image files ----------------------------------------------------------------------------------


def test_modes_become_grey_or_rgb():
    (rgb,) = pictures(1)
    grey = rgb[..., 0]
    assert (decode_image(encoded(rgb), 3) == rgb).all()
    assert (decode_image(encoded(grey), 3) == grey[..., None]).all()
    assert (decode_image(encoded(grey), 1)[..., 0] == grey).all()
    luma = rgb @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(decode_image(encoded(rgb), 1)[..., 0] - luma).max() <= 1
    assert (decode_image(encoded(grey.astype(np.uint16) * 257), 1)[..., 0] == grey).all()
    assert (decode_image(encoded(rgb, "WEBP", lossless=True), 3) == rgb).all()


def test_grey_is_found_where_no_channels_are_asked_for():
    (rgb,) = pictures(1)
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    assert (decode_image(encoded(rgb), 0) == rgb).all()
    assert (decode_image(encoded(grey), 0) == grey[..., :1]).all()
    assert (decode_image(encoded(grey[..., 0]), 0) == grey[..., :1]).all()
    grey_jpeg = decode_image(encoded(grey, "JPEG"), 0)
    assert grey_jpeg.shape == (8, 8, 1)  # its chroma is exactly neutral


def test_what_is_transparent_becomes_white():
    (rgba,) = pictures(1, channels=4)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(decode_image(encoded(rgba), 3) - expected).max() <= 1


def test_photographs_are_upright():
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    stored = encoded(np.rot90(upright), "JPEG", exif=exif, quality=95)
    decoded = decode_image(stored, 3)
    assert decoded.shape == (16, 24, 3)
    assert np.abs(decoded.astype(int) - upright).max() < 40


def test_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)  # for Pillow a warning up to twice as many
    with pytest.raises(Image.DecompressionBombWarning):
        decode_image(encoded(pictures(1)[0]), 3)


FORMATS_AND_MODES = set(
    itertools.product(("BMP", "TIFF", "GIF", "PNG", "WEBP"), ("RGB", "L", "1", "P", "RGBA", "LA"))
) - {("BMP", "LA")}


@pytest.mark.parametrize(("format", "mode"), sorted(FORMATS_AND_MODES))
def test_formats_and_modes(format, mode):
    """Formats that lose are compared with the image that Pillow reads back, over white."""
    (rgba,) = pictures(1, 8, 11, 4)
    rgba[..., 3] = np.where(rgba[..., 3] < 128, 0, 255)
    stored = Image.fromarray(rgba if "A" in mode else rgba[..., :3]).convert(mode)
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    file = io.BytesIO()
    stored.save(file, format, **options)
    back = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", back.size, "white")
    expected = np.asarray(Image.alpha_composite(white, back).convert("RGB"))
    assert (decode_image(file.getvalue(), 3) == expected).all()
    grey = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
    assert np.abs(decode_image(file.getvalue(), 1).astype(int) - grey).max() <= 1
    assert decode_image(file.getvalue(), 0).shape[2] == (1 if mode in ("L", "1", "LA") else 3)


def test_the_first_page_and_the_first_frame():
    first, second = (Image.fromarray(x).quantize(64) for x in pictures(2))
    expected = np.asarray(first.convert("RGB"))
    for format in ("TIFF", "GIF"):
        file = io.BytesIO()
        first.save(file, format, save_all=True, append_images=[second])
        assert (decode_image(file.getvalue(), 3) == expected).all()


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_inks_become_colours(format):
    """Flat patches, which JPEG keeps: cyan has no red, and so on; black ink darkens them all."""
    inks = np.array([[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 128]], np.uint8)
    patches = Image.fromarray(inks.repeat(16, 0)[:, None].repeat(16, 1), "CMYK")
    file = io.BytesIO()
    patches.save(file, format)
    rgb = decode_image(file.getvalue(), 3)[8::16, 8].astype(int)
    expected = [[0, 255, 255], [255, 0, 255], [255, 255, 0], [127, 127, 127]]
    assert np.abs(rgb - expected).max() <= 3
    assert decode_image(file.getvalue(), 1).shape == (64, 16, 1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_scans_are_upright(orientation, bits):
    """EXIF's table says what row 0 and column 0 of the file are in the image."""
    stored = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored[::-1].T,
        7: stored[::-1, ::-1].T,
        8: stored.T[::-1],
    }[orientation]
    values = stored if bits == 8 else stored * np.uint16(257)
    data = encoded(values, "TIFF", tiffinfo={0x0112: orientation})
    assert np.array_equal(decode_image(data, 1, (0, 65535))[..., 0], upright)


@pytest.mark.parametrize("format", ["EPS", "ICO", "PPM", "TGA", "PCX"])
def test_other_formats_are_refused(format):
    with pytest.raises(ValueError, match="no PNG, JPEG or WebP file, nor a BMP, TIFF or GIF"):
        decode_image(encoded(pictures(1)[0], format), 3)


@pytest.mark.parametrize("format", ["TIFF", "BMP", "GIF"])
def test_too_many_pixels_of_any_format(monkeypatch, format):
    stored = encoded(pictures(1)[0], format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    with pytest.raises(Image.DecompressionBombWarning):
        decode_image(stored, 3)


def test_trees_and_zips_hold_the_same(tmp_path):
    images = pictures(20)
    write_tree(tmp_path / "faces", images, "{i:03d}/image.PNG")
    (tmp_path / "faces/notes.txt").write_text("no image")
    (tmp_path / "faces/000/._image.png").write_text("what macOS leaves")
    write_zip(tmp_path / "faces.zip", tmp_path / "faces")
    for path in (tmp_path / "faces", tmp_path / "faces.zip"):
        contents, sizes = both_splits(config_of("folder", path=str(path)))
        assert sorted(contents) == sorted(i.transpose(2, 0, 1).tobytes() for i in images)
        train, test = sizes
        assert (train + test, test > 0) == (20, True)


SPLIT_NAMES = [("train", "test"), ("Train", "VAL"), ("TRAIN", "valid"), ("train", "Validation")]
SPLIT_NAMES += [("training", "testing"), ("train_images", "Dev"), ("Train2017", "held-out")]


def write_splits(root, **splits):
    """A tree, zip and npz of the images of each split; their paths by kind."""
    for name, images in splits.items():
        write_tree(root / "data" / name, images)
    write_zip(root / "data.zip", root / "data")
    np.savez(root / "data.npz", **splits)
    return {"tree": root / "data", "zip": root / "data.zip", "npz": root / "data.npz"}


@pytest.mark.parametrize("kind", ["tree", "zip", "npz"])
@pytest.mark.parametrize("train, test", SPLIT_NAMES)
def test_named_splits_are_used(tmp_path, kind, train, test):
    images = pictures(9)
    path = write_splits(tmp_path, **{train: images[:6], test: images[6:]})[kind]
    config = config_of("folder", path=str(path))
    for split, expected in (("train", images[:6]), ("test", images[6:])):
        data = datasets.get_dataset(config, split)
        assert (data.permute(0, 2, 3, 1).numpy() == expected).all()
    assert folder.find(config.data).split_names == {"train": train, "test": test}


@pytest.mark.parametrize("kind", ["tree", "zip", "npz"])
def test_one_of_several_splits_is_tested_on(tmp_path, kind):
    images = pictures(10)
    splits = {"train": images[:6], "val": images[6:7], "valid": images[7:8]}
    splits |= {"validation": images[8:9], "Test": images[9:]}
    for name, number in (("Test", 9), ("validation", 8), ("valid", 7), ("val", 6)):
        path = write_splits(tmp_path / name, **splits)[kind]
        config = config_of("folder", path=str(path))
        data = datasets.get_dataset(config, "test")
        assert (data.permute(0, 2, 3, 1).numpy() == images[number : number + 1]).all()
        assert len(datasets.get_dataset(config, "train")) == 6
        splits.pop(name)


@pytest.mark.parametrize("names", [("train", "other"), ("trains", "tested"), ("a", "val")])
def test_other_folders_are_not_splits(tmp_path, names, caplog):
    for number, name in enumerate(names):
        write_tree(tmp_path / name, pictures(10, seed=number))
    config = config_of("folder", path=str(tmp_path))
    assert folder.find(config.data).split_names == {}
    assert sum(both_splits(config)[1]) == 20
    assert not caplog.records


@pytest.mark.parametrize("names", [("a_train", "b_test"), ("trainA", "testB"), ("train", "test 1")])
def test_what_looks_like_a_split_is_named_in_a_warning(tmp_path, names, caplog):
    for number, name in enumerate(names):
        write_tree(tmp_path / name, pictures(10, seed=number))
    assert sum(both_splits(config_of("folder", path=str(tmp_path)))[1]) == 20
    (record,) = caplog.records  # once, though both splits were opened
    assert f"{names[0]} and {names[1]} look like a split" in record.getMessage()


@pytest.mark.parametrize("kind", ["tree", "zip", "npz", "npy"])
@pytest.mark.parametrize("has_splits", [True, False])
def test_the_log_says_what_is_trained_on(tmp_path, kind, has_splits):
    images = pictures(20)
    share = (
        "a random tenth is held out" if kind in ("npz", "npy") else "a tenth is held out by names"
    )
    split_text = f"{{}} images to train on and {{}} to test on ({share})"
    if kind == "npy":
        path = tmp_path / "data.npy"
        np.save(path, images)
    elif has_splits:
        path = write_splits(tmp_path, Train=images[:13], VAL=images[13:])[kind]
        split_text = "13 images to train on and 7 to test on (Train and VAL)"
    else:
        path = write_splits(tmp_path, all=images)[kind]
    config = config_of("folder", path=str(path), random_flip=has_splits)
    train, test = (datasets.get_dataset(config, split) for split in ("train", "test"))
    split_text = split_text.format(len(train), len(test))
    mirrored = "mirrored at random" if has_splits else "not mirrored"
    changed = Preparation.from_config(config, get_codec(config), False).words
    assert datasets.Data(config.data).describe(train, test, changed) == (
        f"data: {path}, {split_text}, 8 x 8, 3 channels, {mirrored} (data.random_flip)"
    )


# --- the number of channels -----------------------------------------------------------------------


def test_grey_files_are_measured_as_grey(tmp_path):
    grey = pictures(30, channels=1)
    stored = np.repeat(grey, 3, axis=3)
    write_tree(tmp_path / "x", [*stored[:20], *(encoded(i[..., 0]) for i in grey[20:])])
    write_zip(tmp_path / "x.zip", tmp_path / "x")
    for path in (tmp_path / "x", tmp_path / "x.zip"):
        config = config_of("folder", channels=0, path=str(path))
        assert datasets.Data(config.data).measure_channels() == 1
        contents, sizes = both_splits(config)
        assert sorted(contents) == sorted(image.tobytes() for image in grey)
        assert sum(sizes) == 30
    assert config.data.num_channels == 0  # left as it is


@pytest.mark.parametrize("at", [0, 17, 39])
def test_one_colour_image_makes_three_channels(tmp_path, at):
    images = np.repeat(pictures(40, channels=1), 3, axis=3)
    images[at, 3, 4, 2] ^= 1
    write_splits(tmp_path, train=images, test=images[:1])
    config = config_of("folder", channels=0, path=str(tmp_path / "data"))
    assert datasets.Data(config.data).measure_channels() == 3
    assert datasets.get_dataset(config, "train").shape == (40, 3, 8, 8)


def test_files_are_measured_whatever_the_config_says(tmp_path):
    write_tree(tmp_path / "x", pictures(4))
    for channels in (0, 1, 3):
        config = config_of("folder", channels=channels, path=str(tmp_path / "x"))
        assert datasets.Data(config.data).measure_channels() == 3


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_arrays_have_the_channels_of_their_last_axis(tmp_path, name, channels):
    images = np.full((10, 8, 8, channels), 7, np.uint8)  # grey, but that is not what counts
    np.save(tmp_path / name, images) if name == "x.npy" else np.savez(tmp_path / name, images)
    config = config_of("folder", channels=0, path=str(tmp_path / name))
    assert datasets.Data(config.data).measure_channels() == channels
    assert datasets.get_dataset(config, "train").shape == (9, channels, 8, 8)


def test_stored_channels_count(tmp_path):
    assert datasets.Data(config_of("digits", channels=0).data).measure_channels() == 1
    path = tmp_path / "r03.tfrecords"
    path.write_bytes(tfrecord(*map(stylegan_example, pictures(4))))
    config = config_of("ffhq", channels=0, tfrecords_path=str(path))
    assert datasets.Data(config.data).measure_channels() == 3


def test_damaged_images_are_not_measured(tmp_path):
    images = [image[..., 0] for image in pictures(12, channels=1)]
    write_tree(tmp_path / "some", [*images[:6], b"damaged", *images[6:]])
    write_tree(tmp_path / "all", 12 * [b"damaged"])
    np.save(tmp_path / "first.npy", pictures(12, 3, 8, 8))
    config = config_of("folder", channels=0, path=str(tmp_path / "some"))
    assert datasets.Data(config.data).measure_channels() == 1
    for name, message in (
        ("all", r"none of 11 images can be used; the last: .*all/\d+\.png: no PNG"),
        ("first.npy", r"is \(12, 3, 8, 8\), which looks like \(n, C, H, W\): transpose it"),
        ("nowhere", "nowhere does not exist"),
    ):
        config = config_of("folder", channels=0, path=str(tmp_path / name))
        for opened in (
            lambda c: datasets.Data(c.data).measure_channels(),
            lambda c: datasets.get_dataset(c, "train"),
        ):
            with pytest.raises((ValueError, OSError), match=message):
                opened(config)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_arrays_are_resized_like_files(tmp_path, name):
    images = pictures(10, 12, 20, 1)
    np.save(tmp_path / name, images) if name == "x.npy" else np.savez(tmp_path / name, images)
    config = config_of("folder", channels=1, path=str(tmp_path / name))
    train = datasets.get_dataset(config, "train")
    index = held_out(10, "train")
    expected = [cropped_then_resized(images[i], 8) for i in index]
    assert (train.permute(0, 2, 3, 1).numpy() == np.stack(expected)).all()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="not a file"):
        files.open_below(tmp_path, "pipe.png")


def test_data_of_edm(tmp_path):
    """Files of EDM's dataset_tool.py: numbered folders, and labels in dataset.json."""
    images = pictures(20)
    write_tree(tmp_path / "tree", images, "{i:05d}/img{i:08d}.png")
    labels = [[f"{i:05d}/img{i:08d}.png", i % 3] for i in range(20)]
    (tmp_path / "tree/dataset.json").write_text(json.dumps({"labels": labels}))
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_STORED) as file:
        for path in sorted((tmp_path / "tree").rglob("*.*")):
            file.write(path, path.relative_to(tmp_path / "tree").as_posix())
    expected = sorted(image.transpose(2, 0, 1).tobytes() for image in images)
    for path in ("tree", "data.zip"):
        contents, _ = both_splits(config_of("folder", path=str(tmp_path / path)))
        assert sorted(contents) == expected


def test_entries_are_bounded_and_never_extracted(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../evil.png", encoded(pictures(1)[0]))
        file.writestr("bomb.png", bytes(10**6))
        file.writestr("good.png", encoded(pictures(1)[0]))
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10**5)
    config = config_of("folder", path=str(tmp_path / "x.zip"))
    source = folder.open_folder(config.data, "train").source
    assert source.names == ["../../evil.png", "bomb.png", "good.png"]
    assert (source[0] == source[2]).all()
    with pytest.raises(Unreadable, match=r"x\.zip/bomb\.png: larger than"):
        source[1]
    assert [path.name for path in tmp_path.rglob("*")] == ["x.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_entries_that_unpack_without_bounds_are_named(tmp_path, method):
    """A kilobyte of bzip2 holds 2 GB, and Python unpacks all of it to give the first byte."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("good.png", encoded(pictures(1)[0]))
        file.writestr("other.png", encoded(pictures(1)[0]), compress_type=method)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file, file.open("a.npy", "w") as entry:
        np.save(entry, pictures(2))
    with zipfile.ZipFile(tmp_path / "y.npz", "w", method) as file, file.open("a.npy", "w") as entry:
        np.save(entry, pictures(2))
    source = folder.open_folder(config_of("folder", path=str(tmp_path / "x.zip")).data, "train")
    source = source.source
    assert (source[0] == pictures(1)[0]).all()
    name = zipfile.compressor_names[method]
    with pytest.raises(
        Unreadable, match=rf"x\.zip/other\.png: .*compressed by {name}; only deflate"
    ):
        source[1]
    assert len(folder.open_folder(config_of("folder", path=str(tmp_path / "x.npz")).data, "train"))
    with pytest.raises(ValueError, match=rf"y\.npz cannot be read: .*compressed by {name}"):
        folder.open_folder(config_of("folder", path=str(tmp_path / "y.npz")).data, "train")


def test_sources_travel_to_other_processes(tmp_path):
    write_tree(tmp_path / "data", pictures(4))
    write_zip(tmp_path / "data.zip", tmp_path / "data")
    for path in ("data", "data.zip"):
        source = folder.open_folder(config_of("folder", path=str(tmp_path / path)).data, "train")
        before = all_of(source)
        assert (all_of(pickle.loads(pickle.dumps(source))) == before).all()


def mistakes_of_folders(tmp):
    (tmp / "empty").mkdir()
    (tmp / "text.zip").write_text("not a zip file")
    (tmp / "cut.npy").write_bytes(b"\x93NUMPY")
    write_tree(tmp / "one", pictures(1))
    np.save(tmp / "four.npy", pictures(4, channels=4))
    np.save(tmp / "complex.npy", np.zeros((4, 8, 8, 3), complex))
    np.save(tmp / "objects.npy", np.array([None]), allow_pickle=True)
    np.save(tmp / "none.npy", np.zeros((0, 8, 8, 3), np.uint8))
    np.savez(tmp / "two.npz", a=pictures(2), b=pictures(2))
    np.savez_compressed(tmp / "bomb.npz", np.zeros((100, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(tmp / "bytes.npz", "w") as file:
        file.writestr("images.npy", b"no array")
    return {
        "": "needs data.path",
        "bytes.npz": "bytes.npz cannot be read: images: the magic string is not correct",
        "nowhere": "data.path=.*nowhere does not exist",
        "empty": "empty holds no images",
        "text.zip": "text.zip is no folder, .npy, .npz or zip file",
        "cut.npy": "cut.npy cannot be read",
        "one": r"1 image\(s\) cannot be split",
        "four.npy": r"must hold uint8 images \(n, H, W, 3\).*not uint8 \(4, 8, 8, 4\)",
        "complex.npy": "must hold images or other arrays of numbers .*not complex128",
        "objects.npy": "objects.npy cannot be read",
        "none.npy": "holds no images",
        "two.npz": r"one array of images, or train and test; it has a \(2, 8, 8, 3\), b",
        "bomb.npz": "unpacks to 19,328 bytes, more than data.resident_bytes=9,999",
    }


def test_mistakes_of_folders_are_named(tmp_path):
    for name, message in mistakes_of_folders(tmp_path).items():
        config = config_of("folder", path=name and str(tmp_path / name), resident_bytes=9999)
        with pytest.raises((ValueError, OSError), match=message) as caught:
            datasets.get_dataset(config, "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="data.num_channels must be 1 or 3, not 2"):
        folder.open_folder(
            config_of("folder", channels=2, path=str(tmp_path / "one")).data, "train"
        )


# --- TFRecords ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["FFHQ", "CelebAHQ", "ffhq_256"])
def test_records_of_stylegan(tmp_path, name, packed):
    images = pictures(20)
    path = tmp_path / "r03.tfrecords"
    path.write_bytes(tfrecord(*(stylegan_example(image, packed) for image in images)))
    contents, sizes = both_splits(config_of(name, tfrecords_path=str(path)))
    assert sorted(contents) == sorted(i.transpose(2, 0, 1).tobytes() for i in images)
    assert list(sizes) == [18, 2]


def test_records_that_tensorflow_wrote(tmp_path):
    tf = pytest.importorskip("tensorflow")
    images = pictures(3, 4, 6)
    with tf.io.TFRecordWriter(str(tmp_path / "x.tfrecords")) as writer:
        for image in images:
            planes = image.transpose(2, 0, 1)
            shape = tf.train.Feature(int64_list=tf.train.Int64List(value=planes.shape))
            data = tf.train.Feature(bytes_list=tf.train.BytesList(value=[planes.tobytes()]))
            other = tf.train.Feature(float_list=tf.train.FloatList(value=[1.0, 2.0]))
            features = tf.train.Features(feature={"shape": shape, "data": data, "other": other})
            writer.write(tf.train.Example(features=features).SerializeToString())
    source = tfrecords.TFRecords([tmp_path / "x.tfrecords"], stylegan.stylegan_image)
    assert (all_of(source) == images).all()


def test_a_damaged_record_is_named(tmp_path):
    images = pictures(10)
    whole = tfrecord(*(stylegan_example(image) for image in images))
    damaged = bytearray(whole)
    damaged[len(whole) // 10 * 3 + 100] ^= 4  # within the data of the fourth of ten equal records
    path = tmp_path / "x.tfrecords"
    path.write_bytes(damaged)
    source = tfrecords.TFRecords([path], stylegan.stylegan_image)
    with pytest.raises(Unreadable, match=rf"byte {len(whole) // 10 * 3}: its checksum"):
        source[3]
    assert (source[4] == images[4]).all()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="x.tfrecords is damaged.*record 9, at byte .* ends"):
        tfrecords.TFRecords([path], stylegan.stylegan_image)
    path.write_bytes(b"something else altogether")
    with pytest.raises(ValueError, match="no TFRecord file: record 0, at byte 0.*checksum"):
        tfrecords.TFRecords([path], stylegan.stylegan_image)


@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 7))
def test_any_bytes_are_an_example_or_an_error(noise, at, bit):
    mutated = bytearray(stylegan_example(pictures(1)[0]))
    mutated[at] ^= 1 << bit
    for data in (noise, bytes(mutated)):
        try:
            stylegan.stylegan_image(data)
        except (ValueError, TypeError, LookupError):
            continue


def test_absent_records_are_explained():
    with pytest.raises(FileNotFoundError, match="tfrecords_path=/nowhere/r10 does not exist"):
        datasets.get_dataset(config_of("ffhq", tfrecords_path="/nowhere/r10"), "train")


def test_features_are_found_by_name():
    features = tfrecords.parse_example(example(a=b"x", b=[300, 0], c=b""))
    assert features.keys() == {"a", "b", "c"}
    assert features["b"] == [300, 0]
    assert features["a"] == [b"x"]


# --- tensorflow_datasets --------------------------------------------------------------------------

PREPARE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

def generate(seed, n):
    images = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        yield f"{i:04d}", {"id": f"{i:04d}", "image": image, "label": i % 10}

def split_generators(self, _):  # cifar10 too reads the names of classes here
    self.info.features["label"].names = [f"class {k}" for k in range(10)]
    return {"train": generate(1, 12), "test": generate(2, 5)}

for file_format in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{file_format}"
    builder = tfds.builder("cifar10", data_dir=folder, file_format=file_format)
    type(builder)._split_generators = split_generators
    builder.download_and_prepare()
"""
FORMATS = ("array_record", "tfrecord")

READ = """
import sys
sys.path.insert(0, sys.argv[2])
import datasets
from configs.vp import cifar10_ddpmpp

config = cifar10_ddpmpp.get_config()
config.data.data_dir, config.data.num_classes = sys.argv[1], -1
assert datasets.Data(config.data).measure_classes() == 10
for split in ("train", "test"):
    for limit in (2**31, 0):
        config.data.resident_bytes, config.data.num_workers = limit, 1
        data = datasets.get_dataset(config, split)
        (batch,) = datasets.in_order(data, 100)
        sums = batch.images.double().sum((1, 2, 3)).tolist()
        print(batch.images.shape, sorted(zip(sums, batch.labels.tolist())))
        assert data.names == tuple(f"class {k}" for k in range(10))
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with CIFAR-10 in each of the formats, prepared by one process with TensorFlow."""
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("prepared")
    run_program([sys.executable, "-c", PREPARE, str(folder), *FORMATS])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_prepared_data_are_read_without_tensorflow(prepared, file_format):
    lines = []
    for seed, n in ((1, 12), (2, 5)):  # the records are in an order of tensorflow_datasets' own
        images = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        expected = sorted((float(image.sum()), i % 10) for i, image in enumerate(images))
        lines += 2 * [f"torch.Size([{n}, 3, 32, 32]) {expected}"]
    done = Program([sys.executable, "-c", READ, prepared / file_format, ROOT]).finish()
    assert done.stdout.splitlines() == lines


@pytest.mark.parametrize(
    "dataset, size, stored, data",
    [
        ("CIFAR10", 32, "cifar10/", {}),
        ("svhn", 32, "svhn_cropped/", {}),
        ("CELEBA", 64, "celeb_a/", {}),
        ("LSUN", 256, "lsun/bedroom/", {"category": "bedroom"}),
        ("lsun", 128, "lsun/church_outdoor/", {"category": "church_outdoor"}),
    ],
)
def test_absent_data_are_explained(tmp_path, dataset, size, stored, data):
    name = stored.rstrip("/")
    message = (
        rf"{name} is not in {tmp_path}/{stored}[\d.]+\. Where there is a network, run: python3 -c "
        rf"\"import tensorflow_datasets as tfds; tfds\.data_source\('{name}', "
        rf"data_dir='{tmp_path}'\)\" and copy the folder here"
    )
    with pytest.raises(FileNotFoundError, match=message):
        datasets.get_dataset(config_of(dataset, size, data_dir=str(tmp_path), **data), "test")
    assert not list(tmp_path.iterdir())


def test_unknown_categories_are_named():
    with pytest.raises(ValueError, match="data.category='kitchen'; known: bedroom, church_outdoor"):
        datasets.get_dataset(config_of("lsun", category="kitchen"), "train")


@pytest.mark.parametrize(
    "dataset, size, data",
    [("svhn", 32, {}), ("celeba", 64, {}), ("lsun", 128, {"category": "bedroom"})],
)
def test_mocked_data_have_the_configured_size(dataset, size, data):
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=4):
        images = datasets.get_dataset(config_of(dataset, size, **data), "test")
    assert images.shape == (4, 3, size, size)
    assert images.dtype == torch.uint8
