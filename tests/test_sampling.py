"""Solvers against scipy and closed forms; every sampler against known laws."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_laws import FAMILY, SDES, VP, WithFunction, gaussian_network
from scipy import integrate, stats
from torch.utils._python_dispatch import TorchDispatchMode

from configs.poisson import cifar10_ddpmpp
from configs.subvp import cifar10_ddpmpp_continuous as subvp_config
from configs.ve import cifar10_ncsnpp_continuous as ve_config
from configs.vp import cifar10_ddpmpp_continuous as vp_config
from methods import get_method
from sampling import encode, get_sampling_fn, solve_ode, spherical_interpolation
from solvers import SCHEDULES, SOLVERS
from solvers.base import Counted
from solvers.fixed_steps import euler, heun, multistep
from solvers.predictor_corrector import CORRECTORS, PREDICTORS, predictor_corrector
from solvers.rk45 import rk45

FIXED_STEPS = [name for name, solver in SOLVERS.items() if solver.schedule]


def solve(solver, f, x, levels, **options):
    """The state at the last of `levels`, and the number of evaluations."""
    f = Counted(f)
    return solver(f, x, torch.as_tensor(levels, dtype=torch.float64), **options), f.calls


def seeded(seed):
    return torch.Generator().manual_seed(seed)


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


PREDICTED = [(s, p) for s in SDES for p in ("euler_maruyama", "reverse_diffusion")]
CORRECTED = [(s, c) for s in ("ve", "vp") for c in ("langevin", "ald")]


def assert_close(value, expected):
    """Assert a distance within 1e-5 of the largest entry of each image."""
    error = (value - expected).flatten(1).abs().amax(1)
    assert (error / expected.flatten(1).abs().amax(1)).max() < 1e-5


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name, predictor", PREDICTED)
def test_predictors_match_published_steps(golden, name, predictor, flow):
    x, t, noise = (golden[f"sde/{what}"] for what in ("x", "t", "noise"))
    score = -x / (1 + t.view(-1, 1, 1, 1))
    x, mean = PREDICTORS[predictor](SDES[name], x, t, score, noise, probability_flow=flow)
    expected = f"sde/{name}_{predictor}_pf{flow}"
    assert_close(x, golden[f"{expected}_x"])
    assert_close(mean, golden[f"{expected}_mean"])


@pytest.mark.parametrize("name, corrector", CORRECTED)
def test_correctors_match_published_steps(golden, name, corrector):
    x, t, noise = (golden[f"sde/{what}"] for what in ("x", "t", "noise"))
    for _ in range(2):
        score = -x / (1 + t.view(-1, 1, 1, 1))
        x, mean = CORRECTORS[corrector](SDES[name], x, t, score, noise, snr=0.16)
    assert_close(x, golden[f"sde/{name}_{corrector}_x"])
    assert_close(mean, golden[f"sde/{name}_{corrector}_mean"])


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
    state, evaluations = solve(rk45, f, x, [start, end], rtol=tolerance, atol=tolerance)
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
    times = torch.tensor([0.0, 2 * math.pi], dtype=torch.float64)
    state = rk45(lambda x, t: torch.stack([x[1], -x[0]]), x, times, rtol=1e-10, atol=1e-10)
    assert (state - x).abs().max() < 1e-8


@pytest.mark.parametrize("limit", [8, 100, 101])
def test_rk45_stops_before_it_takes_more_evaluations_than_it_may(limit):
    slope = Counted(lambda x, t: -1e6 * x)  # so stiff that each step is tiny
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"sampling\.max_evaluations") as error:
        rk45(slope, torch.ones(3, dtype=torch.float64), times, max_evaluations=limit)
    assert limit - 6 < slope.calls <= limit
    assert f"after {slope.calls} evaluations" in str(error.value)
    assert "\n" not in str(error.value)


def test_rk45_says_where_it_fails():
    """dx/dt = x^2 from 1 has a pole at t = 1."""
    with pytest.raises(FloatingPointError, match=r"rk45 cannot go on at t = (0\.99|1)"):
        solve(rk45, lambda x, t: x**2, torch.ones(1, dtype=torch.float64), [0, 2])
    with pytest.raises(FloatingPointError, match="state not finite"):
        solve(rk45, lambda x, t: x * math.nan, torch.ones(1), [0, 1])


# --- solvers with fixed steps ---------------------------------------------------------------------


@pytest.mark.parametrize("name, order", [("forward_euler", 1), ("improved_euler", 2)])
def test_fixed_steps_converge_with_their_order(name, order):
    """The error of dx/dt = x cos t shrinks by 2^order when steps are halved."""
    x = torch.ones(1, dtype=torch.float64)
    truth = math.exp(math.sin(2.0))

    def error(n):
        levels = torch.linspace(0, 2, n + 1, dtype=torch.float64)
        return abs(SOLVERS[name].solve(lambda x, t: x * math.cos(t), x, levels).item() - truth)

    assert math.log2(error(200) / error(400)) == pytest.approx(order, abs=0.1)


def test_multistep_has_the_weights_of_adams_and_bashforth():
    """Even steps: 23/12, -16/12, 5/12 from the third on; 3/2, -1/2 in the second."""
    for last, expected in [(3, [5 / 12, -16 / 12, 23 / 12]), (2, [-1 / 2, 3 / 2]), (1, [1])]:
        for i, weight in enumerate(reversed(expected)):
            slope = lambda x, u, at=last - 1 - i: torch.full_like(x, float(u == at))  # noqa: E731
            states = [
                multistep(slope, torch.zeros(1), torch.arange(n + 1)).item()
                for n in (last - 1, last)
                if n
            ]
            assert states[-1] - sum(states[:-1]) == pytest.approx(weight)


def test_multistep_integrates_parabolas_exactly_once_it_has_three_slopes():
    u = torch.tensor([4.0, 3.1, 2.7, 1.5, 0.4, 0.0], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)

    def f(x, u):
        return torch.full_like(x, 3 * u**2 - 4 * u + 1)

    ends = [multistep(f, zero, u[:k]).item() for k in (3, 4, 5, 6)]
    integral = (u**3 - 2 * u**2 + u)[2:]
    np.testing.assert_allclose(np.diff(ends), integral.diff().numpy(), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_evaluations_are_counted(n):
    calls = []

    def f(x, t):
        calls.append(t)
        return -x

    levels = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    for solver, expected in ((euler, n), (heun, 2 * n - 1), (multistep, n)):
        calls.clear()
        assert solve(solver, f, torch.ones(1), levels)[1] == len(calls) == expected
    calls.clear()
    assert solve(rk45, f, torch.ones(1), [1, 0])[1] == len(calls)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_callback_sees_each_step_before_it_is_taken(solver):
    """dx/dt = -x from t = 1 to 0: the state at t is exp(1 - t), the slope minus that."""
    steps, levels = [], torch.linspace(1, 0, 101, dtype=torch.float64)
    end = SOLVERS[solver].solve(lambda x, t: -x, torch.ones(1).double(), levels, steps.append)
    assert [step.index for step in steps] == list(range(len(steps)))
    passed = [step.level for step in steps]
    if SOLVERS[solver].schedule:
        assert passed == levels[:-1].tolist()
    assert passed[0] == 1
    assert sorted(passed, reverse=True) == passed
    for step in steps:
        assert step.x.item() == pytest.approx(math.exp(1 - step.level), rel=1e-2)
        assert step.slope.item() == -step.x.item()
    assert end.item() == pytest.approx(math.exp(1), rel=1e-2)


def test_the_callback_of_a_sampler_sees_every_network_evaluation_of_euler():
    config = vp_config.get_config()
    config.data.image_size = 4
    config.model.update({"num_scales": 5, "beta_max": 4.0})
    method, x = get_method(config), torch.randn(2, 3, 4, 4)
    for name in ("pc", "ode"):
        config.sampling.update({"method": name, "ode_solver": "forward_euler", "N": 5})
        steps = []
        sample = get_sampling_fn(config, method)
        _, evaluations = sample(gaussian_network(method), x=x, callback=steps.append)
        assert evaluations == len(steps) == 5
        assert all(step.x.shape == step.slope.shape == x.shape for step in steps)


@pytest.mark.parametrize(
    "name, where", [("forward_euler", "0.5"), ("improved_euler", "0.25"), ("multistep", "0.5")]
)
def test_fixed_steps_say_where_they_diverge(name, where):
    levels = torch.linspace(0, 1, 5, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=f"not finite after the step to {where}"):
        slope = lambda x, t: x * (math.inf if t >= 0.25 else 1)  # noqa: E731
        method = WithFunction(FAMILY["edm"], slope)
        solve_ode(method, None, torch.ones(1, 1, 1, 1), name, 4, schedule=lambda *_: levels)


# --- the sampling ODE -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["poisson", *SDES, *FAMILY])
def test_levels_go_from_prior_to_data(poisson, name):
    method = (SDES | FAMILY).get(name, poisson)
    ends = method.sigma(torch.tensor([method.t_prior, method.t_data], dtype=torch.float64))
    for schedule in SCHEDULES.values():
        levels = schedule(method, 9, 7.0)
        torch.testing.assert_close(levels[[0, -1]], ends, rtol=1e-12, atol=0)
        assert (levels.diff() < 0).all()
        torch.testing.assert_close(schedule(method, 0, 7.0), ends[:1])
    roots = SCHEDULES["polynomial"](method, 9, 3.0) ** (1 / 3)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(9), rtol=1e-9, atol=0)
    t = method.time(SCHEDULES["uniform"](method, 9, 7.0))
    torch.testing.assert_close(t.diff(), t.diff().mean().expand(9), rtol=1e-9, atol=0)


@given(
    angle=st.floats(0, 3.1),
    lengths=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    share=st.floats(0, 1),
)
def test_interpolation_turns_by_its_share_of_the_angle(angle, lengths, share):
    """In the plane of two vectors; between equal lengths the length is kept."""
    start = lengths[0] * torch.tensor([1.0, 0.0], dtype=torch.float64)
    unit = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    shares = torch.tensor([0.0, share, 1.0], dtype=torch.float64)

    def interpolate(end):
        ends = (v.view(1, 2, 1, 1) for v in (start, end))
        return spherical_interpolation(*ends, shares).view(3, 2)

    points = interpolate(lengths[1] * unit)
    torch.testing.assert_close(points[0], start, atol=1e-9, rtol=0)
    torch.testing.assert_close(points[2], lengths[1] * unit, atol=1e-6, rtol=0)
    x, y = interpolate(lengths[0] * unit)[1].tolist()
    assert math.hypot(x, y) == pytest.approx(lengths[0], rel=1e-6)
    assert math.atan2(y, x) == pytest.approx(share * angle, abs=1e-6)


def end_of_gaussian_flow(sde, x, mean, std):
    """End of `x` under the flow of data N(mean, std^2): its distance from the mean, in standard
    deviations of the marginal, does not change."""
    first, last = torch.tensor([sde.t_prior, sde.t_data], dtype=torch.float64)

    def scale(t):
        return torch.hypot(sde.alpha(t) * std, sde.std(t))

    return sde.alpha(last) * mean + (x - sde.alpha(first) * mean) / scale(first) * scale(last)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver, order", [("heun", 2), ("multistep", 3), ("forward_euler", 1)])
def test_solvers_converge_to_the_flow_with_their_order(name, solver, order):
    sde, mean, std = SDES[name], 0.3, 0.5
    x = sde.prior_sampling((50, 1, 1, 1), seeded(0)).double()
    truth = end_of_gaussian_flow(sde, x, mean, std)

    def error(n):
        return (solve_ode(sde, gaussian_network(sde, mean, std), x, solver, n)[0] - truth).norm()

    assert math.log2(error(160) / error(320)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_removal_leads_to_the_data(name, solver):
    """An Euler step gives Tweedie's mean, a step of higher order the end of the flow."""
    sde, mean, std = SDES[name], 0.3, 0.05
    net = gaussian_network(sde, mean, std)
    x = sde.prior_sampling((50, 1, 1, 1), seeded(0)).double()
    steps = 1000 if "euler" in solver else 200  # higher orders need fewer
    options = {"solver": solver, "n": steps, "rtol": 1e-7, "atol": 1e-7}
    noisy, evaluations = solve_ode(sde, net, x, **options)
    clean, more = solve_ode(sde, net, x, **options, noise_removal=True)
    assert more - evaluations == (1 if solver == "rk45" else 0)
    last = torch.tensor(sde.t_data, dtype=torch.float64)
    signal, noise = sde.alpha(last), sde.std(last)
    gain = std / torch.hypot(signal * std, noise)
    if solver != "multistep":
        gain = signal * gain**2
    expected = mean + gain * (noisy - signal * mean)
    assert (clean - expected).norm() < 0.2 * (clean - noisy).norm()


