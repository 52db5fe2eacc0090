"""Rectified flow and TrigFlow: their definitions, and agreement with EDM at equal noise levels."""

import math
from dataclasses import replace

import pytest
import torch
from known_laws import denoising_network, pfgmpp
from scipy import stats

import methods
from likelihood import log_likelihood, unit_vectors
from losses import Consistency, Regression
from methods.base import spread
from methods.guidance import Guided
from methods.restoration import RESTORERS, Measurement, Restoring, get_operator
from solvers import SOLVERS
from solvers.fixed_steps import Churn
from solvers.solve import encode, solve_ode
from sources.batch import Batch

NUMBERS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}
POINTS = torch.tensor([[0.9, -0.4], [-0.7, 0.3], [0.1, 0.8]], dtype=torch.float64)[:, :, None, None]


def flow(name, D=math.inf, **numbers):
    return methods.METHODS[name](D=D, **NUMBERS | numbers)


def mean_of_points(D, points=POINTS):
    """E[y | x, sigma] of equally likely points, from the density of a Student t, one by one."""

    def denoise(x, sigma):
        law = []
        for y in points:
            squared = (x - y).flatten(1).square().sum(1)
            if math.isinf(D):
                law.append(-squared / (2 * sigma**2))
            else:
                law.append(-(x[0].numel() + D) / 2 * (squared / sigma**2 / D).log1p())
        weights = torch.stack(law, 1).softmax(1)
        return (weights @ points.flatten(1)).view_as(x)

    return denoise


def mean_of_gaussian(x, sigma, std=0.5, mean=0.1):
    s = spread(sigma**2, x)
    return (std**2 * x + s * mean) / (std**2 + s)


def velocity_network(name, denoise, D=math.inf, sd=0.5):
    """The network that gives the exact velocity, from the definition of each path."""

    def net(x, label, **conditions):
        t = label.double()
        if name == "flow":
            t = t / 1000
            alpha, std, alpha_rate, std_rate = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        else:
            x = sd * x if D > 2 else x
            alpha, std, alpha_rate, std_rate = t.cos(), sd * t.sin(), -t.sin(), sd * t.cos()
        if D <= 2:  # EDM's preconditioning of the natural variable y
            sigma = std / alpha
            c_in = (sigma**2 + sd**2).rsqrt()
            return denoising_network(denoise, sd)(x, sigma.log() / 4, **conditions) + 0 * c_in[0]
        y = denoise(x / spread(alpha, x), std / alpha)
        noise = (x - spread(alpha, x) * y) / spread(std, x)
        velocity = spread(alpha_rate, x) * y + spread(std_rate, x) * noise
        return velocity / (1 if name == "flow" else sd)

    return net


CASES = {
    "gaussian": (math.inf, mean_of_gaussian),
    "points": (math.inf, mean_of_points(math.inf)),
    "points, D = 4": (4.0, mean_of_points(4.0)),
    "points, D = 1.5": (1.5, mean_of_points(1.5)),
}
PATHS = ("flow", "trigflow")
ALL = pytest.mark.parametrize("case", CASES)
BOTH = pytest.mark.parametrize("name", PATHS)


def both(name, case, sigma_min=0.002):
    """The flow and EDM (or PFGM++) with their exact networks, and their states of one prior draw.

    They are natural variables times alpha.
    """
    D, denoise = CASES[case]
    method, edm = flow(name, D, sigma_min=sigma_min), pfgmpp(D, sigma_min)
    nets = velocity_network(name, denoise, D), denoising_network(denoise)
    y = edm.prior_sampling((6, 2, 1, 1), torch.Generator().manual_seed(0)).double()
    alpha = method.alpha(torch.tensor(method.t_prior, dtype=torch.float64))
    return method, edm, *nets, alpha * y, y


@BOTH
@ALL
def test_solvers_give_what_they_give_for_edm(name, case):
    method, edm, net, edm_net, x, y = both(name, case)
    for solver in (s for s in SOLVERS if SOLVERS[s].schedule):
        options = {"solver": solver, "n": 6, "schedule": "polynomial", "noise_removal": True}
        sample, evaluations = solve_ode(method, net, x, **options)
        expected, edm_evaluations = solve_ode(edm, edm_net, y, **options)
        assert (sample - expected).abs().max() < 1e-5, solver
        assert evaluations == edm_evaluations


