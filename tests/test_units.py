"""Arrays in units of their own: types, layouts, the measured codec and its inverse."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_arrays import config_of, mistake
from test_configs import load
from test_small_runs import tiny

import datasets
from completion import complete
from experiment import Experiment
from reports.evaluation_page import colour_bars
from sources.codec import EightBitImages
from sources.codec import from_config as get_codec
from sources.dtypes import DTYPES, held, limits, name_of
from sources.measured_arrays import MeasuredArrays
from sources.moments import measure
from sources.preparation import Preparation

UNSIGNED = ("uint16", "uint32")


def numbers(dtype, shape=(40, 8, 8, 3), seed=0):
    """Random numbers of a type, with another mean and deviation in each channel."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * (10.0 ** np.arange(shape[-1])) + 20
    if dtype == "bool":
        return values > 20
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        values = values.clip(max(info.min, -1000), min(info.max, 1000)).round()
    return values.astype(dtype)


def completed(path, **data):
    """The complete config of a first start on the arrays at `path`, its data, and its log lines."""
    config = config_of(path, **{"image_size": 0} | data)
    return complete(config)


def codec_of(array, dtype=None):
    """The codec measured on an array (n, H, W, C)."""
    moments = measure(array)
    shape = (array.shape[3], *array.shape[1:3])
    return MeasuredArrays(shape, dtype or array.dtype.name, moments.mean, moments.std)


def as_tensor(array):
    return torch.from_numpy(held(array)).permute(0, 3, 1, 2)


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_type_comes_back_from_x(dtype):
    """Whole numbers exactly, floats within the rounding of x, which is float32."""
    array = numbers(dtype)
    codec = codec_of(array)
    x = codec.encode(codec.units(as_tensor(array)))
    assert x.dtype == torch.float32
    values = array.astype(float)
    expected = (values - values.mean((0, 1, 2))) * 0.5 / values.std((0, 1, 2))
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-6, atol=1e-6)
    back = codec.stored(codec.decode(x))
    assert back.dtype == array.dtype and back.shape == array.shape
    if np.dtype(dtype).kind == "f":
        error = np.abs(back.astype(float) - values) / values.std((0, 1, 2))
        assert error.max() < (2e-2 if dtype == "float16" else 2e-6)
    else:
        assert (back == array).all()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if np.dtype(d).kind in "biu"])
def test_whole_numbers_are_clamped_and_rounded(dtype):
    low, high = limits(dtype)
    codec = MeasuredArrays((1, 1, 4), dtype, (0.0,), (1.0,))
    data = torch.tensor([[[[-1e30, 0.4, 0.6, 1e30]]]], dtype=torch.float64)
    stored = codec.stored(codec.decode(codec.encode(data)))
    assert stored.dtype == dtype
    assert stored.ravel().tolist() == [type(stored.ravel()[0].item())(v) for v in (low, 0, 1, high)]


def test_whole_numbers_are_dequantised_around_them():
    codec = MeasuredArrays((1, 8, 8), "int16", (0.0,), (1.0,))
    stored = torch.full((500, 1, 8, 8), 7, dtype=torch.int16)
    noisy = codec.dequantized(stored, torch.Generator().manual_seed(0))
    assert (noisy.round() == 7).all()
    assert abs(noisy.mean() - 7) < 0.01 and abs(noisy.var() - 1 / 12) < 0.01
    floats = MeasuredArrays((1, 8, 8), "float64", (0.0,), (1.0,))
    assert (floats.dequantized(stored.double()) == 7).all()


@pytest.mark.parametrize(
    "dtype, held_as", [("uint16", "int32"), (">f4", "float32"), ("g", "float64")]
)
@pytest.mark.parametrize("resident_bytes", [0, 2**31])
def test_types_in_memory_and_on_disk(tmp_path, dtype, held_as, resident_bytes):
    array = numbers("float64").clip(0, 500).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    config, data, _ = completed(tmp_path / "x.npy", resident_bytes=resident_bytes)
    assert config.data.dtype == name_of(np.dtype(dtype))
    train = data.get("train")
    assert isinstance(train, datasets.Stream) == (resident_bytes == 0)
    images = train[:]
    assert str(images.dtype) == f"torch.{held_as}" and images.shape == (36, 3, 8, 8)
    both = np.concatenate([images.numpy(), data.get("test")[:].numpy()]).transpose(0, 2, 3, 1)
    assert {x.tobytes() for x in both} == {x.tobytes() for x in array.astype(held_as)}


