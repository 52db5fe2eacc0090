"""Solvers against scipy and closed forms; sampling against the exact field of known charges."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import sampling
from configs.poisson import cifar10_ddpmpp
from methods import get_method
from sampling import forward_euler, get_sampling_fn, improved_euler, rk45


def small_config(solver="rk45"):
    config = cifar10_ddpmpp.get_config()
    config.data.image_size = 8
    config.sampling.ode_solver = solver
    config.sampling.N = 20
    return config


# --- parity with the published samplers -----------------------------------------------------------


@pytest.mark.parametrize(
    "solver, tolerance", [("forward_euler", 1e-6), ("improved_euler", 1e-6), ("rk45", 1e-4)]
)
def test_samples_match_published_ones(golden, exact_network, solver, tolerance):
    config = small_config(solver)
    net = exact_network(golden["ode/points"], config.training.gamma)
    samples, nfe = get_sampling_fn(config, get_method(config))(net, x=golden["ode/x0"])
    assert (samples - golden[f"ode/{solver}_out"]).abs().max() < tolerance
    assert nfe == golden[f"ode/{solver}_nfe"]


# --- the adaptive solver --------------------------------------------------------------------------


def van_der_pol(mu):
    def f(x, t):
        return torch.stack([x[1], mu * (1 - x[0] ** 2) * x[1] - x[0]])

    return f


PROBLEMS = {
    "decay": (lambda x, t: -x, [1.0, 2.0, 3.0], 0.0, 5.0),
    "pendulum": (lambda x, t: torch.stack([x[1], -torch.sin(x[0])]), [2.0, 0.0], 0.0, 20.0),
    "backwards": (lambda x, t: x * math.cos(t), [1.0, -1.0], 3.0, -2.0),
    "time only": (lambda x, t: torch.full_like(x, 5 * t**4), [0.0], 0.0, 2.0),
    "relaxation oscillator": (van_der_pol(5.0), [2.0, 0.0], 0.0, 20.0),
    "stiff": (lambda x, t: -1000 * (x - math.cos(t)), [0.0], 0.0, 2.0),
    "at rest": (lambda x, t: torch.zeros_like(x), [1.0], 0.0, 1.0),
}


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 1e-8])
@pytest.mark.parametrize("name", PROBLEMS)
def test_rk45_steps_as_scipy_does(name, tolerance):
    f, x, start, end = PROBLEMS[name]
    x = torch.tensor(x, dtype=torch.float64)
    state, evaluations = rk45(f, x, start, end, rtol=tolerance, atol=tolerance)
    truth = integrate.solve_ivp(
        lambda t, y: f(torch.from_numpy(y), t).numpy(),
        (start, end),
        x.numpy(),
        method="RK45",
        rtol=tolerance,
        atol=tolerance,
    )
    assert evaluations == truth.nfev
    np.testing.assert_allclose(state.numpy(), truth.y[:, -1], rtol=1e-7, atol=1e-12)


def test_rk45_converges_to_the_solution():
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    state, _ = rk45(
        lambda x, t: torch.stack([x[1], -x[0]]), x, 0.0, 2 * math.pi, rtol=1e-10, atol=1e-10
    )
    assert (state - x).abs().max() < 1e-8


def test_rk45_says_where_it_fails():
    """dx/dt = x^2 from 1 has a pole at t = 1."""
    with pytest.raises(FloatingPointError, match=r"rk45 cannot go on at t = (0\.99|1)"):
        rk45(lambda x, t: x**2, torch.ones(1, dtype=torch.float64), 0.0, 2.0)
    with pytest.raises(FloatingPointError, match="state not finite"):
        rk45(lambda x, t: x * math.nan, torch.ones(1), 0.0, 1.0)


# --- solvers with fixed steps ---------------------------------------------------------------------


@pytest.mark.parametrize("solver, order", [(forward_euler, 1), (improved_euler, 2)])
def test_fixed_steps_converge_with_their_order(solver, order):
    """The error of dx/dt = x cos t shrinks by 2^order when steps are halved."""
    x = torch.ones(1, dtype=torch.float64)
    truth = math.exp(math.sin(2.0))

    def error(n):
        nodes = torch.linspace(0, 2, n + 1, dtype=torch.float64)
        return abs(solver(lambda x, t: x * math.cos(t), x, nodes)[0].item() - truth)

    assert math.log2(error(200) / error(400)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_evaluations_are_counted(n):
    calls = []

    def f(x, t):
        calls.append(t)
        return -x

    nodes = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    assert forward_euler(f, torch.ones(1), nodes)[1] == len(calls) == n
    calls.clear()
    assert improved_euler(f, torch.ones(1), nodes)[1] == len(calls) == 2 * n - 1
    calls.clear()
    assert rk45(f, torch.ones(1), 1.0, 0.0)[1] == len(calls)


@pytest.mark.parametrize("solver, where", [(forward_euler, "0.5"), (improved_euler, "0.25")])
def test_fixed_steps_say_where_they_diverge(solver, where):
    nodes = torch.linspace(0, 1, 5, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=f"not finite after the step to {where}"):
        solver(lambda x, t: x * (math.inf if t >= 0.25 else 1), torch.ones(1), nodes)


# --- truth: the flow of known charges -------------------------------------------------------------


@pytest.mark.parametrize("solver", ["rk45", "forward_euler", "improved_euler"])
def test_every_sample_lands_on_a_charge_and_charges_in_proportion(exact_network, solver):
    """By Gauss's law equal charges receive equal flux, so equally many samples."""
    charges = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [0.0, 1.0]]).view(3, 2, 1, 1)
    method = replace(
        get_method(small_config()), gamma=1e-9, z_exp=0.0, z_max=60.0, z_min=1e-4, upper_norm=1e9
    )
    x = method.prior_sampling((900, 2, 1, 1), torch.Generator().manual_seed(0))
    x = x.double()
    net = exact_network(charges, method.gamma)
    ends, _ = sampling.ODE_SOLVERS[solver](200)(method, net, x)
    distance = torch.cdist(ends.flatten(1), charges.double().flatten(1))
    nearest, which = distance.min(1)
    assert nearest.quantile(0.99) < 0.05
    counts = torch.bincount(which, minlength=3)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_samples_have_the_asked_shape_and_range(exact_network):
    config = small_config("forward_euler")
    sample = get_sampling_fn(config, get_method(config))
    net = exact_network(torch.randn(5, 3, 8, 8), 5.0)
    generator = torch.Generator().manual_seed(3)
    samples, _ = sample(net, 7, generator=generator)
    assert samples.shape == (7, 3, 8, 8)
    assert samples.min() >= 0
    assert samples.max() <= 1
    again, _ = sample(net, 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(samples, again)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("ode_solver", "rk54", "known: rk45, forward_euler, improved_euler"),
        ("method", "odee", "known: ode"),
        ("N", 0, "at least 1"),
    ],
)
def test_bad_sampling_options_are_named(key, value, message):
    config = small_config()
    config.sampling[key] = value
    with pytest.raises(ValueError, match=rf"sampling\.{key}.*{message}"):
        get_sampling_fn(config, get_method(config))