@BOTH
@pytest.mark.parametrize("case", ["gaussian", "points, D = 4"])
def test_the_adaptive_solver_encodes_decodes_and_gives_likelihoods_as_for_edm(name, case):
    """Levels start at 0.2: below, density and field of points have no scale but their own."""
    method, edm, net, edm_net, x, y = both(name, case, sigma_min=0.2)
    fine = {"rtol": 1e-7, "atol": 1e-7}
    sample, _ = solve_ode(method, net, x, "rk45", noise_removal=True, **fine)
    expected, _ = solve_ode(edm, edm_net, y, "rk45", noise_removal=True, **fine)
    assert (sample - expected).abs().max() < 1e-5
    data = torch.tensor([[0.3, 0.2], [-0.5, 0.1]], dtype=torch.float64)[:, :, None, None]
    probes, alpha = unit_vectors(data), x[0, 0, 0, 0] / y[0, 0, 0, 0]
    log_p, latent, _ = log_likelihood(method, net, data, probes, **fine)
    expected, edm_latent, _ = log_likelihood(edm, edm_net, data, probes, **fine)
    assert (log_p - expected).abs().max() < 1e-5
    assert (latent / alpha - edm_latent).norm() / edm_latent.norm() < 1e-5
    assert torch.equal(encode(method, net, data, **fine)[0].sign(), latent.sign())
    if case == "gaussian":
        law = stats.norm(0.1, math.hypot(0.5, 0.2))
        exact = torch.tensor(law.logpdf(data.flatten(1).numpy())).sum(1)
        assert (log_p - exact).abs().max() < 5e-3  # the prior leaves the data out


@BOTH
@ALL
def test_guidance_and_restoration_are_those_of_edm(name, case):
    method, edm, net, edm_net, x, y = both(name, case)
    options = {"solver": "heun", "n": 12, "schedule": "polynomial", "noise_removal": True}
    D, denoise = CASES[case]

    def worse(y, sigma):
        return 0.8 * denoise(y, sigma)

    others = velocity_network(name, worse, D), denoising_network(worse)
    guided, expected = (
        solve_ode(Guided(m, other, 1.7, (0.1, 20.0)), n, start, **options)[0]
        for m, n, other, start in (
            (method, net, others[0], x),
            (edm, edm_net, others[1], y),
        )
    )
    assert (guided - expected).abs().max() < 1e-5
    value = torch.full((6, 2, 1, 1), 0.3, dtype=torch.float64)
    measurement = Measurement(get_operator("denoise"), value, 0.2)
    for restorer in ("moment_matching", "pigdm", "dps"):

        def restoring(method, change=RESTORERS[restorer]):
            return Restoring(method, measurement, change, (-1.0, 1.0))

        restored, expected = (
            solve_ode(restoring(m), n, start, **options)[0]
            for m, n, start in ((method, net, x), (edm, edm_net, y))
        )
        assert (restored - expected).abs().max() < 1e-5, restorer


@BOTH
def test_churn_adds_the_noise_that_it_adds_to_edm(name):
    method, edm, net, edm_net, x, y = both(name, "gaussian")
    options = {"solver": "heun", "n": 6, "schedule": "polynomial", "churn": Churn(3.0)}
    samples = [
        solve_ode(m, n, start, generator=torch.Generator().manual_seed(0), **options)[0]
        for m, n, start in ((method, net, x), (edm, edm_net, y))
    ]
    alpha = method.alpha_data  # the state is x at sigma_min
    assert (samples[0] / alpha - samples[1]).abs().max() < 1e-5


def test_steps_of_euler_are_those_in_the_time_of_the_flow():
    method, _, net, _, x, _ = both("flow", "points")
    sample, _ = solve_ode(method, net, x, "forward_euler", 7, schedule="uniform")
    times = torch.linspace(method.t_prior, method.t_data, 8, dtype=torch.float64)
    for t, following in zip(times[:-1], times[1:], strict=True):
        x = x + (following - t) * net(x, 1000 * t.expand(len(x)))
    assert (sample - x).abs().max() < 1e-9


