"""Small runs from end to end: few steps, methods exchanged, own images, a run's own config."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from test_configs import load
from torch import nn

import run_lib
from configs.keys import flatten
from experiment import Experiment
from sources.codec import CODECS, EightBitImages
from sources.codec import from_config as get_codec
from sources.preparation import Preparation
from storage import run_config
from storage.checkpoints import load_checkpoint

TINY = {
    "data.num_workers": 0,
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (),
    "training.batch_size": 32,
    "training.small_batch_size": 0,
    "training.n_iters": 2,
    "sampling.N": 2,
    "eval.batch_size": 20,
    "eval.num_samples": 10,
    "eval.enable_bpd": False,
}
STEPS = {"sampling.method": "ode", "sampling.ode_solver": "forward_euler"}
OPEN = ("training.M", "sampling.z_max", "sampling.upper_norm")


def tiny(path, tmp_path, **overrides):
    """An experiment with little of everything; `overrides` have __ in place of the dot."""
    config = load(path)
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    stats = {"eval.stats_dir": str(tmp_path / "stats")}
    config.update_from_flattened_dict(TINY | STEPS | stats | changes)
    return config


def report_of(workdir, k, folder="eval"):
    assert [p.name for p in (workdir / folder).glob("report_*.npz")] == [f"report_{k}.npz"]
    with np.load(workdir / folder / f"report_{k}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("n_iters", [1, 2, 3, 7])
def test_any_number_of_steps_trains_and_evaluates(tmp_path, n_iters):
    config = tiny("poisson/digits_ddpmpp.py", tmp_path, training__n_iters=n_iters)
    assert run_lib.train(config, tmp_path)
    run_lib.evaluate(config, tmp_path)
    report = report_of(tmp_path, math.ceil(n_iters / config.training.snapshot_freq))
    assert report["step"] == n_iters
    assert report["nfe"] == 2
    assert np.isfinite(report["fid"])
    assert load_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["step"] == n_iters


METHODS = ("poisson", "pfgmpp", "edm", "vesde", "vpsde", "subvpsde")
CONFIGS = {
    "poisson": "poisson/digits_ddpmpp.py",
    "pfgmpp": "pfgmpp/digits_ddpmpp.py",
    "vpsde": "vp/digits_ddpmpp.py",
    "subvpsde": "subvp/digits_ddpmpp.py",
    "vesde": "ve/digits_ncsnpp.py",
}


@pytest.mark.parametrize("sde", METHODS)
@pytest.mark.parametrize("of", CONFIGS)
def test_every_method_in_every_digits_config(tmp_path, of, sde):
    config = tiny(CONFIGS[of], tmp_path, training__sde=sde)
    if of == "vesde" != sde:
        with pytest.raises(ValueError, match="set model.scale_by_sigma=False") as error:
            run_lib.train(config, tmp_path)
        assert f"training.sde={sde!r}" in str(error.value)
        assert "\n" not in str(error.value)
        config.model.scale_by_sigma = False
    if of == "vesde" and sde in ("pfgmpp", "edm"):
        with pytest.raises(ValueError, match="set model.embedding_type='positional'"):
            run_lib.train(config, tmp_path)
        config.model.embedding_type = "positional"
    assert run_lib.train(config, tmp_path)
    run_lib.evaluate(config, tmp_path)
    report = report_of(tmp_path, 2)
    assert report["step"] == 2
    assert np.isfinite([report["fid"], report["loss"]]).all()


# --- own images -----------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, digit in enumerate(load_digits().images[:200]):
        Image.fromarray(np.uint8(digit * 15.9)).save(folder / f"{i:03}.png")
    return folder


def measured_of(flat):
    return {key: flat[key] for key in (*OPEN, "data.num_channels")}


def test_what_own_images_decide_is_kept_with_the_run(tmp_path, photos, caplog):
    caplog.set_level(logging.INFO)  # as main.py sets it
    workdir = tmp_path / "run"
    photo_options = {"data__path": str(photos), "data__image_size": 8}
    config = tiny("poisson/images32_ddpmpp.py", tmp_path, **photo_options)
    assert all(flatten(config)[key] is None for key in OPEN)
    assert run_lib.train(config, workdir)

    stored = json.loads((workdir / "config.json").read_text())
    measured = measured_of(stored)
    assert measured["data.num_channels"] == 1
    assert all(measured[key] > 0 for key in OPEN)
    newest = load_checkpoint(workdir / "checkpoints-meta/checkpoint.pth")
    assert measured_of(newest["config"]) == measured
    numbered = load_checkpoint(workdir / "checkpoints/checkpoint_2.pth")
    assert measured_of(numbered["config"]) == measured
    log = (workdir / "stdout.txt").read_text()
    (line,) = [line for line in log.splitlines() if "the training images decide" in line]
    for key in OPEN:
        assert f"{key} = {measured[key]:.6g}" in line

    for i in range(300):  # white ones: the mean norm would be another
        Image.new("L", (8, 8), 255).save(photos / f"white{i}.png")
    photo_options["data__changed"] = "allow"
    config = tiny("poisson/images32_ddpmpp.py", tmp_path, training__n_iters=3, **photo_options)
    assert run_lib.train(config, workdir)
    newest = load_checkpoint(workdir / "checkpoints-meta/checkpoint.pth")
    assert newest["step"] == 3
    assert measured_of(newest["config"]) == measured
    elsewhere = tmp_path / "another"
    run_lib.train(config, elsewhere)
    assert measured_of(json.loads((elsewhere / "config.json").read_text())) != measured


# --- a run's own config ---------------------------------------------------------------------------


def test_evaluating_needs_no_config_and_tells_what_differs(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    overrides = {
        "model__nf": 12,
        "model__embedding_type": "fourier",
        "sampling__N": 3,
        "seed": 7,
        "data__centered": False,
    }
    config = tiny("poisson/digits_ddpmpp.py", tmp_path, **overrides)
    workdir = tmp_path / "run"
    assert run_lib.train(config, workdir)

    run_lib.evaluate(config, workdir, "repeated")
    run_lib.evaluate(run_config.load(workdir), workdir, "stored")
    assert "differs" not in caplog.text
    first, second = (report_of(workdir, 2, folder) for folder in ("repeated", "stored"))
    assert first.keys() == second.keys()
    for key in (k for k in first if "seconds" not in k):
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)

    config = run_config.load(workdir)
    config.sampling.z_max = 40.0
    run_lib.evaluate(config, workdir, "changed")
    message = "the config differs from that of the run: sampling.z_max: 17.9 -> 40.0"
    assert [r.getMessage() for r in caplog.records if "differs" in r.getMessage()] == [message]
    assert report_of(workdir, 2, "changed")["fid"] != first["fid"]


class Weighted(nn.Module):
    """A codec with weights, which counts how often it is built."""

    keys, built, identity, log_volume = {}, 0, "shift of zeros", 0.0

    def __init__(self, shape):
        super().__init__()
        self.data_shape = self.shape = shape
        self.shift = nn.Parameter(torch.zeros(shape))

    @classmethod
    def from_config(cls, config):
        cls.built += 1
        return cls(EightBitImages.from_config(config).shape)


def test_a_codec_is_built_once_on_the_device_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(CODECS, "weighted", Weighted)
    config = tiny("poisson/digits_ddpmpp.py", tmp_path, data__codec="weighted")
    monkeypatch.setattr(Weighted, "built", 0)
    run = Experiment.build(config)
    prepare = Preparation.from_config(config, run.codec, run.method.uses_reference_batch)
    users = run.sampler, run.likelihood, prepare
    assert Weighted.built == 1 and all(user.codec is run.codec for user in users)
    assert not run.codec.shift.requires_grad and not run.codec.training
    assert get_codec(config, "meta").shift.device.type == "meta"
