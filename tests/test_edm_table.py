"""EDM's preconditioning of VP, VE and iDDPM against the published classes, and their files."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from known_laws import denoising_network, pfgmpp
from scipy import stats
from snapshot_files import published_network, save_pickle, snapshot
from test_edm_networks import GOLDEN, published_config

import methods
import models
from experiment import load
from likelihood import log_likelihood, unit_vectors
from losses import Regression
from methods.base import Examples, spread
from solvers import SOLVERS
from solvers.solve import solve_ode
from sources.batch import Batch
from storage.edm_configs import config_values
from storage.edm_snapshots import Snapshot, read_snapshot
from tests.reference_weights import weight

PUBLISHED = json.loads((GOLDEN / "edm_table.json").read_text())
CLASSES = {"VPPrecond": "edm_vp", "VEPrecond": "edm_ve", "iDDPMPrecond": "iddpm"}
EACH = pytest.mark.parametrize("case", CLASSES)

pytestmark = pytest.mark.usefixtures("one_thread")


def column(sde, D=math.inf, **changes):
    numbers = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, **changes}
    return methods.METHODS[sde](D=D, **numbers)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "edm_table.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def published_weights(case):
    return {name: weight(name, tuple(shape)) for name, shape in PUBLISHED[case]["state"]}


def network(case):
    model = models.create_model(published_config(PUBLISHED[case]["options"])).eval()
    weights = published_weights(case)
    weights.pop("u", None)
    if case == "iDDPMPrecond":  # the second half of its outputs, the variance, is read by nothing
        weights |= {k: v[:1] for k, v in weights.items() if k.startswith("model.out_conv.")}
    models.load_reference_state_dict(model, weights)
    return model


@EACH
def test_denoised_images_are_the_published_ones(case, golden):
    method, values = column(CLASSES[case]), {k: golden[f"{case}/{k}"] for k in ("x", "sigma")}
    with torch.no_grad():
        denoised = method.denoise(network(case), values["x"], values["sigma"].double())
    expected = golden[f"{case}/denoised"]
    assert (denoised - expected).abs().max() < 1e-5 * expected.abs().max()


@EACH
def test_noise_levels_end_as_published(case, golden):
    """Sampling reaches no further; VP's lowest, 1e-3, is 9.8e-4 in the published float32."""
    method = column(CLASSES[case], sigma_min=1e-6, sigma_max=1e6)
    low, high = golden[f"{case}/ends"].tolist()
    assert method.level_range[1] == pytest.approx(high, rel=1e-5)
    if case == "VPPrecond":
        beta = torch.tensor(0.5 * 19.9 * 1e-10 + 0.1 * 1e-5)
        low = low * (beta.double().expm1() / (beta.exp() - 1)).sqrt().item()
    assert method.level_range[0] == pytest.approx(low, abs=1e-5)
    assert column(CLASSES[case], sigma_min=0.5, sigma_max=5).level_range == pytest.approx((0.5, 5))


def test_levels_of_iddpm_are_the_published_ones(golden):
    u = golden["iDDPMPrecond/u"].double()
    # published in float32: the smallest, differences from 1, are worse by that
    torch.testing.assert_close(methods.IDDPM.levels, u, rtol=1e-5, atol=1e-5)
    method, numbers = column("iddpm"), torch.arange(1000)
    times = method.time(methods.IDDPM.levels[:-1])
    torch.testing.assert_close(times, 1 - numbers / 1000.0, check_dtype=False)
    assert torch.equal(method.label(times), (999 - numbers).double())


