"""Quality and error of every solver against the evaluations it takes, on a trained model.

    python3 benchmarks/sampling.py [--config FILE] [--workdir runs/demo] [--num 1000] [--plot PNG]

All solvers start from the same prior samples. The error is the root mean square, over pixels in
[0, 1] of the first 100 of them, of the difference from the solution of rk45 with tolerances of 1e-6
in float64. The last column is the share of the time that is spent outside the network.
"""

import argparse
import runpy
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import datasets  # noqa: E402
import run_lib  # noqa: E402
import sampling  # noqa: E402
from metrics.distances import Gaussian, frechet_distance  # noqa: E402
from storage.checkpoints import load_checkpoint  # noqa: E402

STEPS = {
    "forward_euler": (8, 12, 15, 20, 30, 50, 100),
    "improved_euler": (5, 8, 12, 25, 50),
    "heun": (5, 6, 8, 12, 25, 50),
    "multistep": (8, 10, 12, 15, 20, 30, 50),
}


COMPARED = 100  # samples whose exact solution is computed


class Stopwatch:
    """A network that adds up the seconds spent in it."""

    def __init__(self, net):
        self.net, self.seconds = net, 0.0

    def __call__(self, x, cond):
        start = time.perf_counter()
        out = self.net(x, cond)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        self.seconds += time.perf_counter() - start
        return out


def solutions(method, net, x):
    """(solver, steps, seconds, seconds in the network, samples, evaluations) of every solver."""
    runs = [("rk45", 0), *((solver, n) for solver, steps in STEPS.items() for n in steps)]
    for solver, n in runs:
        watch = Stopwatch(net)
        start = time.perf_counter()
        samples, evaluations = sampling.solve_ode(method, watch, x, solver, n)
        yield solver, n, time.perf_counter() - start, watch.seconds, samples, evaluations


def plot(rows, path: Path) -> None:
    """Distance and error against evaluations, a line for each solver, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(
        axes, ("fid", "error"), ("Frechet distance (pixels)", "error, RMS of pixels"), strict=True
    ):
        reference = next(row for row in rows if row["solver"] == "rk45")
        axis.axhline(reference[key], color="black", linewidth=0.8, linestyle=":")
        axis.plot(reference["evaluations"], reference[key], "k*", markersize=10, label="rk45")
        for solver in STEPS:
            own = [row for row in rows if row["solver"] == solver]
            x, y = ([row[k] for row in own] for k in ("evaluations", key))
            axis.plot(x, y, marker="o", markersize=4, label=solver)
        axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel=label)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/poisson/digits_ddpmpp.py")
    parser.add_argument("--workdir", type=Path, default="runs/demo")
    parser.add_argument("--num", type=int, default=1000, help="samples")
    parser.add_argument("--plot", type=Path, help="also draw the table, as this PNG")
    options = parser.parse_args()

    config = runpy.run_path(options.config)["get_config"]()
    run = run_lib.Experiment.build(config)
    run.state.load_network(load_checkpoint(options.workdir / "checkpoints-meta/checkpoint.pth"))
    to_unit = datasets.get_data_inverse_scaler(config)
    shape = (options.num, config.data.num_channels, *2 * [config.data.image_size])
    generator = datasets.keyed_generator(run.device, "benchmark", config.seed)
    prior = run.method.prior_sampling(shape, generator, run.device)
    data = Gaussian.fit(datasets.get_dataset(config, "train")[:].flatten(1) / 255)

    def distance(samples):
        levels = (to_unit(samples).clamp(0, 1) * 255).round().cpu()
        return frechet_distance(Gaussian.fit(levels.flatten(1) / 255), data)

    net = run.state.model
    with run.with_ema():
        exact, evaluations = sampling.solve_ode(
            run.method, net.double(), prior[:COMPARED].double(), rtol=1e-6, atol=1e-6
        )
        net.float()
        print(
            f"{options.config}, step {run.state.step}, {options.num} samples, {run.device}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}; "
            f"{evaluations} evaluations for the exact solution"
        )
        print("solver           steps  evaluations  distance   / rk45     error  seconds  outside")
        rows = []
        for solver, n, seconds, inside, samples, evaluations in solutions(run.method, net, prior):
            difference = to_unit(samples[:COMPARED]) - to_unit(exact)
            row = {
                "solver": solver,
                "evaluations": evaluations,
                "fid": distance(samples),
                "error": difference.square().mean().sqrt().item(),
            }
            rows.append(row)
            print(
                f"{solver:<15}  {n or '':>5}  {evaluations:>11}  {row['fid']:>8.4f}  "
                f"{row['fid'] / rows[0]['fid']:>7.2f}  {row['error']:>8.1e}  {seconds:>7.2f}  "
                f"{1 - inside / seconds:>7.1%}"
            )
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