@pytest.mark.parametrize("name", ["poisson", *SDES, *FAMILY])
@pytest.mark.parametrize("solver", FIXED_STEPS)
@pytest.mark.parametrize("noise_removal", [False, True])
def test_one_step_is_enough_to_run(poisson, exact_network, name, solver, noise_removal):
    method = (SDES | FAMILY).get(name, poisson)
    charge = torch.zeros(1, 1, 2, 2)
    net = exact_network(charge, 5.0) if name == "poisson" else gaussian_network(method)
    x = method.prior_sampling((3, 1, 2, 2), seeded(0))
    x, evaluations = solve_ode(method, net, x, solver, 1, noise_removal=noise_removal)
    assert x.isfinite().all()
    assert x.dtype == torch.float32
    assert evaluations == 1


# --- truth: laws that are known -------------------------------------------------------------------

STEPS = {"rk45": 0, "forward_euler": 300, "improved_euler": 100, "heun": 60, "multistep": 60}
STEPS |= {"ipndm": 60, "dpmpp": 60, "unipc": 60}
MEAN, STD = 0.3, 0.2


def is_law_of_data(x):
    """True if entries (any shape) are compatible with N(MEAN, STD^2), given their number."""
    return stats.kstest(x.flatten().numpy(), stats.norm(MEAN, STD).cdf).pvalue > 1e-3


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver", STEPS)
def test_ode_samples_follow_the_law_of_the_data(name, solver, continuous):
    if name == "subvp" and not continuous:
        pytest.skip("has no discrete form")
    sde = replace(SDES[name], continuous=continuous)
    x = sde.prior_sampling((500, 1, 2, 2), seeded(0))
    net = gaussian_network(sde, MEAN, STD)
    x, _ = solve_ode(sde, net, x, solver, STEPS[solver], noise_removal=True)
    assert is_law_of_data(x)


