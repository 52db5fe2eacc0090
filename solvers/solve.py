"""A method's sampling ODE and reverse SDE, integrated from the prior to the data and back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from methods.base import Method, Network, noise_like
from solvers import SCHEDULES, Schedule, solver_named
from solvers.base import Callback, Counted, FiniteStates, Watch
from solvers.fixed_steps import Advance, Churn, euler
from solvers.predictor_corrector import predictor_corrector
from solvers.rk45 import rk45


def solve_ode(
    method: Method,
    net: Network,
    x: Tensor,
    solver: str = "rk45",
    n: int = 100,
    *,
    schedule: str | Schedule = "auto",
    rho: float = 7.0,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_evaluations: int = 10_000,
    order: int | None = None,
    advance: Advance | None = None,
    churn: Churn | None = None,
    generator: torch.Generator | None = None,
    noise_removal: bool = False,
    callback: Callback | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, int]:
    """Integrate `x` (B, C, H, W) along the sampling ODE from the prior to the data.

    Solvers with fixed steps, and their `callback`, get natural variables y = x / alpha. The host
    waits for the device only at the end.

    Args:
        method, net: of the ODE.
        x: a sample of the prior.
        solver: a name in `SOLVERS`; or "fitted", with the `schedule` and `advance` of a `Fit`.
        n: steps of a solver with a schedule, at least 1.
        schedule: one of `SCHEDULES` or its name, or "auto" for the solver's own.
        rho: see `solvers.schedules.polynomial`.
        rtol, atol, max_evaluations: see `rk45`.
        order: of a solver that has several; None for its default.
        advance: the steps of the solver "fitted"; see `solvers.fixed_steps.linear_multistep`.
        churn: options of the noise that a churning solver adds; None for the ODE.
        generator: source of that noise, on the device of `x`.
        noise_removal: if the ODE stops above noise level 0, the last of the n steps leads from
            there to 0; after `rk45` one more step, Euler's, does. An Euler step gives the mean of
            the data given x (Tweedie's formula).
        callback: called before each step; see `solvers.base.Step`.
        watch: called before each evaluation; see `solvers.base.Watch`.

    Returns:
        The sample, and the number of network evaluations.

    Raises:
        FloatingPointError: the solution is not finite, or (`TooManyEvaluations`) needs more than
            `max_evaluations`; the message says where it stopped.
    """
    solve, solver_schedule, *_ = solver_named(solver)
    denoises = noise_removal and method.noisy_end
    slope = Counted(partial(method.slope, net), watch, FiniteStates())
    if solver_schedule:
        if isinstance(schedule, str):
            schedule = SCHEDULES[solver_schedule if schedule == "auto" else schedule]
        levels = solver_levels(method, schedule, n, rho, noise_removal)
        if order is not None:
            solve = partial(solve, order=order)
        if advance is not None:
            solve = partial(solve, advance=advance)
        if churn is not None:
            solve = partial(solve, churn=churn, noise=partial(noise_like, generator=generator))
    else:
        drift = Counted(partial(method.ode, net), watch_times(method, watch))
        times = torch.tensor([method.t_prior, method.t_data], dtype=torch.float64)
        limits = {"rtol": rtol, "atol": atol, "max_evaluations": max_evaluations}
        x = solve(drift, x, times, callback, **limits)
        slope.calls = drift.calls
        if not denoises:
            return x, drift.calls
        levels = torch.stack([method.sigma(times[1]), torch.zeros_like(times[1])])
        solve, callback = euler, None
    alpha = method.alpha(method.time(levels))
    y = solve(slope, x / alpha[0], levels, callback)
    slope.states.note(y, levels[-1].item())
    slope.states.check()
    return alpha[-1] * y, slope.calls


def solver_levels(
    method: Method, schedule: Schedule, n: int, rho: float, noise_removal: bool
) -> Tensor:
    """The n + 1 noise levels of a solver with fixed steps; see `solve_ode`."""
    if not (noise_removal and method.noisy_end):
        return schedule(method, n, rho)
    return torch.cat([schedule(method, n - 1, rho), torch.zeros(1, dtype=torch.float64)])


def watch_times(method: Method, watch: Watch | None) -> Callable[[int, float], object] | None:
    """A watch for a solver over time, which tells `watch` the noise level; None for None."""
    if watch is None:
        return None
    return lambda evaluations, t: watch(
        evaluations, method.sigma(torch.as_tensor(t, dtype=torch.float64)).item()
    )


def encode(
    method: Method,
    net: Network,
    x: Tensor,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_evaluations: int = 10_000,
    watch: Watch | None = None,
) -> tuple[Tensor, int]:
    """Integrate scaled images `x` (B, C, H, W) along the sampling ODE from the data to the prior.

    The solver is `rk45`. `solve_ode` leads back, and describes the arguments and errors.

    Returns:
        The latents (B, C, H, W), and the number of network evaluations.
    """
    drift = Counted(partial(method.ode, net), watch_times(method, watch))
    times = torch.tensor([method.t_data, method.t_prior], dtype=torch.float64)
    latents = rk45(
        drift, method.alpha_data * x, times, rtol=rtol, atol=atol, max_evaluations=max_evaluations
    )
    return latents, drift.calls


def solve_sde(
    sde: Method,
    method: Method,
    net: Network,
    x: Tensor,
    *,
    callback: Callback | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """Integrate `x` (B, C, H, W) along the reverse SDE by `predictor_corrector`.

    Args:
        sde: the SDE to reverse.
        method: gives the score: `sde` itself, or a method derived from it, such as `Guided`.
        net: the network.
        x: a sample of the prior.
        callback, watch, options: see `predictor_corrector`; `watch` is told noise levels.

    Returns:
        The sample, and the number of network evaluations.
    """
    score = Counted(partial(method.score, net), watch_times(sde, watch))
    return predictor_corrector(sde, score, x, callback=callback, **options), score.calls
