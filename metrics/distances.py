"""Metrics that papers quote, as functions of features (n, K) and logits (n, L), in float64."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KERNEL_BLOCK = 1024  # largest block of the kernel distance, tensorflow-gan's
NEIGHBOURS = 3  # k of precision and recall, the paper's
ROUNDING = 1e-6  # relative error of covariances that were computed or stored in float32
CHUNK_NUMBERS = 2**25  # entries of a distance matrix that are in memory at a time: 256 MiB


class TooFew(ValueError):
    """Error: too few samples for a number; the message says how many it needs."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (K,) and covariance (K, K) of features."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def fit(cls, features: NDArray) -> "Gaussian":
        """The moments of `features` (n, K), in float64; `TooFew` where n < 2."""
        return cls.fit_blocks([features])

    @classmethod
    def fit_blocks(cls, blocks: Iterable[NDArray]) -> "Gaussian":
        """The moments of features that come in blocks (n_i, K), none of them kept.

        Blocks are merged as by Chan, Golub and LeVeque (1983), which loses no digits to means that
        are large beside the spread.
        """
        count, mean, scatter = 0, 0.0, 0.0
        for block in blocks:
            block = np.asarray(block, dtype=np.float64)
            total, block_mean = count + len(block), block.mean(0)
            centred, shift = block - block_mean, block_mean - mean
            between = np.outer(shift, shift) * (count * len(block) / total)
            scatter = scatter + centred.T @ centred + between
            mean = mean + shift * (len(block) / total)
            count = total
        if count < 2:
            raise TooFew(f"a covariance needs at least 2 samples, not {count}")
        return cls(mean, scatter / (count - 1))

    def check(self) -> None:
        """Raise ValueError unless the covariance is symmetric and positive semidefinite.

        Deviations up to `ROUNDING` times its largest variance, as of float32, are allowed.
        """
        covariance = self.covariance
        rounding = ROUNDING * np.abs(np.diag(covariance)).max(initial=1e-20)
        if (apart := np.abs(covariance - covariance.T).max(initial=0)) > rounding:
            raise ValueError(f"no covariance: it is not symmetric, by {apart:.3g}")
        shifted = covariance + len(covariance) * rounding * np.eye(len(covariance))
        try:
            np.linalg.cholesky(shifted)  # in a fifth of the time that eigenvalues take
        except np.linalg.LinAlgError:
            least = np.linalg.eigvalsh(covariance).min()
            raise ValueError(f"no covariance: it has the eigenvalue {least:.3g}") from None


def shortage(number: int, width: int) -> str:
    """The end of a warning that `number` samples do not span `width` features; "" if they do."""
    if number > width:
        return ""
    return (
        f"too few for a covariance of {width} features, which needs {width + 1}: the Fréchet "
        "distance is biased, and not one to quote"
    )


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The last trace is the sum of the square roots
    of the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2), which has those of C_a C_b. A
    result below 0 by no more than rounding is set to 0; ValueError where it is further below, as
    matrices that are no covariances can make it.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)
    shift = np.square(a.mean - b.mean).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    distance = float(shift + traces - 2 * np.sqrt(cross).sum())
    variances = np.diag(a.covariance) + np.diag(b.covariance)
    if distance < -math.sqrt(ROUNDING) * np.abs(variances).sum():
        raise ValueError(f"a Frechet distance of {distance:.4g}: a covariance is not positive")
    return max(distance, 0.0)


def frechet_distance_of_samples(a: NDArray, b: NDArray) -> float:
    """The `frechet_distance` of the Gaussians fitted to features (n, K) and (m, K).

    The trace of (C_a C_b)^(1/2) is the sum of the singular values of the centred a^T and b, so that
    with few samples of many features no (K, K) matrix is made.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(float(shift + np.square(a).sum() + np.square(b).sum() - 2 * cross), 0.0)


def inception_score(logits: NDArray) -> float:
    """exp E[KL(p(y|x) || p(y))] over all samples (Salimans et al. 2016, arXiv 1606.03498).

    As in tensorflow-gan, without splits: the mean over splits of the original depends on their
    number. `logits` (n, L) count up to a constant per row.
    """
    return float(np.exp(label_divergences(logits).mean()))


def label_divergences(logits: NDArray) -> NDArray[np.float64]:
    """KL(p(y|x) || p(y)) of each sample, (n,), from `logits` (n, L)."""
    log_p = torch.from_numpy(np.asarray(logits, dtype=np.float64)).log_softmax(1).numpy()
    p = np.exp(log_p)
    mean = p.mean(0)
    log_mean = np.log(mean, where=mean > 0, out=np.zeros_like(mean))
    return (p * (log_p - log_mean)).sum(1)


def kernel_distance(real: NDArray, fake: NDArray, block: int = KERNEL_BLOCK) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / K + 1)^3.

    The kernel Inception distance (Binkowski et al. 2018, arXiv 1801.01401) of features (n, K) and
    (m, K), averaged over blocks of at most `block` samples as in tensorflow-gan. Blocks are
    consecutive, so the order of the samples should be random. Raises `TooFew` where a block would
    have fewer than 2 samples of either.
    """
    blocks = math.ceil(max(len(real), len(fake)) / block)
    if (fewer := min(len(real), len(fake))) < 2 * blocks:
        needed = f"a kernel distance over {blocks} blocks needs at least {2 * blocks} samples"
        raise TooFew(f"{needed}, not {fewer}")
    return float(np.mean([_discrepancy(x, y) for x, y in kernel_blocks(real, fake, block)]))


