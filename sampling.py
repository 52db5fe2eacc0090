"""Solvers of a method's sampling ODE, predictors and correctors of its SDE, and the sampler of a
config.

A solver takes a vector field `f(x, t)` and knows nothing of methods: those with fixed steps walk
along given nodes, `rk45` chooses its own steps. A predictor or corrector is the formula of one
step. All work on the device and in the dtype of `x`; only times and step sizes live on the host.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

import execution
from datasets import get_data_inverse_scaler
from methods import SDE, Method, Network, reverse, spread

VectorField = Callable[[Tensor, float], Tensor]

# Dormand and Prince 1980: nodes, stages, fifth-order weights, and fifth minus fourth order.
_C = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_B = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_E = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)


def forward_euler(f: VectorField, x: Tensor, nodes: Tensor) -> tuple[Tensor, int]:
    """Euler's method along `nodes` (N + 1,): the state at the last node, and N evaluations."""
    u = nodes.tolist()
    for here, there in pairwise(u):
        x = _finite(x + (there - here) * f(x, here), there)
    return x, len(u) - 1


def improved_euler(f: VectorField, x: Tensor, nodes: Tensor) -> tuple[Tensor, int]:
    """Heun's method along `nodes` (N + 1,), its last step Euler's: 2 N - 1 evaluations."""
    *u, last = nodes.tolist()
    for here, there in pairwise(u):
        slope = f(x, here)
        slope_there = f(x + (there - here) * slope, there)
        x = _finite(x + (there - here) / 2 * (slope + slope_there), there)
    return _finite(x + (last - u[-1]) * f(x, u[-1]), last), 2 * len(u) - 1


def multistep(f: VectorField, x: Tensor, nodes: Tensor) -> tuple[Tensor, int]:
    """Adams and Bashforth's method of order 3 along `nodes` (N + 1,): N evaluations.

    A step integrates the parabola through the last three slopes; the first two make do with fewer.
    In a method's natural variables this is rho-AB DEIS (Zhang and Chen 2023, arXiv 2204.13902).
    """
    slopes, places = [], []
    for here, there in pairwise(nodes.tolist()):
        slopes, places = [f(x, here), *slopes][:3], [here, *places][:3]
        for weight, slope in zip(_adams_bashforth(places, there), slopes, strict=True):
            x = x + weight * slope
        _finite(x, there)
    return x, len(nodes) - 1


def _adams_bashforth(places: list[float], there: float) -> list[float]:
    """Weights of slopes at `places` that integrate from places[0] to `there`.

    They are exact for powers of s = (u - places[0]) / step, which a step takes from 0 to 1.
    """
    step = there - places[0]
    s = (torch.tensor(places, dtype=torch.float64) - places[0]) / step
    moments = 1 / torch.arange(1, len(s) + 1, dtype=torch.float64)
    return (step * torch.linalg.solve(torch.vander(s, increasing=True).T, moments)).tolist()


def _finite(x: Tensor, u: float) -> Tensor:
    if not x.isfinite().all():
        raise FloatingPointError(f"the state is not finite after the step to {u:.6g}")
    return x


def rk45(
    f: VectorField, x: Tensor, t_start: float, t_end: float, rtol: float = 1e-4, atol: float = 1e-4
) -> tuple[Tensor, int]:
    """Dormand-Prince 5(4) with one adaptive step size for the batch.

    The first step and the step control are those of Hairer, Norsett and Wanner (Solving Ordinary
    Differential Equations I, section II.4) as in scipy's `RK45`, so that evaluations agree with
    scipy's; the error norm is the root mean square over all entries. A step costs the host one
    number.

    Args:
        f: vector field, f(x, t) -> dx/dt with `t` a float.
        x: initial state, any shape.
        t_start, t_end: the interval; either may be the larger.
        rtol, atol: a step is accepted where its error is below atol + rtol * |x|.

    Returns:
        The state at `t_end`, and the number of evaluations of `f`.

    Raises:
        FloatingPointError: the step became too small to go on, or the state is not finite.
    """
    direction = 1.0 if t_end > t_start else -1.0
    rows = [torch.tensor(row, dtype=x.dtype, device=x.device) for row in (*_A, _B, _E)]

    def combine(row: Tensor) -> Tensor:
        return (row @ stages[: len(row)].flatten(1)).view_as(x)

    def norm(error: Tensor, magnitude: Tensor) -> float:
        return (error / (atol + rtol * magnitude)).square().mean().sqrt().item()

    stages = x.new_empty(7, *x.shape)
    stages[0] = f(x, t_start)
    step = _first_step(f, x, t_start, t_end, stages[0], norm)
    smallest = 10 * math.ulp(max(abs(t_start), abs(t_end)))
    t, evaluations, retry, error = t_start, 2, False, 0.0
    while t != t_end:
        if not step >= smallest:
            finite = math.isfinite(step + error)
            reason = f"step below {smallest:.1e}" if finite else "state not finite"
            raise FloatingPointError(f"rk45 cannot go on at t = {t:.6g}: {reason}")
        t_next = t + direction * step if step < abs(t_end - t) else t_end
        h = t_next - t
        for i in range(1, 6):
            stages[i] = f(x + h * combine(rows[i]), t + _C[i] * h)
        x_next = x + h * combine(rows[6])
        stages[6] = f(x_next, t_next)
        evaluations += 6

        error = norm(h * combine(rows[7]), torch.maximum(x.abs(), x_next.abs()))
        growth = 0.9 * max(error, 1e-10) ** -0.2 if math.isfinite(error) else 0.0
        step = abs(h) * min(max(0.2, growth), 1.0 if retry else 10.0)
        retry = not error < 1
        if not retry:
            t, x = t_next, x_next
            stages[0] = stages[6]
    return x, evaluations


