"""How good samples are: features, Frechet distance, pictures and the report's table."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # (n, H, W, C)
FEATURES = ("pixels",)


def pixel_features(images: Images) -> NDArray[np.float64]:
    """Pixels in [0, 1], flattened: (n, H * W * C)."""
    return images.reshape(len(images), -1) / 255.0


@dataclass(frozen=True)
class Gaussian:
    """Mean (K,) and covariance (K, K) of features."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def fit(cls, features: NDArray) -> "Gaussian":
        """The moments of `features` (n, K), in float64; ValueError where n < 2."""
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {len(features)}")
        features = np.asarray(features, dtype=np.float64)
        return cls(features.mean(0), np.cov(features, rowvar=False).reshape(2 * features.shape[1:]))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The last trace is the sum of the square roots
    of the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2), which has those of C_a C_b.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)
    shift = np.square(a.mean - b.mean).sum()
    return float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross).sum())


def image_grid(
    images: Images, columns: int | None = None, min_size: int = 48, gap: int = 2
) -> Images:
    """One picture (H', W', 3) of `images`, row by row, in a near-square grid or in `columns`.

    Images smaller than `min_size` are enlarged by a whole factor; `gap` pixels lie between them.
    """
    n, height, width, channels = images.shape
    factor = max(1, math.ceil(min_size / min(height, width)))
    images = np.broadcast_to(images, (n, height, width, 3)) if channels == 1 else images
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cell_height, cell_width = height * factor + gap, width * factor + gap
    grid = np.full((rows * cell_height + gap, columns * cell_width + gap, 3), 128, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * cell_height, gap + i % columns * cell_width
        grid[top : top + height * factor, left : left + width * factor] = image
    return grid


def format_table(rows: list[tuple[str, str]], title: str) -> str:
    """`rows` of (what, value) under `title`, aligned in two columns."""
    width = max(len(what) for what, _ in rows)
    return "\n".join([title, *(f"  {what:<{width}}  {value}" for what, value in rows)])
