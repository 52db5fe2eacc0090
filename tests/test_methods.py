"""The Poisson method against published numbers, slow definitions and known laws."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_laws import FAMILY, SDES, gaussian_network
from scipy import stats

import losses
import methods
from configs.poisson import cifar10_ddpmpp
from methods import field as field_module
from methods.field import poisson_field


def relative_error(value, truth):
    value, truth = value.double(), truth.double()
    return ((value - truth).norm() / truth.norm()).item()


def broadcast_field(points, charges, gamma):
    """The field by its definition, in float64: every distance, every weight, one by one."""
    points, charges = points.double(), charges.flatten(1).double()
    dim = charges.shape[1]
    field = torch.empty_like(points)
    for i, p in enumerate(points):
        arms = torch.cat([charges, charges.new_zeros(len(charges), 1)], dim=1) - p
        distance = arms.norm(dim=1)
        weights = (distance / distance.min()) ** -(dim + 1)
        field[i] = (weights[:, None] * arms).sum(0) / weights.sum()
    return math.sqrt(dim) * field / (field.norm(dim=1, keepdim=True) + gamma)


# --- parity with the published implementation -----------------------------------------------------


def test_perturbation_matches_published_draws(golden, poisson):
    z_noise = golden["perturb/z0_normal"].view(-1, 1)
    near = (poisson.sigma_end * z_noise.abs() < 0.005).flatten()
    uniform = torch.zeros(16, 1)
    uniform[near, 0] = golden["perturb/restrict_uniform"]
    m = poisson.restrict(golden["perturb/m_drawn"].view(-1, 1), z_noise, uniform)
    assert torch.equal(m.flatten(), golden["perturb/m_used"])
    out = poisson.displace(
        golden["perturb/x"],
        m,
        z_noise,
        golden["perturb/x_noise_normal"].flatten(1),
        golden["perturb/direction_normal"],
    )
    assert relative_error(out, golden["perturb/out"]) < 1e-6


def test_field_matches_published_target(golden):
    target = losses.poisson_field(golden["field/perturbed"], golden["field/data"], gamma=5)
    assert relative_error(target, golden["field/target"]) < 1e-6


@pytest.mark.parametrize("reduce_mean", [False, True])
def test_loss_matches_published_loss(golden, poisson, reduce_mean):
    class Fixed(methods.Poisson):
        def perturb(self, x, generator=None):
            return golden["field/perturbed"]

    config = cifar10_ddpmpp.get_config()
    config.training.reduce_mean = reduce_mean
    config.training.small_batch_size = len(golden["field/perturbed"])
    method = Fixed(**vars(poisson))
    loss_fn = losses.get_loss_fn(config, method)
    loss = loss_fn(lambda x, z: (torch.zeros_like(x), torch.zeros(len(x))), golden["field/data"])
    expected = golden[f"field/loss_zero_net_reduce_mean_{reduce_mean}"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("i", range(5))
def test_drift_matches_published_drift(golden, poisson, exact_network, i):
    net = exact_network(golden["ode/points"], poisson.gamma)
    drift = poisson.ode(net, golden[f"ode/drift_{i}_x"], golden[f"ode/drift_{i}_t"])
    assert relative_error(drift, golden[f"ode/drift_{i}_out"]) < 1e-6


# --- the field ------------------------------------------------------------------------------------


@pytest.fixture(params=["double", "split"])
def products(request, monkeypatch):
    """Both ways of the field's matrix products, whatever the device is fast at."""
    monkeypatch.setattr(field_module, "has_fast_double", lambda device: request.param == "double")
    return request.param


