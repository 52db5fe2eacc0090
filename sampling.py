"""Solvers of a method's sampling ODE, and the sampler that a config asks for.

A solver takes a vector field `f(x, t)` and knows nothing of methods: `forward_euler` and
`improved_euler` walk along given nodes, `rk45` chooses its own steps. All work on the device and in
the dtype of `x`; only step sizes live on the host.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from datasets import get_data_inverse_scaler
from methods import Method, Network

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


def _adaptive(method: Method, net: Network, x: Tensor) -> tuple[Tensor, int]:
    return rk45(partial(method.ode, net), x, method.t_prior, method.t_data)


def _along_nodes(solver, n: int) -> Callable[[Method, Network, Tensor], tuple[Tensor, int]]:
    return lambda method, net, x: solver(partial(method.slope, net), x, method.nodes(n))


# sampling.ode_solver -> given the number of steps, what solves a method's ODE from its prior.
ODE_SOLVERS = {
    "rk45": lambda n: _adaptive,
    "forward_euler": partial(_along_nodes, forward_euler),
    "improved_euler": partial(_along_nodes, improved_euler),
}


def get_sampling_fn(config, method: Method) -> Callable[..., tuple[Tensor, int]]:
    """The sampler that `config.sampling` names.

    Returns:
        `sample(net, num=None, x=None, generator=None)`: `num` samples (default
        `eval.batch_size`), from a fresh prior sample or from `x` (B, C, H, W) where it is given,
        on the generator's device (else on that of `x`, else the network's). It returns images
        (num, C, H, W) in [0, 1] and the number of network evaluations.

    Raises:
        ValueError: an unknown sampling method or solver, or fewer than one step.
    """
    data, sampling = config.data, config.sampling
    if sampling.method != "ode":
        raise ValueError(f"unknown sampler sampling.method={sampling.method!r}; known: ode")
    if sampling.ode_solver not in ODE_SOLVERS:
        raise ValueError(
            f"unknown solver sampling.ode_solver={sampling.ode_solver!r}; "
            f"known: {', '.join(ODE_SOLVERS)}"
        )
    if sampling.N < 1:
        raise ValueError(f"sampling.N must be at least 1, not {sampling.N}")
    solve = ODE_SOLVERS[sampling.ode_solver](sampling.N)
    image_shape = (data.num_channels, data.image_size, data.image_size)
    default_num = config.eval.batch_size
    inverse_scaler = get_data_inverse_scaler(config)

    @torch.no_grad()
    def sample(net, num=None, x=None, generator=None):
        if x is None:
            device = generator.device if generator else next(net.parameters()).device
            x = method.prior_sampling((num or default_num, *image_shape), generator, device)
        x, evaluations = solve(method, net, x)
        return inverse_scaler(x).clamp(0, 1), evaluations

    return sample
