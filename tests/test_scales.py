"""Noise levels that follow the data: measured, derived, and training at any scale."""

import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.datasets import load_digits
from test_configs import load
from test_small_runs import tiny
from warm_start import run_main

import datasets
import methods
import run_lib
from completion import complete
from configs.schema import Key, Number
from experiment import Experiment
from experiment import load as load_trained
from methods import get_method
from methods.restoration import RESTORERS, Measurement, Restoring, superresolution
from models import create_model
from sources import codec, measures
from sources.codec import EightBitImages
from sources.measures import ImageMeasures
from sources.preparation import Preparation
from storage import run_config
from training import TrainState, train_step

PFGMPP, VE = "pfgmpp/digits_ddpmpp.py", "ve/digits_ncsnpp.py"
OPEN = {"model.sigma_data": None, "model.P_mean": None, "sampling.sigma_max": None}


@dataclass(frozen=True)
class Scaled(EightBitImages):
    """Images whose x is that of `EightBitImages` times `factor`."""

    factor: float = 1.0

    keys = EightBitImages.keys | {
        "data.factor": Key(1.0, Number(1e-6, 1e6), "of the tests: x is so many times as large")
    }

    @classmethod
    def from_config(cls, config):
        plain = EightBitImages.from_config(config)
        return cls(plain.data_shape, plain.centered, config.data.factor)

    @property
    def bounds(self):
        return tuple(self.factor * end for end in super().bounds)

    def encode(self, data):
        return self.factor * super().encode(data)

    def unclamped(self, x):
        return super().unclamped(x / self.factor)


@pytest.fixture
def scaled_codec(monkeypatch):
    monkeypatch.setitem(codec.CODECS, "scaled", Scaled)


def digits():
    """The training digits as the network sees them, (n, 64)."""
    config = load(PFGMPP)
    data = complete(config)[1].get("train")
    return data[:].double().flatten(1).numpy() / 127.5 - 1


# --- measured -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ["pfgmpp", "edm"])
def test_open_values_are_measured_and_derived(sde):
    config = load(PFGMPP)
    config.training.sde = sde
    config.update_from_flattened_dict(OPEN)
    done, _, lines = complete(config)
    std = digits().std()
    assert done.model.sigma_data == pytest.approx(std, rel=1e-5)
    scale = done.model.sigma_data / 0.5
    assert done.sampling.sigma_max == 80 * scale
    assert done.sampling.sigma_min == 0.002 * scale
    assert done.model.sigma_unit == scale
    assert done.model.P_mean == pytest.approx(-1.2 + math.log(scale), abs=1e-12)
    assert done.sampling.atol == config.sampling.atol * scale
    assert config.model.sigma_data is None  # what is given stays
    (words,) = [line for line in lines if "noise levels follow" in line]
    assert "sampling.sigma_min = " in words and "model.P_mean = " in words
    assert "sampling.S_min" not in words and "consistency" not in words
    method = get_method(done)
    sigma = torch.tensor([scale], dtype=torch.float64)
    assert method.precondition.c_noise(sigma).item() == 0


def test_levels_that_a_config_sets_follow_too():
    config = load("pfgmpp/digits_consistency.py")
    config.update_from_flattened_dict(OPEN)
    config.sampling.update(S_min=0.1, S_max=50.0, guidance_interval=(0.2, 3.0), levels=(0.8,))
    config.sampling.atol = 1.0  # the largest there is
    before, done = config.consistency, complete(config)[0]
    s = done.model.sigma_data / 0.5
    assert (done.sampling.S_min, done.sampling.S_max) == (0.1 * s, 50 * s)
    assert done.sampling.guidance_interval == (0.2 * s, 3.0 * s)
    assert done.sampling.levels == (0.8 * s,)
    assert (done.consistency.c, done.consistency.b) == (before.c * s, before.b / s)
    assert done.consistency.P_mean == pytest.approx(before.P_mean + math.log(s), abs=1e-12)
    assert s > 1 and done.sampling.atol == 1
    assert (done.consistency.k, done.consistency.q) == (before.k, before.q)
    assert (done.model.P_std, done.sampling.rtol) == (config.model.P_std, config.sampling.rtol)


def test_values_beside_a_given_sigma_data():
    """Open keys alone are derived from sigma_data; the label and all else stay."""
    config = load(PFGMPP)
    config.update_from_flattened_dict({**OPEN, "model.sigma_data": 0.75})
    done = complete(config)[0]
    assert done.sampling.sigma_max == 80 * 1.5
    assert done.model.P_mean == pytest.approx(-1.2 + math.log(1.5), abs=1e-12)
    assert (done.model.sigma_unit, done.sampling.sigma_min) == (1.0, 0.002)
    config = load(PFGMPP)
    assert complete(config)[0].to_dict() == config.copy_and_resolve_references().to_dict() | {
        "data": complete(config)[0].data.to_dict()
    }


