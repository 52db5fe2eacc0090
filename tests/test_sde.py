"""The score SDEs against published numbers, their own differential equations and known scores."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_laws import SDES, SUBVP, VE, VP, gaussian_network, time_of
from scipy import integrate, stats

import losses
import methods
from configs.keys import get
from configs.subvp import cifar10_ddpmpp_continuous as subvp_config
from configs.ve import cifar10_ncsnpp_continuous as ve_config
from configs.vp import cifar10_ddpmpp_continuous as vp_config
from methods import get_method
from sampling import get_sampling_fn
from sources.batch import Batch

CONFIGS = Path(__file__).parent.parent / "configs"
DISCRETE = {"smld": replace(VE, continuous=False), "ddpm": replace(VP, continuous=False)}
TRAINED = SDES | DISCRETE


def times(n=50, start=1e-3):
    return torch.linspace(start, 1.0, n, dtype=torch.float64)


def column(c, x):
    return c.view(-1, *[1] * (x.dim() - 1))


# --- parity with the published implementation -----------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_marginals_and_coefficients_match_published_ones(golden, name):
    sde, x, t = SDES[name], golden["sde/x"], golden["sde/t"]
    mean, std = sde.marginal_prob(x, t)
    drift, diffusion = sde.sde(x, t)
    f, g = sde.discretize(x, t)
    values = {"mean": mean, "std": std, "drift": drift, "diffusion": diffusion}
    values |= {"disc_f": f, "disc_G": g, "prior_logp": sde.prior_logp(x)}
    for what, value in values.items():
        expected = golden[f"sde/{name}_{what}"]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=what)


def test_published_parameters_are_those_of_the_configs(golden):
    beta_min, beta_max, sigma_min, sigma_max, steps = golden["sde/params"].tolist()
    vp, subvp, ve = (get_method(c.get_config()) for c in (vp_config, subvp_config, ve_config))
    assert vp == VP == replace(VP, beta_min=beta_min, beta_max=beta_max, N=int(steps))
    assert ve == VE == replace(VE, sigma_min=sigma_min, sigma_max=sigma_max, N=int(steps))
    assert subvp == SUBVP


# --- what the network sees ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, t, label, factor",
    [
        ("ve", 0.5, math.sqrt(0.01 * 50.0), 1.0),
        ("vp", 0.5, 499.5, -1 / 0.95965415),
        ("subvp", 0.5, 499.5, -1 / 0.92093617),
        ("smld", 1.0, 0, 1.0),
        ("smld", 0.9, 100, 1.0),
        ("smld", 1e-5, 999, 1.0),
        ("ddpm", 1.0, 999.0, None),
        ("ddpm", 0.5, 499.5, None),
    ],
)
def test_labels_and_scaling_of_the_network(name, t, label, factor):
    sde, labels = TRAINED[name], []

    def net(x, cond):
        labels.append(cond)
        return x

    if factor is None:  # DDPM's own table: 1 - the product of 1 - beta
        betas = np.linspace(0.1 / 1000, 20.0 / 1000, 1000)
        factor = -1 / math.sqrt(1 - np.prod(1 - betas[: int(label) + 1]))
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for time in (torch.tensor(t), torch.tensor(t).expand(3), torch.tensor(t).double()):
        torch.testing.assert_close(sde.score(net, x, time), factor * x, rtol=1e-5, atol=0)
        assert labels[-1].shape == (3,)
        np.testing.assert_allclose(labels[-1].numpy(), label, rtol=1e-6)


def test_levels_of_a_discrete_network_are_numbered_exactly():
    """Every k / (N - 1) finds its own k, in float32 too."""
    for steps in (2, 10, 232, 1000, 2000):
        sde = replace(DISCRETE["smld"], N=steps)
        for dtype in (torch.float32, torch.float64):
            t = torch.arange(steps).to(dtype) / (steps - 1)
            assert torch.equal(sde.index(t), torch.arange(steps))


# --- an SDE agrees with itself --------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_marginal_solves_the_moment_equations(name):
    """dm/dt = c m and dv/dt = 2 c v + g^2 for dx = c x dt + g dw."""
    sde = SDES[name]

    def moments(t, state):
        c, g = (value.item() for value in sde.coefficients(torch.tensor(t, dtype=torch.float64)))
        return [c * state[0], 2 * c * state[1] + g**2]

    t = times(20)
    start = [1.0, sde.std(torch.zeros(1, dtype=torch.float64)).item() ** 2]
    truth = integrate.solve_ivp(
        moments, (0, 1), start, t_eval=t.numpy(), rtol=1e-9, atol=1e-15, method="LSODA"
    )
    mean, std = sde.marginal_prob(torch.ones(20, 1, dtype=torch.float64), t)
    np.testing.assert_allclose(mean.flatten(), truth.y[0], rtol=1e-6)
    np.testing.assert_allclose(std**2, truth.y[1], rtol=1e-5)


@pytest.mark.parametrize("name", SDES)
@given(t=st.floats(1e-5, 1.0))
def test_time_inverts_sigma(name, t):
    t = torch.tensor(t, dtype=torch.float64)
    assert SDES[name].time(SDES[name].sigma(t)).item() == pytest.approx(t.item(), rel=1e-6)


@pytest.mark.parametrize("name", SDES)
def test_at_level_zero_there_is_only_data(name):
    zero = torch.zeros(1, dtype=torch.float64)
    assert SDES[name].alpha(SDES[name].time(zero)).item() == 1


@pytest.mark.parametrize("name", TRAINED)
def test_slope_is_the_ode_in_natural_variables(name):
    """dx/dt = alpha' y + alpha dy/dsigma sigma' for x = alpha(t) y."""
    sde = TRAINED[name]
    net = gaussian_network(sde, 0.3, 0.2)
    y = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in times(7, start=0.01):
        h = 1e-5 * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        alpha_rate, sigma_rate = (f(t + h).diff() / 2e-5 for f in (sde.alpha, sde.sigma))
        alpha = sde.alpha(t)
        expected = alpha_rate * y + alpha * sigma_rate * sde.slope(net, y, sde.sigma(t))
        drift = sde.ode(net, alpha * y, t)
        torch.testing.assert_close(drift, expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(sde.ode(net, alpha * y, t.item()), drift, rtol=0, atol=0)


@pytest.mark.parametrize("name", SDES)
def test_steps_converge_to_the_sde(name):
    """N f and sqrt(N) G become drift and diffusion; the error falls as 1 / N."""
    x = torch.ones(30, 1, dtype=torch.float64)

    def error(steps):
        sde = replace(SDES[name], N=steps)
        t = torch.arange(steps // 30, steps, steps // 30)[:30].double() / (steps - 1)
        drift, diffusion = sde.sde(x[: len(t)], t)
        f, g = sde.discretize(x[: len(t)], t)
        return max(
            ((steps * f - drift).abs().flatten() / (1 + drift.abs().flatten())).max().item(),
            ((math.sqrt(steps) * g - diffusion).abs() / diffusion).max().item(),
        )

    assert error(3000) < 0.01
    assert error(3000) < 0.6 * error(1500) or error(3000) < 1e-12


@pytest.mark.parametrize("name", SDES)
def test_chain_has_the_marginals_of_the_sde(name):
    """Mean and variance carried from step to step by x <- x + f + G noise."""
    sde = replace(SDES[name], N=4000)
    t = torch.arange(sde.N, dtype=torch.float64) / (sde.N - 1)
    f, g = sde.discretize(torch.ones(sde.N, 1, dtype=torch.float64), t)
    mean, variance = 1.0, 0.0
    for factor, noise in zip((1 + f.flatten()).tolist(), g.tolist(), strict=True):
        mean, variance = factor * mean, factor**2 * variance + noise**2
    assert mean == pytest.approx(sde.alpha(t[-1]).item(), abs=1e-3)
    assert variance == pytest.approx(sde.std(t[-1]).item() ** 2, rel=2e-3)


def test_ddpm_kernel_is_the_law_of_its_chain():
    sde = DISCRETE["ddpm"]
    t = torch.arange(sde.N, dtype=torch.float64) / (sde.N - 1)
    betas = np.linspace(0.1 / 1000, 20.0 / 1000, 1000)
    signal, noise = sde.kernel(t)
    np.testing.assert_allclose(signal, np.sqrt(np.cumprod(1 - betas)), rtol=1e-12)
    np.testing.assert_allclose(noise, np.sqrt(1 - np.cumprod(1 - betas)), rtol=1e-9)


# --- the prior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_prior_density_is_normalised_and_normal(name, dim):
    sde = SDES[name]
    law = stats.norm(0, sde.prior_scale)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)  # in units of sqrt(2) prior_scale
    scale = math.sqrt(2) * sde.prior_scale
    grid = np.stack(np.meshgrid(*[scale * nodes] * dim), axis=-1).reshape(-1, dim)
    weight = np.stack(np.meshgrid(*[weights * np.exp(nodes**2 / 2)] * dim), -1).reshape(-1, dim)
    logp = sde.prior_logp(torch.from_numpy(grid).view(-1, dim, 1, 1)).numpy()
    np.testing.assert_allclose(logp, law.logpdf(grid).sum(1), rtol=1e-9)
    assert (np.exp(logp) * weight.prod(1)).sum() * scale**dim == pytest.approx(1, abs=1e-3)
    x = sde.prior_sampling((4000, dim, 1, 1), torch.Generator().manual_seed(0))
    assert stats.kstest(x.flatten().numpy(), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", SDES)
def test_rescaling_ends_at_the_norm_of_prior_samples(name):
    x = SDES[name].prior_sampling((100, 3, 32, 32), torch.Generator().manual_seed(0))
    low, high = SDES[name].prior_norms(3072)
    assert x.flatten(1).norm(dim=1).mean().item() == pytest.approx(high, rel=0.01)
    assert low < high


@pytest.mark.parametrize("name", SDES)
def test_prior_is_where_the_sde_ends(name):
    one = torch.ones(1, dtype=torch.float64)
    assert SDES[name].std(one).item() == pytest.approx(SDES[name].prior_scale, rel=1e-4)
    assert SDES[name].sigma(one) > 49


# --- the loss -------------------------------------------------------------------------------------


def loss_of(sde, net, batch, seed=0):
    """The loss of each example with the sum over entries; weighted prediction and target."""
    batch = Batch(batch)
    examples = sde.draw(batch, torch.Generator().manual_seed(seed))
    prediction, target = sde.predict(net, examples), sde.target(examples, batch)
    weight = sde.weight(examples)
    root = 1.0 if weight is None else weight.to(target).sqrt()[:, None]
    return 0.5 * (root * (prediction - target)).square().sum(1), root * prediction, root * target


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_exact_score_has_the_least_loss_possible(name, weighted):
    """For N(m, s^2) entries it is w^2 signal^2 s^2 / (v noise^2) / 2 each, v the variance of x."""
    sde, mean, std = TRAINED[name], 0.3, 0.2
    if weighted and not sde.continuous:
        pytest.skip("has no weighting")
    sde = replace(sde, likelihood_weighting=weighted)
    dim = 16
    batch = mean + std * torch.randn(
        20000, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    loss, prediction, target = loss_of(sde, gaussian_network(sde, mean, std), batch)

    def least(t):
        t = torch.as_tensor(t, dtype=torch.float64)
        signal, noise = sde.kernel(t)
        weight = sde.coefficients(t)[1] if weighted else noise
        variance = (signal * std) ** 2 + noise**2
        return dim / 2 * weight**2 * (signal * std) ** 2 / (variance * noise**2)

    if sde.continuous:
        u = np.linspace(math.log(sde.t_data), 0, 200001)  # the small times weigh most
        expected = integrate.trapezoid(least(np.exp(u)).numpy() * np.exp(u), u) / (1 - sde.t_data)
    else:
        expected = least(torch.arange(sde.N, dtype=torch.float64) / (sde.N - 1)).mean().item()
    error = loss.std().item() / math.sqrt(len(loss))
    assert loss.mean().item() == pytest.approx(expected, abs=4 * error)
    assert error < 0.1 * expected
    # the best multiple of the exact score is the exact score
    products = (prediction * (target - prediction)).sum(1)
    assert abs(products.mean()) < 4 * products.std() / math.sqrt(len(products))


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_losses_are_those_of_their_papers(name):
    """SMLD: sigma^2 |s + noise / sigma|^2; DDPM: |network - noise|^2, with the levels' tables."""
    sde, calls = DISCRETE[name], []

    def net(x, cond):
        calls.append((x, cond))
        return 0.1 * x

    batch = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    loss, _, _ = loss_of(sde, net, batch)
    ((x, cond),) = calls
    k = cond.round().long()
    assert (cond - k).abs().max() < 1e-3
    if name == "smld":
        sigmas = torch.from_numpy(np.geomspace(50.0, 0.01, 1000)).float()
        sigma = column(sigmas[k], x)
        noise = (x - batch) / sigma
        squared = sigma**2 * (0.1 * x + noise / sigma) ** 2
    else:
        power = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))).float()
        power = column(power[k], x)
        noise = (x - power.sqrt() * batch) / (1 - power).sqrt()
        squared = (0.1 * x - noise) ** 2
    torch.testing.assert_close(loss, 0.5 * squared.flatten(1).sum(1), rtol=1e-3, atol=1e-3)
    assert noise.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", TRAINED)
