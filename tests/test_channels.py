"""Images of any number of channels, not colours: cropped, plotted, saved, and in whole runs."""

import logging

import numpy as np
import pytest
import torch
from data_files import encoded, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_sources import config_of, cubic, reference_resize, triangle

import datasets
import run_lib
from experiment import Trained
from reports.images import LARGEST, image_grid, visible
from reports.samples import SampleFiles
from sources.folder import read_images
from sources.images import Filter, cropped_then_resized, resize, resized_then_cropped
from storage import run_config
from storage.checkpoints import load_checkpoint

# --- resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 1024])
@pytest.mark.parametrize("kernel", [Filter.BILINEAR, Filter.BICUBIC])
def test_channels_are_resized_one_by_one(channels, kernel):
    (image,) = pictures(1, 13, 17, channels)
    planes = [Image.fromarray(image[..., c], "L").resize((9, 6), kernel) for c in range(channels)]
    assert (resize(image, 6, 9, kernel) == np.stack(planes, -1)).all()
    assert resize(image, 6, 9, kernel).dtype == np.uint8
    assert (resize(image, 13, 17, kernel) == image).all()


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("last", [0, 7, 255])
def test_a_dark_last_channel_darkens_no_other(channels, last):
    image = np.full((20, 20, channels), 200, np.uint8)
    image[..., -1] = last
    for resized in (cropped_then_resized(image, 16), resized_then_cropped(image, 12)):
        assert (resized[..., :-1] == 200).all()
        assert (resized[..., -1] == last).all()


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_the_definition_of_the_kernels(channels):
    (image,) = pictures(1, 40, 40, channels) // 2 + 60  # a kernel cannot lead these beyond 0 to 255
    for kernel, function, support in ((Filter.BILINEAR, triangle, 1), (Filter.BICUBIC, cubic, 2)):
        expected = reference_resize(image, 24, function, support)
        errors = np.abs(resize(image, 24, 24, kernel) - expected)
        assert errors.max() <= 2.5  # rounded after each direction
        assert errors.mean() < 0.35


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_arrays_of_many_channels_as_data(tmp_path, name, channels):
    images = pictures(10, 12, 20, channels)
    np.save(tmp_path / name, images) if name == "x.npy" else np.savez(tmp_path / name, images)
    config = config_of("folder", channels=channels, path=str(tmp_path / name))
    train = datasets.get_dataset(config, "train")
    expected = {cropped_then_resized(image, 8).tobytes() for image in images}
    assert {x.permute(1, 2, 0).numpy().tobytes() for x in train} < expected


def test_channels_that_come_first_are_named(tmp_path):
    np.save(tmp_path / "x.npy", pictures(10, 3, 16, 16))
    config = config_of("folder", channels=0, path=str(tmp_path / "x.npy"))
    with pytest.raises(ValueError, match=r"looks like \(n, C, H, W\): transpose it .*=16 if"):
        datasets.get_dataset(config, "train")
    config.data.num_channels = 16
    assert datasets.get_dataset(config, "train").shape == (9, 16, 8, 8)


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 1024])
def test_what_a_picture_shows(channels):
    images = pictures(3, 5, 7, channels)
    pixels = visible(images)
    if channels in (1, 3):
        assert (pixels == images).all()
        return
    number = min(channels, 4)
    assert pixels.shape == (3, 5, number * 7, 1)
    for c in range(number):
        assert (pixels[:, :, 7 * c : 7 * c + 7, 0] == images[..., c]).all()