def test_the_largest_noise_level_of_ve():
    config = load(VE)
    config.model.sigma_max = None
    done = complete(config)[0]
    plain = load_digits().images.reshape(-1, 64) / 16
    largest = pdist(np.round(plain * 255) / 255).max()
    assert 0.9 * largest <= done.model.sigma_max <= largest + 1e-4  # of digits to train on
    x = (digits() + 1) / 2
    assert done.model.sigma_max == pytest.approx(pdist(x).max(), rel=1e-5)
    assert get_method(done).sigma_max == done.model.sigma_max
    assert create_model(done).sigmas is None  # given the noise level itself


def test_measures_of_a_part_of_many_images(monkeypatch, caplog):
    monkeypatch.setattr(measures, "SAMPLED", 30)
    data = torch.randint(256, (1000, 2, 3, 4), dtype=torch.uint8)
    sample = ImageMeasures(data, lambda stored: 2 * (stored / 255) - 1)
    rows = [int(k) for k in np.linspace(0, 999, 30)]
    x = data[rows].double().flatten(1).numpy() / 127.5 - 1
    assert sample.standard_deviation() == pytest.approx(x.std(), rel=1e-6)
    assert sample.largest_distance() == pytest.approx(pdist(x).max(), rel=1e-5)
    black = ImageMeasures(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), lambda stored: stored / 255)
    assert black.standard_deviation() == 0.5 and "all entries of all" in caplog.text
    with pytest.raises(ValueError, match="all training images are equal: set model.sigma_max"):
        black.largest_distance()


@pytest.mark.parametrize(
    "path, key",
    [(PFGMPP, "model.sigma_data"), (PFGMPP, "sampling.sigma_max"), (VE, "model.sigma_max")],
)
def test_what_needs_an_open_value_says_so(path, key):
    config = load(path)
    config.update_from_flattened_dict({key: None})
    with pytest.raises(ValueError, match=f"^{key} is open: training measures it at its first"):
        get_method(config)