def test_training_times_cover_their_range(name):
    sde = TRAINED[name]
    t = sde.draw_times(20000, torch.Generator().manual_seed(0))
    first = sde.t_data if sde.continuous else 0.0
    assert stats.kstest(t.numpy(), stats.uniform(first, 1 - first).cdf).pvalue > 1e-3
    if not sde.continuous:
        assert set(sde.index(t).tolist()) == set(range(sde.N))


@pytest.mark.parametrize("reduce_mean", [False, True])
def test_loss_reads_reduce_mean_and_ignores_the_reference_batch(reduce_mean):
    config = vp_config.get_config()
    config.training.reduce_mean = reduce_mean
    loss_fn = losses.get_loss_fn(config, VP)
    batch = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    net = gaussian_network(VP)
    loss = loss_fn(net, batch, torch.Generator().manual_seed(0))
    half_sum = loss_of(VP, net, batch)[0].mean()
    assert loss.item() == pytest.approx((half_sum * (2 / 48 if reduce_mean else 1)).item())
    examples = loss_fn.draw(Batch(batch), generator=torch.Generator().manual_seed(0))
    assert loss == loss_fn.loss(net, examples, Batch(batch[:2]))


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("*/**/*.py"))
)
def test_every_experiment_has_a_method_and_a_sampler(path):
    spec = importlib.util.spec_from_file_location("experiment", CONFIGS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.num_channels = config.data.num_channels or 3  # training measures what is open
    config.data.image_size = config.data.image_size or 32
    if config.training.M is None:
        config.training.M, config.sampling.z_max, config.sampling.upper_norm = 291, 40.0, 3000.0
    measured = {"model.sigma_data": 0.5, "model.P_mean": -1.2, "sampling.sigma_max": 80.0}
    for key, value in measured.items():
        if get(config, key) is None:
            config.update_from_flattened_dict({key: value})
    method = get_method(config)
    family = path.split("/")[0].removesuffix("2")  # EDM2 is EDM with another network
    assert config.training.sde.removesuffix("sde").partition("_")[0] == family
    get_sampling_fn(config, method)


@pytest.mark.parametrize(
    "make, key, value, message",
    [
        (subvp_config, "training.continuous", False, r"subvpsde has no discrete form"),
        (vp_config, "model.num_scales", 1, r"model\.num_scales must be at least 2, not 1"),
        (vp_config, "model.num_scales", 20, r"beta_max=20 must be below model\.num_scales=20"),
        (ve_config, "model.sigma_min", 50.0, r"model\.sigma_min must lie between 0 and"),
        (ve_config, "model.sigma_min", 0.0, r"model\.sigma_min must lie between 0 and"),
        (vp_config, "model.beta_min", 21.0, r"model\.beta_min must lie between 0 and"),
        (subvp_config, "model.beta_min", 0.0, r"model\.beta_min must lie between 0 and"),
    ],
)
def test_numbers_out_of_range_are_named(make, key, value, message):
    config = make.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        get_sampling_fn(config, get_method(config))


def test_discrete_losses_have_no_likelihood_weighting():
    config = vp_config.get_config()
    config.training.continuous = False
    config.training.likelihood_weighting = True
    with pytest.raises(ValueError, match=r"likelihood_weighting needs training\.continuous"):
        get_method(config)


def test_known_network_is_told_times_as_defined():
    """The helper of these tests: a label leads back to the time it was made from."""
    for sde in TRAINED.values():
        t = torch.tensor(617 / 999, dtype=torch.float64)
        labels = []
        sde.score(lambda x, cond: labels.append(cond) or x, torch.zeros(1, 1, 1, 1).double(), t)  # noqa: B023
        assert time_of(sde, labels[0]).item() == pytest.approx(t.item(), rel=1e-9)


def test_a_predicted_score_with_a_skip_has_a_slope_at_one_noise_level_an_image():
    class Skipping(methods.VPSDE):
        predicts = "score"

        @property
        def precondition(self):
            return replace(super().precondition, c_skip=lambda t: -t, c_out=lambda t: 1 + t)

    method = Skipping(**vars(VP))
    y, t, out = torch.randn(3, 1, 2, 2), torch.tensor([0.2, 0.5, 0.9]), torch.randn(3, 1, 2, 2)
    alpha, std = (c(t).view(-1, 1, 1, 1) for c in (method.alpha, method.std))
    of_state, of_output = (c.view(-1, 1, 1, 1) for c in method.slope_factors(t))
    score = method.precondition(lambda x, label: out, alpha * y, t)
    torch.testing.assert_close(of_state * y + of_output * out, -std * score, check_dtype=False)
