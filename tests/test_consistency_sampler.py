"""Samples of a consistency network: their law, the choice of levels, and refused options."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from known_laws import denoising_network, pfgmpp
from PIL import Image
from test_small_runs import TINY, tiny
from warm_start import run_main

import run_lib
from datasets import Data
from experiment import Experiment, load
from library import levels
from library.levels import LevelChoice
from methods.base import spread
from metrics.distances import Gaussian, frechet_distance, frechet_distance_of_samples
from samplers.base import Guidance
from samplers.consistency import ConsistencySampler, sample_consistency
from sources.batch import Batch
from sources.codec import EightBitImages
from storage.checkpoints import load_checkpoint

STD = 0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_end(x, sigma):
    """The end of the trajectory through x at a noise level, for Gaussian data and noise."""
    return STD * x.double() / (STD**2 + spread(sigma, x) ** 2).sqrt()


def sampler_of(method=None, **numbers):
    codec = EightBitImages((1, 2, 2))
    return ConsistencySampler(method=method or pfgmpp(), codec=codec, **numbers)


@pytest.mark.parametrize("levels", [(), (0.8,), (3.0, 0.8, 0.1)])
def test_exact_ends_have_the_law_of_the_data(levels):
    """N(0, STD^2) again after each level, where it is forgotten by STD^2 / (STD^2 + level^2)."""
    method, states = pfgmpp(), []
    x = method.prior_sampling((50_000, 1, 1, 1), generator())
    net = denoising_network(exact_end)
    ends, evaluations = sample_consistency(
        method, net, x, levels=levels, generator=generator(1), callback=states.append
    )
    assert evaluations == 1 + len(levels)
    assert [step.level for step in states] == [80.0, *levels]
    assert ends.std().item() == pytest.approx(STD, rel=0.02)
    assert ends.mean().item() == pytest.approx(0, abs=0.01)
    expected = math.prod(STD / math.sqrt(STD**2 + level**2) for level in levels)
    first = exact_end(x, torch.tensor([80.0]))
    correlation = torch.corrcoef(torch.stack([first.flatten(), ends.double().flatten()]))[0, 1]
    assert correlation.item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("D", [2.0, 128.0, math.inf])
def test_noise_of_a_level_is_that_of_the_kernel(D):
    """The second evaluation is given the end plus level times n, of the D of the method."""
    inputs = []
    method, y = pfgmpp(D), torch.full((20_000, 1, 1, 2), 0.3)
    net = denoising_network(lambda x, sigma: inputs.append(x) or 0 * x.double() + 0.3)
    sample_consistency(method, net, y, levels=(1.5,), generator=generator())
    noise = ((inputs[1].double() - 0.3) / 1.5).flatten(1).square().sum(1).sqrt()
    normal, width = method.noise(y, generator(1))
    other = (spread(width, y) * normal).flatten(1).norm(dim=1)
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(
        noise.quantile(quantiles), other.double().quantile(quantiles), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("D", [3.0, math.inf])
def test_a_sample_depends_on_its_own_generator_alone(D):
    method = pfgmpp(D)
    sampler = sampler_of(method, n=3, levels=(1.0, 0.2))
    net = denoising_network(exact_end)
    x = method.prior_sampling((4, 1, 2, 2), generator())
    together, _ = sampler(net, x=x, generator=[generator(seed) for seed in range(4)])
    for row in range(4):
        alone, _ = sampler(net, x=x[row : row + 1], generator=[generator(row)])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-6)


def test_guidance_mixes_ends():
    """u + w (c - u) of the two outputs, at each evaluation."""

    def end(x, sigma, class_labels=None):
        return 0 * x.double() + (0.1 if class_labels is None else 0.3)

    sampler = sampler_of(guidance=Guidance(2.0), n=1, class_label=1)
    samples, _ = sampler(denoising_network(end), 2, generator=generator())
    expected = (1 + 0.1 + 2.0 * (0.3 - 0.1)) / 2  # decoded to [0, 1]
    torch.testing.assert_close(samples, torch.full_like(samples, expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"n": 18}, "takes 1 to 8 .* sampling.N=18: are steps of the ODE meant"),
        ({"n": 0}, "takes 1 to 8"),
        ({"n": 3, "levels": (0.5,)}, "must be sampling.N - 1 = 2 noise levels"),
        ({"n": 3, "levels": (0.5, 0.6)}, "that fall between 80 and 0.002"),
        ({"n": 2, "levels": (90.0,)}, "that fall between 80 and 0.002"),
        ({"n": 2, "levels": (0.001,)}, "that fall between 80 and 0.002"),
    ],
)
def test_numbers_that_do_not_fit_are_one_line(numbers, words):
    with pytest.raises(ValueError, match=words):
        sampler_of(**numbers)


def test_a_sample_that_is_not_finite_is_found():
    net = denoising_network(lambda x, sigma: x.double() / 0)
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler_of(n=1)(net, 2, generator=generator())


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [(60, 90, 7), (20, 30, 40)])
def test_the_distance_of_samples_is_that_of_their_gaussians(numbers):
    n, m, width = numbers
    rng = np.random.default_rng(0)
    a = rng.normal(size=(n, width))
    b = rng.normal(size=(m, width)) @ rng.normal(size=(width, width)) + 0.3
    expected = frechet_distance(Gaussian.fit(a), Gaussian.fit(b))
    assert frechet_distance_of_samples(a, b) == pytest.approx(expected, rel=1e-6)


# --- runs -----------------------------------------------------------------------------------------


def arrays_of(path):
    with np.load(path) as file:
        return dict(file)


def small(tmp_path, **overrides):
    return tiny(
        "pfgmpp/digits_consistency.py",
        tmp_path,
        sampling__method="consistency",
        training__n_iters=6,
        training__batch_size=16,
        training__log_freq=1,
        consistency__stages=3,
        **overrides,
    )


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    """Choose levels by few samples, for speed; which levels are best is not tested with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "LEAST_SAMPLES", 64)
        patch.setattr(levels, "MOST_SAMPLES", 64)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained and evaluated run of three stages."""
    folder = tmp_path_factory.mktemp("consistency")
    config = small(folder, eval__num_samples=40)
    run_lib.train(config, folder)
    run_lib.evaluate(config, folder)
    return folder


def test_an_evaluation_says_levels_stages_and_evaluations(run):
    (path,) = (run / "eval").glob("report_*.npz")
    report = arrays_of(path)
    assert report["nfe"] == 2
    page = (run / "eval" / "report.html").read_text()
    assert all(f"stage {a}" in page for a in (1, 2, 3))
    assert "consistency, 2 evaluations, noise levels" in page
    (chosen,) = (run / "checkpoints").glob("*.fitted-levels-2.npz")
    (level,) = arrays_of(chosen)["levels"].tolist()
    assert f'"chosen.levels": [{level}' in str(report["settings"])
    assert '"sampling.levels": []' in str(report["settings"])


def test_levels_are_those_of_the_least_distance_and_chosen_once(run, caplog):
    """A loop over the grid with the program's draws and an independent Frechet distance agrees."""
    caplog.set_level("INFO")
    (numbered,) = (run / "checkpoints").glob("checkpoint_6.pth")
    trained = load(numbered)
    assert "choosing" not in caplog.text  # the evaluation has chosen them
    sampler = trained.experiment.sampler
    (level,) = sampler.levels
    build = Experiment.build(trained.experiment.config)
    build.network.load_state_dict(trained.experiment.network.state_dict())
    choice = LevelChoice(
        sampler=replace(sampler, levels=()),
        network=build.network,
        device=build.device,
        checkpoint=trained.path,
        origin={},
        seed=build.config.seed,
        data=build.data,
    )
    images = choice._images()
    real = Gaussian.fit(images.images.flatten(1).double().numpy() / 255)
    distances = {}
    for candidate in np.geomspace(12, 0.075, 16):  # for a standard deviation of 0.75
        fake = choice._samples((candidate,), images)
        distances[candidate] = frechet_distance(real, Gaussian.fit(fake.astype(float)))
    assert level == pytest.approx(min(distances, key=distances.get), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_level_leaves_room_for_those_below_it(n, monkeypatch, tmp_path):
    """Samples err by their last level, so that the lowest level of the grid is always best."""
    stored = np.random.default_rng(0).integers(0, 256, (60, 3), dtype=np.uint8)
    images, real = Batch(torch.from_numpy(stored).view(60, 3, 1, 1)), stored / 255
    monkeypatch.setattr(LevelChoice, "_images", lambda choice: images)
    monkeypatch.setattr(LevelChoice, "_samples", lambda choice, levels, _: real + levels[-1])
    choice = LevelChoice(
        sampler=sampler_of(n=n),
        network=None,
        device=torch.device("cpu"),
        checkpoint=tmp_path / "checkpoint_1.pth",
        origin={},
        seed=0,
        data=SimpleNamespace(stored=None, name="data"),
    )
    grid = np.geomspace(8, 0.05, 16)
    assert choice.fitted().levels == pytest.approx(grid[-(n - 1) :])
    few = replace(choice, sampler=sampler_of(pfgmpp(sigma_max=0.08), n=8))
    with pytest.raises(ValueError, match="too few to choose 7 of: set sampling.levels"):
        few.fitted()


@pytest.mark.parametrize("ends", [(0.002, 80.0), (0.01, 80.0), (0.002, 0.5), (0.3, 0.4)])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_default_levels_fall_between_the_ends_of_the_method(n, ends):
    low, high = ends
    levels = sampler_of(pfgmpp(sigma_min=low, sigma_max=high), n=n).without_fit().levels
    assert high > levels[0]
    assert levels[-1] >= low
    assert all(a > b for a, b in pairwise(levels))
    if ends == (0.002, 80.0):
        assert levels[0] == pytest.approx(0.821)


def test_a_shared_file_has_its_levels_and_needs_no_data(run, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    chosen = load(run).experiment.sampler.levels
    run_lib.export(small(tmp_path), run, tmp_path)
    caplog.clear()
    assert load(tmp_path / "model.safetensors").experiment.sampler.levels == chosen
    assert "sampling.levels" not in caplog.text

    def unreadable(data, split, labels=True):
        raise ValueError("no data here")

    monkeypatch.setattr(Data, "get", unreadable)
    trained = load(tmp_path / "model.safetensors", {"sampling.levels": (), "sampling.N": 3})
    assert trained.experiment.sampler.levels == pytest.approx([0.821 * 1.5, 0.821 * 1.5 * 0.4])
    assert "default sampling.levels, as none can be chosen: no data here" in caplog.text


def test_seeds_give_the_same_images_alone_and_together(run):
    trained = load(run)
    together = trained.sample([3, 4, 5])
    torch.testing.assert_close(trained.sample([4])[0], together[1], rtol=1e-5, atol=1e-5)
    film = trained.film([3, 4], frames=5)
    assert film.shape == (5, 2, 1, 8, 8)
    torch.testing.assert_close(film[-1] / 255, together[:2], rtol=0, atol=1 / 255)


NEEDS_ODE = {
    "encode": lambda trained, x: trained.encode(x),
    "decode": lambda trained, x: trained.decode(x),
    "bits/dim": lambda trained, x: trained.bits_per_dim(x),
    "likelihood": lambda trained, x: trained.log_likelihood(x),
    "restore": lambda trained, x: trained.restore(x[:, :, ::2, ::2], "super2"),
}


@pytest.mark.parametrize("name", NEEDS_ODE)
def test_what_follows_the_ode_is_refused(run, name):
    trained = load(run)
    with pytest.raises(ValueError, match="training.objective='consistency'") as error:
        NEEDS_ODE[name](trained, torch.full((2, 1, 8, 8), 0.5))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"eval__enable_bpd": True},
        {"eval__enable_interpolate": True},
        {"eval__enable_rescale": True},
        {"sampling__restore": "denoise", "sampling__restore_degrade": True},
        {"sampling__method": "ode"},
    ],
)
def test_evaluations_that_follow_the_ode_are_refused_before_any_work(run, tmp_path, overrides):
    config = small(tmp_path)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    with pytest.raises(ValueError, match="training.objective='consistency'"):
        run_lib.evaluate(config, run, "refused")
    assert not (run / "refused").exists()