def kernel_blocks(real: NDArray, fake: NDArray, block: int) -> Iterator[tuple[NDArray, NDArray]]:
    """Consecutive blocks of both, at most `block` long, in float64; longer ones come last."""
    blocks = math.ceil(max(len(real), len(fake)) / block)
    pairs = zip(*(np.array_split(each[::-1], blocks) for each in (real, fake)), strict=True)
    for x, y in pairs:
        yield np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)


def polynomial_kernel(a: NDArray, b: NDArray) -> NDArray:
    """(x . y / K + 1)^3 of the rows of `a` (n, K) and `b` (m, K): (n, m)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _discrepancy(x: NDArray, y: NDArray) -> float:
    def within(a: NDArray) -> float:
        k = polynomial_kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return within(x) + within(y) - 2 * polynomial_kernel(x, y).mean()


def _double(features: NDArray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(features).to(device, torch.float64)


def _squared_distances(queries: Tensor, points: Tensor) -> Iterator[Tensor]:
    """Rows of |q_i - p_j|^2, (rows, m), for `queries` (n, K) and `points` (m, K), in chunks."""
    lengths = points.square().sum(1)
    for chunk in queries.split(max(1, CHUNK_NUMBERS // len(points))):
        square = chunk.square().sum(1, keepdim=True) + lengths
        yield square.addmm_(chunk, points.T, alpha=-2).clamp_(min=0)


def nearest(
    queries: NDArray, points: NDArray, k: int = 1, device: torch.device | str = "cpu"
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k nearest of `points` (m, K) to each of `queries` (n, K), the nearest first.

    Gives Euclidean distances (n, k), and rows of `points` (n, k). Computed in float64 by matrix
    products over chunks of queries, so memory stays bounded.
    """
    queries, points = (_double(x, device) for x in (queries, points))
    chunks = [d.topk(k, largest=False) for d in _squared_distances(queries, points)]
    distances = torch.cat([f.values for f in chunks]).sqrt()
    return distances.cpu().numpy(), torch.cat([f.indices for f in chunks]).cpu().numpy()


def precision_recall(
    real: NDArray, fake: NDArray, k: int = NEIGHBOURS, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    A manifold is the union of balls around its samples, each reaching to the sample's k-th nearest
    neighbour. Precision is the share of `fake` (m, K) in the manifold of `real` (n, K), recall the
    share of `real` in that of `fake`. Raises `TooFew` unless n and m are greater than k.
    """
    if (fewer := min(len(real), len(fake))) <= k:
        raise TooFew(f"precision and recall need more than {k} samples, not {fewer}")

    def share_within(queries: NDArray, points: NDArray) -> float:
        reach = nearest(points, points, k + 1, device)[0][:, k]  # the nearest is the point itself
        reach, queries, points = (_double(x, device) for x in (reach, queries, points))
        chunks = _squared_distances(queries, points)
        return torch.cat([(d <= reach.square()).any(1) for d in chunks]).double().mean().item()

    return share_within(fake, real), share_within(real, fake)


@dataclass(frozen=True)
class Backend:
    """Implementation of the metrics that exist twice, here and in tensorflow-gan.

    Of the Frechet distance the arguments are the samples' features (n, K), the Gaussian of the
    data's, and these themselves (m, K), or None where not all of them are known.
    """

    inception_score: Callable[[NDArray], float]  # of logits (n, L)
    frechet_distance: Callable[[NDArray, Gaussian, NDArray | None], float]
    kernel_distance: Callable[[NDArray, NDArray], float]  # of the data's features and samples'


OURS = Backend(
    inception_score=inception_score,
    frechet_distance=lambda fake, real, _: frechet_distance(Gaussian.fit(fake), real),
    kernel_distance=kernel_distance,
)
