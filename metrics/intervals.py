"""Intervals in which 95 % of further evaluations lie: as many other samples, the same data.

Frechet distance, kernel distance and Inception Score have the standard error of the infinitesimal
jackknife (Efron 1982, chapter 6), the limit of the bootstrap for small changes: from the influence
of each sample on the number, its derivative by the sample's weight. Resamples would have another
Frechet distance, since it grows as the number of different samples falls; influences have no such
bias, and cost no more than the number itself.
"""

import math

import numpy as np
from numpy.typing import NDArray

from metrics.distances import (
    KERNEL_BLOCK,
    Gaussian,
    kernel_blocks,
    label_divergences,
    polynomial_kernel,
)

Z = 1.959964  # standard errors of a normal law within which 95 % lie
SHIFT = 1e-10  # of the largest variance, which makes a singular covariance positive
SMALLEST = 1e-12  # eigenvalue, of the largest, of which the root is inverted

Interval = tuple[float, float]


def from_influences(value: float, influences: NDArray, least: float = -math.inf) -> Interval | None:
    """The interval around `value`, from the influences (n,) of n samples; not below `least`.

    None for a single sample.
    """
    if len(influences) < 2:
        return None
    reach = Z * float(np.std(influences, ddof=1)) / math.sqrt(len(influences))
    return max(value - reach, least), value + reach


def of_share(share: float, number: int) -> Interval:
    """Wilson's score interval of a `share` of `number` images (Wilson 1927).

    Unlike a bootstrap it has a width where the share is 0 or 1.
    """
    centre, scale = share + Z**2 / (2 * number), 1 + Z**2 / number
    reach = Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def of_median(values: NDArray) -> Interval:
    """The interval of the median of `values` (n,), between two of them (Conover 1999, 3.2)."""
    n = len(values)
    reach = Z * math.sqrt(n) / 2
    ranks = np.clip([math.floor(n / 2 - reach), math.ceil(n / 2 + reach)], 0, n - 1)
    low, high = np.sort(values)[ranks]
    return float(low), float(high)


def of_frechet(distance: float, fake: NDArray, real: Gaussian) -> Interval | None:
    """Interval of the Frechet `distance` of samples (n, K); None where n is not above K.

    The derivative of tr (R C)^(1/2) by the samples' covariance C is T / 2, where, of any factor
    R = F F^T of the data's, T = F (F^T C F)^(-1/2) F^T is the optimal map from samples to data.
    """
    n, width = fake.shape
    if n <= width:
        return None
    samples, factor = Gaussian.fit(fake), _factor(real.covariance)
    values, vectors = np.linalg.eigh(factor.T @ samples.covariance @ factor)
    smallest = max(SMALLEST * values[-1], np.finfo(np.float64).tiny)  # > 0 if all are alike too
    half = factor @ vectors / values.clip(smallest) ** 0.25
    slope, offset = np.eye(width) - half @ half.T, 2 * (samples.mean - real.mean)
    influences = []
    for block in np.array_split(fake, math.ceil(n / KERNEL_BLOCK)):
        centred = block.astype(np.float64) - samples.mean
        influences.append(((centred @ slope + offset) * centred).sum(1))
    return from_influences(distance, np.concatenate(influences), least=0.0)


def _factor(covariance: NDArray) -> NDArray:
    """A matrix F of which F F^T is a covariance, which may be singular or rounded."""
    width, largest = len(covariance), np.diag(covariance).max(initial=1e-20)
    try:  # ten times as fast as the other way
        return np.linalg.cholesky(covariance + SHIFT * largest * np.eye(width))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(values.clip(0))


def of_kernel(distance: float, real: NDArray, fake: NDArray) -> Interval | None:
    """Interval of the kernel distance of data (m, K) and samples (n, K)."""
    number, influences = math.ceil(max(len(real), len(fake)) / KERNEL_BLOCK), []
    for x, y in kernel_blocks(real, fake, KERNEL_BLOCK):
        within = polynomial_kernel(y, y)
        others = (within.sum(1) - np.diag(within)) / (len(y) - 1)
        of_block = 2 * (others - polynomial_kernel(y, x).mean(1))
        weight = len(fake) / (number * len(y))  # a block counts the same, whatever its length
        influences.append(weight * (of_block - of_block.mean()))
    return from_influences(distance, np.concatenate(influences))


def of_inception_score(score: float, logits: NDArray) -> Interval | None:
    """Interval of the Inception Score of `logits` (n, L)."""
    return from_influences(score, score * label_divergences(logits), least=1.0)
