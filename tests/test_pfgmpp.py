"""PFGM++ of any D and EDM: laws, densities and flows in closed form; published numbers."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from known_laws import denoising_network, gaussian_network, pfgmpp
from scipy import stats
from test_edm_networks import CASES, case_inputs, case_model

import methods
import models
from configs.edm import digits_ddpmpp as edm_config
from configs.pfgmpp import digits_ddpmpp as pfgmpp_config
from likelihood import get_likelihood_fn, log_likelihood, unit_vectors
from losses import get_loss_fn, posterior_mean
from methods.student_t import log_density
from sampling import get_sampling_fn, solve_ode
from solvers import SCHEDULES
from solvers.fixed_steps import Churn, heun
from sources.batch import Batch

EVERY_D = (0.5, 1.0, 2.0, 8.0, 128.0, 2048.0, 3e6, math.inf)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def slow_posterior_mean(x, data, sigma, D):
    """The definition in float64: a loop over images and data."""
    means = []
    for point, s in zip(x.double(), sigma.tolist(), strict=True):
        squared = torch.stack([(point - y).square().sum() for y in data.double()])
        power = -squared / (2 * s**2)
        if math.isfinite(D):
            power = -(point.numel() + D) / 2 * (squared / (D * s**2)).log1p()
        means.append(torch.tensordot(power.softmax(0), data.double(), 1))
    return torch.stack(means)


@pytest.fixture(scope="module")
def published():
    """Tensors measured on the programs of EDM and PFGM++, by name."""
    with np.load(GOLDEN / "edm_method.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


# --- the kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 64, 3072])
@pytest.mark.parametrize("D", EVERY_D)
def test_radii_follow_their_law(D, dim):
    """||x - y||^2 / (N sigma^2) has Fisher's F law of N and D degrees of freedom.

    Of perturbed images, and of the examples of a training step.
    """
    y = torch.full((2000, dim, 1, 1), 0.3, dtype=torch.float64)
    sigma = torch.linspace(0.1, 5, 2000, dtype=torch.float64)
    law = stats.f(dim, D) if math.isfinite(D) else stats.chi2(dim, scale=1 / dim)
    examples = pfgmpp(D).draw(Batch(y), seeded(1))
    perturbed = pfgmpp(D).perturb_at(y, sigma, seeded(0))
    for x, level in ((perturbed, sigma), (examples.images, examples.t)):
        ratio = (x - y).flatten(1).square().sum(1) / (dim * level**2)
        assert stats.kstest(ratio.numpy(), law.cdf).pvalue > 1e-3


def test_directions_are_uniform_and_independent_of_radii():
    x = pfgmpp(1.0).perturb_at(torch.zeros(4000, 2, 1, 1), 3.0, seeded(0)).flatten(1)
    angle = torch.atan2(x[:, 1], x[:, 0]).numpy()
    assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
    far = x.norm(dim=1) > x.norm(dim=1).median()
    assert stats.ks_2samp(angle[far], angle[~far]).pvalue > 1e-3


def test_with_one_dimension_more_draws_are_those_of_pfgm(poisson):
    y = torch.full((4000, 8, 1, 1), 0.25, dtype=torch.float64)
    z = torch.tensor(0.7, dtype=torch.float64)
    pfgmpp_draws = pfgmpp(1.0).perturb_at(y, z, seeded(0))
    pfgm_draws = poisson.perturb_at(y, poisson.time(z), seeded(1))
    radii = [(x - y).flatten(1).norm(dim=1).numpy() for x in (pfgmpp_draws, pfgm_draws)]
    assert stats.ks_2samp(*radii).pvalue > 1e-3
    entries = (pfgmpp_draws - y)[:, 3].flatten().numpy()
    assert stats.kstest(entries, stats.cauchy(scale=0.7).cdf).pvalue > 1e-3


def test_smallest_D_stays_within_float32():
    x = pfgmpp(0.5).prior_sampling((200_000, 1, 2, 2), seeded(0))
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert x.abs().max() > 1e9  # not clipped: one of 200,000 is expected beyond about 4e10 sigma


@pytest.mark.parametrize("dim", [1, 2, 64])
@pytest.mark.parametrize("D", EVERY_D)
def test_density_is_that_of_scipy(D, dim):
    x = pfgmpp(D, sigma_max=3.0).prior_sampling((20, dim, 1, 1), seeded(0)).double()
    if math.isfinite(D):
        law = stats.multivariate_t(shape=9.0 * np.eye(dim), df=D)
    else:
        law = stats.multivariate_normal(cov=9.0 * np.eye(dim))
    log_p = pfgmpp(D, sigma_max=3.0).prior_logp(x).numpy()
    # scipy's difference of log-gammas loses up to some 1e-15 D log D
    error = 1e-9 + (1e-14 * D if math.isfinite(D) else 0)
    expected = np.atleast_1d(law.logpdf(x.flatten(1).numpy()))
    np.testing.assert_allclose(log_p, expected, rtol=1e-9, atol=error)


@pytest.mark.parametrize("D", EVERY_D[:-1])
def test_density_is_a_product_of_those_of_single_entries(D):
    """Given k entries of square sum s, the next has k more degrees of freedom and the scale
    sqrt((D + s) / (D + k))."""
    x = pfgmpp(D, sigma_max=1.0).prior_sampling((5, 3072, 1, 1), seeded(0)).double().flatten(1)
    k, squared = np.arange(3072), x.numpy() ** 2
    scale = np.sqrt((D + squared.cumsum(1) - squared) / (D + k))
    expected = stats.t(D + k, scale=scale).logpdf(x.numpy()).sum(1)
    np.testing.assert_allclose(log_density(x, 1.0, D).numpy(), expected, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("D", [1e7, 1e8])
def test_density_goes_to_the_gaussian(D):
    """Their difference is ((s - N)^2 - 2 N) / (4 D) + O(D^-2), with s = ||x||^2 / sigma^2."""
    x = 2 * torch.randn(50, 3072, 1, 1, generator=seeded(0), dtype=torch.float64)
    s = x.flatten(1).square().sum(1) / 4
    difference = log_density(x, 2.0, D) - log_density(x, 2.0, math.inf)
    expected = ((s - 3072) ** 2 - 2 * 3072) / (4 * D)
    torch.testing.assert_close(difference, expected, rtol=1e-2, atol=2e-7)
    assert difference.abs().max() < 1e5 / D


@pytest.mark.parametrize("D", [0.5, 1e12, math.inf])
@pytest.mark.parametrize("sigma", [1e-200, 1e200])
def test_density_takes_any_scale(D, sigma):
    """log p of sigma x at scale sigma is log p of x at scale 1, less N log sigma."""
    x = torch.randn(3, 4, generator=seeded(0), dtype=torch.float64)
    scaled = log_density(sigma * x, sigma, D) + 4 * math.log(sigma)
    torch.testing.assert_close(scaled, log_density(x, 1.0, D), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("D", [0.5, 1e12, math.inf])
def test_mean_at_the_ends_of_the_noise_levels(D):
    """Far above the data all of them count alike; far below, the nearest alone."""
    data = torch.randn(6, 1, 2, 2, generator=seeded(0), dtype=torch.float64)
    far = posterior_mean(data, data, 1e30, D)
    torch.testing.assert_close(far, data.mean(0, keepdim=True).expand_as(data))
    torch.testing.assert_close(posterior_mean(data, data, 1e-30, D), data)


# --- the posterior mean ---------------------------------------------------------------------------


@pytest.mark.parametrize("D", [2.0, 16.0, 128.0, 2048.0, math.inf])
def test_posterior_mean_matches_published_targets(published, D):
    name = f"target/{D:.0f}"
    mean = posterior_mean(
        published[f"{name}_x"], published["target/refs"], published["target/sigma"], D
    )
    expected = published[f"{name}_target"]
    assert (mean - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", EVERY_D)
def test_posterior_mean_is_its_definition(D, dtype):
    data = torch.rand(50, 3, 16, 16, generator=seeded(0), dtype=dtype) * 2 - 1
    sigma = torch.logspace(-3, 2, 12, dtype=torch.float64)
    x = pfgmpp(D).perturb_at(data[:12], sigma, seeded(1))
    mean, expected = posterior_mean(x, data, sigma, D), slow_posterior_mean(x, data, sigma, D)
    assert mean.dtype == dtype
    assert (mean - expected).abs().max() < 1e-6


def test_posterior_mean_takes_one_noise_level_for_all():
    data = torch.rand(5, 1, 2, 2, generator=seeded(0), dtype=torch.float64)
    x, sigma = data[:3] + 0.1, torch.full((3,), 0.4)
    one = posterior_mean(x, data, 0.4, 3.0)
    torch.testing.assert_close(one, slow_posterior_mean(x, data, sigma, 3.0), rtol=0, atol=1e-7)


# --- training -------------------------------------------------------------------------------------


def config_of(D, **training):
    config = pfgmpp_config.get_config()
    config.model.D = D
    config.model.sigma_data, config.model.P_mean, config.model.P_std = 0.5, -1.2, 1.2
    config.sampling.sigma_min, config.sampling.sigma_max = 0.002, 80.0
    config.training.batch_size = 64
    config.training.update(training)
    return config


def loss_of(config, net, images):
    return get_loss_fn(config, methods.get_method(config))(net, images, seeded(0))


def test_noise_levels_of_training_are_log_normal():
    method = replace(pfgmpp(4.0), P_mean=-0.7, P_std=0.4)
    logs = method.draw_times(10_000, seeded(0)).log()
    assert stats.kstest(logs.numpy(), stats.norm(-0.7, 0.4).cdf).pvalue > 1e-3


def test_loss_of_a_large_D_is_that_of_edm():
    images = torch.rand(64, 3, 8, 8, generator=seeded(1)) * 2 - 1
    losses = [
        loss_of(config_of(D, target=target), lambda x, label: (3 * x).sin(), images).item()
        for target in ("image", "posterior_mean")
        for D in (1e8, math.inf)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] == pytest.approx(losses[3], rel=1e-5)
    assert losses[0] != losses[2]


@pytest.mark.parametrize("reduce_mean", [False, True])
def test_loss_of_exact_denoisers(reduce_mean):
    """Weight times posterior variance, std^2 sigma^2 / (std^2 + sigma^2), over ln sigma's law."""
    images = 0.1 + 0.3 * torch.randn(4000, 1, 2, 2, generator=seeded(1), dtype=torch.float64)
    config = config_of(math.inf, batch_size=4000, reduce_mean=reduce_mean)
    loss = loss_of(config, gaussian_network(pfgmpp(), 0.1, 0.3), images).item()
    e = np.linspace(-6, 6, 10001)
    sigma = np.exp(-1.2 + 1.2 * e)
    error = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * 0.09 * sigma**2 / (0.09 + sigma**2)
    expected = np.average(error, weights=np.exp(-0.5 * e**2)) * (1 if reduce_mean else 4 / 2)
    assert loss == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("D", [1.0, 64.0, math.inf])