@pytest.mark.parametrize("case", ["VPPrecond", "VEPrecond"])
def test_losses_are_the_published_ones(case, golden, monkeypatch):
    method = column(CLASSES[case])
    clean, uniform, noise, expected = (
        golden[f"{case}/{k}"] for k in ("clean", "uniform", "noise", "loss")
    )
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform.double())
    t = method.draw_times(len(clean))
    x = clean + spread(method.sigma(t), clean) * noise
    examples = Examples(images=x, t=t, clean=clean, noise=noise)
    objective = Regression(method, reduce_mean=False, batch_size=4, examples=0)
    with torch.no_grad():
        loss = objective.squared_errors(network(case), examples, Batch(clean))
    assert (loss.view_as(expected) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_chain_of_vp_is_that_of_the_sde():
    """Levels, labels and network inputs are those of Song et al.'s VP SDE."""
    vp = methods.VPSDE(
        beta_min=0.1, beta_max=20.0, N=1000, continuous=True, likelihood_weighting=False
    )
    method, t = column("edm_vp"), torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(method.sigma(t), vp.sigma(t))
    torch.testing.assert_close(method.time(method.sigma(t)), t)
    torch.testing.assert_close(method.precondition.c_noise(t), vp.precondition.c_noise(t))
    torch.testing.assert_close(method.precondition.c_in(t), vp.alpha(t))


@EACH
def test_times_of_training_follow_their_law(case):
    method = column(CLASSES[case])
    t = method.draw_times(4000, torch.Generator().manual_seed(0))
    if case == "iDDPMPrecond":
        numbers = (1000 * (1 - t)).round()
        assert stats.kstest(numbers.numpy() + 0.5, stats.uniform(0, 1000).cdf).pvalue > 1e-3
        torch.testing.assert_close(numbers, 1000 * (1 - t))
    elif case == "VEPrecond":
        law = stats.uniform(math.log(0.02), math.log(5000))
        assert stats.kstest(method.sigma(t).log().numpy(), law.cdf).pvalue > 1e-3
    else:
        assert stats.kstest(t.numpy(), stats.uniform(1e-5, 1 - 1e-5).cdf).pvalue > 1e-3


# --- samples, likelihood --------------------------------------------------------------------------


def mean_of_points(D):
    def denoise(x, sigma):
        points = torch.tensor([-0.6, 0.1, 0.7], dtype=torch.float64)
        squared = (x.flatten(1) - points) ** 2
        law = -squared / (2 * sigma[:, None] ** 2)
        if math.isfinite(D):
            law = -(1 + D) / 2 * (squared / sigma[:, None] ** 2 / D).log1p()
        return (law.softmax(1) @ points).view_as(x)

    return denoise


def noise_network(case, denoise):
    """The network that gives the exact denoiser, from the definition of each column."""

    def net(x, label):
        if case == "VPPrecond":
            t = label.double() / 999
            sigma = (19.9 * t**2 / 2 + 0.1 * t).expm1().sqrt()
        elif case == "VEPrecond":
            sigma = 2 * label.double().exp()
        y = x if case == "VEPrecond" else x * spread((1 + sigma**2).sqrt(), x)
        noise = (y - denoise(y, sigma)) / spread(sigma, y)
        return -noise if case == "VEPrecond" else noise

    return net


@pytest.mark.parametrize("D", [math.inf, 4.0])
@pytest.mark.parametrize("case", ["VPPrecond", "VEPrecond"])
def test_samples_and_likelihoods_are_those_of_edm_at_equal_noise_levels(case, D):
    method, edm = column(CLASSES[case], D, sigma_min=0.1), pfgmpp(D, 0.1)
    nets = noise_network(case, mean_of_points(D)), denoising_network(mean_of_points(D))
    y = edm.prior_sampling((6, 1, 1, 1), torch.Generator().manual_seed(0)).double()
    for solver in (s for s in SOLVERS if SOLVERS[s].schedule):
        options = {"solver": solver, "n": 6, "schedule": "polynomial", "noise_removal": True}
        sample, expected = (
            solve_ode(m, net, y, **options)[0] for m, net in zip((method, edm), nets, strict=True)
        )
        assert (sample - expected).abs().max() < 1e-5, solver
    data = torch.tensor([0.2, -0.5], dtype=torch.float64).view(2, 1, 1, 1)
    log_p, expected = (
        log_likelihood(m, net, data, unit_vectors(data), rtol=1e-7, atol=1e-7)[0]
        for m, net in zip((method, edm), nets, strict=True)
    )
    assert (log_p - expected).abs().max() < 1e-5


@EACH
def test_scaled_data_train_as_unscaled_ones_do(case):
    s, y = 3.0, 0.5 * torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    method = column(CLASSES[case])
    larger = replace(method, sigma_min=0.006, sigma_max=240.0, sigma_data=1.5, sigma_unit=s)

    def net(x, label):
        return (x + spread(label, x)).tanh()

    losses = [
        Regression(m, reduce_mean=True, batch_size=8, examples=0)(
            net, data, torch.Generator().manual_seed(0)
        ).item()
        for m, data in ((method, y), (larger, s * y))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_noise_without_variance_is_refused():
    with pytest.raises(ValueError, match="needs model.D above 2, not 1.5"):
        column("edm_ve", 1.5)


# --- files ----------------------------------------------------------------------------------------


@EACH
def test_published_files_denoise_as_published(case, golden, tmp_path):
    path = tmp_path / "network-snapshot-000007.pkl"
    weights, options = published_weights(case), PUBLISHED[case]["options"]
    if case == "iDDPMPrecond":
        weights |= {"u": golden["iDDPMPrecond/u"]}
    published = published_network(weights, options, class_name=case)
    save_pickle(path, snapshot(published))
    assert read_snapshot(path).network == case
    trained = load(path, {"data.dataset": "digits"})
    x, sigma = golden[f"{case}/x"], golden[f"{case}/sigma"]
    run = trained.experiment
    with torch.no_grad():
        denoised = run.method.denoise(run.network, x, sigma.double())
    expected = golden[f"{case}/denoised"]
    assert (denoised - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("case", "option"),
    [
        ("VPPrecond", {"beta_d": 10.0}),
        ("VPPrecond", {"M": 500}),
        ("VEPrecond", {"sigma_min": 0.01}),
        ("iDDPMPrecond", {"C_2": 0.01}),
    ],
)
def test_other_constants_are_refused_by_name(case, option):
    options = PUBLISHED[case]["options"]
    assert config_values(Snapshot(case, options, {}))["training.sde"] == CLASSES[case]
    with pytest.raises(ValueError, match=f"option {next(iter(option))} other than"):
        config_values(Snapshot(case, options | option, {}))
