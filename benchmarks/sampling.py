"""Measure quality and error of every solver and schedule against its evaluations.

    python3 benchmarks/sampling.py WORKDIR ... [--num 1000] [--solvers ipndm,unipc] [--plot PNG]
    python3 benchmarks/sampling.py WORKDIR ... [--num 1000] --speed 3 [--compile 1]

All solvers, or those of --solvers, start from the same prior samples. The distance is the Frechet
distance between the pixels of samples and training images; the error is the root mean square, over
pixels in [0, 1] of the first 100 samples, of the difference from the solution of rk45 with
tolerances of 1e-6 in float64. The last column is the share of the time that is spent outside the
network. Workdirs that differ in their seeds only are one curve, of which mean and range are shown.

With --speed the time of 18 steps of heun is measured instead, the median of so many rounds, in each
form of the network: by `sampling.precision`, `channels_last` and, with --compile 1, `compile`. They
are compared with a plain loop: Heun's method written out, the state checked after each step, and
the network in its plain form (benchmarks/networks.py). The difference is the root mean square, over
pixels in [0, 1], from the samples of that loop.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
from networks import plain

import experiment
import sampling
from metrics.distances import Gaussian, frechet_distance
from reports.plots import draw_range
from reports.progress import solver_bar
from solvers import FITTED, SCHEDULES, SOLVERS
from solvers.fitted import Fit
from sources.keyed import keyed_generator

FEW = (5, 6, 7, 8, 10, 15, 20)
# Values of the sampler whose solver and schedule are then replaced.
PLAIN = {
    "sampling.method": "ode",
    "sampling.ode_solver": "heun",
    "sampling.schedule": "auto",
    "sampling.order": None,
    "sampling.S_churn": 0.0,
}
COMPARED = 100  # samples whose exact solution is computed


class Setting(NamedTuple):
    """A solver with its own order and rho, and a schedule."""

    solver: str
    schedule: str = "auto"

    def __str__(self) -> str:
        return self.solver if self.schedule == "auto" else f"{self.solver}, {self.schedule}"


STEPS = {
    Setting("forward_euler"): FEW,
    Setting("improved_euler"): (3, 5, 8, 12, 18),
    Setting("heun"): (3, 4, 5, 8, 12, 18),
    Setting("multistep"): FEW,
    Setting("multistep", "fitted"): FEW,
    Setting("ipndm"): FEW,
    Setting("ipndm", "logsnr"): FEW,
    Setting("ipndm", "fitted"): FEW,
    Setting("dpmpp"): FEW,
    Setting("dpmpp", "logsnr"): FEW,
    Setting("unipc", "logsnr"): FEW,
    Setting("fitted"): FEW,
}


class Measured(NamedTuple):
    """Results of a setting: its distance over the distance of rk45, and its error."""

    ratio: float
    error: float


Steps = dict[Setting, tuple[int, ...]]
Results = dict[tuple[str, int], Measured]  # by (setting, evaluations)


@torch.no_grad()
def measure(workdir: Path, num: int, steps_of: Steps) -> Results:
    """Print the table of a run, and return its results."""
    trained = experiment.load(workdir, PLAIN, fits=False)
    run, to_unit = trained.experiment, trained.experiment.codec.unclamped
    generator = keyed_generator(run.device, "benchmark", 0)
    prior = run.method.prior_sampling((num, *run.codec.shape), generator, run.device)
    data = Gaussian.fit(run.data.get("train", labels=False)[:].flatten(1) / 255)

    def distance(samples):
        rounded = (to_unit(samples).clamp(0, 1) * 255).round().cpu()
        return frechet_distance(Gaussian.fit(rounded.flatten(1) / 255), data)

    net, results, base, sampler = run.network, {}, np.nan, run.sampler

    def fit(setting: Setting, n: int) -> Fit:
        """The schedule of a setting, fitted to the network where that is "fitted"."""
        if FITTED not in setting:
            return Fit(setting.schedule)
        run.sampler = replace(sampler, **setting._asdict(), n=n, noise_removal=True)
        return run.fitted_sampler(trained.path).fit

    tight = {"rtol": 1e-6, "atol": 1e-6, "noise_removal": True}
    with solver_bar(run.method, "exact solution") as show:
        exact, evaluations = sampling.solve_ode(
            run.method, net.double(), prior[:COMPARED].double(), watch=show, **tight
        )
    net.float()
    name = common.name_of(run.config, run.method)
    print(
        f"\n{workdir}: {name}, step {trained.step}, {num} samples, "
        f"{common.setting(run.device)}; {evaluations} evaluations for the exact solution"
    )
    columns = ("solver", "<18"), ("steps", ">5"), ("evaluations", ">11"), ("distance", ">8.4f")
    more = ("/ rk45", ">7.3f"), ("error", ">8.1e"), ("seconds", ">7.2f"), ("outside", ">7.1%")
    table = common.Table(*columns, *more)
    cases = [(setting, n) for setting, steps in steps_of.items() for n in steps]
    cases.insert(0, (Setting("rk45"), 0))
    for i, (setting, n) in enumerate(cases, 1):
        watch = common.Stopwatch(run.device)
        timed = watch.phase("network")(net)
        fitting = fit(setting, n)
        title = f"{setting}, {i} of {len(cases)}"
        with solver_bar(run.method, title) as show, watch.phase("all"):
            samples, evaluations = sampling.solve_ode(
                run.method,
                timed,
                prior,
                setting.solver,
                n,
                schedule=fitting.schedule,
                advance=fitting.advance,
                noise_removal=True,
                watch=show,
            )
        inside, seconds = watch.seconds["network"], watch.seconds["all"]
        difference = to_unit(samples[:COMPARED]) - to_unit(exact)
        error, d = difference.square().mean().sqrt().item(), distance(samples)
        base = d if setting.solver == "rk45" else base
        results[str(setting), evaluations] = Measured(d / base, error)
        outside = 1 - inside / seconds
        table.row(str(setting), n or "", evaluations, d, d / base, error, seconds, outside)
    return results


FORMS = {
    "plain loop": {},
    "float32": {},
    "bf16": {"precision": "bf16"},
    "channels last": {"channels_last": True},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
    "float32, compiled": {"compile": True},
    "bf16, compiled": {"precision": "bf16", "compile": True},
}


@torch.no_grad()
def measure_speed(workdir: Path, num: int, rounds: int, compiles: bool) -> None:
    """Print images per second of a run's network in each of `FORMS`."""
    run = experiment.load(workdir, PLAIN | {"sampling.N": 18}, fits=False).experiment
    config, images, actions = run.config, {}, {}
    generator = keyed_generator(run.device, "benchmark", 0)
    prior = run.method.prior_sampling((num, *run.codec.shape), generator, run.device)

    def plain_form() -> None:
        x = plain()(plain_heun)(run.method, run.network, prior, config.sampling)
        images["plain loop"] = run.codec.decode(x)

    def form_of(name: str, sample) -> None:
        images[name], _ = sample(run.network, x=prior)

    for name, options in FORMS.items():
        if compiles or not options.get("compile"):
            config.sampling.update(precision="fp32", channels_last=False, compile=False)
            config.sampling.update(**options)
            sample = sampling.get_sampling_fn(config, run.method)
            actions[name] = partial(form_of, name, sample) if name != "plain loop" else plain_form
    for action in actions.values():
        action()  # compiles, and loads libraries
    seconds = common.medians(*actions.values(), rounds=rounds, device=run.device)
    name = common.name_of(config, run.method)
    print(f"\n{workdir}: {name}, {num} samples of heun, {common.setting(run.device)}")
    columns = ("form", "<20"), ("seconds", ">8.2f"), ("images/s", ">9.1f"), ("/ plain", ">8.2f")
    table = common.Table(*columns, ("difference", ">11.1e"))
    for name, t in zip(actions, seconds, strict=True):
        differ = (images[name] - images["plain loop"]).square().mean().sqrt().item()
        table.row(name, t, num / t, seconds[0] / t, differ)


