"""Quality and error of every solver against the evaluations it takes, on a trained model.

    python3 benchmarks/sampling.py [--config FILE] [--workdir runs/demo] [--num 1000] [--plot PNG]

All solvers start from the same prior samples. The error is the root mean square, over pixels in
[0, 1] of the first 100 of them, of the difference from the solution of rk45 with tolerances of 1e-6
in float64. The last column is the share of the time that is spent outside the network.
"""

import runpy
from pathlib import Path

import common
import torch

import datasets
import sampling
from experiment import Experiment
from metrics.distances import Gaussian, frechet_distance
from storage.checkpoints import load_checkpoint

STEPS = {
    "forward_euler": (8, 12, 15, 20, 30, 50, 100),
    "improved_euler": (5, 8, 12, 25, 50),
    "heun": (5, 6, 8, 12, 25, 50),
    "multistep": (8, 10, 12, 15, 20, 30, 50),
}
COMPARED = 100  # samples whose exact solution is computed


def plot(rows: list[dict], path: str) -> None:
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
    defaults = {"config": "configs/poisson/digits_ddpmpp.py", "workdir": Path("runs/demo")}
    options = common.options(__doc__, **defaults, num=1000, plot=None)
    config = runpy.run_path(options.config)["get_config"]()
    run = Experiment.build(config)
    run.state.load_network(load_checkpoint(options.workdir / "checkpoints-meta/checkpoint.pth"))
    to_unit = datasets.get_data_inverse_scaler(config)
    generator = datasets.keyed_generator(run.device, "benchmark", config.seed)
    shape = (options.num, *datasets.image_shape(config))
    prior = run.method.prior_sampling(shape, generator, run.device)
    data = Gaussian.fit(datasets.get_dataset(config, "train")[:].flatten(1) / 255)

    def distance(samples):
        rounded = (to_unit(samples).clamp(0, 1) * 255).round().cpu()
        return frechet_distance(Gaussian.fit(rounded.flatten(1) / 255), data)

    net, rows = run.state.model, []
    with run.with_ema():
        exact, evaluations = sampling.solve_ode(
            run.method, net.double(), prior[:COMPARED].double(), rtol=1e-6, atol=1e-6
        )
        net.float()
        print(
            f"{options.config}, step {run.state.step}, {options.num} samples, "
            f"{common.setting(run.device)}; {evaluations} evaluations for the exact solution"
        )
        columns = ("solver", "<15"), ("steps", ">5"), ("evaluations", ">11"), ("distance", ">8.4f")
        more = ("/ rk45", ">7.2f"), ("error", ">8.1e"), ("seconds", ">7.2f"), ("outside", ">7.1%")
        table = common.Table(*columns, *more)
        for solver, n in [("rk45", 0), *((name, n) for name in STEPS for n in STEPS[name])]:
            watch = common.Stopwatch(run.device)
            timed = watch.phase("network")(net)
            with watch.phase("all"):
                samples, evaluations = sampling.solve_ode(run.method, timed, prior, solver, n)
            inside, seconds = watch.seconds["network"], watch.seconds["all"]
            difference = to_unit(samples[:COMPARED]) - to_unit(exact)
            fid, error = distance(samples), difference.square().mean().sqrt().item()
            rows.append({"solver": solver, "evaluations": evaluations, "fid": fid, "error": error})
            relative, outside = fid / rows[0]["fid"], 1 - inside / seconds
            table.row(solver, n or "", evaluations, fid, relative, error, seconds, outside)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
