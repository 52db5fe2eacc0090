"""Likelihoods against known densities: of Gaussian data, and of charges."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from known_laws import SDES, VE, gaussian_network, time_of
from scipy import integrate, special, stats

from configs.poisson import cifar10_ddpmpp
from configs.subvp import cifar10_ddpmpp_continuous as subvp_config
from configs.ve import cifar10_ncsnpp_continuous as ve_config
from configs.vp import cifar10_ddpmpp_continuous as vp_config
from likelihood import gaussian, get_likelihood_fn, log_likelihood, rademacher, unit_vectors
from methods import get_method
from sampling import get_sampling_fn, solve_ode

CONFIGS = {"ve": ve_config, "vp": vp_config, "subvp": subvp_config}


def method_with(**changes):
    return replace(get_method(cifar10_ddpmpp.get_config()), gamma=1e-9, z_exp=0.0, **changes)


# --- Poisson flow ---------------------------------------------------------------------------------


def test_one_charge_carries_the_cauchy_law_down(exact_network):
    """Rays shrink the prior's Cauchy law of scale z_max to one of scale z_min around the charge."""
    dim = 6
    method = method_with(z_max=40.0, z_min=0.1)
    charge = torch.full((1, dim, 1, 1), 0.3, dtype=torch.float64)
    law = stats.multivariate_t(loc=np.full(dim, 0.3), shape=0.1**2 * np.eye(dim), df=1)
    x = torch.from_numpy(law.rvs(size=16, random_state=0)).view(16, dim, 1, 1)
    probes = rademacher(x, torch.Generator().manual_seed(0))
    log_p, latent, _ = log_likelihood(
        method, exact_network(charge, method.gamma), x, probes, rtol=1e-7, atol=1e-7
    )
    bits = (log_p.numpy() - law.logpdf(x.flatten(1).numpy())) / (dim * math.log(2))
    assert np.abs(bits).max() < 1e-2
    # the latent lies on the ray; 1e-5 in the denominator of dx/dz bends it a little
    assert (latent - (x - charge) * 400 - charge).norm() / latent.norm() < 5e-3


@pytest.mark.parametrize("n", [1, 2, 5])
def test_density_of_charges_on_a_line(exact_network, n):
    """At z_min the flux density of n charges is the mean of Cauchy laws of scale z_min.

    With z_max far above the charges the prior is their flux density there, so the flow's density
    on the line is that mixture.
    """
    method = method_with(z_max=3000.0, z_min=0.2)
    charges = torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1).double()
    x = torch.linspace(-2, 2, 41, dtype=torch.float64).view(-1, 1, 1, 1)
    net = exact_network(charges.view(-1, 1, 1, 1), method.gamma)
    log_p, _, _ = log_likelihood(method, net, x, unit_vectors(x), rtol=1e-7, atol=1e-7)
    density = stats.cauchy(charges.numpy(), 0.2).pdf(x.flatten().numpy()[:, None]).mean(1)
    bits = (log_p.numpy() - np.log(density)) / math.log(2)
    assert np.abs(bits).max() < 1e-2


@pytest.mark.parametrize("dim", [1, 2])
def test_density_of_normal_data(exact_network, dim):
    """Charges at the quantiles of a normal law, in the plane on a spiral of golden angles.

    At z_min the density is the law's, smoothed by the Cauchy kernel of scale z_min: a Voigt profile
    on the line, by Fourier's transform also known in the plane.
    """
    std, z_min = 0.5, 0.1
    method = method_with(z_max=2000.0, z_min=z_min)
    r = torch.linspace(0, 1.1, 16, dtype=torch.float64)
    x = torch.zeros(16, dim, 1, 1, dtype=torch.float64)
    x[:, 0, 0, 0] = r
    if dim == 1:
        charges = torch.from_numpy(stats.norm(0, std).ppf((np.arange(500) + 0.5) / 500))[:, None]
        density = special.voigt_profile(r.numpy(), std, z_min)
    else:
        i = np.arange(3000)
        radius = std * np.sqrt(-2 * np.log1p(-(i + 0.5) / 3000))
        angle = math.pi * (3 - math.sqrt(5)) * i
        charges = torch.from_numpy(radius * np.stack([np.cos(angle), np.sin(angle)])).T

        def spectrum(k, r):
            return k * math.exp(-((std * k) ** 2) / 2 - z_min * k) * special.j0(k * r)

        density = [integrate.quad(spectrum, 0, 40, args=(r_i,))[0] / (2 * math.pi) for r_i in r]
    net = exact_network(charges, method.gamma)
    log_p, _, _ = log_likelihood(method, net, x, unit_vectors(x), rtol=1e-6, atol=1e-6)
    bits = (log_p.numpy() - np.log(density)) / (dim * math.log(2))
    assert np.abs(bits).max() < 1e-2


