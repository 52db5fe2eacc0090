"""A small low-dose CT: phantoms of random ellipses, measured at two doses and reconstructed.

    python3 benchmarks/ct_data.py FOLDER [--number 2200] [--side 32] [--low 2000] [--high 1000000]

It writes to FOLDER, in Hounsfield units, float32 (n, side, side, 1): x.npy, reconstructions at the
high dose; c.npy, those of the same phantoms at the low one; phantoms.npy. A dose is the number of
photons that each ray starts with, of which a Poisson number arrives; the sinogram is scikit-image's
radon transform, the reconstruction its filtered back-projection.
"""

from pathlib import Path

import common
import numpy as np
from numpy.typing import NDArray
from skimage.transform import iradon, radon

WATER = 3.0  # attenuation of water across the whole image, in units of 1 / side
FINE = 4  # points across a pixel
ANGLES = 60


def ellipse(points: NDArray, centre: NDArray, axes: NDArray, angle: float) -> NDArray:
    """True at `points` (2, k, k) of the square [-1, 1]^2 that lie in an ellipse."""
    x, y = points - centre[:, None, None]
    cos, sin = np.cos(angle), np.sin(angle)
    return ((cos * x + sin * y) / axes[0]) ** 2 + ((cos * y - sin * x) / axes[1]) ** 2 <= 1


def phantom(random: np.random.Generator, side: int) -> NDArray:
    """A body of water with 4 to 9 ellipses in it, (side, side), in Hounsfield units."""
    ticks = (np.arange(FINE * side) + 0.5) / (FINE * side) * 2 - 1
    points = np.stack(np.meshgrid(ticks, ticks, indexing="ij"))
    body = ellipse(points, np.zeros(2), random.uniform(0.7, 0.92, 2), random.uniform(0, np.pi))
    image = np.where(body, 0.0, -1000.0)
    for _ in range(random.integers(4, 10)):
        centre, axes = random.uniform(-0.5, 0.5, 2), random.uniform(0.08, 0.35, 2)
        inside = ellipse(points, centre, axes, random.uniform(0, np.pi)) & body
        image[inside] += random.choice([-1, 1]) * random.uniform(40, 400)
    image = image.clip(-1000, 1500)
    return image.reshape(side, FINE, side, FINE).mean((1, 3))


def reconstruction(image: NDArray, dose: float, random: np.random.Generator) -> NDArray:
    """The filtered back-projection of `image` (side, side) measured with `dose` photons a ray."""
    side, angles = len(image), np.linspace(0, 180, ANGLES, endpoint=False)
    attenuation = (image / 1000 + 1) * WATER / side
    sinogram = radon(attenuation, angles, circle=False)
    photons = random.poisson(dose * np.exp(-sinogram)).clip(1)
    measured = np.log(dose / photons)
    back = iradon(measured, angles, output_size=side, circle=False)
    return (back * side / WATER - 1) * 1000


def make(folder: Path, number: int, side: int, low: float, high: float, seed: int = 0) -> None:
    """Write x.npy, c.npy and phantoms.npy; see the module."""
    shape, names = (number, side, side, 1), ("phantoms", "x", "c")
    arrays = {name: np.empty(shape, np.float32) for name in names}
    for i in range(number):
        random = np.random.default_rng((seed, i))
        image = phantom(random, side)
        parts = image, reconstruction(image, high, random), reconstruction(image, low, random)
        for array, part in zip(arrays.values(), parts, strict=True):
            array[i, ..., 0] = part
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


if __name__ == "__main__":
    options = common.options(__doc__, "folder", number=2200, side=32, low=2000.0, high=1e6)
    make(options.folder[0], options.number, options.side, options.low, options.high)