def plain_heun(method, net, x: torch.Tensor, options) -> torch.Tensor:
    """Heun's method as papers write it, with the results of `sampling.solve_ode`."""
    solver = SOLVERS["heun"]
    levels = SCHEDULES[solver.schedule](method, options.N - method.noisy_end, options.rho).tolist()
    levels += [0.0] * method.noisy_end
    alpha = method.alpha(method.time(torch.tensor(levels, dtype=torch.float64)))
    x = x / alpha[0]
    for level, next_level in pairwise(levels):
        d = method.slope(net, x, level)
        moved = x + (next_level - level) * d
        if next_level != levels[-1]:
            moved = x + (next_level - level) / 2 * (d + method.slope(net, moved, next_level))
        x = moved
        assert x.isfinite().all()
    return alpha[-1] * x


def plot(curves: dict[str, list[Results]], settings: Iterable[Setting], path: str) -> None:
    """Save a PNG of distance and error against evaluations, a column for each curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 8), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, seeds) in zip(axes.T, curves.items(), strict=True):
        for axis, key, label in zip(
            column,
            Measured._fields,
            ("distance / that of rk45", "error, RMS of pixels"),
            strict=True,
        ):
            for k, setting in enumerate(map(str, settings)):
                counts = sorted(n for other, n in seeds[0] if other == setting)
                values = np.array([[getattr(s[setting, n], key) for n in counts] for s in seeds])
                line = {"color": f"C{k % 10}", "linestyle": "-" if k < 10 else "--"}
                line |= {"marker": "o", "markersize": 3, "label": setting}
                draw_range(axis, counts, values.mean(0), values.min(0), values.max(0), **line)
            axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel=label)
            axis.set_xticks(FEW, FEW)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        column[0].axhline(1, color="black", linewidth=0.8, linestyle=":")
        column[0].set_title(f"{name}, {len(seeds)} seed{'s' * (len(seeds) > 1)}")
        column[0].set_ylim(0.9, 10)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    options = common.options(
        __doc__, "workdirs", num=1000, solvers=None, plot=None, speed=0, compile=0
    )
    if options.speed:
        for workdir in options.workdirs:
            measure_speed(workdir, options.num, options.speed, bool(options.compile))
        return
    solvers = {setting.solver for setting in STEPS}
    names = options.solvers.split(",") if options.solvers else solvers
    if not solvers.issuperset(names):
        raise SystemExit(f"--solvers must be among {', '.join(sorted(solvers))}")
    steps_of = {setting: steps for setting, steps in STEPS.items() if setting.solver in names}
    curves: dict[str, list[Results]] = defaultdict(list)
    try:
        curve_of = common.curves(options.workdirs)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    for workdir, curve in curve_of.items():
        curves[curve].append(measure(workdir, options.num, steps_of))
    for name, seeds in curves.items():
        print(f"\n{name}: mean (range) of {len(seeds)} seeds")
        columns = ("solver", "<18"), ("evaluations", ">11"), ("distance / rk45", "<21")
        table = common.Table(*columns, ("error", "<27"), ("/ multistep", ">11.2f"))
        for case in seeds[0]:
            ratios, errors = zip(*(seed[case] for seed in seeds), strict=True)
            plain = [
                seed.get(("multistep", case[1]), Measured(np.nan, np.nan)).error for seed in seeds
            ]
            table.row(
                *case,
                f"{np.mean(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
                f"{np.mean(errors):.1e} ({min(errors):.1e}-{max(errors):.1e})",
                np.mean(np.divide(errors, plain)),
            )
    if options.plot:
        plot(curves, steps_of, options.plot)


if __name__ == "__main__":
    main()