@pytest.mark.parametrize("share_of_m", [i / 20 for i in range(21)])
def test_field_is_accurate_at_every_distance(poisson, products, share_of_m):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(256, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(2, 32, 3072, generator=generator)
    height = torch.randn(32, 1, generator=generator)
    m = torch.full((32, 1), share_of_m * poisson.M)
    points = poisson.displace(images[:32], m, height, noise[0], noise[1])
    truth = broadcast_field(points, images, poisson.gamma)
    assert relative_error(poisson_field(points, images, poisson.gamma), truth) < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 12),
    n=st.integers(1, 20),
    gamma=st.sampled_from([0.0, 1e-3, 5.0]),
    spread=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_field_equals_its_definition(dim, n, gamma, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    charges = torch.randn(n, dim, 1, 1, generator=generator)
    points = torch.randn(7, dim + 1, generator=generator) * spread
    points[:, -1] = points[:, -1].abs() + 1e-3
    truth = broadcast_field(points, charges, gamma)
    assert relative_error(poisson_field(points, charges, gamma), truth) < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    dim=st.sampled_from([1, 64, 3072, 5000]),
    low=st.integers(-40, 20),
    high=st.integers(0, 30),
    seed=st.integers(0, 2**31),
)
def test_split_products_are_accurate_at_any_scale(dim, low, high, seed):
    """Rows of scales 2^low to 2^(low + high), entries too: the error is far below float32's.

    A single term: two products with a rest, each at most 2^-6 of it, and their sum are rounded, to
    2^-24 of 2^-6, 2^-6 and 2^-5 of the term: 2^-28 in all. The rests have a rounding of their own.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(n):
        exponents = low + torch.rand(n, dim, generator=generator) * high
        return torch.randn(n, dim, generator=generator) * 2.0**exponents

    x, y = rows(5), rows(7)
    x[0] = 0
    error = (field_module.split_products(x, y) - x.double() @ y.double().T).abs()
    sizes = x.double().abs().amax(1)[:, None] * y.double().abs().amax(1) * dim
    assert (error <= 1.05 * 2.0**-28 * sizes).all()


@pytest.mark.parametrize("dim", [64, 4096])
def test_leading_bits_multiply_exactly(dim):
    """The largest sum of the products there can be: every entry just below its power of two."""
    x = torch.full((1, dim), 2.0).nextafter(torch.tensor(0.0))
    high = field_module.leading_bits(x)
    assert (high == 2).all()  # 2^6 units, so that the sum can be 2^24 of them
    assert (high @ high.T).item() == (high.double() @ high.double().T).item()


def test_slow_double_is_told_from_fast(monkeypatch):
    expected = {(8, 0): True, (9, 0): True, (8, 6): False, (8, 9): False, (12, 0): False}
    for capability, fast in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert field_module.has_fast_double(torch.device("cuda")) == fast
    assert field_module.has_fast_double(torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("share_of_m", [0.0, 0.25, 0.5, 0.6, 0.75, 1.0])
def test_field_is_accurate_on_a_gpu_with_tf32_allowed(poisson, products, share_of_m):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(256, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(2, 32, 3072, generator=generator)
    m = torch.full((32, 1), share_of_m * poisson.M)
    height = torch.randn(32, 1, generator=generator)
    points = poisson.displace(images[:32], m, height, noise[0], noise[1])
    torch.set_float32_matmul_precision("high")
    try:
        field = poisson_field(points.cuda(), images.cuda(), poisson.gamma).cpu()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert relative_error(field, broadcast_field(points, images, poisson.gamma)) < 1e-5


def test_field_does_not_depend_on_the_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    charges = torch.randn(50, 6, generator=generator)
    points = torch.randn(9, 7, generator=generator)
    truth = broadcast_field(points, charges, 5.0)
    for chunk in (1, 7, 50, 51):
        monkeypatch.setattr(field_module, "DATA_CHUNK", chunk)
        assert relative_error(poisson_field(points, charges, 5.0), truth) < 1e-6


def test_field_at_a_charge_is_finite():
    charges = torch.eye(3).view(3, 3, 1, 1)
    points = torch.cat([charges.flatten(1), torch.zeros(3, 1)], dim=1)
    assert torch.isfinite(poisson_field(points, charges, gamma=5.0)).all()
    assert poisson_field(points, charges, gamma=5.0).abs().max() < 1e-6


# --- perturbation ---------------------------------------------------------------------------------


def test_perturbation_has_the_law_of_algorithm_2(poisson):
    """Given m, height over scale is half-normal and distance over scale is chi with D degrees."""
    n, dim = 4000, 12
    method = replace(poisson, restrict_M=False)
    x = torch.zeros(n, 3, 2, 2)
    points = method.perturb(x, torch.Generator().manual_seed(0)).double().numpy()
    radius = np.linalg.norm(points[:, :-1], axis=1)
    ratio = points[:, -1] / radius  # free of m: half-normal over chi is a folded t, up to sqrt(D)
    assert stats.kstest(ratio * math.sqrt(dim), lambda v: 2 * stats.t.cdf(v, dim) - 1).pvalue > 1e-3
    direction = points[:, :-1] / radius[:, None]
    first = (direction[:, 0] + 1) / 2  # a coordinate of a point on the sphere is a shifted beta
    assert stats.kstest(first, stats.beta((dim - 1) / 2, (dim - 1) / 2).cdf).pvalue > 1e-3
    assert radius.max() / radius.min() > (1 + method.tau) ** (0.9 * method.M)


def test_restricted_points_stay_close(poisson):
    uniform = torch.full((3, 1), 1.0)
    z_noise = torch.tensor([[0.1], [-0.1], [0.6]])
    m = poisson.restrict(torch.full((3, 1), 290.0), z_noise, uniform)
    assert m.flatten().tolist() == [203.0, 203.0, 290.0]  # floor(0.7 * 291) = 203


# --- the prior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 64])
def test_prior_density_is_the_cauchy_law(poisson, dim):
    method = replace(poisson, z_max=3.0)
    law = stats.multivariate_t(loc=np.zeros(dim), shape=9.0 * np.eye(dim), df=1)
    x = law.rvs(size=5, random_state=0).reshape(5, dim)
    logp = method.prior_logp(torch.from_numpy(x).view(5, dim, 1, 1))
    np.testing.assert_allclose(logp.numpy(), law.logpdf(x).reshape(5), rtol=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 64, 3072])
def test_prior_density_is_that_of_its_radius(poisson, dim):
    """Over the sphere of radius r the density integrates to that of r: r^2 / (D z_max^2) ~ F."""
    r = np.array([0.1, 1.0, 20.0]) * math.sqrt(dim)
    x = torch.zeros(3, dim, 1, 1, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.from_numpy(r)
    logp = poisson.prior_logp(x).numpy()
    log_sphere = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    scale = dim * poisson.z_max**2
    radial = stats.f(dim, 1).logpdf(r**2 / scale) + np.log(2 * r / scale)
    np.testing.assert_allclose(logp + log_sphere + (dim - 1) * np.log(r), radial, rtol=1e-8)


@pytest.mark.parametrize("dim", [1, 2, 64, 3072])
def test_prior_samples_have_the_cauchy_radius(poisson, dim):
    """||x||^2 / (D z_max^2) of a D-variate Cauchy law of scale z_max follows F(D, 1)."""
    method = replace(poisson, upper_norm=1e30)
    x = method.prior_sampling((4000, dim, 1, 1), torch.Generator().manual_seed(1)).double()
    squared = x.flatten(1).square().sum(1).numpy()
    unclipped = squared > 1.0  # norms below 1 are clipped to it
    law = stats.f(dim, 1)
    floor = law.cdf(1 / (dim * method.z_max**2))
    value = squared[unclipped] / (dim * method.z_max**2)
    test = stats.kstest(value, lambda v: (law.cdf(v) - floor) / (1 - floor))
    assert test.pvalue > 1e-3


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_prior_density_integrates_to_one(poisson, dim):
    method = replace(poisson, z_max=2.0)
    sphere = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)
    # r = tan(a) covers all of space with a bounded variable
    nodes, weights = np.polynomial.legendre.leggauss(400)
    a = math.pi / 4 * (nodes + 1)
    r = np.tan(a)
    x = np.zeros((len(r), dim))
    x[:, 0] = r
    density = method.prior_logp(torch.from_numpy(x).view(-1, dim, 1, 1)).exp().numpy()
    total = (math.pi / 4 * weights * density * sphere * r ** (dim - 1) / np.cos(a) ** 2).sum()
    assert total == pytest.approx(1, abs=1e-6)


def test_prior_sample_at_a_height_of_zero(poisson, monkeypatch):
    """torch.randn gives an exact 0 once in some 10^7 draws: infinitely far, hence clipped."""
    randn = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *s, **k: torch.zeros(*s) if s[1:] == (1,) else randn(*s, **k)
    )
    norm = poisson.prior_sampling((5, 3, 2, 2)).flatten(1).norm(dim=1)
    torch.testing.assert_close(norm, torch.full((5,), poisson.upper_norm))


def test_prior_norms_are_clipped(poisson):
    x = poisson.prior_sampling((2000, 1, 1, 1), torch.Generator().manual_seed(0))
    norm = x.flatten(1).norm(dim=1)
    assert norm.min() >= 1 - 1e-5
    assert norm.max() <= poisson.upper_norm * (1 + 1e-5)
    assert (norm > poisson.upper_norm * 0.99).any()  # some were beyond it
    assert poisson.prior_norms(3072)[1] == poisson.upper_norm


# --- the interface --------------------------------------------------------------------------------


def test_slope_follows_the_field_of_one_charge(poisson, exact_network):
    """Field lines of a single charge are rays, so dx/dz = (x - y) / z."""
    charge = torch.full((1, 3, 4, 4), 0.25, dtype=torch.float64)
    method = replace(poisson, gamma=1e-6, z_exp=0.0)
    x = charge + torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    net = exact_network(charge, method.gamma)
    slope = method.slope(net, x, 7.0)
    # 1e-5 in the denominator of dx/dz keeps this from being exact
    assert relative_error(slope, (x - charge) / 7.0) < 1e-4
    assert relative_error(method.ode(net, x, math.log(7.0)), x - charge) < 1e-4


def test_inferred_height_of_the_field(poisson, exact_network):
    """Below z_exp the z entry comes from the x entries alone; near one charge that is the truth."""
    charge = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def net_without_height(x, z):
        v_x, v_z = exact_network(charge, poisson.gamma)(x, z)
        return v_x, torch.full_like(v_z, torch.nan)

    slope = poisson.slope(net_without_height, x, 0.1)
    assert relative_error(slope, x / 0.1) < 0.02


def test_unknown_method_names_the_known_ones():
    config = cifar10_ddpmpp.get_config()
    config.training.sde = "poison"
    with pytest.raises(ValueError, match=r"training\.sde must be one of 'poisson', .*'poison'"):
        methods.get_method(config)


@pytest.mark.parametrize("key, value", [("z_min", 50.0), ("z_min", 0.0), ("z_max", -1.0)])
def test_heights_must_be_ordered(key, value):
    config = cifar10_ddpmpp.get_config()
    config.sampling[key] = value
    with pytest.raises(ValueError, match=r"sampling\.z_min"):
        methods.get_method(config)


@pytest.mark.parametrize("name", ["poisson", *SDES, *FAMILY])
def test_an_euler_step_to_zero_denoises(poisson, exact_network, name):
    """With the exact network of one image every method's denoised image is that image."""
    image = torch.full((1, 1, 2, 2), 0.25, dtype=torch.float64)
    if name == "poisson":
        method = replace(poisson, gamma=1e-9, z_exp=0.0)
        net = exact_network(image, method.gamma)
    else:
        method = (SDES | FAMILY)[name]
        net = gaussian_network(method, 0.25, 1e-9)
    y = image + torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    assert relative_error(method.denoise(net, y, 0.7), image.expand_as(y)) < 1e-3


@pytest.mark.parametrize("t", [0.01, 0.5])
@pytest.mark.parametrize("name", ["poisson", *SDES, *FAMILY])
def test_perturbed_images_have_the_marginal_of_their_time(poisson, name, t):
    """Mean alpha y, scale alpha sigma; normal, a Student t, or for Poisson flow Cauchy."""
    method, y = (
        (SDES | FAMILY).get(name, poisson),
        torch.full((4000, 1, 1, 1), 0.25, dtype=torch.float64),
    )
    times = torch.full((4000,), t, dtype=torch.float64)
    x = method.perturb_at(y, times, torch.Generator().manual_seed(0)).flatten()
    alpha, sigma = method.alpha(times)[0].item(), method.sigma(times)[0].item()
    law = {"poisson": stats.cauchy, "pfgmpp": partial(stats.t, 4)}.get(name, stats.norm)
    assert stats.kstest(x.numpy(), law(alpha * 0.25, alpha * sigma).cdf).pvalue > 1e-3
