"""Compare flows on the toys with and without optimal transport: path lengths and Euler steps.

    python3 benchmarks/transport.py WORKDIR [--seeds 2] [--num 2000]

Each run is configs/flow/toy_mlp.py with steps of 128 points, trained below WORKDIR or found there.
The table has the mean length of the paths of 64 steps, and the energy distance of samples from the
test points after 1 to 64 Euler steps, evenly spaced in t; the last row of a toy has that of
training points.
"""

from itertools import pairwise
from pathlib import Path

import common
import numpy as np
import torch
from scipy.spatial.distance import cdist

import run_lib
from configs.flow import toy_mlp
from datasets import get_dataset
from experiment import load
from solvers.base import Step

TOYS = ("eight_gaussians", "moons")
COUPLINGS = ("independent", "transport")
STEPS = (1, 2, 4, 8, 16, 64)
EULER = {"sampling.ode_solver": "forward_euler", "sampling.schedule": "uniform"}


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The square root of 2 E|a - b| - E|a - a'| - E|b - b'|, of points (n, 2) and (m, 2)."""
    squared = 2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean()
    return max(squared, 0.0) ** 0.5


def run_of(folder: Path, toy: str, coupling: str, seed: int) -> Path:
    """The workdir of a run, which is trained if it is not there."""
    workdir = folder / f"{toy}-{coupling}-{seed}"
    if not (workdir / "checkpoints").exists():
        config = toy_mlp.get_config()
        config.data.dataset, config.model.coupling, config.seed = toy, coupling, seed
        config.training.update(batch_size=128, snapshot_sampling=False)
        run_lib.train(config, workdir)
    return workdir


def measured(workdir: Path, num: int) -> tuple[float, list[float], float]:
    """Path length, distances after `STEPS`, and the distance of as many training points."""
    distances = []
    for n in STEPS:
        trained = load(workdir, EULER | {"sampling.N": n})
        run = trained.experiment
        if n == STEPS[0]:
            test, train = (
                run.codec.units(get_dataset(run.config, split)[:num]).flatten(1).numpy()
                for split in ("test", "train")
            )
        samples = trained.sample(range(num)).flatten(1).numpy()
        distances.append(energy_distance(samples, test))
    x = []  # the states, in the flow's own variable

    def record(step: Step) -> None:
        t = run.method.time(torch.tensor(step.level, dtype=torch.float64))
        x.append(run.method.alpha(t) * step.x)

    run.sampler(run.network, num=num, generator=torch.Generator().manual_seed(0), callback=record)
    length = sum((b - a).flatten(1).norm(dim=1).mean().item() for a, b in pairwise(x))
    return length, distances, energy_distance(train, test)


def main() -> None:
    arguments = common.options(__doc__, "workdir", seeds=2, num=2000)
    (folder,) = arguments.workdir
    print(f"| toy | coupling | path length | {' | '.join(map(str, STEPS))} |")
    print(f"| --- | --- {'| ---: ' * (len(STEPS) + 1)}|")
    for toy in TOYS:
        for coupling in COUPLINGS:
            runs = [
                measured(run_of(folder, toy, coupling, seed), arguments.num)
                for seed in range(arguments.seeds)
            ]
            length = np.mean([run[0] for run in runs])
            distances = np.mean([run[1] for run in runs], 0)
            columns = " | ".join(f"{value:.3f}" for value in (length, *distances))
            print(f"| {toy} | {coupling} | {columns} |", flush=True)
        print(f"| {toy} | training points | | {'| ' * 5}{runs[0][2]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
