"""Images of 16 bits: every value, whatever the file, and the range that becomes 0 to 255."""

import logging
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT
from data_files import encoded, pictures, png_of_16_bits, tiff, write_tree, write_zip
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import config_of

import datasets
import experiment
import run_lib
from completion import complete
from sources.files import LOOKED_AT, Files, read_bounded
from sources.folder import read_images
from sources.images import decode_image, decode_numbers, read_header
from storage import run_config
from storage.checkpoints import load_checkpoint


def scaled(values, low, high):
    """round(255 (v - low) / (high - low)) within 0 to 255, in exact fractions."""
    shares = [
        255 * (int(v) - Fraction(low)) / (Fraction(high) - Fraction(low)) for v in values.flat
    ]
    return np.array([min(max(round(s), 0), 255) for s in shares]).reshape(values.shape)


def random_values(bits, shape=(5, 7, 1), seed=0):
    """Random values of so many bits, the largest of which needs them all."""
    values = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint16)
    values.flat[3] = 2**bits - 1
    return values


GREY = {
    "png": png_of_16_bits,
    "Pillow": lambda values: encoded(values[..., 0]),
    "tiff": tiff,
    "big-endian tiff": lambda values: tiff(values, ">"),
    "deflated tiff": lambda values: tiff(values, deflate=True),
    "tiff of a plane": lambda values: tiff(values, ">", planes=True),
}
COLOUR = {
    "png": png_of_16_bits,
    "tiff": tiff,
    "big-endian tiff": lambda values: tiff(values, ">"),
    "deflated tiff": lambda values: tiff(values, deflate=True),
    "deflated big-endian tiff": lambda values: tiff(values, ">", deflate=True),
    "tiff of planes": lambda values: tiff(values, planes=True),
    "big-endian tiff of planes": lambda values: tiff(values, ">", planes=True),
}


# --- one image ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("file", GREY)
def test_grey_of_any_bits(file, bits):
    values = random_values(bits)
    decoded = decode_image(GREY[file](values), 1)
    assert (decoded == scaled(values, 0, 2 ** max(8, bits) - 1)).all()
    assert (decode_image(GREY[file](values), 3) == decoded).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("file", COLOUR)
def test_colours_of_any_bits(file, bits):
    values = random_values(bits, (5, 7, 3))
    expected = scaled(values, 0, 2**bits - 1)
    assert (decode_image(COLOUR[file](values), 3) == expected).all()
    assert decode_image(COLOUR[file](values), 0).shape == (5, 7, 3)


