"""Sampling: a method's ODE or SDE from the prior to the data, and the sampler of a config."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

import execution
from datasets import get_data_inverse_scaler, get_data_scaler
from methods.base import Method, Network, conditioned, noise_like
from methods.guidance import Guided
from methods.restoration import RESTORERS, Measurement, Replacement, Restoring
from solvers import FITTED, SCHEDULES, SOLVERS, Schedule, solver_named
from solvers.base import Callback, Counted, FiniteStates, Slope, Step, Watch
from solvers.fitted import FINE_STEPS, Fit
from solvers.fixed_steps import Advance, Churn, euler
from solvers.predictor_corrector import predictor_corrector
from solvers.rk45 import rk45


def integrate(
    method: Method,
    slope: Slope,
    x: Tensor,
    levels: Tensor,
    solve: Callable[..., Tensor],
    callback: Callback | None = None,
) -> Tensor:
    """`x` (B, C, H, W), integrated along noise `levels` in natural variables by `solve`.

    The state that `callback` sees is y = x / alpha. The host waits for the device at the end only.

    Raises:
        FloatingPointError: a state is not finite; the message names the first.
    """
    alpha, states = method.alpha(method.time(levels)), FiniteStates()

    def noted(y: Tensor, level: float) -> Tensor:
        states.note(y, level)
        return slope(y, level)

    y = solve(noted, x / alpha[0], levels, callback)
    states.note(y, levels[-1].item())
    states.check()
    return alpha[-1] * y


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
    """Integrates `x` (B, C, H, W) along the sampling ODE from the prior to the data.

    Args:
        method, net: whose ODE.
        x: a sample of the prior.
        solver: a name in `SOLVERS`; or "fitted", with the `schedule` and `advance` of a `Fit`.
        n: steps of those that have a schedule, at least 1.
        schedule: one of `SCHEDULES` or its name, or "auto" for the solver's own.
        rho: see `solvers.schedules.polynomial`.
        rtol, atol, max_evaluations: see `rk45`.
        order: of a solver that has several; None for its own choice.
        advance: the steps of the solver "fitted"; see `solvers.fixed_steps.linear_multistep`.
        churn: noise that a solver which churns adds on the way; None for the ODE.
        generator: source of that noise, on the device of `x`.
        noise_removal: where the ODE stops at some noise, the last of the n steps leads from there
            to noise level 0; after `rk45` an Euler step does. Euler's gives the mean of the data
            given x (Tweedie's formula).
        callback: called before each step; see `solvers.base.Step`.
        watch: called before each evaluation; see `solvers.base.Watch`.

    Returns:
        The sample, and the number of network evaluations.

    Raises:
        FloatingPointError: the solution is not finite, or (`TooManyEvaluations`) the evaluations
            are spent; the message says where.
    """
    solve, own_schedule = solver_named(solver).solve, solver_named(solver).schedule
    if order is not None:
        solve = partial(solve, order=order)
    if advance is not None:
        solve = partial(solve, advance=advance)
    if churn is not None:
        solve = partial(solve, churn=churn, noise=partial(noise_like, generator=generator))
    denoise = noise_removal and method.noisy_end
    slope = Counted(partial(method.slope, net), watch)
    if own_schedule:
        if isinstance(schedule, str):
            schedule = SCHEDULES[own_schedule if schedule == "auto" else schedule]
        levels = solver_levels(method, schedule, n, rho, noise_removal)
        return integrate(method, slope, x, levels, solve, callback), slope.calls
    drift = Counted(partial(method.ode, net), watch_times(method, watch))
    times = torch.tensor([method.t_prior, method.t_data], dtype=torch.float64)
    x = solve(drift, x, times, callback, rtol=rtol, atol=atol, max_evaluations=max_evaluations)
    slope.calls = drift.calls
    if denoise:
        ends = torch.tensor([method.t_data, 0], dtype=torch.float64)
        levels = torch.stack([method.sigma(ends[0]), ends[1]])
        x = integrate(method, slope, x, levels, euler)
    return x, slope.calls


def solver_levels(
    method: Method, schedule: Schedule, n: int, rho: float, noise_removal: bool
) -> Tensor:
    """The n + 1 noise levels of a solver with given steps; see `solve_ode`."""
    if not (noise_removal and method.noisy_end):
        return schedule(method, n, rho)
    return torch.cat([schedule(method, n - 1, rho), torch.zeros(1, dtype=torch.float64)])


def watch_times(method: Method, watch: Watch | None) -> Callable[[int, float], object] | None:
    """What tells `watch` the noise level, where a solver knows the time."""
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
    """Integrates scaled images `x` (B, C, H, W) along the sampling ODE from the data to the prior.

    `solve_ode` leads back. For the arguments and what is raised see there; the solver is `rk45`.

    Returns:
        The latents (B, C, H, W), and the number of network evaluations.
    """
    drift = Counted(partial(method.ode, net), watch_times(method, watch))
    times = torch.tensor([method.t_data, method.t_prior], dtype=torch.float64)
    latents = rk45(drift, x, times, rtol=rtol, atol=atol, max_evaluations=max_evaluations)
    return latents, drift.calls


class States:
    """A callback of solvers that keeps what a solution passes at falling noise `levels` (k,).

    Between two steps y = x / alpha is taken to be linear in the noise level, as by Euler's method.

    Args:
        method: whose ODE or SDE is solved.
        levels: the noise levels, all above 0.
        timed: the solver tells x at times, and not y at noise levels; see `tells_times`.
        keep: what is kept of a state y (B, C, H, W).
    """

    def __init__(
        self, method: Method, levels: Tensor, timed: bool, keep: Callable[[Tensor], Tensor]
    ):
        self.method, self.levels, self.timed, self.keep = method, levels.tolist(), timed, keep
        self.kept: list[Tensor] = []
        self.before: tuple[float, Tensor] | None = None

    def __call__(self, step: Step) -> None:
        level, y = step.level, step.x
        if self.timed:
            t = torch.tensor(level, dtype=torch.float64)
            level, y = self.method.sigma(t).item(), y / self.method.alpha(t).item()
        self._reach(level, y)

    def end(self, x: Tensor) -> Tensor:
        """All that was kept, (k + 1, B, ...), the last one of the solution's end `x`."""
        self._reach(0.0, x)
        return torch.stack([*self.kept, self.keep(x)])

    def _reach(self, level: float, y: Tensor) -> None:
        while len(self.kept) < len(self.levels) and self.levels[len(self.kept)] >= level:
            if self.before is None:
                state = y
            else:
                above, start = self.before
                share = (above - self.levels[len(self.kept)]) / (above - level)
                state = start.lerp(y, share)
            self.kept.append(self.keep(state))
        self.before = level, y


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


# --- by name --------------------------------------------------------------------------------------

OUTPUTS = ("seeds", "film", "film_format", "encode", "between")  # keys that change no sample
MAX_SEEDS = 10**6  # of one command
SNAPSHOT_STEPS = 18  # as many as EDM's sampler takes: 35 evaluations of heun


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


def get_rk45_options(config) -> dict[str, float]:
    """The options of `rk45` from `config.sampling`; ValueError where one is not positive."""
    keys = "rtol", "atol", "max_evaluations"
    _check_positive(config, *keys)
    return {key: config.sampling[key] for key in keys}


def _get_order(config, solver: str) -> int | None:
    order, n, orders = config.sampling.order, config.sampling.N, solver_named(solver).orders
    if order is None:
        return None
    if order not in orders:
        has = f"has the orders {', '.join(map(str, orders))}" if orders else "has one order only"
        raise ValueError(f"sampling.order={order}: sampling.ode_solver={solver!r} {has}")
    if order > n:
        raise ValueError(f"sampling.order={order} needs as many steps at least, not sampling.N={n}")
    return order


def _get_churn(config, method: Method, solver: str) -> Churn | None:
    churn = Churn(*(config.sampling[key] for key in Churn._fields))
    if churn.S_churn == 0:
        return None
    asked = f"sampling.S_churn must be 0, not {churn.S_churn:g}"
    if not solver_named(solver).churns:
        known = " and ".join(repr(name) for name, solver in SOLVERS.items() if solver.churns)
        raise ValueError(f"{asked}: sampling.ode_solver={solver!r} adds no noise, only {known} do")
    if not method.gaussian:
        name = config.training.sde.lower()
        raise ValueError(f"{asked}: {name} has no Gaussian noise that a sampler could add")
    if not churn.S_min <= churn.S_max:
        raise ValueError(
            f"sampling.S_min must be at most sampling.S_max: {churn.S_min:g} and {churn.S_max:g} "
            "are not"
        )
    return churn


def _ode_sampler(config, method: Method, constrain: Replacement | None):
    sampling = config.sampling
    if constrain:
        raise ValueError(
            f"sampling.restorer={sampling.restorer!r} needs an SDE's sampling.method='pc'; the "
            "others take 'ode' too"
        )
    if sampling.N < 1:
        raise ValueError(f"sampling.N must be at least 1, not {sampling.N}")
    _check_positive(config, "rho")
    solver = _choose(config, "ode_solver", (*SOLVERS, FITTED))
    schedule = _choose(config, "schedule", ("auto", *SCHEDULES, FITTED))
    if schedule != "auto" and solver_named(solver).schedule is None:
        raise ValueError(
            f"sampling.ode_solver={solver!r} chooses its own steps: sampling.schedule must be "
            f"'auto', not {schedule!r}"
        )
    if solver == FITTED and schedule not in ("auto", FITTED):
        raise ValueError(
            "sampling.ode_solver='fitted' needs sampling.schedule='fitted' or 'auto', not "
            f"{schedule!r}"
        )
    if is_fitted(config) and sampling.N > FINE_STEPS:
        raise ValueError(
            f"sampling.schedule='fitted' chooses among {FINE_STEPS} steps: sampling.N can be no "
            f"more, not {sampling.N}"
        )
    options = {
        "solver": solver,
        "n": sampling.N,
        "rho": sampling.rho,
        "order": _get_order(config, solver),
        "churn": _get_churn(config, method, solver),
        "noise_removal": sampling.noise_removal,
        **get_rk45_options(config),
    }

    def sample(method, net, x, generator, callback, watch, fit):
        seen = {"callback": callback, "watch": watch, "generator": generator}
        if fit is None and is_fitted(config):
            raise ValueError(
                "sampling.schedule and sampling.ode_solver 'fitted' are made for a network, by "
                "experiment.fit_solver, and are to be given as `fit`"
            )
        chosen, advance = fit or Fit(schedule)
        return solve_ode(method, net, x, schedule=chosen, advance=advance, **seen, **options)

    return sample


def _pc_sampler(config, method: Method, constrain: Replacement | None):
    sampling = config.sampling
    options = {
        "predictor": _choose(config, "predictor", method.predictors),
        "corrector": _choose(config, "corrector", method.correctors),
        "n_steps_each": sampling.n_steps_each,
        "snr": sampling.snr,
        "probability_flow": sampling.probability_flow,
        "noise_removal": sampling.noise_removal,
        "constrain": constrain,
        "resample": sampling.restore_resample if constrain else 1,
    }
    if options["corrector"] != "none":
        _check_positive(config, "n_steps_each", "snr")
    elif options["predictor"] == "none":
        raise ValueError("sampling.predictor and sampling.corrector are both 'none'")
    if options["predictor"] == "none" and options["resample"] > 1:
        raise ValueError("sampling.restore_resample above 1 needs a sampling.predictor")
    drawn = options["predictor"] != "none" and not sampling.probability_flow
    if constrain is not None and constrain.measurement.noise > 0 and not drawn:
        raise ValueError(
            "sampling.restorer='replacement' with sampling.restore_noise needs a predictor "
            "(not sampling.predictor='none') and no sampling.probability_flow"
        )
    if options["predictor"] == "ancestral_sampling" and sampling.probability_flow:
        raise ValueError("sampling.predictor='ancestral_sampling' has no probability_flow")

    def sample(method, net, x, generator, callback, watch, fit):
        net, seen = Counted(net), {"callback": callback, "watch": watch_times(method, watch)}
        x = predictor_corrector(method, net, x, generator=generator, **seen, **options)
        return x, net.calls

    return sample


SAMPLERS = {"ode": _ode_sampler, "pc": _pc_sampler}


def _check_classes(config) -> None:
    classes, label = config.data.num_classes, config.sampling.class_label
    if label >= classes and label >= 0:
        has = f"those from 0 to {classes - 1}" if classes else "none (data.num_classes=0)"
        raise ValueError(f"sampling.class_label={label} is no class of the network: it has {has}")


def _guidance(config, guide: Network | None) -> tuple[float, tuple[float, float]] | None:
    """Weight and interval of the guidance that `config.sampling` asks for, if it does."""
    sampling, (low, high) = config.sampling, config.sampling.guidance_interval or (0.0, math.inf)
    if low > high:
        raise ValueError(f"sampling.guidance_interval must rise: {low} and {high} do not")
    if sampling.guidance == 1:
        if sampling.guide:
            raise ValueError("sampling.guide changes nothing where sampling.guidance is 1")
        return None
    if sampling.guide and guide is None:
        raise ValueError("the network of sampling.guide has to be given as `guide`")
    if not sampling.guide and not (config.data.num_classes and config.training.label_dropout):
        raise ValueError(
            f"sampling.guidance={sampling.guidance} needs a network trained with class labels and "
            "without (data.num_classes and training.label_dropout above 0), or another network as "
            "sampling.guide"
        )
    return sampling.guidance, (low, high)


def seeds_of(text: str) -> list[int]:
    """The seeds that `sampling.seeds` names, such as "0-63" or "1,2,5-10", each once.

    Raises:
        ValueError: a range falls, or they are more than `MAX_SEEDS`.
    """
    seeds: dict[int, None] = {}
    for piece in text.split(",") if text else ():
        first, _, last = piece.partition("-")
        first, last = int(first), int(last or first)
        if first > last:
            raise ValueError(f"sampling.seeds={text:.100}: the range {piece} falls")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise ValueError(f"sampling.seeds={text:.100} are more than {MAX_SEEDS:,}")
        seeds |= dict.fromkeys(range(first, last + 1))
    return [*seeds]


def tells_times(config) -> bool:
    """Whether a callback of the configured sampler is told x at times, not y at noise levels."""
    asked = config.sampling
    return asked.method != "ode" or solver_named(asked.ode_solver).schedule is None


def couples_samples(config) -> bool:
    """Whether samples that are drawn together depend on each other.

    A solver that chooses its steps has one step size for all of them, and a corrector may have.
    """
    asked = config.sampling
    if asked.method == "ode":
        return solver_named(asked.ode_solver).schedule is None
    return asked.corrector != "none"


def is_fitted(config) -> bool:
    """Whether the configured sampler has to be made for a network."""
    asked = config.sampling
    return asked.method == "ode" and FITTED in (asked.schedule, asked.ode_solver)


def without_fit(config):
    """`config` with the solver's own schedule in place of 'fitted', and 'ipndm' as the solver."""
    config = config.copy_and_resolve_references()
    if config.sampling.schedule == FITTED:
        config.sampling.schedule = "auto"
    if config.sampling.ode_solver == FITTED:
        config.sampling.ode_solver = "ipndm"
    return config


def for_snapshots(config):
    """`config` with the sampler of the pictures that training draws: one of few evaluations.

    `training.snapshot_solver` takes the place of a solver that chooses its own steps, since a
    young network can make it take any number. The weights still change, so that levels and
    steps fitted to them would not last.
    """
    config = without_fit(config)
    sampling = config.sampling
    if sampling.method == "ode" and solver_named(sampling.ode_solver).schedule is None:
        sampling.update(
            ode_solver=config.training.snapshot_solver, N=SNAPSHOT_STEPS, order=None, S_churn=0.0
        )
    return config


def for_trajectories(config):
    """`config` whose sampler follows the trajectories that schedule and solver are fitted to.

    The sampler has to be given the schedule `solvers.fitted.fine_levels`. With it, for Gaussian
    data, the relative error of the samples is 2e-4 with `unipc` and 2e-3 with `multistep`.
    """
    config = config.copy_and_resolve_references()
    config.sampling.update(
        ode_solver="unipc",
        N=FINE_STEPS + 1,
        order=None,
        S_churn=0.0,
        schedule="auto",
        noise_removal=False,
        precision="fp32",
    )
    return config


def for_fitting(config):
    """`config` whose sampler takes the steps that are fitted; it has to be given them."""
    config = config.copy_and_resolve_references()
    config.sampling.update(ode_solver=FITTED, S_churn=0.0, schedule="auto", precision="fp32")
    config.sampling.order = min(config.sampling.order or 3, config.sampling.N)
    return config


def get_sampling_fn(
    config,
    method: Method,
    guide: Network | None = None,
    measurement: Measurement | None = None,
) -> Callable[..., tuple[Tensor, int]]:
    """The sampler that `config.sampling` names; `guide` is the network of `sampling.guide`.

    Given a `measurement`, its `sampling.restorer` draws images that agree with it; without noise
    they have this measurement, up to the clamping to [0, 1]. There have to be as many
    samples as rows of it.

    Returns:
        `sample(net, num=None, x=None, generator=None, callback=None, labels=None, watch=None,
        fit=None)`: `num` samples (default `eval.batch_size`), from a fresh prior sample or
        from `x` (B, C, H, W) where it is given, on the generator's device (else on that of `x`,
        else the network's). The callback is called before each step (`solvers.base.Step`), `watch`
        before each network evaluation (`solvers.base.Watch`). Class `labels` (num,), int64, are -1
        for none; by default all are `sampling.class_label`. A `fit` (`solvers.fitted.Fit`) takes
        the place of `sampling.schedule`, and has to be given where that or the solver is 'fitted'.
        With `x`, `generator` may be several, one for each sample, which draw its noise. It returns
        images (num, C, H, W) in [0, 1] and the number of network evaluations, of which one with
        guidance counts once.

    Raises:
        ValueError: a sampler that the method does not have, a number out of range, or guidance
            that the network is not trained for.
    """
    data = config.data
    image_shape = (data.num_channels, data.image_size, data.image_size)
    default_num = config.eval.batch_size
    inverse_scaler = get_data_inverse_scaler(config)
    bounds = tuple(map(get_data_scaler(config), (0.0, 1.0)))
    name = _choose(config, "method", SAMPLERS if method.predictors else ("ode",))
    restorer = RESTORERS[_choose(config, "restorer", RESTORERS)]
    constrain = None
    if measurement is not None and restorer is None:
        constrain = Replacement(method, measurement)
    elif measurement is not None and config.sampling.restore_resample > 1:
        raise ValueError("sampling.restore_resample above 1 needs sampling.restorer='replacement'")
    integrate_prior = SAMPLERS[name](config, method, constrain)
    _check_classes(config)
    guidance = _guidance(config, guide)
    class_label, run = config.sampling.class_label, config.sampling
    prepare = partial(
        execution.for_sampling,
        precision=run.precision,
        channels_last=run.channels_last,
        compiles=run.compile,
    )

    @torch.no_grad()
    def sample(
        net,
        num=None,
        x=None,
        generator=None,
        callback=None,
        labels=None,
        watch=None,
        fit=None,
    ):
        if x is None:
            device = generator.device if generator else next(net.parameters()).device
            x = method.prior_sampling((num or default_num, *image_shape), generator, device)
        if labels is None and class_label >= 0:
            labels = torch.full((len(x),), class_label, device=x.device)
        net = prepare(net, x.device)
        conditional, followed = conditioned(net, {"class_labels": labels}), method
        if guidance:
            other = net
            if guide is not None:
                other = conditioned(prepare(guide, x.device), {"class_labels": labels})
            followed = Guided(method, other, *guidance)
        if measurement is not None and restorer is not None:
            followed = Restoring(followed, measurement, restorer, bounds)
        x, evaluations = integrate_prior(followed, conditional, x, generator, callback, watch, fit)
        if measurement is not None and measurement.noise == 0:
            x = measurement.project(x)
        return inverse_scaler(x).clamp(0, 1), evaluations

    return sample