@given(
    n=st.integers(1, 9),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    channels=st.integers(1, 6),
    columns=st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_each_image_lies_in_its_cell(n, height, width, channels, columns):
    images = pictures(n, height, width, channels)
    grid = image_grid(images, columns or None)
    if (height, width, channels) == (1, 1, 2):
        return  # points of the plane
    pixels = visible(images)
    across = columns or int(np.ceil(np.sqrt(n)))
    down = -(-n // across)
    cell_height, cell_width = (grid.shape[0] - 2) // down, (grid.shape[1] - 2) // across
    factor = (cell_height - 2) // height
    assert factor * height >= 48 or factor * width >= 48
    assert (cell_height - 2, cell_width - 2) == (factor * height, factor * pixels.shape[2])
    for i in range(n):
        top, left = 2 + i // across * cell_height, 2 + i % across * cell_width
        cell = grid[top : top + cell_height - 2, left : left + cell_width - 2]
        assert (cell[::factor, ::factor] == pixels[i]).all()  # grey in each of R, G and B


@pytest.mark.parametrize("shape", [(9, 150, 150, 4), (4, 7, 400, 5), (100, 3, 100, 1)])
def test_large_pictures_are_made_smaller(tmp_path, monkeypatch, shape):
    """Pictures beyond the largest size shrink; flat images keep their one value."""
    monkeypatch.setattr("reports.images.LARGEST", 700)
    grid = image_grid(np.full(shape, 90, np.uint8))
    assert 350 < max(grid.shape) <= 700
    assert set(np.unique(grid)) == {90, 128}


def test_the_largest_picture_can_be_read():
    """Pillow reads it for the page of an evaluation, and WebP takes it as a frame."""
    assert LARGEST**2 < Image.MAX_IMAGE_PIXELS
    assert LARGEST < 2**14


# --- samples in files of their own ----------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_samples_are_kept_as_they_are(tmp_path, channels):
    files, samples = SampleFiles(tmp_path, (6, 5, channels)), pictures(4, 6, 5, channels)
    for seed in (0, 1, 3):
        files.save(seed, samples[seed])
    assert files.missing([0, 1, 2, 3]) == [2]
    assert (files.read([3, 0, 1]) == samples[[3, 0, 1]]).all()
    with Image.open(tmp_path / "000003.png") as picture:
        across = 5 if channels in (1, 3) else 5 * min(4, channels)
        assert picture.size == (across, 6)
        assert (np.asarray(picture).reshape(6, across, -1) == visible(samples[3:])[0]).all()


@pytest.mark.parametrize("channels", [2, 3])
def test_damaged_samples_are_named(tmp_path, channels):
    files = SampleFiles(tmp_path, (6, 5, channels))
    files.save(0, pictures(1, 6, 5, channels)[0])
    suffix = "png" if channels == 3 else "npz"
    for content in (b"", b"damaged"):
        (tmp_path / f"000000.{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"000000.{suffix}.*: remove it, and it is drawn aga"):
            files.read([0])
    SampleFiles(tmp_path, (6, 4, channels)).save(0, pictures(1, 6, 4, channels)[0])
    with pytest.raises(ValueError, match=r"\(6, 4, .*remove it"):
        files.read([0])


# --- images that a run is given -------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_arrays_of_images(tmp_path, channels):
    images = pictures(3, 8, 8, channels)
    np.save(tmp_path / "all.npy", images)
    np.save(tmp_path / "one.npy", images[0])
    np.savez(tmp_path / "only.npz", images)
    np.savez(tmp_path / "ours.npz", samples=images, seeds=np.arange(3))
    for name in ("all.npy", "only.npz", "ours.npz"):
        read = read_images("sampling.encode", str(tmp_path / name), channels)
        assert [*read] == [f"{name}:{i}" for i in range(3)]
        assert (np.stack([*read.values()]) == images).all()
    (one,) = read_images("sampling.encode", str(tmp_path / "one.npy"), channels).values()
    assert (one == images[0]).all()


def test_arrays_of_images_that_do_not_fit(tmp_path):
    arrays = {
        "float.npy": pictures(3).astype(np.float32),
        "flat.npy": pictures(3)[..., 0, 0],
        "three.npy": pictures(3),
        "none.npy": pictures(0, channels=4),
    }
    for name, array in arrays.items():
        np.save(tmp_path / name, array)
        says = "holds no images" if name == "none.npy" else r"must hold uint8 images \(n, H, W, 4\)"
        with pytest.raises(ValueError, match=rf"^x=.*{name} {says}"):
            read_images("x", str(tmp_path / name), 4)
    np.savez(tmp_path / "two.npz", a=pictures(1), b=pictures(1))
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    (tmp_path / "file.png").write_bytes(encoded(pictures(1)[0]))
    for name, says in (
        ("two.npz", "needs one array, or samples; it has"),
        ("bad.npy", "cannot be read"),
        ("file.png", r"images of 4 channels are given as an .npy or .npz, uint8 \(n, H, W, 4\)"),
    ):
        with pytest.raises(ValueError, match=says):
            read_images("x", str(tmp_path / name), 4)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 5])
def run(request, tmp_path_factory):
    """The number of channels, and a workdir trained for two steps with pictures of each."""
    folder = tmp_path_factory.mktemp("channels")
    np.save(folder / "x.npy", pictures(20, 10, 12, request.param))
    config = config_of("folder", channels=0, path=str(folder / "x.npy"))
    config.update_from_flattened_dict(
        {
            "training.n_iters": 2,
            "training.batch_size": 8,
            "training.small_batch_size": 0,
            "training.snapshot_freq": 1,
            "training.picture_freq": 1,
            "model.nf": 8,
            "model.ch_mult": (1,),
            "sampling.ode_solver": "forward_euler",
            "sampling.N": 3,
            "eval.features": "pixels",
            "eval.enable_sampling": True,
            "eval.enable_bpd": False,
            "eval.num_samples": 20,
            "eval.batch_size": 10,
            "eval.steps": "",
            "eval.begin_ckpt": 2,
            "eval.end_ckpt": 2,
            "eval.stats_dir": str(folder / "stats"),
        }
    )
    assert run_lib.train(config, folder / "run")
    return request.param, folder / "run"


def sample(workdir, outdir, **overrides):
    config = run_config.load(workdir)
    config.update_from_flattened_dict({f"sampling.{k}": v for k, v in overrides.items()})
    run_lib.sample(config, workdir, outdir)


def test_pictures_of_training(run):
    channels, workdir = run
    for step in (1, 2):
        with np.load(workdir / f"samples/iter_{step}/sample.npz") as file:
            samples = file["samples"]
        assert samples.shape == (8, 8, 8, channels)
        with Image.open(workdir / f"samples/iter_{step}/sample.png") as picture:
            assert (np.asarray(picture) == image_grid(samples)).all()
    assert load_checkpoint(workdir / "checkpoints/checkpoint_2.pth")["step"] == 2


def test_nothing_is_drawn_twice(run, tmp_path, monkeypatch):
    channels, workdir = run
    sample(workdir, tmp_path, seeds="0-2")
    contents = {path: path.read_bytes() for path in tmp_path.glob("00000*")}
    assert len(contents) == 6
    seeds, whole = [], Trained.sample
    monkeypatch.setattr(Trained, "sample", lambda *a, **k: seeds.extend(a[1]) or whole(*a, **k))
    sample(workdir, tmp_path, seeds="0-4", film=True)
    assert not seeds  # the film's last frame has the new samples
    sample(workdir, tmp_path, seeds="4-6")
    assert seeds == [5, 6]
    assert {path: path.read_bytes() for path in contents} == contents
    with np.load(tmp_path / "samples.npz") as file:
        assert file["samples"].shape == (3, 8, 8, channels)
        for seed, image in zip((4, 5, 6), file["samples"], strict=True):
            with np.load(tmp_path / f"{seed:06d}.npz") as sample_file:
                assert (sample_file["sample"] == image).all()
    with Image.open(tmp_path / "film.webp") as film:
        assert film.n_frames > 1


def test_a_sample_that_a_kill_left_half_is_drawn_again(run, tmp_path, caplog):
    """Samples count as saved by their array: a picture without one is drawn again."""
    channels, workdir = run
    sample(workdir, tmp_path, seeds="0-1")
    truth = (tmp_path / "000001.npz").read_bytes()
    (tmp_path / "000001.npz").unlink()
    (tmp_path / "000000.png").unlink()
    caplog.set_level(logging.INFO)
    sample(workdir, tmp_path, seeds="0-1")
    assert "2 samples, 1 of which were there" in caplog.text
    with np.load(tmp_path / "000001.npz") as again:
        (tmp_path / "old.npz").write_bytes(truth)
        assert (again["sample"] == np.load(tmp_path / "old.npz")["sample"]).all()


def test_arrays_are_encoded_and_restored(run, tmp_path, monkeypatch):
    """The latent is the image itself here, since the exact one takes long."""
    monkeypatch.setattr(Trained, "encode", lambda trained, x: x)
    monkeypatch.setattr(Trained, "decode", lambda trained, z: z)
    monkeypatch.setattr(Trained, "log_likelihood", lambda trained, x: torch.zeros(len(x)))
    channels, workdir = run
    images = pictures(2, 8, 8, channels, seed=3)
    np.savez(tmp_path / "two.npz", samples=images)
    for i in (0, 1):
        np.save(tmp_path / f"{i}.npy", images[i])
    ends = ",".join(str(tmp_path / f"{i}.npy") for i in (0, 1))
    sample(workdir, tmp_path / "a", encode=str(tmp_path / "two.npz"), between=ends)
    with np.load(tmp_path / "a/encoded.npz") as file:
        assert file["names"].tolist() == ["two.npz:0", "two.npz:1"]
        assert (file["decoded"] == images).all()
    with Image.open(tmp_path / "a/between.webp") as film:
        assert film.n_frames > 1
    restore = {"restore": "inpaint", "restore_mask": "0,0,4,8"}
    restore["restore_path"] = str(tmp_path / "two.npz")
    sample(workdir, tmp_path / "b", seeds="0-3", **restore)
    with np.load(tmp_path / "b/samples.npz") as file:
        assert np.abs(file["samples"][:, 4:].astype(int) - images[[0, 1, 0, 1], 4:]).max() <= 1


def test_image_files_are_refused_before_the_work(run, tmp_path, monkeypatch):
    channels, workdir = run
    (tmp_path / "x.png").write_bytes(encoded(pictures(1)[0]))
    monkeypatch.setattr(run_lib, "load", None)
    for key in ("encode", "between"):
        with pytest.raises(ValueError, match=rf"sampling.{key}=.*: images of {channels} channels"):
            sample(workdir, tmp_path / "out", **{key: str(tmp_path / "x.png")})
    assert not (tmp_path / "out").exists()


def test_evaluations_draw_every_picture(run, tmp_path):
    channels, workdir = run
    config = run_config.load(workdir)
    config.eval.enable_interpolate = config.eval.enable_rescale = True
    config.sampling.update(restore="super2", restore_degrade=True)
    run_lib.evaluate(config, workdir)
    picture_names = {path.name for path in (workdir / "eval").glob("*.png")}
    names = ("ode_images", "data_images", "nearest", "interpolation", "rescale", "restoration")
    assert picture_names == {f"{name}_2.png" for name in names}
    page = (workdir / "eval/report.html").read_text()
    first = "the first 4 side by side" if channels == 5 else "side by side"
    assert f"{channels} channels, {first} in pictures" in page
    with np.load(workdir / "eval/ckpt_2/samples_0.npz") as file:
        samples = file["samples"]
    assert samples.shape == (10, 8, 8, channels)
    with np.load(workdir / "eval/ckpt_2/samples_1.npz") as file:
        samples = np.concatenate([samples, file["samples"]])
    with Image.open(workdir / "eval/ode_images_2.png") as picture:
        assert (np.asarray(picture) == image_grid(samples)).all()


def test_the_library_gives_films_of_any_channels(run):
    channels, workdir = run
    frames = run_lib.load(workdir).film([0, 1])
    assert frames.shape[1:] == (2, channels, 8, 8)
    assert frames.dtype == torch.uint8