PC = [
    (name, predictor, corrector)
    for name, sde in SDES.items()
    for predictor in sde.predictors
    for corrector in sde.correctors
    if (predictor, corrector) != ("none", "none")
]


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("name, predictor, corrector", PC)
def test_pc_samples_follow_the_law_of_the_data(name, predictor, corrector, continuous):
    if name == "subvp" and not continuous:
        pytest.skip("has no discrete form")
    steps = 300 if (predictor, corrector) == ("none", "ald") else 150
    sde = replace(SDES[name], N=steps, continuous=continuous)
    generator = seeded(0)
    net = Counted(gaussian_network(sde, MEAN, STD))
    x = predictor_corrector(
        sde,
        partial(sde.score, net),
        sde.prior_sampling((500, 1, 2, 2), generator),
        predictor,
        corrector,
        generator,
        n_steps_each=10 if predictor == "none" else 1,
        snr=0.3 if (predictor, corrector) == ("none", "ald") else 0.16,
        noise_removal=True,
    )
    assert is_law_of_data(x)
    each = (predictor != "none") + (corrector != "none") * (10 if predictor == "none" else 1)
    assert net.calls == steps * each


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(
    "name, predictor", [(n, p) for n, s in SDES.items() for p in s.predictors if p != "none"]
)
def test_predictors_converge_to_the_law_of_the_data(name, predictor, flow):
    """Variances follow without draws: x <- A x + B noise makes them A^2 variance + B^2."""
    if predictor == "ancestral_sampling" and flow:
        pytest.skip("has no probability flow")
    step, options = PREDICTORS[predictor], {"probability_flow": True} if flow else {}
    x, noise = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).view(2, 2, 1, 1, 1)

    def error(n):
        sde = replace(SDES[name], N=n)
        net, variance = gaussian_network(sde, 0.0, 0.5), sde.prior_scale**2
        for t in torch.linspace(1, sde.t_data, n, dtype=torch.float64):
            a, b = step(sde, x, t, sde.score(net, x, t), noise, **options)[0].flatten().tolist()
            variance = a**2 * variance + b**2
        return abs(variance - 0.25)

    few, many = error(100), error(800)
    assert many < max(0.25 * few, 3e-3)  # at t_data some of the noise is left
    assert many < 0.06 * 0.25


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
@pytest.mark.parametrize("name", SDES)
def test_correctors_keep_the_marginal(name, corrector):
    """Many small steps at one time take any x to the marginal there."""
    sde, t = SDES[name], torch.tensor(0.5, dtype=torch.float64)
    generator = seeded(0)
    net, x = gaussian_network(sde, MEAN, STD), torch.ones(500, 1, 2, 2)
    for _ in range(300):
        noise = torch.randn(x.shape, generator=generator)
        x, _ = CORRECTORS[corrector](sde, x, t, sde.score(net, x, t), noise, snr=0.15)
    law = stats.norm(sde.alpha(t) * MEAN, torch.hypot(sde.alpha(t) * STD, sde.std(t)))
    assert stats.kstest(x.flatten().numpy(), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("solver", STEPS)
def test_every_sample_lands_on_a_charge_and_charges_in_proportion(exact_network, solver):
    """By Gauss's law equal charges receive equal flux, so equally many samples."""
    charges = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [0.0, 1.0]]).view(3, 2, 1, 1)
    method = replace(
        get_method(small_config()), gamma=1e-9, z_exp=0.0, z_max=60.0, z_min=1e-4, upper_norm=1e9
    )
    x = method.prior_sampling((900, 2, 1, 1), seeded(0))
    x = x.double()
    net = exact_network(charges, method.gamma)
    ends, _ = solve_ode(method, net, x, solver, 200)
    distance = torch.cdist(ends.flatten(1), charges.double().flatten(1))
    nearest, which = distance.min(1)
    assert nearest.quantile(0.99) < 0.05
    counts = torch.bincount(which, minlength=3)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("solver", STEPS)