@given(largest=st.integers(0, 65535), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_fewest_bits_that_hold_the_largest_value(largest, seed):
    values = np.random.default_rng(seed).integers(0, largest + 1, (3, 4, 1), dtype=np.uint16)
    values[1, 2] = largest
    bits = next(b for b in range(8, 17) if largest < 2**b)
    assert (decode_image(png_of_16_bits(values), 1) == scaled(values, 0, 2**bits - 1)).all()


def test_whole_16_bits_are_as_before():
    """Values of all 16 bits are, up to rounding, divided by 256 as in older programs."""
    values = np.arange(0, 2**16, dtype=np.uint16).reshape(256, 256, 1)
    decoded = decode_image(png_of_16_bits(values), 1)
    assert np.abs(decoded.astype(int) - (values >> 8)).max() <= 1
    grey = pictures(1, channels=1)[0]
    assert (decode_image(png_of_16_bits(grey * np.uint16(257)), 1, (0, 65535)) == grey).all()


@given(
    ends=st.lists(st.integers(-70000, 70000), min_size=2, max_size=2, unique=True).map(sorted),
    bits=st.integers(1, 16),
)
@settings(max_examples=50, deadline=None)
def test_a_scale_is_clamped(ends, bits):
    values = random_values(bits)
    assert (decode_image(png_of_16_bits(values), 1, tuple(ends)) == scaled(values, *ends)).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_values_below_zero_need_a_scale(order):
    values = np.array([[-1000, -500, 0, 500, 3000]], np.int16)[..., None]
    for file in (tiff(values, order), tiff(values, order, deflate=True)):
        expected = scaled(values, -1000, 1000)
        assert (decode_image(file, 1, (-1000, 1000)) == expected).all()
        with pytest.raises(ValueError, match=r"from -1,000 to 3,000: .*data.scale=\(low, hi"):
            decode_image(file, 1)


@pytest.mark.parametrize("dtype", ["f4", "u4", "i4"])
def test_32_bits_are_refused(dtype):
    with pytest.raises(
        ValueError, match="numbers of 32 bits, .*: set data.dtype=.*or save them as 8"
    ):
        decode_image(tiff(np.ones((4, 4, 1), dtype)), 1)


def test_white_at_zero():
    values = random_values(12)
    assert (decode_image(tiff(values, photometric=0), 1) == 255 - scaled(values, 0, 4095)).all()


# --- transparency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [9, 12, 16])
def test_a_transparent_value_becomes_white(channels, bits):
    """All 16 bits of it count: a value beside it in the low byte is not transparent."""
    values = random_values(bits, (6, 6, channels))
    values[0, 0], values[3, 3] = 300, 300
    values[1, 1] = 301
    decoded = decode_image(png_of_16_bits(values, channels * (300,)), channels)
    expected = scaled(values, 0, 2**bits - 1)
    expected[(values == 300).all(-1)] = 255
    assert (decoded == expected).all()
    assert (decoded[1, 1] != 255).all()


def test_a_transparent_value_is_not_the_largest():
    values = random_values(12)
    values[0, 0] = 65535  # as where a scanner marks what it did not see
    decoded = decode_image(png_of_16_bits(values, (65535,)), 1)
    assert (decoded[1:] == scaled(values[1:], 0, 4095)).all()
    assert decoded[0, 0] == 255


def test_all_is_transparent():
    for values in (np.full((4, 4, 1), 51400, np.uint16), np.zeros((4, 4, 1), np.uint16)):
        assert (decode_image(png_of_16_bits(values, tuple(values[0, 0])), 1) == 255).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_of_16_bits(channels):
    values = random_values(12, (9, 9, channels))
    values[..., -1] = np.random.default_rng(1).integers(0, 2**16, (9, 9))
    alpha = values[..., -1:] / 65535
    colours = values[..., :-1] / (2 ** int(values[..., :-1].max()).bit_length() - 1)
    expected = 255 * (colours * alpha + 1 - alpha)
    files = [png_of_16_bits(values)] + [tiff(values, order) for order in "<>"] * (channels == 4)
    for file in files:
        assert np.abs(decode_image(file, 3) - expected).max() <= 1.5  # each share is of 8 bits


@pytest.mark.parametrize("planes", [False, True])
def test_colours_multiplied_by_their_alpha(planes):
    values = random_values(16, (9, 9, 4))
    values[..., 3] |= 2**15
    alpha = values[..., 3:] / 65535
    stored = np.concatenate([(values[..., :3] * alpha).astype(np.uint16), values[..., 3:]], -1)
    expected = 255 * (values[..., :3] / 65535 * alpha + 1 - alpha)
    decoded = decode_image(tiff(stored, alpha=1, planes=planes), 3)
    assert np.abs(decoded - expected).max() <= 1.5


def test_compressed_planes_are_refused():
    """Pillow reads their high bytes alone."""
    with pytest.raises(ValueError, match="one after another in 16 bits: save it as PNG"):
        decode_image(tiff(random_values(12, (4, 4, 3)), planes=True, deflate=True), 3)


# --- many images ----------------------------------------------------------------------------------


def files_of(images, path):
    write_tree(path, images)
    return Files(path, sorted(p.name for p in path.iterdir()), lambda n: open(path / n, "rb"))


@pytest.mark.parametrize("at", [0, 37, 99])
@pytest.mark.parametrize("bits", [10, 12, 15])
def test_the_largest_value_of_all_files_decides(tmp_path, at, bits):
    images = [png_of_16_bits(random_values(9, seed=i)) for i in range(100)]
    images[at] = png_of_16_bits(random_values(bits))
    measured = files_of(images, tmp_path / "x").measure_scale()
    assert measured.scale == (0, 2**bits - 1)
    assert measured.line == (
        f"16-bit images: values up to {2**bits - 1:,} count as {bits} bits (data.scale)"
    )


def test_images_of_8_bits_cost_their_headers(tmp_path, monkeypatch):
    files, looked_at = files_of([*pictures(100, channels=1)[..., 0]], tmp_path / "x"), []

    def look(file):
        looked_at.append(file.name)
        return read_header(file)

    monkeypatch.setattr("sources.files.read_header", look)
    monkeypatch.setattr("sources.files.read_bounded", None)
    for _ in range(2):  # each header is read once
        assert files.measure_scale() == ((), None)
    assert len(set(looked_at)) == len(looked_at) == LOOKED_AT


def test_what_needs_all_bits_ends_the_search(tmp_path, monkeypatch):
    images = [png_of_16_bits(random_values(16, seed=i)) for i in range(100)]
    files, read = files_of(images, tmp_path / "x"), []
    whole = read_bounded
    monkeypatch.setattr("sources.files.read_bounded", lambda f: read.append(f) or whole(f))
    assert files.measure_scale().scale == (0, 65535)
    assert len(read) == 1


def test_files_that_are_mixed_or_damaged(tmp_path):
    images = [*pictures(8, channels=1)[..., 0], b"damaged", png_of_16_bits(random_values(12))]
    images += [png_of_16_bits(random_values(10))[:-40], tiff(np.ones((4, 4, 1), np.float32))]
    files = files_of(images, tmp_path / "x")
    assert files.measure_scale().scale == (0, 4095)
    scaled = replace(files, channels=1, scale=(0, 4095))
    assert (scaled[0] == images[0][..., None]).all()  # 8 bits are as they are


@pytest.mark.parametrize("zipped", [False, True])
def test_a_data_set_has_one_scale(tmp_path, zipped):
    """The test split's largest value counts in the training split too."""
    values = [random_values(9, (8, 8, 1), seed=i) for i in range(6)]
    write_tree(tmp_path / "x/train", [png_of_16_bits(v) for v in values])
    write_tree(tmp_path / "x/test", [png_of_16_bits(random_values(12, (8, 8, 1)))])
    path = tmp_path / ("x.zip" if zipped else "x")
    if zipped:
        write_zip(path, tmp_path / "x")
    config = config_of("folder", channels=1, path=str(path))
    train = datasets.get_dataset(config, "train")
    assert (train[:].permute(0, 2, 3, 1).numpy() == scaled(np.stack(values), 0, 4095)).all()
    config.data.scale = (100, 200)
    train = datasets.get_dataset(config, "train")
    assert (train[:].permute(0, 2, 3, 1).numpy() == scaled(np.stack(values), 100, 200)).all()


def test_values_below_zero_name_the_folder(tmp_path):
    write_tree(tmp_path / "x", [tiff(np.full((8, 8, 1), -5, np.int16))] * 12)
    config = config_of("folder", channels=1, path=str(tmp_path / "x"))
    with pytest.raises(ValueError, match=r"images of .*x: it has values from -5 to 0: name those"):
        datasets.get_dataset(config, "train")
    config.data.scale = (-5, 250)
    assert (datasets.get_dataset(config, "train")[:] == 0).all()


def test_masks_and_single_images_have_the_range_of_their_own(tmp_path):
    mask = np.zeros((8, 8, 1), np.uint16)
    mask[:4] = 4095
    (tmp_path / "mask.png").write_bytes(png_of_16_bits(mask))
    (read,) = read_images("sampling.restore_mask", str(tmp_path / "mask.png"), 1).values()
    assert (read == scaled(mask, 0, 4095)).all()
    (read,) = read_images("x", str(tmp_path / "mask.png"), 1, (0, 65535)).values()
    assert read.max() == 16  # that of a run whose images use all bits
    (tmp_path / "other.png").write_bytes(png_of_16_bits(random_values(14, (8, 8, 1))))
    assert read_images("x", str(tmp_path), 1)["mask.png"].max() == round(255 * 4095 / 16383)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder of 20 scans of 12 bits."""
    path = tmp_path_factory.mktemp("scans") / "x"
    write_tree(path, [png_of_16_bits(random_values(12, (8, 8, 1), seed=i)) for i in range(20)])
    return path


def config_of_run(path, **values):
    config = config_of("folder", channels=0, path=str(path))
    config.update_from_flattened_dict(
        {
            "training.n_iters": 2,
            "training.batch_size": 8,
            "training.small_batch_size": 0,
            "training.snapshot_freq": 2,
            "training.snapshot_sampling": False,
            "model.nf": 8,
            "training.M": None,
            **values,
        }
    )
    return config


@pytest.fixture(scope="module")
def run(scans, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert run_lib.train(config_of_run(scans), workdir)
    return workdir


def test_a_run_keeps_its_scale(run, scans, caplog, monkeypatch):
    assert run_config.load(run).data.scale == (0, 4095)
    caplog.set_level(logging.INFO)
    run_lib.train(config_of_run(scans, **{"training.n_iters": 3}), run, dry_run=True)
    assert "data.scale" not in caplog.text  # nothing differs
    monkeypatch.setattr(Files, "measure_scale", None)  # nor is it measured again
    config, *_ = complete(config_of_run(scans), run)
    assert config.data.scale == (0, 4095)
    config, *_ = complete(run_config.load(run), run)
    assert config.data.scale == (0, 4095)


def test_the_start_says_it(scans, tmp_path):
    config, _, lines = complete(config_of_run(scans), tmp_path)
    assert config.data.scale == (0, 4095)
    assert lines[0].startswith("16-bit images: values up to 4,095 count as 12 bits (data.scale)")
    assert lines[1].startswith("the training images decide: ")
    config, _, lines = complete(config_of_run(scans, **{"data.scale": (0, 9)}), tmp_path)
    assert config.data.scale == (0, 9)
    assert "16-bit" not in "; ".join(lines)


def test_another_scale_measures_the_images_again(run, scans):
    """M is measured on the images as they become."""
    same, *_ = complete(config_of_run(scans), run)
    dark, *_ = complete(config_of_run(scans, **{"data.scale": (4094, 4095)}), run)
    assert same.training.M == run_config.load(run).training.M != dark.training.M


def test_a_run_of_before_keeps_what_it_read(run, scans):
    """Its config has no scale: its images were divided by 256."""
    flat = load_checkpoint(run / "checkpoints/checkpoint_2.pth")["config"]
    old = {key: value for key, value in flat.items() if key != "data.scale"}
    restored = run_config.restore(old)
    assert restored.data.scale == (0, 65535)
    assert run_config.differences(old, run_config.flatten(restored)) == []
    assert run_config.differences(flat, run_config.flatten(restored)) == [
        "data.scale: [0, 4095] -> [0, 65535]"
    ]
    assert run_config.restore(old | {"data.dataset": "digits"}).data.scale == ()
    assert run_config.restore(old | {"data.path": "x.npy"}).data.scale == ()


def test_a_run_of_8_bits_is_not_measured_again(tmp_path, monkeypatch):
    write_tree(tmp_path / "x", pictures(12, channels=1)[..., 0])
    config, _, lines = complete(config_of_run(tmp_path / "x"), tmp_path)
    assert config.data.scale == ()
    assert "16-bit" not in "; ".join(lines)
    assert run_lib.train(config_of_run(tmp_path / "x"), tmp_path / "run")
    monkeypatch.setattr(datasets.Data, "measure_scale", None)
    assert complete(config_of_run(tmp_path / "x"), tmp_path / "run")[0].data.scale == ()
    stored_config = run_config.load(tmp_path / "run")
    assert complete(stored_config, tmp_path / "run")[0].data.scale == ()
    restored = encoded(random_values(12, (8, 8, 1))[..., 0])
    (tmp_path / "scan.png").write_bytes(restored)
    (scan,) = read_images("x", str(tmp_path / "scan.png"), 1, stored_config.data.scale).values()
    assert scan.max() == 255  # as the run has no scale


def test_data_that_are_gone_are_not_looked_for(scans, tmp_path):
    config = config_of_run(tmp_path / "gone", **{"data.num_channels": 1, "training.M": 9})
    assert complete(config, tmp_path)[0].data.scale == ()


def test_other_data_have_no_scale(tmp_path):
    np.save(tmp_path / "x.npy", pictures(12, channels=1))
    for config in (config_of_run(tmp_path / "x.npy"), config_of("digits", channels=1)):
        assert complete(config, tmp_path)[0].data.scale == ()


def test_the_key_is_a_pair_that_rises():
    for scale in ((1,), (2, 1), (1, 1), ("a", "b"), (0, float("nan"))):
        config = config_of("folder", path=str(ROOT))
        with pytest.raises((ValueError, TypeError), match=r"data.scale|type"):
            config.data.scale = scale
            experiment.check(config)


# --- in units of their own ------------------------------------------------------------------------


@pytest.mark.parametrize("channels, writers", [(1, GREY), (3, COLOUR)])
def test_numbers_are_those_of_the_file(channels, writers):
    values = random_values(13, (5, 7, channels))
    for write in writers.values():
        for dtype in ("uint16", "int32", "float32"):
            numbers = decode_numbers(write(values), 0, dtype)
            assert numbers.dtype == dtype and (numbers == values).all()


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_numbers_of_32_bits(dtype):
    values = (np.random.default_rng(0).standard_normal((5, 7)) * 1e6).astype(dtype)
    assert (decode_numbers(encoded(values, "TIFF"), 1, dtype)[..., 0] == values).all()
    with pytest.raises(ValueError, match=f"set data.dtype={dtype} to train on them in their own"):
        decode_image(encoded(values, "TIFF"), 1)


def test_numbers_of_8_bits():
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (decode_numbers(encoded(values), 0, "uint16") == values).all()
    assert (decode_numbers(encoded(values[..., 0]), 1, "int16")[..., 0] == values[..., 0]).all()


@pytest.mark.parametrize(
    "values, channels, dtype, words",
    [
        (random_values(16)[..., 0], 1, "int16", "are not of the type int16"),
        (random_values(9)[..., 0], 3, "uint16", "its channels are 1, not 3"),
        (np.full((4, 4), 0.5, np.float32), 1, "uint16", "float32 from 0.5 to 0.5, are not"),
        (np.zeros((4, 4, 4), np.uint8), 0, "uint16", "transparent pixels have no value"),
    ],
)
def test_numbers_that_a_type_does_not_hold(values, channels, dtype, words):
    kind = "TIFF" if values.dtype == np.float32 else "PNG"
    with pytest.raises(ValueError, match=words):
        decode_numbers(encoded(values, kind), channels, dtype)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_folder_of_numbers_is_encoded_as_their_array(tmp_path, dtype):
    """Number, moments, and x of a folder of image files are those of an .npy of the values."""
    values = np.stack([random_values(12, (8, 6, 1), seed) for seed in range(12)]).astype(dtype)
    kind = "TIFF" if dtype == "float32" else "PNG"
    images = [encoded(image[..., 0], kind) for image in values]
    write_tree(tmp_path / "files", images, "{i:03d}." + kind.lower().replace("tiff", "tif"))
    np.save(tmp_path / "x.npy", values)
    x = {}
    for path in ("files", "x.npy"):
        config = config_of("folder", size=0, channels=0, path=str(tmp_path / path), held_out=0)
        config.data.dtype = dtype if path == "files" else ""
        built = experiment.Experiment.build(complete(config)[0])
        stored = built.data.get("train")[:]
        assert built.codec.stored(built.codec.units(stored)).dtype == dtype
        x[path] = built.codec.encode(built.codec.units(stored))
    assert (x["files"] == x["x.npy"]).all() and abs(x["files"].std(correction=0) - 0.5) < 1e-6
