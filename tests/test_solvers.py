"""Solvers of few evaluations against slow definitions, known solutions and known laws."""

import gc
import math
from functools import partial

import numpy as np
import pytest
import torch
from known_laws import FAMILY, SDES, WithFunction, gaussian_network
from scipy import integrate, interpolate, stats

from configs.edm import digits_ddpmpp as edm_config
from configs.pfgmpp import digits_ddpmpp as pfgmpp_config
from configs.poisson import cifar10_ddpmpp as poisson_config
from configs.subvp import cifar10_ddpmpp_continuous as subvp_config
from configs.ve import cifar10_ncsnpp_continuous as ve_config
from configs.vp import cifar10_ddpmpp_continuous as vp_config
from methods import get_method
from sampling import get_sampling_fn, solve_ode
from solvers import SOLVERS
from solvers.base import Counted
from solvers.exponential import dpmpp, unipc
from solvers.fixed_steps import Churn, ipndm, multistep

CONFIGS = {
    "poisson": poisson_config,
    "ve": ve_config,
    "vp": vp_config,
    "subvp": subvp_config,
    "edm": edm_config,
    "pfgmpp": pfgmpp_config,
}
FIXED_STEPS = [name for name, solver in SOLVERS.items() if solver.schedule]
WITH_ORDERS = [(name, order) for name, solver in SOLVERS.items() for order in solver.orders]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def even(first, last, n):
    return torch.linspace(first, last, n + 1, dtype=torch.float64)


def polynomial(first, last, n):
    return even(first ** (1 / 7), last ** (1 / 7), n) ** 7


# --- order of convergence -------------------------------------------------------------------------

# At smooth levels that are not even; the corrector of UniPC adds one to its order.
ORDER = {("heun", None): 2, ("forward_euler", None): 1, ("improved_euler", None): 2}
ORDER |= {("multistep", order): order for order in (1, 2, 3, 4)}
ORDER |= {("ipndm", order): min(order, 2) for order in (1, 2, 3, 4)}
ORDER |= {("dpmpp", order): order for order in (1, 2, 3)}
ORDER |= {("unipc", order): order + 1 for order in (1, 2, 3)}


def error_of_gaussian_flow(name, order, levels, std=0.5):
    """Data N(0, std^2): x keeps its share of sqrt(std^2 + sigma^2)."""
    scale = torch.hypot(levels, torch.tensor(std, dtype=torch.float64))
    options = {} if order is None else {"order": order}
    slope = lambda x, sigma: x * sigma / (sigma**2 + std**2)  # noqa: E731
    return (SOLVERS[name].solve(slope, scale[:1], levels, **options) - scale[-1]).abs().item()


@pytest.mark.parametrize("name, order", ORDER)
def test_solvers_converge_with_their_order(name, order):
    few, many = (
        error_of_gaussian_flow(name, order, polynomial(80.0, 0.002, n)) for n in (200, 400)
    )
    assert math.log2(few / many) == pytest.approx(ORDER[name, order], abs=0.3)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_its_order_at_even_levels(order):
    few, many = (
        error_of_gaussian_flow("ipndm", order, even(100.0, 1.0, n), std=1.0) for n in (1000, 2000)
    )
    assert math.log2(few / many) == pytest.approx(order, abs=0.3)


def test_every_solver_with_given_steps_has_its_order_measured():
    assert {name for name, _ in ORDER} == set(FIXED_STEPS)
    assert {(name, order) for name, order in ORDER if order} == set(WITH_ORDERS)


# --- slow definitions -----------------------------------------------------------------------------