def test_poisson_samples_follow_the_density_of_the_charges(poisson, exact_network, solver):
    """The field of 300 charges at the quantiles of a normal law."""
    law = stats.norm(MEAN, STD)
    charges = torch.from_numpy(law.ppf((np.arange(300) + 0.5) / 300)).view(-1, 1, 1, 1)
    method = replace(poisson, gamma=1e-9, z_exp=0.0, z_max=500.0, z_min=5e-3, upper_norm=math.inf)
    # norms are at least 1, which is little where z_max is 500
    x = method.prior_sampling((1000, 1, 1, 1), seeded(0)).double()
    net = exact_network(charges, method.gamma)
    x, _ = solve_ode(method, net, x, solver, STEPS[solver])
    assert is_law_of_data(x)


# --- by name --------------------------------------------------------------------------------------


def test_samples_have_the_asked_shape_and_range(exact_network):
    config = small_config("forward_euler")
    sample = get_sampling_fn(config, get_method(config))
    net = exact_network(torch.randn(5, 3, 8, 8), 5.0)
    generator = seeded(3)
    samples, _ = sample(net, 7, generator=generator)
    assert samples.shape == (7, 3, 8, 8)
    assert samples.min() >= 0
    assert samples.max() <= 1
    again, _ = sample(net, 7, generator=seeded(3))
    assert torch.equal(samples, again)


