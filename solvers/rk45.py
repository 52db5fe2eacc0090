"""Dormand-Prince 5(4), a solver that chooses its own steps."""

import math
from typing import Any

import torch
from torch import Tensor

from configs.schema import Key, Number, whole
from solvers.base import Callback, Slope, Step, TooManyEvaluations

KEYS = {
    "sampling.rtol": Key(
        1e-4,
        Number(1e-12, 1),
        "largest error of a step of 'rk45', in sampling and likelihood: rtol |x| + atol",
    ),
    "sampling.atol": Key(1e-4, Number(1e-12, 1), "see sampling.rtol", scales="level"),
    "sampling.max_evaluations": Key(
        1000,
        whole(8),
        "evaluations of the network after which 'rk45' stops with an error, in sampling and "
        "likelihood; training goes on",
    ),
}

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


def limits_of(options: Any) -> dict[str, float]:
    """Options of `rk45`, by name, from attributes of `options`, such as a config's `sampling`."""
    return {name: getattr(options, name) for name in ("rtol", "atol", "max_evaluations")}


def rk45(
    slope: Slope,
    x: Tensor,
    levels: Tensor,
    callback: Callback | None = None,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_evaluations: int = 10_000,
) -> Tensor:
    """Dormand-Prince 5(4) with one adaptive step size for the batch.

    The first step and the step control are those of Hairer, Norsett and Wanner (Solving Ordinary
    Differential Equations I, section II.4) as in scipy's `RK45`, so that evaluations agree with
    scipy's; the error norm is the root mean square over all entries. A step costs the host one
    number.

    Args:
        slope: (x, t) -> dx/dt with `t` a float.
        x: initial state, any shape.
        levels: the t where it starts and where it ends, in its first and last entry.
        callback: called before each step.
        rtol, atol: a step is accepted where its error is below atol + rtol * |x|.
        max_evaluations: of `slope`, after which it gives up.

    Returns:
        The state at the last of `levels`.

    Raises:
        FloatingPointError: the step became too small to go on, the state is not finite, or
            (`TooManyEvaluations`) the evaluations are spent; the message says where.
    """
    t_start, t_end = levels[0].item(), levels[-1].item()
    direction = 1.0 if t_end > t_start else -1.0
    rows = [torch.tensor(row, dtype=x.dtype, device=x.device) for row in (*_A, _B, _E)]

    def combine(row: Tensor) -> Tensor:
        return (row @ stages[: len(row)].flatten(1)).view_as(x)

    def norm(error: Tensor, magnitude: Tensor) -> float:
        return (error / (atol + rtol * magnitude)).square().mean().sqrt().item()

    stages = x.new_empty(7, *x.shape)
    stages[0] = slope(x, t_start)
    step = _first_step(slope, x, t_start, t_end, stages[0], norm)
    smallest = 10 * math.ulp(max(abs(t_start), abs(t_end)))
    t, accepted, retry, error, evaluations = t_start, 0, False, 0.0, 2
    while t != t_end:
        if evaluations + 6 > max_evaluations:
            raise TooManyEvaluations(
                f"rk45 reached t = {t:.6g}, not {t_end:.6g}, after {evaluations} evaluations: "
                "sampling.max_evaluations allows no more; larger sampling.rtol and atol need fewer"
            )
        if not step >= smallest:
            finite = math.isfinite(step + error)
            reason = f"step below {smallest:.1e}" if finite else "state not finite"
            raise FloatingPointError(f"rk45 cannot go on at t = {t:.6g}: {reason}")
        if callback and not retry:
            callback(Step(accepted, t, x, stages[0].clone()))
        t_next = t + direction * step if step < abs(t_end - t) else t_end
        h = t_next - t
        for i in range(1, 6):
            stages[i] = slope(x + h * combine(rows[i]), t + _C[i] * h)
        x_next = x + h * combine(rows[6])
        stages[6] = slope(x_next, t_next)
        evaluations += 6

        error = norm(h * combine(rows[7]), torch.maximum(x.abs(), x_next.abs()))
        growth = 0.9 * max(error, 1e-10) ** -0.2 if math.isfinite(error) else 0.0
        step = abs(h) * min(max(0.2, growth), 1.0 if retry else 10.0)
        retry = not error < 1
        if not retry:
            t, x, accepted = t_next, x_next, accepted + 1
            stages[0] = stages[6]
    return x


def _first_step(slope, x, t_start, t_end, d, norm) -> float:
    """Length of a step of about a hundredth of the tolerated error; evaluates `slope` once."""
    length = t_end - t_start
    size, speed = norm(x, x.abs()), norm(d, x.abs())
    if not math.isfinite(speed):
        return math.nan
    guess = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    h = math.copysign(min(guess, abs(length)), length)
    curvature = norm(slope(x + h * d, t_start + h) - d, x.abs()) / abs(h)
    fastest = max(speed, curvature)
    best = (0.01 / fastest) ** 0.2 if fastest > 1e-15 else max(1e-6, 1e-3 * abs(h))
    return min(100 * abs(h), best, abs(length))