def test_posterior_means_of_the_reference_batch_have_no_error(D):
    """The reference batch is all of the batch, also where fewer examples are perturbed."""
    images = torch.rand(64, 1, 4, 4, generator=seeded(1), dtype=torch.float64) * 2 - 1
    net = denoising_network(lambda x, sigma: posterior_mean(x, images, sigma, D))
    config = config_of(D, target="posterior_mean", small_batch_size=24)
    assert loss_of(config, net, images).item() < 1e-12
    config.training.target = "image"
    assert loss_of(config, net, images).item() > 1e-2


def test_only_posterior_means_take_a_reference_batch():
    sizes = {}
    for target in ("image", "posterior_mean"):
        config = config_of(8.0, target=target, batch_size=500, small_batch_size=32)
        loss = get_loss_fn(config, methods.get_method(config))
        sizes[target] = (loss.batch_size, loss.examples)
    assert sizes == {"image": (32, 32), "posterior_mean": (500, 32)}


# --- the denoiser ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_denoised_and_slope_agree_with_the_definition(dtype, error):
    """EDM's table 1, with sigma a float or one for each image."""
    x = torch.randn(5, 1, 4, 4, generator=seeded(0), dtype=dtype)
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)
    inputs = []

    def net(x, label):
        inputs.append((x, label))
        return x.cos()

    denoised = pfgmpp().denoise(net, x, sigma)
    s = sigma.view(-1, 1, 1, 1)
    scaled = x / (s**2 + 0.25).sqrt()
    skip, out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
    expected = skip * x + out * scaled.cos()
    torch.testing.assert_close(denoised.double(), expected, rtol=0, atol=error)
    torch.testing.assert_close(inputs[0][0].double(), scaled, rtol=error, atol=0)
    torch.testing.assert_close(inputs[0][1].double(), sigma.log() / 4, rtol=error, atol=0)
    for i, level in enumerate(sigma.tolist()):
        one = x[i : i + 1]
        torch.testing.assert_close(pfgmpp().denoise(net, one, level), denoised[i : i + 1])
        slope = ((one.double() - expected[i]) / level).to(dtype)
        torch.testing.assert_close(
            pfgmpp().ode(net, one, level), slope, rtol=10 * error, atol=error
        )