def _first_step(f, x, t_start, t_end, slope, norm) -> float:
    """A step whose error should be a hundredth of the tolerance (one evaluation of `f`)."""
    length = t_end - t_start
    size, speed = norm(x, x.abs()), norm(slope, x.abs())
    guess = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    h = math.copysign(min(guess, abs(length)), length)
    curvature = norm(f(x + h * slope, t_start + h) - slope, x.abs()) / abs(h)
    fastest = max(speed, curvature)
    best = (0.01 / fastest) ** 0.2 if fastest > 1e-15 else max(1e-6, 1e-3 * abs(h))
    return min(100 * abs(h), best, abs(length))


# --- the sampling ODE of a method -----------------------------------------------------------------


def uniform_levels(method: Method, n: int, rho: float) -> Tensor:
    """The n + 1 levels, from prior to data, whose times are evenly spaced; `rho` plays no part."""
    return method.level(torch.linspace(method.t_prior, method.t_data, n + 1, dtype=torch.float64))


def polynomial_levels(method: Method, n: int, rho: float) -> Tensor:
    """The n + 1 levels, from prior to data, whose rho-th roots are evenly spaced.

    Source: Karras et al. 2022 (arXiv 2206.00364), equation 5; the larger rho > 0, the more of them
    are close to the data.
    """
    ends = torch.tensor([method.t_prior, method.t_data], dtype=torch.float64)
    first, last = (method.level(ends) ** (1 / rho)).tolist()
    return torch.linspace(first, last, n + 1, dtype=torch.float64) ** rho


# sampling.ode_solver -> a solver with fixed steps, and where it takes them.
FIXED_STEPS = {
    "forward_euler": (forward_euler, uniform_levels),
    "improved_euler": (improved_euler, uniform_levels),
    "heun": (improved_euler, polynomial_levels),
    "multistep": (multistep, polynomial_levels),
}
ODE_SOLVERS = ("rk45", *FIXED_STEPS)


def walk(method: Method, net: Network, x: Tensor, solver, levels: Tensor) -> tuple[Tensor, int]:
    """`solver` along `levels` of a method's natural variables: x at the last, and evaluations."""
    signal = method.signal(method.time(levels))
    y, evaluations = solver(partial(method.slope, net), x / signal[0], levels)
    return signal[-1] * y, evaluations


def solve_ode(
    method: Method,
    net: Network,
    x: Tensor,
    solver: str = "rk45",
    n: int = 100,
    *,
    rho: float = 7.0,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    noise_removal: bool = False,
) -> tuple[Tensor, int]:
    """Carries `x` (B, C, H, W) along the sampling ODE from the prior to the data.

    Args:
        method, net: whose ODE.
        x: a sample of the prior.
        solver: one of `ODE_SOLVERS`.
        n: steps of those with fixed steps, at least 1.
        rho: see `polynomial_levels`.
        rtol, atol: see `rk45`.
        noise_removal: where the ODE stops at some noise, the last of the n steps leads from there
            to level 0; after `rk45` an Euler step does. Euler's gives the mean of the data given x
            (Tweedie's formula).

    Returns:
        The sample, and the number of network evaluations.

    Raises:
        FloatingPointError: the solution is not finite; the message says where.
    """
    denoise = noise_removal and method.noisy_end
    zero = torch.zeros(1, dtype=torch.float64)
    if solver != "rk45":
        step, place = FIXED_STEPS[solver]
        levels = torch.cat([place(method, n - 1, rho), zero]) if denoise else place(method, n, rho)
        return walk(method, net, x, step, levels)
    x, evaluations = rk45(partial(method.ode, net), x, method.t_prior, method.t_data, rtol, atol)
    if denoise:
        last = method.level(zero + method.t_data)
        x, more = walk(method, net, x, forward_euler, torch.cat([last, zero]))
        evaluations += more
    return x, evaluations


