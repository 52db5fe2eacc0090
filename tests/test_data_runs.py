"""Whole runs, trained and evaluated, on every kind of data; error messages for bad data."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from data_files import encoded, pictures, stylegan_example, tfrecord, write_tree, write_zip
from test_metrics import MeanColour, save_torchscript
from warm_start import Program, run_main

import datasets
import run_lib
from configs.poisson import cifar10_ddpmpp, digits_ddpmpp
from storage.checkpoints import load_checkpoint

TINY = {
    "data.num_channels": 3,
    "data.random_flip": True,
    "training.n_iters": 5,
    "training.batch_size": 16,
    "training.small_batch_size": 8,
    "training.eval_freq": 5,
    "training.snapshot_freq": 5,
    "training.snapshot_sampling": False,
    "model.nf": 8,
    "model.ch_mult": (1,),
    "sampling.ode_solver": "forward_euler",
    "sampling.N": 3,
    "eval.steps": "",
    "eval.begin_ckpt": 1,
    "eval.end_ckpt": 1,
    "eval.batch_size": 16,
    "eval.num_samples": 20,
    "eval.bpd_num_repeats": 1,
    "eval.enable_bpd": False,
}


def call(mode, workdir, expect=0, **values):
    overrides = [f"--config.{key}={value}" for key, value in (TINY | values).items()]
    config = ROOT / "configs/poisson/digits_ddpmpp.py"
    base = ["--config", str(config), "--mode", mode, "--workdir", str(workdir)]
    return run_main([*base, *overrides], expect)


def weights(workdir):
    return load_checkpoint(workdir / "checkpoints/checkpoint_5.pth")["model"]


def check_report(workdir):
    with np.load(workdir / "eval/report_1.npz") as report:
        assert report["step"] == 5
        assert np.isfinite(report["loss"])
        assert np.isfinite(report["fid"])


@pytest.mark.slow
def test_a_run_is_the_same_however_its_images_are_stored_and_read(tmp_path):
    """A folder in memory, and a zip on disk read by 0 and by 2 processes: equal to the last bit."""
    write_tree(tmp_path / "faces", pictures(40, 10, 9))
    write_zip(tmp_path / "faces.zip", tmp_path / "faces", top=False)  # one name, one split
    runs = {
        "resident": {"data.path": tmp_path / "faces"},
        "in process": {"data.path": tmp_path / "faces.zip", "data.num_workers": 0},
        "workers": {"data.path": tmp_path / "faces.zip", "data.num_workers": 2},
    }
    for name, values in runs.items():
        values |= {"data.dataset": "folder", "data.resident_bytes": 0}
        if name == "resident":
            values["data.resident_bytes"] = 2**31
        call("train", tmp_path / name, **values)
        if name != "in process":
            call("eval", tmp_path / name, **values)
            check_report(tmp_path / name)
    expected = weights(tmp_path / "resident")
    for name in ("in process", "workers"):
        other = weights(tmp_path / name)
        assert all(torch.equal(other[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_a_run_on_tfrecords(tmp_path):
    images = pictures(40)
    path = tmp_path / "ffhq-r03.tfrecords"
    path.write_bytes(tfrecord(*(stylegan_example(image) for image in images)))
    config = digits_ddpmpp.get_config()
    config.update_from_flattened_dict(TINY | {"data.dataset": "FFHQ"})
    config.data.update({"tfrecords_path": str(path)})
    run_lib.train(config, tmp_path / "run")
    run_lib.evaluate(config, tmp_path / "run")
    check_report(tmp_path / "run")


@pytest.mark.slow
def test_a_run_on_mocked_cifar10(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    config = cifar10_ddpmpp.get_config()
    config.update_from_flattened_dict(
        TINY
        | {"model.num_res_blocks": 1, "model.ch_mult": (1, 1)}
        | {"eval.features": "torchscript", "eval.inception_path": str(tmp_path / "network")}
        | {"eval.enable_sampling": True, "eval.enable_loss": True}
    )
    save_torchscript(tmp_path / "network", MeanColour())  # pixels have 3072 features: seconds
    with tfds.testing.mock_data(num_examples=20):
        run_lib.train(config, tmp_path)
        run_lib.evaluate(config, tmp_path)
    check_report(tmp_path)


def test_images_that_are_left_out_are_named_in_the_log(tmp_path):
    images = list(pictures(12))
    images[3] = encoded(images[3])[:-30]
    write_tree(tmp_path / "data", images)
    values = {"data.dataset": "folder", "data.path": tmp_path / "data", "training.n_iters": 1}
    done = call("train", tmp_path / "run", **values)
    assert re.search(
        r"^data: .*/data, \d+ images to train on and \d to test on "
        r"\(a tenth is held out by names\), 8 x 8, 3 channels, "
        r"mirrored at random \(data\.random_flip\)$",
        done.stdout,
        re.M,
    )
    assert re.search(r"^unreadable image: .*/data/003\.png: ", done.stdout, re.M)
    assert re.search(r"^1 of 1[12] images are unreadable and left out$", done.stdout, re.M)


def bad_data(tmp):
    """Config values that name bad data, and the error message of each."""
    (tmp / "empty").mkdir()
    write_tree(tmp / "corrupt", [b"no image"] * 12)
    np.save(tmp / "four.npy", pictures(12, channels=4))
    (tmp / "cut.tfrecords").write_bytes(tfrecord(b"one", b"two")[:-1])
    (tmp / "text.zip").write_text("text")
    return {
        "absent": (
            {"data.dataset": "cifar10", "data.data_dir": tmp / "absent"},
            r"cifar10 is not in .*/absent/cifar10/.*run: python3 -c .*tfds\.data_source\('cifar10'",
        ),
        "without images": (
            {"data.dataset": "folder", "data.path": tmp / "empty"},
            "empty holds no images",
        ),
        "corrupt": (
            {"data.dataset": "folder", "data.path": tmp / "corrupt"},
            r"1\d images in a row cannot be used; the last: .*corrupt/\d+\.png: no PNG",
        ),
        "channels": (
            {"data.dataset": "folder", "data.path": tmp / "four.npy"},
            r"uint8 images \(n, H, W, 3\), as data\.num_channels says, not uint8 \(12, 8, 8, 4\)",
        ),
        "not a zip": (
            {"data.dataset": "folder", "data.path": tmp / "text.zip"},
            r"text\.zip is no folder, \.npy, \.npz or zip file",
        ),
        "workers": ({"data.num_workers": -2}, "data.num_workers must be .* from -1 to .*, not -2"),
    }


def test_bad_data_are_one_line(tmp_path):
    for values, message in bad_data(tmp_path).values():
        done = call("train", tmp_path / "run", expect=2, **values)
        assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_hyper_parameters_measure_any_data(tmp_path, channels):
    np.save(tmp_path / "x.npy", np.full((10, 8, 8, channels), 255, np.uint8))
    (tmp_path / "experiment.py").write_text(
        "from configs.poisson import digits_ddpmpp\n"
        "def get_config():\n"
        "    config = digits_ddpmpp.get_config()\n"
        f"    config.data.update(dict(dataset='folder', path={str(tmp_path / 'x.npy')!r}))\n"
        "    config.data.update(dict(resident_bytes=0, num_workers=1, num_channels=0))\n"
        "    return config\n"
    )
    command = [sys.executable, "hyper_parameters.py", "--config", tmp_path / "experiment.py"]
    done = Program(command, cwd=ROOT).finish()
    norm, dimensions = 8 * channels**0.5, 64 * channels
    assert f"mean norm {norm:.4g} in {dimensions} dimensions" in done.stdout, done.stderr


def test_a_stream_moves_to_a_device_batch_by_batch():
    stream = datasets.Stream([np.zeros((2, 2, 1), np.uint8)], (1, 2, 2))
    assert stream.to("cpu") is stream
    assert not stream.pinned
    assert stream.to("cuda").pinned
