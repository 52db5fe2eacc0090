"""Likelihoods against densities that are known: exact fields of charges in low dimension."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from configs.poisson import cifar10_ddpmpp
from likelihood import get_likelihood_fn, log_likelihood, rademacher
from methods import get_method


def method_with(**changes):
    return replace(get_method(cifar10_ddpmpp.get_config()), gamma=1e-9, z_exp=0.0, **changes)


def exact_divergence_probe(x):
    """In one dimension a probe of +-1 gives the divergence itself."""
    return torch.ones_like(x)


def test_one_charge_carries_the_cauchy_law_down(exact_network):
    """Rays shrink the prior's Cauchy law of scale z_max to one of scale z_min around the charge."""
    dim = 6
    method = method_with(z_max=40.0, z_min=0.1)
    charge = torch.full((1, dim, 1, 1), 0.3, dtype=torch.float64)
    law = stats.multivariate_t(loc=np.full(dim, 0.3), shape=0.1**2 * np.eye(dim), df=1)
    x = torch.from_numpy(law.rvs(size=16, random_state=0)).view(16, dim, 1, 1)
    probe = rademacher(x, torch.Generator().manual_seed(0))
    log_p, latent, _ = log_likelihood(
        method, exact_network(charge, method.gamma), x, probe, rtol=1e-7, atol=1e-7
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
    log_p, _, _ = log_likelihood(method, net, x, exact_divergence_probe(x), rtol=1e-7, atol=1e-7)
    density = stats.cauchy(charges.numpy(), 0.2).pdf(x.flatten().numpy()[:, None]).mean(1)
    bits = (log_p.numpy() - np.log(density)) / math.log(2)
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

    def log_p(probe):
        return log_likelihood(method, net, x, probe.view_as(x), rtol=1e-8, atol=1e-8)[0].item()

    signs = [torch.tensor([1.0, s], dtype=torch.float64) for s in (1.0, -1.0)]
    axes = torch.eye(2, dtype=torch.float64)
    prior = method.prior_logp(
        log_likelihood(method, net, x, axes[0].view_as(x), rtol=1e-8, atol=1e-8)[1]
    ).item()
    exact = log_p(axes[0]) + log_p(axes[1]) - prior  # one partial derivative at a time
    assert log_p(signs[0]) != pytest.approx(log_p(signs[1]), abs=1e-3)
    assert (log_p(signs[0]) + log_p(signs[1])) / 2 == pytest.approx(exact, abs=1e-6)


def test_rademacher_probe():
    probe = rademacher(torch.zeros(200, 3, 8, 8), torch.Generator().manual_seed(0))
    assert set(probe.unique().tolist()) == {-1.0, 1.0}
    assert abs(probe.mean().item()) < 0.02