@pytest.mark.parametrize(
    "module, key, value, message",
    [
        (cifar10_ddpmpp, "ode_solver", "rk54", "rk54.*it has: rk45, forward_euler, improved_euler"),
        (cifar10_ddpmpp, "method", "odee", "sampling.method must be one of 'ode', 'pc'"),
        (cifar10_ddpmpp, "method", "pc", "PFGM has no sampling.method='pc': it has no SDE"),
        (cifar10_ddpmpp, "N", 0, "at least 1, not 0"),
        (cifar10_ddpmpp, "rho", 0.0, "must be positive, not 0.0"),
        (cifar10_ddpmpp, "rtol", 0.0, "must be positive, not 0.0"),
        (cifar10_ddpmpp, "atol", -1e-4, "must be positive, not -0.0001"),
        (ve_config, "method", "odee", "sampling.method must be one of 'ode', 'pc'"),
        (
            ve_config,
            "predictor",
            "euler",
            "VE SDE has no.*it has: euler_maruyama, reverse_diffusion",
        ),
        (ve_config, "corrector", "langevine", "VE SDE has no.*it has: langevin, ald, none"),
        (ve_config, "n_steps_each", 0, "must be positive, not 0"),
        (ve_config, "snr", 0.0, "must be positive, not 0.0"),
        (
            subvp_config,
            "predictor",
            "ancestral_sampling",
            "sub-VP SDE has no.*it has: euler_maruyama",
        ),
        (vp_config, "predictor", "none", "both 'none'"),
    ],
)
def test_bad_sampling_options_are_named(module, key, value, message):
    config = module.get_config()
    config.sampling[key] = value
    with pytest.raises(ValueError, match=message) as error:
        get_sampling_fn(config, get_method(config))
    assert f"sampling.{key}" in str(error.value)