@pytest.mark.parametrize("key", ["encode", "between"])
def test_sample_mode_refuses_what_follows_the_ode(run, tmp_path, key):
    path = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(path)
    config = small(tmp_path)
    config.sampling[key] = f"{path},{path}" if key == "between" else str(path)
    with pytest.raises(ValueError, match=f"sampling.{key} follows the method's ODE"):
        run_lib.sample(config, run, tmp_path / "out")


def test_two_processes_train_as_one(run, tmp_path):
    """The whole program, its gradients averaged by the wrapper, from another run's weights."""
    config = ["--config", ROOT / "configs/pfgmpp/digits_consistency.py", "--mode", "train"]
    values = TINY | {
        "training.n_iters": 3,
        "training.init_from": str(run),
        "optim.optimizer": "Adam",
    }
    values |= {"model.ch_mult": "(1,)", "model.attn_resolutions": "()", "eval.enable_bpd": None}
    values |= {"sampling.N": 2, "training.snapshot_sampling": None}
    flags = [f"--config.{k}={v}" if v is not None else f"--noconfig.{k}" for k, v in values.items()]
    weights = {}
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        run_main([*config, "--workdir", workdir, *flags], processes=processes)
        state = load_checkpoint(workdir / "checkpoints-meta/checkpoint.pth")
        weights[processes] = torch.cat([p.flatten() for p in state["ema"]["shadow_params"]])
        assert state["init_from"]["step"] == 6
    change = (weights[1] - weights[2]).norm()
    initial = load_checkpoint(run / "checkpoints-meta/checkpoint.pth")["ema"]["shadow_params"]
    trained = (weights[1] - torch.cat([p.flatten() for p in initial])).norm()
    assert change < 0.02 * trained


def test_consistency_sampling_refuses_a_regression_network(tmp_path):
    config = tiny("pfgmpp/digits_ddpmpp.py", tmp_path, sampling__method="consistency")
    with pytest.raises(ValueError, match="is for a network of training.objective='consistency'"):
        Experiment.build(config)


@pytest.mark.parametrize("path", ["poisson/digits_ddpmpp.py", "vp/digits_ddpmpp.py"])
def test_methods_without_a_denoiser_are_refused(path, tmp_path):
    config = tiny(path, tmp_path, training__objective="consistency")
    config.sampling.method = "consistency"
    with pytest.raises(ValueError, match="needs a denoiser, as of PFGM\\+\\+ and EDM"):
        Experiment.build(config)
