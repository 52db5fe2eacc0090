"""metrics.compare: folders, zips, arrays and statistics files of all kinds against each other."""

import json
import re
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_metrics import MeanColour, save_torchscript
from test_small_runs import report_of, tiny

import run_lib
from configs.default import get_default_config
from metrics import compare
from metrics.distances import OURS, Gaussian, frechet_distance, kernel_distance
from metrics.image_sets import ImageSet
from metrics.networks import tensorflow_gan
from storage.files import read_arrays, save_npz

SAME = {"rtol": 1e-6, "atol": 1e-9}


def images_of(seed, n, size=8, channels=3):
    random = np.random.default_rng(seed)
    return random.integers(0, 128 + 64 * seed, (n, size, size, channels), dtype=np.uint8)


def pixels(images):
    return images.reshape(len(images), -1) / 255


def compared(monkeypatch, folder, *arguments):
    """The numbers that the program writes."""
    out = folder / "out/metrics.json"
    command = ["metrics.compare", *map(str, arguments), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    compare.main()
    return json.loads(out.read_text())


def refused(monkeypatch, capsys, *arguments):
    """The line with which the program refuses `arguments`."""
    monkeypatch.setattr(sys, "argv", ["metrics.compare", *map(str, arguments)])
    with pytest.raises(SystemExit):
        compare.main()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Paths of the samples A and the data B, by name, in every form that is read."""
    folder = tmp_path_factory.mktemp("sets")
    a, b = images_of(0, 60), images_of(1, 70)
    for name, images in (("a", a), ("b", b)):
        (folder / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{i:03d}.png")
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for path in sorted((folder / name).iterdir()):
                archive.write(path, path.name)
        np.save(folder / f"{name}.npy", images)
        np.savez(folder / f"{name}_adm.npz", images, np.arange(len(images)) % 10)
        np.savez(folder / f"{name}_ours.npz", samples=images, seeds=np.arange(len(images)))
    (folder / "rounds").mkdir()
    for r, part in enumerate(np.split(a, [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55])):
        np.savez(folder / f"rounds/samples_{r}.npz", samples=part, nfe=3)  # 10 comes after 9
    return folder


@pytest.mark.parametrize(
    "a, b",
    [("a", "b"), ("a.zip", "b.npy"), ("a_adm.npz", "b.zip"), ("rounds", "b_ours.npz")],
)
def test_images_of_any_form(a, b, sets, monkeypatch, tmp_path, capsys):
    numbers = compared(monkeypatch, tmp_path, sets / a, sets / b, "--features", "pixels")
    fake, real = pixels(images_of(0, 60)), pixels(images_of(1, 70))
    assert (numbers["a_images"], numbers["b_images"]) == (60, 70)
    fid = OURS.frechet_distance(fake, Gaussian.fit(real), None)
    np.testing.assert_allclose(numbers["fid"], fid, rtol=1e-4)  # pixels are float32
    order = np.random.default_rng(0).permutation(70)  # the data's, on which blocks depend
    np.testing.assert_allclose(numbers["kid"], kernel_distance(real[order], fake), rtol=1e-4)
    assert {"precision", "recall", "fid_data", "kid_low", "kid_high"} <= numbers.keys()
    table = capsys.readouterr().out
    assert re.search(r"\n  images +60 and 70\n", table)
    assert re.search(
        r"\n  Kernel distance, pixels +.*\n    95 % interval .*\n    of the data", table
    )


def test_it_gives_the_figures_of_an_evaluation(monkeypatch, tmp_path, one_thread):
    """The run's samples and its data in two spaces, and the file written for ADM's evaluator."""
    network = save_torchscript(tmp_path / "network.pt", MeanColour())
    np.savez(tmp_path / "data.npz", images_of(1, 90), np.arange(90) % 3)
    config = tiny("edm/digits_ddpmpp.py", tmp_path, training__snapshot_sampling=False)
    config.data.update(dataset="folder", path=str(tmp_path / "data.npz"), held_out=0)
    config.data.update(num_channels=3, image_size=8, num_classes=3)
    config.eval.update(inception_path=str(network), num_samples=30, enable_loss=False)
    config.eval.features = "pixels,network:colour"
    assert run_lib.train(config, tmp_path / "run")
    run_lib.evaluate(config, tmp_path / "run")
    report = report_of(tmp_path / "run", 2)
    sides = tmp_path / "run/eval/ckpt_2", tmp_path / "data.npz"
    options = "--features", "pixels,network:colour", "--networks", network
    numbers = compared(monkeypatch, tmp_path, *sides, *options)
    keys = {key for key in report if key.partition(":")[2] or key in numbers} - {"features"}
    keys = {key for key in keys if report[key].dtype.kind == "f"}
    assert {"fid", "kid", "colour:fid", "colour:IS", "colour:recall_high", "kid_data"} <= keys
    for key in keys:
        np.testing.assert_allclose(numbers[key], report[key], **SAME, err_msg=key)
    assert numbers["spaces"].keys() == {"pixels", "colour"}

    config.sampling.update(npz="arr_0", seeds="0-4")
    run_lib.sample(config, tmp_path / "run", tmp_path / "adm")
    adm_arrays = read_arrays(tmp_path / "adm/samples.npz")
    assert adm_arrays.keys() == {"arr_0", "arr_1"}
    assert (adm_arrays["arr_0"].dtype, adm_arrays["arr_0"].shape) == (np.uint8, (5, 8, 8, 3))
    for seed, image in enumerate(adm_arrays["arr_0"]):
        with Image.open(tmp_path / f"adm/{seed:06d}.png") as picture:
            np.testing.assert_array_equal(image, np.asarray(picture))
    config.sampling.npz = "samples"
    run_lib.sample(config, tmp_path / "run", tmp_path / "adm")  # the samples are not drawn again
    usual = read_arrays(tmp_path / "adm/samples.npz")
    np.testing.assert_array_equal(usual["samples"], adm_arrays["arr_0"])
    np.testing.assert_array_equal(usual["labels"], adm_arrays["arr_1"])


def test_it_gives_the_figures_of_tensorflow_gan(sets, monkeypatch, tmp_path):
    """Both have the same features, the mean colours of the images."""
    pytest.importorskip("tensorflow_gan")
    network = save_torchscript(tmp_path / "network.pt", MeanColour())
    options = "--features", "network", "--networks", network
    numbers = compared(monkeypatch, tmp_path, sets / "a", sets / "b", *options)
    fake, real = (images_of(seed, n).mean((1, 2)) for seed, n in ((0, 60), (1, 70)))
    tfgan, order = tensorflow_gan(), np.random.default_rng(0).permutation(70)
    fid = tfgan.frechet_distance(fake, Gaussian.fit(real), real)
    kid = tfgan.kernel_distance(real[order], fake)
    np.testing.assert_allclose(numbers["fid"], fid, rtol=1e-6)
    np.testing.assert_allclose(numbers["kid"], kid, rtol=1e-6)
    np.testing.assert_allclose(numbers["IS"], tfgan.inception_score(2 * fake), rtol=1e-6)


def test_without_features_it_takes_the_network_or_else_pixels(sets, monkeypatch, tmp_path, capsys):
    network = save_torchscript(tmp_path / "network.pt", MeanColour())
    for options, space in (((), pixels), (("--networks", network), lambda x: x.mean((1, 2)))):
        numbers = compared(monkeypatch, tmp_path, sets / "a", sets / "b", *options)
        fake, real = space(images_of(0, 60)), space(images_of(1, 70))
        fid = OURS.frechet_distance(fake, Gaussian.fit(real), None)
        np.testing.assert_allclose(numbers["fid"], fid, rtol=1e-4)
        assert numbers["features"] == ("network" if options else "pixels")
    assert "pixels" in capsys.readouterr().out


def moments(images):
    gaussian = Gaussian.fit(pixels(images))
    return gaussian.mean, gaussian.covariance


def published(form, images):
    """Statistics of pixels as another program stores them."""
    mean, covariance = moments(images)
    spatial = {"mu_s": np.ones(33), "sigma_s": np.eye(33)}
    return {
        "EDM": {"mu": mean, "sigma": covariance},
        "ADM": {"mu": mean, "sigma": covariance} | spatial,
        "ADM with images": {"arr_0": images, "mu": mean, "sigma": covariance} | spatial,
        "clean-fid's kernel distance": {"feats": pixels(images)},
        "unknown names": {"m": mean.astype("f4"), "s": covariance.astype("f4")},
        "score_sde": {"pool_3": pixels(images)},
    }[form]


@pytest.mark.parametrize(
    "form, others",
    [
        ("EDM", False),
        ("ADM", False),
        ("ADM with images", True),
        ("clean-fid's kernel distance", True),
        ("unknown names", False),
        ("score_sde", True),
    ],
)
def test_published_statistics_are_known_by_content(form, others, monkeypatch, sets, tmp_path):
    """The name of the file does not matter; files with features give the other metrics too."""
    path = tmp_path / "anything.npz"
    save_npz(path, **published(form, images_of(1, 300)))
    expected = frechet_distance(
        Gaussian.fit(pixels(images_of(0, 60))), Gaussian(*moments(images_of(1, 300)))
    )
    numbers = compared(monkeypatch, tmp_path, sets / "a", path, "--features", "pixels")
    np.testing.assert_allclose(numbers["fid"], expected, rtol=1e-5)
    assert ("kid" in numbers) == ("fid_data" in numbers) == others


def test_two_statistics_files_need_no_network(monkeypatch, tmp_path):
    save_npz(tmp_path / "a.npz", **published("EDM", images_of(0, 300)))
    save_npz(tmp_path / "b.npz", **published("ADM", images_of(1, 300)))
    numbers = compared(monkeypatch, tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
    expected = frechet_distance(*(Gaussian(*moments(images_of(s, 300))) for s in (0, 1)))
    np.testing.assert_allclose(numbers["fid"], expected, rtol=1e-9)
    save_npz(tmp_path / "a.npz", **published("score_sde", images_of(0, 300)))
    numbers = compared(monkeypatch, tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
    np.testing.assert_allclose(numbers["fid"], expected, rtol=1e-9)


def statistics(width, **more):
    return {"mu": np.ones(width), "sigma": np.eye(width), **more}


@pytest.mark.parametrize(
    "a, b, options, pattern",
    [
        ("a", "small.npy", "pixels", "different sizes: .*8 x 8 x 3 and .*small.npy of 4 x 4 x 3"),
        ("a", "mixed", "pixels", "mixed: image number 1 is 6 x 6 x 3, the first 8 x 8"),
        ("a", "floats.npy", "pixels", "floats.npy holds float64 arrays; only images of 8 bits"),
        ("a", "b", "pixel", "--features must be one of .*not 'pixel'"),
        ("a", "b", "network", "--features='network' needs a file: --networks=''"),
        ("a", "five.npz", "pixels", "five.npz holds statistics of 5 features, but .*'pixels' has"),
        ("a", "other.npz", "pixels", "their feature space is pt2-1234, not pixels"),
        ("five.npz", "six.npz", "", "five.npz holds statistics of 5 features, .*six.npz of 6"),
        ("five.npz", "none.npz", "", "none.npz holds no statistics: neither mu and sigma nor"),
        ("five.npz", "negative.npz", "", "negative.npz: sigma is no covariance"),
        ("five.npz", "damaged.npz", "", "damaged.npz cannot be read: File is not a zip file"),
        ("a", "damaged.png", "pixels", "damaged.png"),
        ("a", "nowhere", "pixels", "nowhere does not exist"),
        ("other.npz", "another.npz", "", "their feature space is pt2-5678, not pt2-1234"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    a, b, options, pattern, sets, tmp_path, monkeypatch, capsys
):
    np.save(tmp_path / "small.npy", images_of(1, 5, 4))
    np.save(tmp_path / "floats.npy", np.ones((5, 8, 8, 3)))
    (tmp_path / "mixed").mkdir()
    for i, size in enumerate((8, 6)):
        Image.fromarray(images_of(1, 1, size)[0]).save(tmp_path / f"mixed/{i}.png")
    for name, content in (
        ("five", statistics(5)),
        ("six", statistics(6)),
        ("other", statistics(192, space="pt2-1234")),
        ("another", statistics(192, space="pt2-5678")),
        ("none", {"x": np.ones(3, int)}),
        ("negative", {"mu": np.ones(5), "sigma": -np.eye(5)}),
    ):
        np.savez(tmp_path / f"{name}.npz", **content)
    (tmp_path / "damaged.npz").write_bytes(b"nothing of the kind")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG and nothing more")
    paths = [sets / name if (sets / name).exists() else tmp_path / name for name in (a, b)]
    out = tmp_path / "metrics.json"
    line = refused(monkeypatch, capsys, *paths, "--features", options, "--out", out)
    assert re.search(pattern, line), line
    assert not out.exists()


def test_colours_and_grey_images_of_one_folder(tmp_path):
    """If any image of a folder has colours, its grey images get three channels too."""
    images = images_of(1, 3)
    Image.fromarray(images[0]).convert("L").save(tmp_path / "0.png")
    for i in (1, 2):
        Image.fromarray(images[i]).save(tmp_path / f"{i}.png")
    opened = ImageSet.open(tmp_path, get_default_config().data)
    (block,) = opened.images.blocks()
    assert opened.images.shape == block.shape[1:] == (8, 8, 3)
    np.testing.assert_array_equal(block[1:], images[1:])