def test_types_that_are_none_are_one_line(tmp_path):
    for array in (np.zeros((9, 8, 8), complex), np.zeros((9, 8, 8), np.uint64)):
        np.save(tmp_path / "x.npy", array)
        assert f"not {array.dtype} (9, 8, 8)" in mistake(tmp_path / "x.npy")


def test_data_of_another_type_than_the_config_says(tmp_path):
    np.save(tmp_path / "x.npy", numbers("float32"))
    assert "must hold int16 images (n, H, W, C), not float32" in mistake(
        tmp_path / "x.npy", dtype="int16"
    )


def test_splits_of_two_types_are_one_line(tmp_path):
    train, test = numbers("uint8"), numbers("float32")
    np.savez(tmp_path / "x.npz", x_train=train, x_test=test)
    data = datasets.Data(config_of(tmp_path / "x.npz", image_size=8, num_channels=3).data)
    data.get("train")
    with pytest.raises(ValueError, match="must hold uint8 images .*, not float32"):
        data.get("test")


def test_whole_numbers_close_together_are_told_how_to_train(tmp_path):
    """Likelihoods add noise of a variance of 1/12: beside 100 times that it is little."""
    random = np.random.default_rng(0)
    for std, tells in ((0.5, True), (30.0, False)):
        path = tmp_path / f"{std}.npy"
        np.save(path, random.normal(0, std, (40, 8, 8)).round().astype("int16"))
        for flag in (False, True):
            *_, lines = completed(path, uniform_dequantization=flag)
            assert any("uniform_dequantization" in line for line in lines) == (tells > flag)


# --- layouts and sides ----------------------------------------------------------------------------

LAYOUTS = {
    "(n, H, W)": ((20, 6, 10), "nhwc", (1, 6, 10)),
    "(n, H, W, C)": ((20, 6, 10, 2), "nhwc", (2, 6, 10)),
    "(n, C, H, W)": ((20, 2, 6, 10), "nchw", (2, 6, 10)),
    "(n, L)": ((20, 12), "nhwc", (1, 1, 12)),
    "(n, L, C)": ((20, 12, 2), "nlc", (2, 1, 12)),
    "(n, C, L)": ((20, 2, 12), "ncl", (2, 1, 12)),
}