def test_ancestral_sampling_has_no_probability_flow():
    config = vp_config.get_config()
    config.sampling.predictor = "ancestral_sampling"
    config.sampling.probability_flow = True
    with pytest.raises(ValueError, match="ancestral_sampling' has no probability_flow"):
        get_sampling_fn(config, get_method(config))


def test_schedule_and_solver_are_chosen_apart():
    config = vp_config.get_config()
    config.data.image_size = 4
    config.sampling.update({"method": "ode", "N": 5})
    method = get_method(config)
    net, x = gaussian_network(method), torch.randn(2, 3, 4, 4)

    def sample(solver, schedule):
        config.sampling.update({"ode_solver": solver, "schedule": schedule})
        return get_sampling_fn(config, method)(net, x=x)[0]

    assert torch.equal(sample("heun", "uniform"), sample("improved_euler", "auto"))
    assert torch.equal(sample("improved_euler", "polynomial"), sample("heun", "auto"))
    assert not torch.equal(sample("heun", "uniform"), sample("heun", "auto"))
    with pytest.raises(ValueError, match="rk45' chooses its own steps: sampling.schedule must be"):
        sample("rk45", "uniform")
    with pytest.raises(ValueError, match=r"has no sampling\.schedule='cosine'; it has: auto, unif"):
        sample("heun", "cosine")


def test_config_chooses_the_sampler():
    """`get_sampling_fn` runs the sampler that the config says, noise removal included."""
    config = vp_config.get_config()
    config.data.image_size = 4
    config.model.num_scales = 21
    config.sampling.update({"predictor": "reverse_diffusion", "corrector": "ald", "snr": 0.1})
    config.sampling.n_steps_each = 2
    method = get_method(config)
    net, x = gaussian_network(method), torch.randn(2, 3, 4, 4)
    samples, evaluations = get_sampling_fn(config, method)(net, x=x, generator=seeded(7))
    expected = predictor_corrector(
        method,
        partial(method.score, net),
        x,
        "reverse_diffusion",
        "ald",
        seeded(7),
        n_steps_each=2,
        snr=0.1,
        noise_removal=True,
    )
    torch.testing.assert_close(samples, ((expected + 1) / 2).clamp(0, 1))
    assert evaluations == 63
    config.sampling.update({"method": "ode", "ode_solver": "heun", "N": 5, "rho": 3.0})
    samples, evaluations = get_sampling_fn(config, method)(net, x=x)
    expected, _ = solve_ode(method, net, x, "heun", 5, rho=3.0, noise_removal=True)
    torch.testing.assert_close(samples, ((expected + 1) / 2).clamp(0, 1))
    assert evaluations == 9


def test_tighter_tolerances_cost_more_evaluations():
    config = vp_config.get_config()
    config.sampling.method = "ode"
    method = get_method(config)
    x = method.prior_sampling((4, 3, 4, 4), seeded(0))
    used = []
    for tolerance in (1e-3, 1e-5):
        config.sampling.rtol = config.sampling.atol = tolerance
        used.append(get_sampling_fn(config, method)(gaussian_network(method), x=x)[1])
    assert used[0] < used[1]