@pytest.mark.parametrize("case", CASES)
def test_denoised_images_of_published_networks(case):
    model, inputs = case_model(case), case_inputs(case)
    labels, augment = inputs["labels"], inputs["augment_labels"]
    with torch.no_grad():
        for class_labels, name in ((labels, "denoised"), (None, "denoised_nolabel")):
            if name in inputs:
                denoised = pfgmpp().denoise(
                    model,
                    inputs["x"],
                    inputs["sigma"],
                    class_labels=class_labels,
                    augment_labels=augment,
                )
                assert (denoised - inputs[name]).norm() < 1e-5 * inputs[name].norm()


@pytest.mark.parametrize("method", [pfgmpp(8.0), methods.get_method(edm_config.get_config())])
def test_conditions_reach_the_network(method):
    def net(x, label, **conditions):
        arguments.update(conditions)
        return x

    arguments, labels = {}, torch.tensor([1, 3])
    method.denoise(net, torch.zeros(2, 1, 2, 2), 0.5, class_labels=labels, augment_labels=None)
    assert arguments == {"class_labels": labels}


# --- sampling -------------------------------------------------------------------------------------


def blurred_points_network(published):
    """Points of equal weight, blurred by s0, have a denoiser in closed form."""
    points, s0 = published["sampler/points"], published["sampler/s0"].item()

    def denoise(x, sigma):
        total = sigma.view(-1, 1, 1, 1) ** 2 + s0**2
        mean = slow_posterior_mean(x, points, total.flatten().sqrt(), math.inf)
        return mean + s0**2 / total * (x - mean)

    return denoising_network(denoise)


