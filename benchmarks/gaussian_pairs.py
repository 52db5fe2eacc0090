"""Compare draws for Gaussian pairs with the mean and covariance of the exact posterior.

    python3 benchmarks/gaussian_pairs.py FOLDER [--dims 64,inf] [--steps 3000] [--draws 4000]
            [--evaluations 35]

First it prints the factors by which solvers, with the exact network at D = inf, change the variance
of Gaussian posteriors, in units in which the variance of the images is 0.25.

Images of 4 x 4 are drawn from a Gaussian with correlated neighbours; a condition is its image with
white noise. configs/pfgmpp/denoise_ddpmpp.py, with a network for this size, is trained on them in
FOLDER/{D}, or resumed there. Images are drawn for each of 8 new conditions, by ipndm. The error of
their means is relative to the distance of the posterior means from the mean of all images; that of
their covariance, which is the same for all conditions, is relative in the Frobenius norm. The row
`exact` has the errors of as many draws from the posterior itself.
"""

from pathlib import Path

import common
import numpy as np
import torch
from numpy.typing import NDArray
from pairs import CONFIG, program

from experiment import load
from methods.base import WithSlope
from methods.pfgmpp import EDM
from sampling import solve_ode
from sources.keyed import keyed_generator

SIDE, DIM = 4, 16
NUMBER = 40_000  # of pairs
CONDITIONS = 8
VARIANCES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.25)
SOLVERS = (
    *(("heun", n) for n in (3, 9, 18, 32)),
    *(("ipndm", n) for n in (5, 10, 18, 35)),
    *(("unipc", n) for n in (18, 35)),
)
MEAN, STD, NOISE = 50.0, 20.0, 12.0  # of the images; std of the conditions' noise
NETWORK = {"model.nf": 16, "model.ch_mult": "(1,)", "model.attn_resolutions": "(4,)"}
TRAINING = {"training.batch_size": 128, "training.snapshot_sampling": False}


def covariance() -> NDArray:
    """Covariance (16, 16) of the images; it falls by a factor of e over two pixels."""
    places = np.argwhere(np.ones((SIDE, SIDE)))
    return STD**2 * np.exp(-np.linalg.norm(places[:, None] - places, axis=2) / 2)


def pairs(number: int, seed: int) -> tuple[NDArray, NDArray]:
    """Images and conditions, float32 (number, 4, 4, 1)."""
    normal = np.random.default_rng(seed).standard_normal((2, number, DIM))
    images = MEAN + normal[0] @ np.linalg.cholesky(covariance()).T
    both = images, images + NOISE * normal[1]
    return tuple(each.reshape(-1, SIDE, SIDE, 1).astype(np.float32) for each in both)


def posterior(conditions: NDArray) -> tuple[NDArray, NDArray]:
    """Posterior means (n, 16), less the mean of the images, and their covariance (16, 16)."""
    inverse = np.linalg.inv(covariance()) + np.eye(DIM) / NOISE**2
    spread = np.linalg.inv(inverse)
    return (conditions.reshape(-1, DIM) - MEAN) @ spread / NOISE**2, spread


def draws_of(
    workdir: Path, conditions: NDArray, number: int, sampling: dict[str, object]
) -> NDArray:
    """Draws (n, number, 16) for conditions (n, 4, 4, 1), less the mean of all images."""
    trained, results = load(workdir, sampling), []
    experiment = trained.experiment
    for i, condition in enumerate(torch.from_numpy(conditions).permute(0, 3, 1, 2)):
        image = trained.encoded_condition(condition, number)
        options = {"generator": keyed_generator("cpu", "draws", i), "conditions": {"image": image}}
        images, _ = experiment.sampler(experiment.network, number, **options)
        results.append(images.flatten(1).numpy() - MEAN)
    return np.stack(results)


def errors(draws: NDArray, means: NDArray, spread: NDArray) -> tuple[float, float]:
    """Relative errors of the means and of the covariance of `draws` (n, k, 16)."""
    mean = draws.mean(1)
    of_means = np.linalg.norm(mean - means) / np.linalg.norm(means)
    centred = (draws - mean[:, None]).reshape(-1, DIM)
    measured = centred.T @ centred / (len(centred) - len(draws))
    return of_means, np.linalg.norm(measured - spread) / np.linalg.norm(spread)


class Exact(WithSlope):
    """EDM's ODE for Gaussian data with mean 0 and one variance for each entry."""

    def __init__(self, variance: torch.Tensor):
        options = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
        super().__init__(EDM(**options, P_mean=-1.2, P_std=1.2))
        self.variance = variance

    def slope(self, net, y, sigma):
        return y * sigma / (self.variance + sigma**2)


def print_factors() -> None:
    """A table of the factors by which solvers change `VARIANCES`."""
    variance = torch.tensor(VARIANCES, dtype=torch.float64).view(1, -1, 1, 1)
    prior = torch.full_like(variance, 80.0)  # of a posterior variance of 80^2
    titles = [(f"{each:g}", ">8.3f") for each in VARIANCES]
    table = common.Table(("solver", "<8"), ("evaluations", ">12"), *titles)
    for solver, steps in SOLVERS:
        x, number = solve_ode(Exact(variance), None, prior, solver, steps, noise_removal=True)
        table.row(solver, number, *(x**2 / variance).flatten().tolist())


def main() -> None:
    options = common.options(
        *(__doc__, "folder"), dims="64,inf", steps=3000, draws=4000, evaluations=35
    )
    folder = options.folder[0].resolve()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "x.npy", folder / "c.npy"]
    for path, array in zip(paths, pairs(NUMBER, seed=0), strict=True):
        if not path.exists():
            np.save(path, array)
    print_factors()
    sampling = {"sampling.ode_solver": "ipndm", "sampling.N": options.evaluations}
    _, conditions = pairs(CONDITIONS, seed=1)
    means, spread = posterior(conditions)
    normal = np.random.default_rng(2).standard_normal((CONDITIONS, options.draws, DIM))
    exact = errors(means[:, None] + normal @ np.linalg.cholesky(spread).T, means, spread)
    table = common.Table(("D", "<6"), ("mean", ">10.2%"), ("covariance", ">12.2%"))
    table.row("exact", *exact)
    for D in options.dims.split(","):
        keys = {"model.D": D, "training.n_iters": options.steps, **NETWORK, **TRAINING}
        keys |= {"data.path": paths[0], "data.condition_path": paths[1]}
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        program("train", folder / D, "--config", CONFIG, *flags)
        draws = draws_of(folder / D, conditions, options.draws, sampling)
        table.row(D, *errors(draws, means, spread))


if __name__ == "__main__":
    main()