def test_none_on_the_command_line(tmp_path):
    train = ["--config", "configs/pfgmpp/digits_ddpmpp.py", "--mode", "train", "--dry_run"]
    train += ["--workdir", tmp_path, "--config.model.sigma_data=None"]
    done = run_main([*train, "--config.sampling.sigma_max=None"])
    (measured,) = re.findall(r"model.sigma_data = ([\d.]+)", done.stdout + done.stderr)
    assert float(measured) == pytest.approx(digits().std(), rel=1e-5)
    done = run_main([*train, "--config.model.P_std=None"], expect=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = run_main([*train, "--config.model.P=None"], expect=2)
    assert "unknown config value model.P" in done.stderr


def test_published_and_own_images():
    images = load("pfgmpp/images16_ddpmpp.py")
    assert (images.model.sigma_data, images.model.P_mean) == (None, None)
    assert images.sampling.sigma_max is None
    published = load("pfgmpp/cifar10_ddpmpp.py")
    assert (published.model.sigma_data, published.model.P_mean) == (0.5, -1.2)
    assert (published.sampling.sigma_max, published.model.sigma_unit) == (80.0, 1.0)


def test_a_run_keeps_what_it_measured(tmp_path):
    """A resumed run, an evaluation and the library have the numbers of the first start."""
    config = tiny(PFGMPP, tmp_path, **{k.replace(".", "__"): v for k, v in OPEN.items()})
    config.sampling.S_min = 0.1
    assert run_lib.train(config, tmp_path / "run")
    values = json.loads((tmp_path / "run/config.json").read_text())
    scale = values["model.sigma_data"] / 0.5
    assert scale == pytest.approx(digits().std() / 0.5, rel=1e-5)
    assert values["model.sigma_unit"] == scale and values["sampling.S_min"] == 0.1 * scale
    config.training.n_iters = 3
    again = complete(config, tmp_path / "run")[0]
    assert {**run_config.flatten(again), "training.n_iters": 2} == {
        **values,
        **{k: v for k, v in run_config.flatten(again).items() if k.startswith(("eval", "optim"))},
        "training.snapshot_freq": again.training.snapshot_freq,
    }
    stored = complete(run_config.load(tmp_path / "run"), tmp_path / "run")[0]
    assert stored.sampling.S_min == 0.1 * scale  # not scaled again
    trained = load_trained(tmp_path / "run")
    assert trained.experiment.method.sigma_max == 80 * scale
    run_lib.evaluate(run_config.load(tmp_path / "run"), tmp_path / "run")


def test_a_run_with_a_sigma_data_of_its_own_keeps_its_levels(tmp_path):
    """A sigma_data that was set, not measured, holds for a later config that leaves it open."""
    config = tiny(PFGMPP, tmp_path)  # 0.75, of noise labels ln(sigma) / 4
    assert run_lib.train(config, tmp_path / "run")
    before = complete(config, tmp_path / "run")[0]
    config.update_from_flattened_dict(OPEN)
    after = complete(config, tmp_path / "run")[0]
    assert run_config.flatten(after) == run_config.flatten(before)


# --- scaled data train as unscaled ones do --------------------------------------------------------


def trajectory(tmp_path, std, path, changes):
    """Losses of 20 steps and samples after them, of digits scaled to `std`, in [0, 1]."""
    values = {
        **OPEN,
        "data.codec": "scaled",
        "data.factor": float(std / digits().std()),
        "training.batch_size": 64,
        "training.small_batch_size": 32,
        "optim.warmup": 0,
        **changes,
    }
    config = tiny(path, tmp_path, **{k.replace(".", "__"): v for k, v in values.items()})
    config.training.n_iters = 20
    config, data, _ = complete(config)
    torch.manual_seed(0)
    experiment = Experiment.build(config, data)
    network, objective = experiment.network.double(), experiment.objective
    state = TrainState.from_config(config, network, objective)
    prepare = Preparation.from_config(config, experiment.codec, True)
    losses = []
    batches = datasets.shuffled_batches(data.get("train"), objective.batch_size, 0)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        batch = prepare(next(batches), generator)
        batch = batch.map(lambda x: x.double() if x.is_floating_point() else x)
        losses.append(train_step(state, batch, generator, (0, 1)).item())
    prior = experiment.method.prior_sampling((8, 1, 8, 8), torch.Generator().manual_seed(0))
    with state.with_ema():
        generator = torch.Generator().manual_seed(1)
        samples, _ = experiment.sampler(network, x=prior.double(), generator=generator)
    return np.array(losses), samples.numpy()


RUNS = {
    "PFGM++ with churn": (
        PFGMPP,
        {"sampling.ode_solver": "heun", "sampling.N": 6, "sampling.S_churn": 3.0}
        | {"sampling.S_min": 0.05, "sampling.S_max": 20.0},
    ),
    "EDM by rk45": (
        PFGMPP,
        {"training.sde": "edm", "sampling.ode_solver": "rk45"}
        | {"sampling.rtol": 1e-6, "sampling.atol": 1e-6},  # the first step depends on the unit of t
    ),
    "consistency": (
        "pfgmpp/digits_consistency.py",
        {"sampling.method": "consistency", "sampling.N": 2, "sampling.levels": (0.8,)}
        | {"consistency.c": 0.06},
    ),
}


@pytest.mark.usefixtures("scaled_codec", "one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_scaled_digits_train_as_unscaled_ones(tmp_path, name):
    losses, samples = trajectory(tmp_path, 0.5, *RUNS[name])
    assert losses[-5:].mean() < losses[:5].mean() and samples.std() > 0.1
    for std in (0.05, 0.25, 2.0):
        others = trajectory(tmp_path, std, *RUNS[name])
        np.testing.assert_allclose(others[0], losses, rtol=1e-4)
        np.testing.assert_allclose(others[1], samples, atol=1e-4)


@pytest.mark.parametrize("D", [32.0, math.inf])
@pytest.mark.parametrize("restorer", ["moment_matching", "pigdm", "dps"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_restorers_of_scaled_data(D, restorer, noise):
    """The slope at scaled states, levels and measurements is that of unscaled ones."""

    def net(x, label):
        wave = torch.sin(3 * x + label.view(-1, 1, 1, 1))
        return wave + 0.3 * x.roll(1, -1) * x

    draw = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}
    y, value = torch.randn(3, 1, 4, 6, **draw), torch.randn(3, 1, 2, 3, **draw)
    slopes = []
    for s in (1.0, 0.1, 4.0):
        levels = {"sigma_min": 0.002 * s, "sigma_max": 80 * s, "sigma_data": 0.5 * s}
        method = methods.PFGMPP(D=D, P_mean=-1.2, P_std=1.2, sigma_unit=s, **levels)
        measurement = Measurement(superresolution(2), s * value, s * noise)
        restoring = Restoring(method, measurement, RESTORERS[restorer])
        slopes.append(restoring.slope(net, s * y, 0.7 * s))
    for other in slopes[1:]:
        torch.testing.assert_close(other, slopes[0], rtol=1e-8, atol=1e-8)


def test_results_of_earlier_versions_keep_their_origin(tmp_path):
    """A key that they do not have counts only where its value is not the one they stood for."""
    config = tiny("pfgmpp/digits_ddpmpp.py", tmp_path)
    origin = str(Experiment.build(config).origin())
    assert not any(word in origin for word in ("sigma_unit", "'size'", "'levels'"))
    config.model.sigma_unit = 1.5
    assert "'sigma_unit': 1.5" in str(Experiment.build(config).origin())
