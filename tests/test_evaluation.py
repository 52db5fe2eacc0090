"""Distances against closed forms, pictures pixel by pixel."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from evaluation import Gaussian, format_table, frechet_distance, image_grid, pixel_features


def random_gaussian(seed, dim, rank=None):
    random = np.random.RandomState(seed)
    factor = random.standard_normal((dim, rank or dim))
    return Gaussian(random.standard_normal(dim), factor @ factor.T)


@pytest.mark.parametrize("dim, rank", [(1, None), (5, None), (64, None), (64, 20)])
def test_frechet_distance_is_its_definition(dim, rank):
    a, b = random_gaussian(0, dim, rank), random_gaussian(1, dim, rank)
    cross = sqrtm(a.covariance @ b.covariance).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4 if rank else 1e-8)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_frechet_distance_of_commuting_gaussians():
    """With diagonal covariances it is the distance of means and standard deviations."""
    a = Gaussian(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = Gaussian(np.array([3.0, 1.0]), np.diag([1.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 1) ** 2 + 3**2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_moments():
    features = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    gaussian = Gaussian.fit(features)
    np.testing.assert_allclose(gaussian.mean, [1, 2])
    np.testing.assert_allclose(gaussian.covariance, [[4 / 3, 0], [0, 16 / 3]])
    assert Gaussian.fit(features[:, :1]).covariance.shape == (1, 1)
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        Gaussian.fit(features[:1])


def test_pixel_features():
    images = np.zeros((3, 2, 2, 1), dtype=np.uint8)
    images[1] = 255
    assert pixel_features(images).tolist() == [[0] * 4, [1] * 4, [0] * 4]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_image_once(channels):
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * 20
    images = np.broadcast_to(images, (5, 4, 6, channels))
    grid = image_grid(images, min_size=8, gap=1)
    assert grid.shape == (2 * 9 + 1, 3 * 13 + 1, 3)  # 2 x 3 cells, each image enlarged twice
    for i in range(5):
        top, left = 1 + i // 3 * 9, 1 + i % 3 * 13
        assert (grid[top : top + 8, left : left + 12] == i * 20).all()
    assert (grid[-1] == 128).all()
    assert image_grid(images, columns=5, min_size=8, gap=1).shape == (9 + 1, 5 * 13 + 1, 3)


def test_table_is_aligned():
    table = format_table([("a", "1"), ("longer", "2")], "title")
    assert table == "title\n  a       1\n  longer  2"
