"""Solvers that integrate the denoised image over the log-SNR, N evaluations for N steps.

In natural variables and over lambda = -log sigma the sampling ODE is dx/dlambda = D - x, with the
denoised image D = x - sigma dx/dsigma. So a step of length h in lambda gives

    x <- exp(-h) x + integral over u from 0 to h of exp(u - h) D(lambda + u)

exactly, and its only error is that of the polynomial through known D that stands for D (exponential
integrators). Levels are positive and fall; only the last may be 0, where x is the denoised image.
"""

import math
from itertools import pairwise

from torch import Tensor

from solvers.base import Callback, Slope, Step
from solvers.fixed_steps import combine, interpolating_weights, linear_multistep


def dpmpp(
    slope: Slope, x: Tensor, levels: Tensor, callback: Callback | None = None, *, order: int = 3
) -> Tensor:
    """DPM-Solver++, multistep, of an `order` from 1 to 3 (Lu et al. 2022, arXiv 2211.01095).

    The polynomial goes through the last `order` denoised images; the first steps make do with
    fewer. Its integral is exact: published code takes h / 2 times the first difference at order 2,
    and half the second difference at order 3, which then converges with order 2 only.
    """
    return linear_multistep(
        slope, x, levels, callback, order=order, advance=advance, term=denoised_image
    )


def unipc(
    slope: Slope, x: Tensor, levels: Tensor, callback: Callback | None = None, *, order: int = 3
) -> Tensor:
    """UniPC of an `order` from 1 to 3, which its corrector raises by one (arXiv 2302.04867).

    The predictor is `dpmpp`'s step. The denoised image is evaluated where it arrives; the corrector
    takes the step again with that image as one more point of the polynomial, and the next step uses
    the same image: one evaluation a step. The equations for the weights are solved exactly, so that
    the paper's B(h) cancels.
    """
    images, passed = [], []
    rest, weight = x, 0.0  # the corrected state is rest + weight * the newest denoised image
    for i, (level, next_level) in enumerate(pairwise(levels.tolist())):
        d = slope(x, level)
        if callback:
            callback(Step(i, level, x, d))
        images.insert(0, denoised_image(x, level, d))
        passed.insert(0, level)
        start = rest + weight * images[0] if i else x
        x = advance(start, images, passed, next_level)
        if next_level > 0:
            weight, *weights = exponential_weights([next_level, *passed], level, next_level)
            rest = combine(start * (next_level / level), images, weights)
        del start, d, images[order - 1 :], passed[order - 1 :]  # before memory goes to the network
    return x


def denoised_image(x: Tensor, level: float, slope: Tensor) -> Tensor:
    """The denoised image D at `x` and `level`."""
    return x - level * slope


def advance(x: Tensor, images: list[Tensor], passed: list[float], next_level: float) -> Tensor:
    """The state at `next_level`, from `x` at passed[0], with D through `images` at `passed` levels.

    At level 0 it is images[0], the limit for a constant D.
    """
    if next_level == 0:
        return images[0]
    weights = exponential_weights(passed, passed[0], next_level)
    return combine(x * (next_level / passed[0]), images, weights)


def exponential_weights(nodes: list[float], start: float, end: float) -> list[float]:
    """Weights of the D at the levels `nodes` that integrate exp(u - h) D over u from 0 to h.

    The step is from the level `start` to `end`, h = log(start / end). The weights are exact for
    powers of s = u / h, whose integrals are I_0 = 1 - exp(-h) and, by parts,

        I_k = 1 - k / h I_(k-1).
    """
    h = math.log(start / end)
    moments = [-math.expm1(-h)]
    for k in range(1, len(nodes)):
        moments.append(1 - k / h * moments[-1])
    return interpolating_weights([math.log(start / level) / h for level in nodes], moments)