def test_bits_per_dim_of_one_charge_in_an_image(exact_network):
    """The whole path, units included: 8-bit grey levels span an interval of length 2."""
    config = cifar10_ddpmpp.get_config()
    method = method_with(z_max=40.0, z_min=0.1)
    charge = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    x = torch.linspace(-0.5, 0.5, 12, dtype=torch.float64).view(3, 1, 2, 2)
    bits, latent, evaluations = get_likelihood_fn(config, method)(
        exact_network(charge, method.gamma), x, torch.Generator().manual_seed(0)
    )
    law = stats.multivariate_t(loc=np.zeros(4), shape=0.01 * np.eye(4), df=1)
    levels = math.log2(2 / 256)  # the width of a grey level in [-1, 1]
    expected = -law.logpdf(x.flatten(1).numpy()) / (4 * math.log(2)) - levels
    np.testing.assert_allclose(bits.numpy(), expected, atol=1e-2)
    assert latent.shape == x.shape
    assert evaluations > 6


def test_hutchinson_estimate_is_unbiased(exact_network):
    """Averaged over all sign vectors the estimate is the exact divergence."""
    method = method_with(z_max=40.0, z_min=0.5)
    charges = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64).view(2, 2, 1, 1)
    x = torch.tensor([[0.2, 0.9]], dtype=torch.float64).view(1, 2, 1, 1)
    net = exact_network(charges, method.gamma)

    def log_p(*probes):
        probes = torch.tensor(probes, dtype=torch.float64).view(-1, 1, 2, 1, 1)
        return log_likelihood(method, net, x, probes, rtol=1e-8, atol=1e-8)[0].item()

    exact = log_p([1, 0], [0, 1])
    assert log_p([1, 1]) != pytest.approx(log_p([1, -1]), abs=1e-3)
    assert (log_p([1, 1]) + log_p([1, -1])) / 2 == pytest.approx(exact, abs=1e-6)


# --- score SDEs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["rademacher", "exact"])
@pytest.mark.parametrize("name", SDES)
def test_bits_per_dim_of_normal_data(name, divergence):
    """Independent entries, for which one Rademacher probe is exact.

    With a tight tolerance the density is that of the prior, carried to t_data by the affine flow.
    """
    config, sde, mean, std = CONFIGS[name].get_config(), SDES[name], 0.1, 0.25
    config.eval.divergence = divergence
    data = mean + std * torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    net, levels = gaussian_network(sde, mean, std), 128 if config.data.centered else 256

    def error(data, law):
        bits, latent, _ = get_likelihood_fn(config, sde)(
            net, data, torch.Generator().manual_seed(0)
        )
        assert latent.shape == data.shape
        assert latent.std() == pytest.approx(sde.prior_scale, rel=0.2)
        log_p = law.logpdf(data.numpy()).mean((1, 2, 3)) / math.log(2)
        return np.abs(bits.numpy() - (math.log2(levels) - log_p)).max()

    assert error(data, stats.norm(mean, std)) < 5e-3
    ends = torch.tensor([sde.t_prior, sde.t_data], dtype=torch.float64)
    signal, scale = sde.alpha(ends), torch.hypot(sde.alpha(ends) * std, sde.std(ends))
    ratio = scale[1] / scale[0]
    carried = stats.norm((signal[1] - signal[0] * ratio) * mean, sde.prior_scale * ratio)
    config.sampling.rtol = config.sampling.atol = 1e-7
    assert error(data.double(), carried) < 1e-5