@pytest.mark.parametrize("solve, steps", [(ipndm, [1, 2, 5, 3, 4]), (multistep, [2, 2, 2, 2, 2])])
@pytest.mark.parametrize(
    "order, expected",
    [
        (1, [1]),
        (2, [3 / 2, -1 / 2]),
        (3, [23 / 12, -16 / 12, 5 / 12]),
        (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
    ],
)
def test_last_slopes_have_the_weights_of_adams_and_bashforth(solve, steps, order, expected):
    """A slope that is 1 at one level only: the change over the last step is its weight."""
    levels = torch.tensor([0, *steps], dtype=torch.float64).cumsum(0)
    for back, weight in enumerate([*expected, 0, 0, 0][: len(steps)]):
        at = levels[len(steps) - 1 - back].item()
        slope = lambda x, level, at=at: torch.full_like(x, float(level == at))  # noqa: E731
        ends = [
            solve(slope, torch.zeros(1).double(), levels[:k], order=order).item()
            for k in (len(steps), len(steps) + 1)
        ]
        assert ends[1] - ends[0] == pytest.approx(weight * steps[-1], abs=1e-12)


def slow_step(x, images, nodes, level, next_level):
    """exp(-h) x + the integral of exp(u - h) P(u), P through `images` at the levels `nodes`."""
    h = math.log(level / next_level)
    at = [math.log(level / node) for node in nodes]
    polynomial = interpolate.lagrange(at, images)
    integral, _ = integrate.quad(lambda u: math.exp(u - h) * polynomial(u), 0, h, epsabs=1e-13)
    return math.exp(-h) * x + integral


def slow_dpmpp(denoise, x, levels, order):
    images, nodes = [], []
    for level, next_level in zip(levels, levels[1:], strict=False):
        images, nodes = [denoise(x, level), *images][:order], [level, *nodes][:order]
        x = slow_step(x, images, nodes, level, next_level) if next_level else images[0]
    return x


def slow_unipc(denoise, x, levels, order):
    """Predict, evaluate at the next level, correct; the last step is a prediction."""
    images, nodes = [denoise(x, levels[0])], [levels[0]]
    for i, (level, next_level) in enumerate(zip(levels, levels[1:], strict=False)):
        predicted = slow_step(x, images, nodes, level, next_level) if next_level else images[0]
        if i == len(levels) - 2:
            return predicted
        image = denoise(predicted, next_level)
        x = slow_step(x, [image, *images], [next_level, *nodes], level, next_level)
        images, nodes = [image, *images][:order], [next_level, *nodes][:order]
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solve, slow", [(dpmpp, slow_dpmpp), (unipc, slow_unipc)])
@pytest.mark.parametrize("last", [0.0, 0.05])
def test_exponential_solvers_follow_their_definition(solve, slow, order, last):
    """Two points, -1 and 1: the denoised image is tanh(x / sigma^2)."""
    levels = [20.0, 7.0, 3.0, 1.4, 0.7, 0.3, last]
    denoise = lambda x, sigma: math.tanh(x / sigma**2)  # noqa: E731
    slope = lambda x, sigma: (x - torch.tanh(x / sigma**2)) / sigma  # noqa: E731
    x = torch.tensor([4.0], dtype=torch.float64)
    end = solve(slope, x, torch.tensor(levels, dtype=torch.float64), order=order)
    assert end.item() == pytest.approx(slow(denoise, 4.0, levels, order), rel=1e-9)


@pytest.mark.parametrize("solve", [dpmpp, unipc])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_exponential_solvers_are_exact_for_polynomials_in_the_log_snr(solve, order):
    """x e^lambda grows, from step `order` on, by the integral of e^u D(u), known by parts.

    D = 1, u or u^2 has the integral e^u, e^u (u - 1) or e^u (u^2 - 2 u + 2).
    """
    levels = torch.tensor([9.0, 4.0, 2.5, 1.1, 0.6, 0.2], dtype=torch.float64)
    u = -levels.log()
    integral = u.exp() * [torch.ones_like(u), u - 1, u**2 - 2 * u + 2][order - 1]

    def slope(x, sigma):
        return (x - (-math.log(sigma)) ** (order - 1)) / sigma

    def end(k):
        return solve(slope, torch.ones(1).double(), levels[: k + 1], order=order) * u[k].exp()

    ends = torch.cat([end(k) for k in range(order, 6)])
    torch.testing.assert_close(ends.diff(), integral[order:].diff(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solve", [dpmpp, unipc])
def test_exponential_solvers_end_on_the_denoised_image(solve):
    slope = lambda x, sigma: (x - 0.3) / sigma  # noqa: E731
    for n in (1, 2, 5):
        end = solve(slope, torch.full((3,), 5.0), torch.linspace(10, 0, n + 1))
        torch.testing.assert_close(end, torch.full((3,), 0.3))


# --- what a step costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, order", WITH_ORDERS)
def test_a_step_is_one_evaluation_and_keeps_four_states(name, order, request):
    """States are counted as the network is called; the caller holds one more, the prior sample."""
    shape, alive = (7, 1, 3, 5), []
    gc.freeze()  # collections then skip objects that exist already
    request.addfinalizer(gc.unfreeze)

    def count():
        tensors = (value for value in gc.get_objects() if type(value) is torch.Tensor)
        return sum(value.shape == shape for value in tensors)

    def slope(x, sigma):
        alive.append(count())
        return x / (1 + sigma)

    x = torch.ones(shape)
    before = count()
    SOLVERS[name].solve(slope, x, polynomial(80.0, 0.0, 8), order=order)
    assert len(alive) == 8
    assert max(alive) <= before + 4


@pytest.mark.parametrize("name", ["ipndm", "dpmpp", "unipc"])
def test_fixed_steps_say_where_they_diverge(name):
    slope = lambda x, sigma: x * (math.inf if sigma < 0.6 else 1)  # noqa: E731
    with pytest.raises(FloatingPointError, match=r"not finite after the step to 0\.25"):
        method, levels = WithFunction(FAMILY["edm"], slope), even(1.0, 0.0, 4)
        solve_ode(method, None, torch.ones(1, 1, 1, 1), name, 4, schedule=lambda *_: levels)


# --- churn ----------------------------------------------------------------------------------------

MEAN, STD = 0.3, 0.2


@pytest.mark.parametrize("name", [*SDES, "edm"])
def test_samples_with_churn_follow_the_law_of_the_data(name):
    """Most of their noise is new: they are hardly correlated with those of other noise."""
    method = (SDES | FAMILY)[name]
    x = method.prior_sampling((1000, 1, 2, 2), seeded(0))
    net, churn = gaussian_network(method, MEAN, STD), Churn(S_churn=40.0)
    sample = partial(solve_ode, method, net, x, "heun", 100, churn=churn, noise_removal=True)
    samples = [sample(generator=seeded(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1])
    law = stats.norm(MEAN, STD)
    assert stats.kstest(samples[0].flatten().numpy(), law.cdf).pvalue > 1e-3
    assert np.corrcoef(samples[0].flatten(), samples[2].flatten())[0, 1] < 0.1


def test_churn_keeps_to_its_interval_and_below_the_first_level():
    levels = torch.tensor([10.0, 9.0, 5.0, 1.0, 0.1], dtype=torch.float64)
    churn = Churn(S_churn=1.0, S_min=1.0, S_max=9.0)
    raised = [churn.raised(level, levels) for level in levels.tolist()]
    assert raised == [10.0, 10.0, 6.25, 1.25, 0.1]
    assert Churn(S_churn=100.0).raised(1.0, levels) == math.sqrt(2)  # but for rounding
    steps = []
    SOLVERS["heun"].solve(lambda x, s: x / s, torch.ones(2), levels, steps.append, churn=churn)
    assert [step.level for step in steps] == [10.0, 10.0, 6.25, 1.25]


def test_noise_of_churn_has_its_standard_deviation():
    """Slope 0 keeps the noise of all steps: variance S_noise^2 (raised^2 - level^2) each."""
    levels = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    churn = Churn(S_churn=0.5, S_noise=0.5)  # levels rise by a quarter, but the first
    x = SOLVERS["heun"].solve(
        lambda x, s: torch.zeros_like(x),
        torch.zeros(100_000),
        levels,
        churn=churn,
        noise=lambda x: torch.randn(x.shape, generator=seeded(0)),
    )
    assert x.std().item() == pytest.approx(0.5 * math.sqrt(2.5**2 - 2**2), rel=0.01)


# --- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("solver", FIXED_STEPS)
def test_every_solver_runs_for_every_method_by_config(exact_network, name, solver):
    config = CONFIGS[name].get_config()
    config.data.image_size = 4
    config.training.M, config.sampling.z_max, config.sampling.upper_norm = 291, 40.0, 3000.0
    config.sampling.update({"method": "ode", "ode_solver": solver, "N": 6})
    method = get_method(config)
    shape = (5, config.data.num_channels, 4, 4)
    charges = torch.randn(shape, generator=seeded(1))
    net = exact_network(charges, 5.0) if name == "poisson" else gaussian_network(method)
    for order in (None, *SOLVERS[solver].orders):
        config.sampling.order = order
        x = method.prior_sampling(shape, seeded(0))
        counted = Counted(net)
        samples, evaluations = get_sampling_fn(config, method)(counted, x=x)
        assert samples.isfinite().all()
        assert evaluations == counted.calls == (11 if SOLVERS[solver].churns else 6)


def test_config_chooses_order_and_churn():
    config = edm_config.get_config()
    config.sampling.update({"N": 7, "ode_solver": "unipc", "order": 2, "rho": 5.0})
    method = get_method(config)
    net, x = gaussian_network(method), method.prior_sampling((2, 1, 8, 8), seeded(0))

    def sample():
        return 2 * get_sampling_fn(config, method)(net, x=x, generator=seeded(3))[0] - 1

    options = {"rho": 5.0, "noise_removal": True}
    expected, _ = solve_ode(method, net, x, "unipc", 7, order=2, **options)
    torch.testing.assert_close(sample(), expected.clamp(-1, 1))
    config.sampling.update({"ode_solver": "heun", "order": None})
    config.sampling.update({"S_churn": 3.0, "S_min": 0.1, "S_max": 9.0, "S_noise": 1.01})
    churn = Churn(3.0, 0.1, 9.0, 1.01)
    expected, _ = solve_ode(method, net, x, "heun", 7, churn=churn, generator=seeded(3), **options)
    torch.testing.assert_close(sample(), expected.clamp(-1, 1))


@pytest.mark.parametrize(
    "module, changes, message",
    [
        (
            edm_config,
            {"ode_solver": "dpmpp", "order": 4},
            r"order=4: .*'dpmpp' has the orders 1, 2",
        ),
        (edm_config, {"ode_solver": "heun", "order": 2}, r"order=2: .*'heun' has one order only"),
        (edm_config, {"ode_solver": "rk45", "order": 2}, r"order=2: .*'rk45' has one order only"),
        (edm_config, {"ode_solver": "ipndm", "order": 3, "N": 2}, r"order=3 needs .*N=2"),
        (
            edm_config,
            {"ode_solver": "unipc", "S_churn": 1.0},
            "only 'improved_euler' and 'heun' do",
        ),
        (poisson_config, {"ode_solver": "heun", "S_churn": 1.0}, "PFGM has no Gaussian noise"),
        (
            edm_config,
            {"ode_solver": "heun", "S_churn": 1.0, "S_min": 2.0, "S_max": 1.0},
            "S_min must be at most sampling.S_max: 2 and 1 are not",
        ),
    ],
)
def test_what_a_solver_or_method_cannot_is_named(module, changes, message):
    config = module.get_config()
    config.sampling.update(changes)
    with pytest.raises(ValueError, match=message) as error:
        get_sampling_fn(config, get_method(config))
    assert str(error.value).startswith("sampling.")
    assert str(error.value).isprintable()