def test_config_chooses_both_tolerances():
    """The absolute one far below the relative one; an image leads back by the same steps."""
    config, tolerances = vp_config.get_config(), {"rtol": 1e-2, "atol": 1e-7}
    config.data.image_size = 4
    config.sampling.update({"method": "ode", "noise_removal": False} | tolerances)
    method = get_method(config)
    net, x = gaussian_network(method), torch.randn(2, 3, 4, 4, generator=seeded(0))
    drift, times = partial(method.ode, net), [method.t_prior, method.t_data]
    expected, used = solve(rk45, drift, x, times, **tolerances)
    samples, evaluations = get_sampling_fn(config, method)(net, x=x)
    torch.testing.assert_close(samples, ((expected + 1) / 2).clamp(0, 1))
    assert evaluations == used
    latents, evaluations = encode(method, net, expected, **tolerances)
    expected, used = solve(rk45, drift, expected, times[::-1], **tolerances)
    torch.testing.assert_close(latents, expected)
    assert evaluations == used


def test_noise_removal_leaves_out_the_noise_of_the_last_step():
    """The noise left out has variance beta(t) / N at the last t, 1e-3."""
    sde = replace(VP, N=5)
    score, x = partial(sde.score, gaussian_network(sde)), torch.randn(4, 1, 2, 2)
    noisy, clean = (
        predictor_corrector(
            sde, score, x, "euler_maruyama", "none", seeded(1), noise_removal=removes
        )
        for removes in (False, True)
    )
    generator = seeded(1)
    *_, last = (torch.randn(x.shape, generator=generator) for _ in range(5))
    torch.testing.assert_close(noisy - clean, math.sqrt((0.1 + 1e-3 * 19.9) / 5) * last)


def test_diverging_samples_say_when():
    with pytest.raises(FloatingPointError, match=r"not finite after the step to 0\.95"):
        net = lambda x, label: x * math.inf if label[0] < 950 else x  # noqa: E731
        vp = replace(VP, N=101)
        predictor_corrector(vp, partial(vp.score, net), torch.ones(1, 1, 1, 1))


# --- devices --------------------------------------------------------------------------------------


class NeverWaits(TorchDispatchMode):
    """Copies to the device "meta" that the host would wait for, were it a GPU, are errors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            moves = torch.device(kwargs.get("device") or "cpu").type == "meta"
            assert not moves or kwargs.get("non_blocking"), "the host waits for a copy"
        return func(*args, **kwargs)


METHODS = {**SDES, **FAMILY, "poisson": get_method(small_config())}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("solver", FIXED_STEPS)
def test_steps_never_wait_for_the_device(name, solver):
    """Tensors without values, of which none can be read, go through a network that multiplies."""
    method, evaluations = METHODS[name], []

    def net(x, noise_label):
        assert noise_label.device.type == x.device.type == "meta"
        evaluations.append(noise_label.shape)
        out = x / (1 + noise_label.view(-1, 1, 1, 1))
        return (out, noise_label) if name == "poisson" else out

    with NeverWaits(), pytest.raises(RuntimeError, match="meta"):  # the look at the end
        solve_ode(method, net, torch.empty(2, 3, 4, 4, device="meta"), solver, 4)
    assert len(evaluations) == (7 if SOLVERS[solver].solve is heun else 4)


@pytest.mark.parametrize("name", SDES)
def test_predictor_and_corrector_never_wait_for_the_device(name):
    evaluations, sde = [], replace(SDES[name], N=4)

    def net(x, noise_label):
        evaluations.append(noise_label.device.type)
        return x / (1 + noise_label.view(-1, 1, 1, 1))

    corrector = "none" if name == "subvp" else "langevin"
    with NeverWaits(), pytest.raises(RuntimeError, match="meta"):
        x = torch.empty(2, 3, 4, 4, device="meta")
        predictor_corrector(sde, partial(sde.score, net), x, "reverse_diffusion", corrector)
    assert evaluations == ["meta"] * (4 if name == "subvp" else 8)
