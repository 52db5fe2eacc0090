"""Gaussian arrays whose law is known: samples and likelihoods in the data's own units."""

import math

import numpy as np
import pytest
import torch
from known_laws import denoising_network, pfgmpp
from scipy import stats

from configs.edm import digits_ddpmpp
from likelihood import get_likelihood_fn
from methods.base import spread
from sampling import get_sampling_fn
from sources.codec import from_config as get_codec

SIDES, CHANNELS = (6, 10), 3
ENTRIES = math.prod(SIDES)
MEANS, VARIANCES = 1_000 + np.array([0.0, 5.0, -40.0]), np.array([1e-4, 1.0, 1e4])
EDM = pfgmpp()


def law():
    """Mean (C, N) and covariance (C, N, N) of N entries in each of C independent channels.

    The condition number of each covariance is 100, and the mean of its eigenvalues the channel's
    variance.
    """
    random = np.random.default_rng(0)
    spectrum = np.geomspace(0.1, 10, ENTRIES)
    spectrum /= spectrum.mean()
    covariances = []
    for variance in VARIANCES:
        basis, _ = np.linalg.qr(random.standard_normal((ENTRIES, ENTRIES)))
        covariances.append(variance * basis * spectrum @ basis.T)
    return np.repeat(MEANS[:, None], ENTRIES, 1), np.stack(covariances)


def config_of():
    """A config with the exact moments of each channel."""
    config = digits_ddpmpp.get_config()
    with config.ignore_type():
        config.data.update(num_channels=CHANNELS, image_size=SIDES, dtype="float64")
    config.data.update(mean=tuple(MEANS), std=tuple(np.sqrt(VARIANCES)))
    config.eval.divergence = "exact"
    config.sampling.update(rtol=1e-7, atol=1e-7, ode_solver="unipc", N=80)
    return config


def exact_network():
    """The network of the exact denoiser S (S + sigma^2)^-1 x, S the covariance of x."""
    _, covariances = law()
    values, basis = np.linalg.eigh(covariances / 4 / VARIANCES[:, None, None])
    values, basis = torch.from_numpy(values), torch.from_numpy(basis)

    def denoise(x, sigma):
        modes = torch.einsum("bcn,cnk->bck", x.double().flatten(2), basis)
        modes = modes * values / (values + spread(sigma, modes) ** 2)
        return torch.einsum("bck,cnk->bcn", modes, basis).view_as(x).to(x)

    return denoising_network(denoise)


def test_nats_of_gaussian_arrays():
    mean, covariances = law()
    random = np.random.default_rng(1)
    laws = [
        stats.multivariate_normal(m, c, seed=random) for m, c in zip(mean, covariances, strict=True)
    ]
    data = np.stack([each.rvs(4) for each in laws], 1)  # (4, C, N)
    log_p = sum(each.logpdf(data[:, c]) for c, each in enumerate(laws))
    config = config_of()
    x = get_codec(config).encode(torch.from_numpy(data).view(4, CHANNELS, *SIDES)).double()
    nats, latent, _ = get_likelihood_fn(config, EDM)(exact_network(), x)
    np.testing.assert_allclose(nats.numpy(), -log_p / (CHANNELS * ENTRIES), atol=1e-3)
    assert latent.shape == x.shape


@pytest.mark.parametrize("seed", [0])
def test_moments_of_samples_of_gaussian_arrays(seed):
    """Whitened by the true law, samples have mean 0 and covariance 1 up to Monte-Carlo error."""
    mean, covariances = law()
    number = 4_000
    samples, _ = get_sampling_fn(config_of(), EDM)(
        exact_network(), number, generator=torch.Generator().manual_seed(seed)
    )
    assert samples.dtype == torch.float64 and samples.shape == (number, CHANNELS, *SIDES)
    data = samples.flatten(2).numpy()
    values, basis = np.linalg.eigh(covariances)
    modes = np.einsum("bcn,cnk->bck", data - mean, basis) / np.sqrt(values)
    modes = modes.reshape(number, -1)
    count = modes.shape[1]
    assert np.abs(modes.mean(0)).max() < 5 / math.sqrt(number)
    covariance = modes.T @ modes / number
    variances = covariance.diagonal()
    assert np.abs(variances - 1).max() < 5 * math.sqrt(2 / number)
    assert abs(variances.mean() - 1) < 5 * math.sqrt(2 / number / count)
    across = covariance[~np.eye(count, dtype=bool)]
    assert np.abs(across).max() < 6 / math.sqrt(number)
    assert across.std() == pytest.approx(1 / math.sqrt(number), rel=0.05)