# --- training -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("D", [math.inf, 4.0, 1.5])
def test_examples_and_targets_are_those_of_the_path(name, D):
    method, sd = flow(name, D), 0.5
    y = torch.rand(400, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double() - 0.5
    examples = method.draw(Batch(y), torch.Generator().manual_seed(1))
    t = examples.t.view(-1, 1, 1, 1)
    alpha, std = (1 - t, t) if name == "flow" else (t.cos(), sd * t.sin())
    torch.testing.assert_close(examples.images.double(), alpha * y + std * examples.noise)
    rates = (-1, 1) if name == "flow" else (-t.sin(), sd * t.cos())
    velocity = rates[0] * y + rates[1] * examples.noise
    expected = velocity if D > 2 else y
    target = method.target(examples, Batch(y))
    torch.testing.assert_close(target.double(), expected.double().flatten(1))
    law = stats.norm if math.isinf(D) else stats.t(D)
    assert stats.kstest(examples.noise[:, 0, 0, 0].numpy(), law.cdf).pvalue > 1e-3


@BOTH
def test_the_network_of_zeros_errs_by_the_velocity(name):
    method = flow(name)
    y = torch.rand(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    examples = method.draw(Batch(y), torch.Generator().manual_seed(1))
    objective = Regression(method, reduce_mean=False, batch_size=50, examples=0)
    loss = objective.loss(lambda x, label: torch.zeros_like(x), examples, Batch(y))
    t = examples.t.view(-1, 1, 1, 1)
    noise = examples.noise
    velocity = noise - y if name == "flow" else t.cos() * noise - 2 * t.sin() * y
    expected = 0.5 * velocity.double().square().sum((1, 2, 3)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@BOTH
@pytest.mark.parametrize("D", [math.inf, 4.0, 1.5])
def test_exact_networks_have_no_error_about_posterior_means(name, D):
    method = flow(name, D, target_kind="posterior_mean")
    reference = Batch(POINTS)
    batch = Batch(POINTS.repeat(20, 1, 1, 1))
    examples = method.draw(batch, torch.Generator().manual_seed(0))
    objective = Regression(method, reduce_mean=False, batch_size=60, examples=0)
    net = velocity_network(name, mean_of_points(D), D)
    assert objective.loss(net, examples, reference) < 1e-10
    plain = replace(method, target_kind="image")
    objective = Regression(plain, reduce_mean=False, batch_size=60, examples=0)
    assert objective.loss(net, examples, reference) > 1e-3


@BOTH
@pytest.mark.parametrize("times", ["uniform", "logit_normal", "edm"])
def test_times_follow_their_law(name, times):
    method = flow(name, times=times, P_mean=-0.5, P_std=1.4)
    t = method.draw_times(4000, torch.Generator().manual_seed(0))
    if times == "uniform":
        law = stats.uniform(method.t_data, method.t_prior - method.t_data)
    elif times == "logit_normal":
        t, law = method.sigma(t).log(), stats.norm
        if name == "flow":  # the name: ln(t / (1 - t)) is normal
            torch.testing.assert_close(t, torch.logit(method.time(t.exp())))
    else:
        t, law = method.sigma(t).log(), stats.norm(-0.5, 1.4)
    assert stats.kstest(t.numpy(), law.cdf).pvalue > 1e-3


@BOTH
@pytest.mark.parametrize("D", [math.inf, 1.5])
def test_scaled_data_train_as_unscaled_ones_do(name, D):
    """All noise levels are in units of the data's standard deviation."""
    s, y = 3.0, 0.5 * torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    levels = {k: s * NUMBERS[k] for k in ("sigma_min", "sigma_max", "sigma_data")}
    larger = flow(name, D, **levels, P_mean=NUMBERS["P_mean"] + math.log(s), sigma_unit=s)
    losses = []

    def net(x, label):
        return (x + spread(label, x)).tanh()

    for method, data in ((flow(name, D), y), (larger, s * y)):
        for times in ("uniform", "edm"):
            objective = Regression(
                replace(method, times=times), reduce_mean=True, batch_size=8, examples=0
            )
            losses.append(objective(net, data, torch.Generator().manual_seed(0)).item())
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-9)


@BOTH
@pytest.mark.parametrize("target_kind", ["image", "posterior_mean"])
def test_consistency_is_that_of_edm(name, target_kind):
    """Equal pairs of noise levels, distances and gradient weights, for one denoiser."""
    denoise = mean_of_points(4.0)
    batch = Batch(POINTS.repeat(10, 1, 1, 1))
    loss, expected = (
        Consistency(method, batch_size=30, examples=0, stages=3, n_iters=10)(
            net, batch, torch.Generator().manual_seed(0), step=9
        ).item()
        for method, net in (
            (
                flow(name, 4.0, target_kind=target_kind),
                velocity_network(name, lambda x, s: 0.9 * denoise(x, s), 4.0),
            ),
            (
                pfgmpp(4.0, target_kind=target_kind),
                denoising_network(lambda x, s: 0.9 * denoise(x, s)),
            ),
        )
    )
    assert loss == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-3


def test_unknown_times_are_refused():
    with pytest.raises(ValueError, match="unknown flow.times='late'; known: uniform"):
        flow("flow", times="late")