@pytest.mark.parametrize("shape, layout, expected", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_layouts(tmp_path, shape, layout, expected, name, dtype):
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    (np.save if name == "x.npy" else np.savez)(tmp_path / name, array)
    config, data, _ = completed(tmp_path / name, layout=layout)
    assert data.shape == expected
    images = torch.cat([data.get("train")[:], data.get("test")[:]]).numpy()
    rows = {image.tobytes() for image in images}
    if layout in ("nlc", "nhwc") and len(shape) in (3, 4) and shape[-1] == 2:
        array = np.moveaxis(array, -1, 1)
    assert rows == {np.ascontiguousarray(x).tobytes() for x in array}


def test_arrays_are_not_resized(tmp_path):
    np.save(tmp_path / "x.npy", numbers("float32", (20, 6, 10, 3)))
    np.save(tmp_path / "s.npy", np.zeros((20, 12), np.uint8))
    says = "float32 arrays of 6 x 10, which are not resized as images are: set data.image_size=0"
    assert says in mistake(tmp_path / "x.npy")
    assert "uint8 arrays of 1 x 12, which are not resized" in mistake(tmp_path / "s.npy")


def test_axes_that_look_like_others(tmp_path):
    np.save(tmp_path / "x.npy", numbers("float32", (9, 3, 16, 16)))
    assert "set data.layout='nchw', or say data.num_channels=16" in mistake(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", numbers("float32", (40, 50, 3)))
    assert "signals (n, L, C) with data.layout='nlc'" in mistake(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", numbers("float32", (9, 3, 16, 16)))
    assert "must hold images or other arrays" in mistake(tmp_path / "x.npy", layout="nlc")


# --- what is measured -----------------------------------------------------------------------------


def test_moments_are_those_of_all_numbers():
    """Means far above the deviations, where a sum of squares would lose all digits, included."""
    random = np.random.default_rng(0)
    array = 1e3 + random.standard_normal((200, 4, 5, 3)) * np.array([1e-2, 1, 1e2])
    moments = measure(array)
    np.testing.assert_allclose(moments.mean, array.mean((0, 1, 2)), rtol=1e-14)
    np.testing.assert_allclose(moments.std, array.std((0, 1, 2)), rtol=1e-10)
    ends = np.percentile(array.reshape(-1, 3), (0.5, 99.5), axis=0)
    np.testing.assert_allclose(np.reshape(moments.window, (3, 2)), ends.T)


def test_scales():
    array = numbers("float64")
    each, together, fixed = (measure(array, scale) for scale in ("channels", "all", (-10.0, 30.0)))
    assert each == measure(array)
    assert together.mean == pytest.approx(3 * [array.mean()])
    assert together.std == pytest.approx(3 * [array.std()])
    assert together.window == pytest.approx(np.percentile(array, (0.5, 99.5)))
    codec = MeasuredArrays((3, 8, 8), "float64", fixed.mean, fixed.std)
    ends = torch.tensor([-10.0, 10, 30]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    assert codec.encode(ends)[:, 0, 0, 0].tolist() == [-1, 0, 1]
    assert measure(array, [-10.0, 30.0]) == fixed


def test_constant_channels_are_named_and_kept(tmp_path):
    array = numbers("float32")
    array[..., 1] = 0.1
    np.save(tmp_path / "x.npy", array)
    config, _, lines = completed(tmp_path / "x.npy")
    assert config.data.std[1] == 1 and config.data.mean[1] == np.float32(0.1)
    assert any("constant, and kept: channel 1" in line for line in lines)
    codec = get_codec(config)
    x = codec.encode(codec.units(as_tensor(array)))
    assert (x[:, 1] == 0).all() and (codec.stored(codec.decode(x))[..., 1] == array[..., 1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout, place", [("nhwc", "17, 5, 6, 2"), ("nchw", "17, 2, 5, 6")])
def test_numbers_that_are_not_finite_are_named_with_their_index(tmp_path, value, layout, place):
    array = numbers("float32")
    array[17, 5, 6, 2] = value
    stored = array if layout == "nhwc" else array.transpose(0, 3, 1, 2)
    np.save(tmp_path / "x.npy", stored)
    config = config_of(tmp_path / "x.npy", image_size=0, layout=layout)
    with pytest.raises(ValueError, match=rf"x\.npy\[{place}\] is {value}: replace") as caught:
        complete(config)
    assert "\n" not in str(caught.value)


def test_a_run_keeps_what_is_measured(tmp_path):
    """A config that has the numbers builds the codec without the data."""
    np.save(tmp_path / "x.npy", numbers("int16"))
    config, _, lines = completed(tmp_path / "x.npy", scale="all")
    assert config.data.dtype == "int16" and len(config.data.mean) == len(config.data.std) == 3
    assert len(set(config.data.std)) == 1 and len(config.reports.window) == 2
    assert any(line.startswith("arrays of int16: channels have mean") for line in lines)
    (tmp_path / "x.npy").unlink()
    again, _, lines = complete(config)
    assert again.data.mean == config.data.mean and lines == []
    assert get_codec(again) == get_codec(config)


def test_images_of_8_bits_are_no_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 8, 8, 3), np.uint8))
    config, _, _ = completed(tmp_path / "x.npy")
    assert config.data.dtype == "" and config.data.mean == ()
    assert get_codec(config).levels == 256
    with pytest.raises(ValueError, match="data.scale='all' is for arrays"):
        complete(tiny("vp/digits_ddpmpp.py", tmp_path, data__scale="all"))


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_show_the_window():
    codec = MeasuredArrays((2, 1, 3), "int16", (0.0, 0.0), (1.0, 1.0), (-100.0, 100.0, 0.0, 10.0))
    stored = np.array([[-200, 0], [0, 5], [200, 10]], np.int16).reshape(1, 1, 3, 2)
    assert codec.pictures(stored).reshape(3, 2).tolist() == [[0, 0], [128, 128], [255, 255]]
    x = codec.encode(codec.units(as_tensor(stored.clip(-100, 100))))
    assert codec.show(x).flatten().tolist() == [0, 128, 255, 0, 128, 255]
    assert (codec.show(1e4 * x).float().mean() - 128).abs() < 64  # noise stays visible
    one = MeasuredArrays((2, 1, 3), "int16", (0.0, 0.0), (1.0, 1.0), (-100.0, 100.0))
    assert one.windows == ((-100.0, 100.0),) * 2
    assert one == codec and one.identity == codec.identity  # a window changes no result
    with pytest.raises(ValueError, match="reports.window has 6 numbers"):
        MeasuredArrays((2, 1, 3), "int16", (0.0, 0.0), (1.0, 1.0), 3 * (0.0, 1.0))
    with pytest.raises(ValueError, match="each low must be below its high"):
        MeasuredArrays((2, 1, 3), "int16", (0.0, 0.0), (1.0, 1.0), (1.0, 1.0))


def test_colour_bars_of_a_page():
    codec = MeasuredArrays((5, 1, 3), "int16", 5 * (0.0,), 5 * (1.0,), (-100.0, 100.0))
    assert colour_bars(codec, "HU") == [("", "-100 HU", "100 HU")]
    codec = MeasuredArrays((2, 1, 3), "int16", (0.0, 1.0), (1.0, 1.0), (0.0, 1.0, 2.0, 4.5))
    assert colour_bars(codec) == [("channel 0", "0", "1"), ("channel 1", "2", "4.5")]
    assert colour_bars(EightBitImages((3, 8, 8))) == []


# --- training -------------------------------------------------------------------------------------


def test_twelve_bits_and_their_floats_train_alike(tmp_path):
    """Encoded within 1e-6; after 20 steps of SGD in float64 the weights agree within 1e-9."""
    random = np.random.default_rng(0)
    whole = random.integers(0, 4096, (64, 8, 8, 2)).astype(np.uint16)
    ends, encoded = {}, {}
    for name, array in {"uint16": whole, "float": whole / 4095}.items():
        np.save(tmp_path / f"{name}.npy", array)
        config = tiny("pfgmpp/digits_ddpmpp.py", tmp_path, data__dataset="folder")
        config.data.update(path=str(tmp_path / f"{name}.npy"), num_channels=0, random_flip=False)
        config, data, _ = complete(config)
        experiment = Experiment.build(config, data)
        experiment.network.double()
        prepare = Preparation.from_config(config, experiment.codec, False)
        optimizer = torch.optim.SGD(experiment.network.parameters(), lr=1e-3)
        batches = datasets.shuffled_batches(data.get("train"), 16, seed=0)
        for step, batch in zip(range(20), batches, strict=False):
            generator = torch.Generator().manual_seed(step)
            torch.manual_seed(step)
            batch = prepare(batch, generator)
            encoded.setdefault(name, []).append(batch.images)
            batch = batch.map(torch.Tensor.double)
            examples = experiment.objective.draw(batch, step, generator)
            optimizer.zero_grad()
            experiment.objective.loss(experiment.network, examples, batch).backward()
            optimizer.step()
        ends[name] = [p.detach().clone() for p in experiment.network.parameters()]
    for a, b in zip(encoded["uint16"], encoded["float"], strict=True):
        assert (a - b).abs().max() < 1e-6
    for a, b in zip(ends["uint16"], ends["float"], strict=True):
        assert (a - b).abs().max() < 1e-9


def test_no_config_of_own_data_mirrors_them():
    """Arrays are not augmented unless this is asked for."""
    paths = [p for p in (ROOT / "configs").glob("*/*.py") if not p.name.startswith("_")]
    configs = [load(str(path.relative_to(ROOT / "configs"))) for path in paths]
    of_folders = [config for config in configs if config.data.dataset == "folder"]
    assert len(of_folders) > 5
    for config in of_folders:
        assert not config.data.random_flip
        assert not config.training.augment or config.model.augment_dim == 9