def correlated_network(sde, covariance):
    """The exact score of data N(0, covariance) of two entries."""
    eye = torch.eye(2, dtype=torch.float64)

    def net(x, cond):
        signal, noise = sde.kernel(time_of(sde, cond[0]))
        score = -torch.linalg.solve(signal**2 * covariance + noise**2 * eye, x.flatten(1).T).T
        return (score if sde is VE else -noise * score).view_as(x)

    return net


@pytest.mark.parametrize("name", SDES)
def test_exact_divergence_and_the_mean_of_estimates(name):
    """Correlated data, whose divergence a single probe misses."""
    sde = SDES[name]
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
    x = torch.tensor([[0.3, -0.5], [1.0, 0.2]], dtype=torch.float64).view(2, 2, 1, 1)
    net = correlated_network(sde, covariance)

    def log_p(probes):
        return log_likelihood(sde, net, x, probes, rtol=1e-5, atol=1e-5)[0].numpy()

    law = stats.multivariate_normal(np.zeros(2), covariance.numpy())
    expected = law.logpdf(x.flatten(1).numpy())
    assert np.abs(log_p(unit_vectors(x)) - expected).max() < 2 * math.log(2) * 5e-3
    for draw in (rademacher, gaussian):  # repeated for as many independent estimates
        copies = x[:1].expand(2000, 2, 1, 1)
        probe = draw(copies, torch.Generator().manual_seed(0))
        estimates = log_likelihood(sde, net, copies, probe, rtol=1e-5, atol=1e-5)[0]
        error = estimates.std() / math.sqrt(2000)
        assert estimates.std() > 0.1
        assert abs(estimates.mean() - expected[0]) < 4 * error


# --- encoding -------------------------------------------------------------------------------------


def mixture_network(sde):
    """The exact score of a law with two modes, -0.5 and 0.5, of each entry: a flow that bends."""
    left, right = (gaussian_network(sde, mean, 0.2) for mean in (-0.5, 0.5))

    def net(x, cond):
        signal, noise = sde.kernel(time_of(sde, cond[0]))
        share = torch.sigmoid(signal * x / ((signal * 0.2) ** 2 + noise**2))
        return share * right(x, cond) + (1 - share) * left(x, cond)

    return net


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver", ["rk45", "heun", "multistep"])
def test_latent_leads_back_to_the_image(name, solver):
    config, sde = CONFIGS[name].get_config(), SDES[name]
    config.sampling.update({"method": "ode", "noise_removal": False, "ode_solver": solver})
    config.sampling.N = 300
    net = mixture_network(sde)
    image = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    data = 2 * image - 1 if config.data.centered else image
    _, latent, _ = get_likelihood_fn(config, sde)(net, data, torch.Generator().manual_seed(0))
    decoded, _ = get_sampling_fn(config, sde)(net, x=latent)
    assert (decoded - image).abs().max() < 2e-3


def test_poisson_latent_leads_back_to_the_image(exact_network, poisson):
    generator = torch.Generator().manual_seed(0)
    charges, data = torch.rand(2, 30, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    net = exact_network(charges, poisson.gamma)
    probes = rademacher(data, generator)
    _, latent, _ = log_likelihood(poisson, net, data, probes, rtol=1e-6, atol=1e-6)
    decoded, _ = solve_ode(poisson, net, latent, rtol=1e-6, atol=1e-6)
    assert (decoded - data).abs().max() < 1e-3
    assert latent.flatten(1).norm(dim=1).min() > 1


# --- probes and errors ----------------------------------------------------------------------------


def test_probes_have_mean_zero_and_unit_covariance():
    x = torch.zeros(5000, 1, 1, 3)
    for draw in (rademacher, gaussian):
        probe = draw(x, torch.Generator().manual_seed(0))[0].flatten(1)
        assert probe.mean(0).abs().max() < 0.06
        assert (probe.T @ probe / len(probe) - torch.eye(3)).abs().max() < 0.06
    assert set(rademacher(x).unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(unit_vectors(x).flatten(1), torch.eye(3))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("training.continuous", False, "discrete noise levels.*has no likelihood"),
        ("eval.divergence", "hutchinson", "must be one of 'rademacher', 'gaussian', 'exact', not"),
        ("sampling.rtol", 0.0, r"sampling\.rtol must be positive"),
    ],
)
def test_what_has_no_likelihood_is_said(key, value, message):
    config = vp_config.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        get_likelihood_fn(config, get_method(config))