def spherical_interpolation(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Points on the arcs from `start` to `end`, each (n, C, H, W): (n, k, C, H, W).

    `shares` (k,) of an arc's angle lie behind its points, 0 for `start` and 1 for `end`; between
    vectors of one length all points have that length (Shoemake 1985).
    """
    a, b = start.flatten(1), end.flatten(1)
    angle = torch.nn.functional.cosine_similarity(a, b).clamp(-1, 1).acos()[:, None] / math.pi
    # sin(s angle) / sin(angle), without 0 / 0 between vectors of one direction
    weight_a = (1 - shares) * torch.sinc((1 - shares) * angle) / torch.sinc(angle)
    weight_b = shares * torch.sinc(shares * angle) / torch.sinc(angle)
    points = weight_a[..., None] * a[:, None] + weight_b[..., None] * b[:, None]
    return points.unflatten(2, start.shape[1:])


# --- predictors and correctors (Song et al. 2021, arXiv 2011.13456) -------------------------------
#
# One step at `x` (B, C, H, W) and time `t` () or (B,), given the score there and standard normal
# noise, both of the shape of `x`. Each returns the new x, and the new x without its noise.


def euler_maruyama(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, probability_flow: bool = False
) -> tuple[Tensor, Tensor]:
    """A step of 1 / N of the reverse SDE, or of the probability flow."""
    drift, diffusion = reverse(*sde.sde(x, t), score, probability_flow)
    mean = x - drift / sde.N
    return mean + spread(diffusion, x) / math.sqrt(sde.N) * noise, mean


def reverse_diffusion(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, probability_flow: bool = False
) -> tuple[Tensor, Tensor]:
    """The step of the SDE's own discretisation, reversed (appendix E)."""
    drift, diffusion = reverse(*sde.discretize(x, t), score, probability_flow)
    mean = x - drift
    return mean + spread(diffusion, x) * noise, mean


def ancestral_sampling(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, probability_flow: bool = False
) -> tuple[Tensor, Tensor]:
    """A draw from the Markov chain's law one step back (equation 4, appendix F)."""
    a, b = (spread(c, x) for c in sde.transition(t))
    mean = (x + b**2 * score) / a
    return mean + spread(sde.ancestral_std(t), x) * noise, mean


def langevin(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, snr: float
) -> tuple[Tensor, Tensor]:
    """A Langevin step, its size from the mean norms of noise and score (algorithms 4 and 5)."""
    a, _ = sde.transition(t)
    ratio = snr * noise.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()
    return _langevin(x, score, noise, spread(a**2, x) * ratio**2)


def ald(
    sde: SDE, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, snr: float
) -> tuple[Tensor, Tensor]:
    """A step of annealed Langevin dynamics, its size from the noise level (arXiv 1907.05600)."""
    a, _ = sde.transition(t)
    return _langevin(x, score, noise, spread((a * snr * sde.noise(t)) ** 2, x))


def _langevin(x: Tensor, score: Tensor, noise: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    mean = x + 2 * size * score
    return mean + 2 * size.sqrt() * noise, mean


PREDICTORS = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "none": None,
}
CORRECTORS = {"langevin": langevin, "ald": ald, "none": None}


def predictor_corrector(
    sde: SDE,
    net: Network,
    x: Tensor,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    generator: torch.Generator | None = None,
    *,
    n_steps_each: int = 1,
    snr: float = 0.16,
    probability_flow: bool = False,
    noise_removal: bool = False,
) -> tuple[Tensor, int]:
    """Carries `x` (B, C, H, W) from the prior to the data in the SDE's N steps (algorithm 1).

    Args:
        sde, net: whose reverse.
        x: a sample of the prior.
        predictor, corrector: names in `sde.predictors` and `sde.correctors`.
        generator: source of the noise, on the device of `x`.
        n_steps_each: corrector steps before each step of the predictor.
        snr: ratio that sets the corrector's step size, > 0.
        probability_flow: the predictor follows the ODE.
        noise_removal: leave out the noise of the last step.

    Returns:
        The sample, and the number of network evaluations.

    Raises:
        FloatingPointError: the sample is not finite; the message says from when on.
    """
    predict, correct = PREDICTORS[predictor], CORRECTORS[corrector]
    steps = [partial(correct, snr=snr)] * n_steps_each if correct else []
    steps += [partial(predict, probability_flow=probability_flow)] if predict else []
    mean = x
    for t in torch.linspace(sde.t_prior, sde.t_data, sde.N, dtype=torch.float64):
        for step in steps:
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x, mean = step(sde, x, t, sde.score(net, x, t), noise)
        _finite(x, t)
    return mean if noise_removal else x, sde.N * len(steps)


# --- by name --------------------------------------------------------------------------------------


def _choose(config, key: str, known: Iterable[str]) -> str:
    value = config.sampling[key]
    if value not in known:
        name = config.training.sde.lower()
        raise ValueError(f"{name} has no sampling.{key}={value!r}; it has: {', '.join(known)}")
    return value


def _check_positive(config, *keys: str) -> None:
    for key in keys:
        if not config.sampling[key] > 0:
            raise ValueError(f"sampling.{key} must be positive, not {config.sampling[key]}")


def get_tolerances(config) -> dict[str, float]:
    """`rtol` and `atol` of `rk45` from `config.sampling`; ValueError where one is not positive."""
    _check_positive(config, "rtol", "atol")
    return {"rtol": config.sampling.rtol, "atol": config.sampling.atol}


def _ode_sampler(config, method: Method):
    sampling = config.sampling
    if sampling.N < 1:
        raise ValueError(f"sampling.N must be at least 1, not {sampling.N}")
    _check_positive(config, "rho")
    options = {
        "solver": _choose(config, "ode_solver", ODE_SOLVERS),
        "n": sampling.N,
        "rho": sampling.rho,
        "noise_removal": sampling.noise_removal,
        **get_tolerances(config),
    }
    return lambda net, x, generator: solve_ode(method, net, x, **options)


def _pc_sampler(config, method: Method):
    sampling = config.sampling
    options = {
        "predictor": _choose(config, "predictor", method.predictors),
        "corrector": _choose(config, "corrector", method.correctors),
        "n_steps_each": sampling.n_steps_each,
        "snr": sampling.snr,
        "probability_flow": sampling.probability_flow,
        "noise_removal": sampling.noise_removal,
    }
    if options["corrector"] != "none":
        _check_positive(config, "n_steps_each", "snr")
    elif options["predictor"] == "none":
        raise ValueError("sampling.predictor and sampling.corrector are both 'none'")
    if options["predictor"] == "ancestral_sampling" and sampling.probability_flow:
        raise ValueError("sampling.predictor='ancestral_sampling' has no probability_flow")
    return lambda net, x, generator: predictor_corrector(
        method, net, x, generator=generator, **options
    )


SAMPLERS = {"ode": _ode_sampler, "pc": _pc_sampler}


def get_sampling_fn(config, method: Method) -> Callable[..., tuple[Tensor, int]]:
    """The sampler that `config.sampling` names.

    Returns:
        `sample(net, num=None, x=None, generator=None)`: `num` samples (default
        `eval.batch_size`), from a fresh prior sample or from `x` (B, C, H, W) where it is given,
        on the generator's device (else on that of `x`, else the network's). It returns images
        (num, C, H, W) in [0, 1] and the number of network evaluations.

    Raises:
        ValueError: a sampler that the method does not have, or a number out of range.
    """
    data = config.data
    image_shape = (data.num_channels, data.image_size, data.image_size)
    default_num = config.eval.batch_size
    inverse_scaler = get_data_inverse_scaler(config)
    name = _choose(config, "method", SAMPLERS if method.predictors else ("ode",))
    carry = SAMPLERS[name](config, method)
    compiles = config.sampling.compile

    @torch.no_grad()
    def sample(net, num=None, x=None, generator=None):
        if x is None:
            device = generator.device if generator else next(net.parameters()).device
            x = method.prior_sampling((num or default_num, *image_shape), generator, device)
        net = execution.compiled(net, x.device) if compiles else net
        x, evaluations = carry(net, x, generator)
        return inverse_scaler(x).clamp(0, 1), evaluations

    return sample