@pytest.mark.parametrize("n, evaluations", [(18, 35), (5, 9)])
def test_heun_matches_published_samples(published, n, evaluations):
    x, net = 80 * published["sampler/latents"], blurred_points_network(published)
    x, calls = solve_ode(pfgmpp(), net, x, "heun", n, noise_removal=True)
    expected = published[f"sampler/heun{n}"]
    assert calls == evaluations
    assert (x - expected).norm() < 1e-5 * expected.norm()


def test_heun_with_churn_matches_published_samples(published):
    """40 steps; step i takes the noise of that number, where its level lies in the interval."""
    method, net = pfgmpp(), blurred_points_network(published)
    levels = torch.cat([SCHEDULES["polynomial"](method, 39, 7.0), torch.zeros(1)])
    used = published["sampler/noise"][(levels[:-1] >= 0.01) & (levels[:-1] <= 1)]
    unused = iter(used)
    x = heun(
        partial(method.slope, net),
        80 * published["sampler/latents"],
        levels,
        churn=Churn(S_churn=30, S_min=0.01, S_max=1, S_noise=1.007),
        noise=lambda x: next(unused),
    )
    expected = published["sampler/heun40"]
    assert next(unused, None) is None
    assert (x - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("solver", ["rk45", "heun"])
@pytest.mark.parametrize("D", [1.0, 4.0, 64.0, math.inf])
def test_every_sample_lands_on_a_point_in_proportion(D, solver):
    points = torch.rand(3, 1, 2, 2, generator=seeded(5), dtype=torch.float64) * 2 - 1
    data = points[[0, 0, 0, 1, 1, 2]]
    net = denoising_network(lambda x, sigma: posterior_mean(x, data, sigma, D))
    # The prior lies around 0, and at D = 1 some sigma_min / |y - y'| of the kernel between points.
    method = pfgmpp(D, sigma_min=1e-6, sigma_max=1000.0)
    x = method.prior_sampling((1500, 1, 2, 2), seeded(0)).double()
    x, _ = solve_ode(method, net, x, solver, 80, noise_removal=True)
    distance = torch.cdist(x.flatten(1), points.flatten(1))
    assert distance.min(1).values.max() < 1e-3
    counts = distance.argmin(1).bincount(minlength=3).numpy()
    assert stats.chisquare(counts, [750, 500, 250]).pvalue > 1e-3


@pytest.mark.parametrize("D", [0.5, 1.0, 128.0, math.inf])
def test_float32_is_enough(D):
    """The flow in float32, from far away to the data, ends at the images of float64."""
    data = torch.rand(20, 1, 4, 4, generator=seeded(0)) * 2 - 1
    x = pfgmpp(D).prior_sampling((200, 1, 4, 4), seeded(1))
    ends = []
    for dtype in (torch.float32, torch.float64):
        charges = data.to(dtype)
        net = denoising_network(lambda x, sigma, y=charges: posterior_mean(x, y, sigma, D))
        ends.append(solve_ode(pfgmpp(D), net, x.to(dtype), "heun", 18, noise_removal=True)[0])
    assert ends[0].dtype == torch.float32
    error = (ends[0] - ends[1]).flatten(1).abs().amax(1)
    assert error.median() < 1e-4
    assert (error < 1e-2).float().mean() > 0.98  # the others lie between two of the data


# --- likelihood -----------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1.0, 4.0, 64.0, math.inf])
def test_bits_of_one_data_point(D):
    """At sigma_min the flow of one image y = 0.1 has the kernel around it as its density."""
    config, dim = config_of(D), 16
    config.data.image_size = 4
    config.sampling.sigma_min, config.sampling.sigma_max = 0.05, 5000.0
    config.sampling.rtol = config.sampling.atol = 1e-6
    config.eval.divergence = "exact"
    method = methods.get_method(config)
    y = torch.full((8, 1, 4, 4), 0.1, dtype=torch.float64)
    x = method.perturb_at(y, 0.05, seeded(0))
    net = denoising_network(lambda x, sigma: torch.full_like(x, 0.1) + 0 * x)
    bits, latent, _ = get_likelihood_fn(config, method)(net, x)
    law = stats.multivariate_normal(np.full(dim, 0.1), 0.05**2 * np.eye(dim))
    if math.isfinite(D):
        law = stats.multivariate_t(np.full(dim, 0.1), 0.05**2 * np.eye(dim), df=D)
    expected = -law.logpdf(x.flatten(1).numpy()) / (dim * math.log(2)) + 7
    assert np.abs(bits.numpy() - expected).max() < 1e-3
    ray = y + (x - y) * 5000 / 0.05
    assert (latent - ray).norm() < 1e-3 * ray.norm()


def test_bits_of_gaussian_data():
    method = pfgmpp(sigma_min=0.01, sigma_max=500.0)
    law = torch.distributions.Normal(0.1, math.hypot(0.3, 0.01))
    x = 0.1 + 0.3 * torch.randn(10, 1, 2, 2, generator=seeded(0), dtype=torch.float64)
    net = gaussian_network(method, 0.1, 0.3)
    log_p, _, _ = log_likelihood(method, net, x, unit_vectors(x), rtol=1e-6, atol=1e-6)
    expected = law.log_prob(x).flatten(1).sum(1)
    assert (log_p - expected).abs().max() < 1e-3 * 4 * math.log(2)


@pytest.mark.parametrize("D", [1.0, 3.0, math.inf])
def test_density_of_points_on_a_line(D):
    """At sigma_min it is the mean of Student t laws around them."""
    method = pfgmpp(D, sigma_min=0.2, sigma_max=3000.0)
    points = torch.tensor([-1.0, -0.2, 0.9], dtype=torch.float64)
    x = torch.linspace(-2, 2, 21, dtype=torch.float64).view(-1, 1, 1, 1)
    data = points.view(-1, 1, 1, 1)
    net = denoising_network(lambda x, sigma: _differentiable_mean(x, data, sigma, D))
    log_p, _, _ = log_likelihood(method, net, x, unit_vectors(x), rtol=1e-7, atol=1e-7)
    law = stats.t(D, points.numpy(), 0.2) if math.isfinite(D) else stats.norm(points.numpy(), 0.2)
    expected = np.log(law.pdf(x.flatten().numpy()[:, None]).mean(1))
    assert np.abs(log_p.numpy() - expected).max() < 1e-3 * math.log(2)


def _differentiable_mean(x, data, sigma, D):
    return slow_posterior_mean(x, data, sigma, D)


# --- configs --------------------------------------------------------------------------------------


def test_edm_is_the_limit_whatever_D_says():
    config = edm_config.get_config()
    config.model.D = 3.0
    edm = methods.get_method(config)
    config.training.sde, config.model.D = "pfgmpp", math.inf
    limit = methods.get_method(config)
    assert edm.D == limit.D == math.inf
    assert type(edm)(**{name: vars(limit)[name] for name in edm.options}) == edm
    with pytest.raises(TypeError, match="'D'"):
        type(edm)(**vars(limit))
    assert [edm.sigma_data, edm.sigma_max] == [limit.sigma_data, limit.sigma_max]


def test_digits_take_35_evaluations():
    config = pfgmpp_config.get_config()
    method = methods.get_method(config)
    x = method.prior_sampling((2, 1, 8, 8), seeded(0))
    assert get_sampling_fn(config, method)(lambda x, label: x, x=x)[1] == 35


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("model", "D", 0.0),
        ("model", "D", -1.0),
        ("model", "D", math.nan),
        ("model", "sigma_data", 0.0),
        ("model", "P_std", 0.0),
        ("training", "target", "mean"),
        ("sampling", "sigma_min", 80.0),
        ("sampling", "sigma_min", 0.0),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(section, key, value):
    config = config_of(8.0)
    config[section][key] = value
    with pytest.raises(ValueError, match=rf"{section}\.{key}") as error:
        methods.get_method(config)
    assert "\n" not in str(error.value)


def test_negative_noise_labels_need_a_positional_embedding():
    config = config_of(8.0)
    config.model.embedding_type = "fourier"
    with pytest.raises(ValueError, match=r"set model\.embedding_type='positional'"):
        models.check_labels(config.model, config.training.sde, config.training.continuous)
