"""Restoration: images x of which a linear measurement m = A x + noise is known.

`Restoring` turns a method's ODE and SDE into those of the images given m, whose denoised image is
E[x | y, m]. A restorer approximates it by one step from the method's own, E[x | y].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Network, WithSlope, noise_like, spread

GREY = (0.299, 0.587, 0.114)  # of R, G and B (ITU-R BT.601), as image files are turned to grey

# Variance that `moment_matching` adds to the measurement, as a share of that of the noise in y. At
# large noise levels the true V / variance is below a network's error, and its inverse unbounded.
DAMPING = 1e-4

Rows = slice | Tensor  # of a batch


# --- measurements ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """A linear map A of images, and its transpose.

    A A^T is `gram` times the identity; in inpainting only on images that are 0 where A gives 0.
    `rows` gives the operator of a part of the images; None where it is the same for all. `picture`
    turns a measurement m into an image x to look at, with A x = m; None for A^T m / `gram`.
    """

    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    gram: float = 1.0
    rows: Callable[[Rows], "Operator"] | None = None
    picture: Callable[[Tensor], Tensor] | None = None

    def __getitem__(self, rows: Rows) -> "Operator":
        """The operator of the images `rows`."""
        return self if self.rows is None else self.rows(rows)


def inpainting(mask: Tensor) -> Operator:
    """The operator that keeps the pixels in the `mask` and sets the others to 0.

    The mask, bool, is (H, W) for all images, or (n, 1, H, W) with one for each of n images.
    """

    def keep(x: Tensor) -> Tensor:
        return torch.where(mask.to(x.device), x, 0.0)

    of_rows = (lambda rows: inpainting(mask[rows])) if mask.dim() == 4 else None
    return Operator(keep, keep, rows=of_rows)


def colouring() -> Operator:
    """The operator from a colour image (B, 3, H, W) to its grey one (B, 1, H, W)."""

    def weights(x: Tensor) -> Tensor:
        return x.new_tensor(GREY).view(3, 1, 1)

    return Operator(
        lambda x: (weights(x) * x).sum(1, keepdim=True),
        lambda m: weights(m) * m,
        gram=sum(weight**2 for weight in GREY),
        picture=lambda m: m.expand(-1, 3, -1, -1),
    )


def superresolution(factor: int) -> Operator:
    """The operator to means of `factor` x `factor` pixels, (B, C, H / factor, W / factor)."""

    def repeat(m: Tensor) -> Tensor:
        return m.repeat_interleave(factor, -1).repeat_interleave(factor, -2) / factor**2

    return Operator(lambda x: torch.nn.functional.avg_pool2d(x, factor), repeat, gram=1 / factor**2)


def denoising() -> Operator:
    """The operator that leaves images as they are."""
    return Operator(lambda x: x, lambda m: m)


# sampling.restore -> factor by which the measurement is smaller than the image.
RESTORE = {"inpaint": 1, "colour": 1, "super2": 2, "super4": 4, "super8": 8, "denoise": 1}


def get_operator(name: str, mask: Tensor | None = None) -> Operator:
    """The operator of `name`, one of `RESTORE`; "inpaint" needs a `mask`, see `inpainting`."""
    if name == "inpaint":
        return inpainting(mask)
    if name.startswith("super"):
        return superresolution(RESTORE[name])
    return {"colour": colouring, "denoise": denoising}[name]()


@dataclass(frozen=True)
class Measurement:
    """Measurement of images x: `value` = A x + noise, (B, ...), in the network's scaling.

    `noise` is the standard deviation of each entry, at least 0.
    """

    operator: Operator
    value: Tensor
    noise: float = 0.0

    def __getitem__(self, rows: Rows) -> "Measurement":
        """The measurement of the images `rows` alone."""
        return Measurement(self.operator[rows], self.value[rows], self.noise)

    def residual(self, x: Tensor) -> Tensor:
        """m - A x, of the shape of `value`."""
        return self.value - self.operator.forward(x)

    def picture(self) -> Tensor:
        """Images (B, C, H, W) of what was measured: grey for colouring, else missing is 0."""
        A = self.operator
        return A.picture(self.value) if A.picture else A.adjoint(self.value) / A.gram

    def project(self, x: Tensor) -> Tensor:
        """The images closest to `x` (B, C, H, W) that have exactly this measurement."""
        A = self.operator
        unmeasured = x - A.adjoint(A.forward(x)) / A.gram  # exactly 0 where inpainting has a pixel
        return unmeasured + A.adjoint(self.value) / A.gram


# --- guidance -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoised:
    """Result of a denoiser D at y and a noise level.

    Attributes:
        image: D(y) = E[x | y], (B, C, H, W).
        covariance: v -> V v / variance, both (B, C, H, W); V is that of x given y.
        sigma: the noise level.
        variance: of the noise in y, given y, (B, 1, 1, 1).
        unit: of noise levels and images, `Method.sigma_unit`.
    """

    image: Tensor
    covariance: Callable[[Tensor], Tensor]
    sigma: float
    variance: Tensor
    unit: float = 1.0


def moment_matching(m: Measurement, d: Denoised, iterations: int = 5) -> Tensor:
    """E[x | y, m] - E[x | y] where x given y is normal, of covariance V:

        V A^T (A V A^T + noise^2)^-1 (m - A D).

    V and noise^2 are divided by the variance of the noise in y, and `iterations` of conjugate
    gradients solve the equation. Exact for Gaussian data and noise, up to `DAMPING`.
    Source: Rozet et al. 2024 (arXiv 2405.13712).
    """
    forward, adjoint = m.operator.forward, m.operator.adjoint
    ridge = m.noise**2 / d.variance + DAMPING * m.operator.gram

    def apply(u: Tensor) -> Tensor:
        return forward(d.covariance(adjoint(u))) + ridge * u

    u = conjugate_gradients(apply, m.residual(d.image), iterations)
    return d.covariance(adjoint(u))


def pigdm(m: Measurement, d: Denoised) -> Tensor:
    """Change of the denoised image by PiGDM: variance dlog p(m | y)/dy with

        V = r^2 I,    r^2 = variance / (variance + 1)    in the method's unit,

    which is right for white Gaussian data of variance 1. Source: Song et al. 2023 ("Pseudoinverse-
    guided diffusion models for inverse problems", ICLR 2023).
    """
    covariance = d.variance / (d.variance / d.unit**2 + 1) * m.operator.gram + m.noise**2
    return d.variance * d.covariance(m.operator.adjoint(m.residual(d.image) / covariance))


def dps(m: Measurement, d: Denoised) -> Tensor:
    """Change of the denoised image by DPS: variance dlog p(m | y)/dy with

        p(m | y) = p(m | x = D(y)),

    which is exact where the noise of m is much larger than what y leaves open of x. The gradient
    has no bound as the noise vanishes. As published, the step is then divided by the norm of the
    residual, here relative to the noise level: the variance of m is noise^2, but at least sigma
    times the root mean square of m - A D. Source: Chung et al. 2023 (arXiv 2209.14687).
    """
    residual = m.residual(d.image)
    size = residual.flatten(1).norm(dim=1) / rank(m.operator, d.image).to(residual).sqrt()
    covariance = spread(d.sigma * size, residual).clamp(min=max(m.noise**2, 1e-30))
    return d.variance * d.covariance(m.operator.adjoint(residual / covariance))


def rank(operator: Operator, images: Tensor) -> Tensor:
    """Number of independent entries in the measurement of each of `images`, (B,)."""
    return operator.forward(torch.ones_like(images)).flatten(1).count_nonzero(1)


# sampling.restorer -> the change of the denoised image; None is `Replacement`, which has none.
RESTORERS: dict[str, Callable[[Measurement, Denoised], Tensor] | None] = {
    "moment_matching": moment_matching,
    "pigdm": pigdm,
    "dps": dps,
    "replacement": None,
}


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], right: Tensor, iterations: int
) -> Tensor:
    """A solution u, (B, ...), of `apply(u)` = `right`, in which each row is its own equation.

    `apply` should be symmetric and positive; a row ends where it is not, or where it is solved.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return spread((a * b).flatten(1).sum(1), a)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where((b > 0) & (size > smallest), a / b, 0.0)

    u, residual, direction = torch.zeros_like(right), right, right
    size = dot(right, right)
    smallest = torch.finfo(right.dtype).eps ** 2 * size
    for _ in range(iterations):
        image = apply(direction)
        step = ratio(size, dot(direction, image))
        u, residual = u + step * direction, residual - step * image
        size, before = dot(residual, residual), size
        direction = residual + ratio(size, before) * direction
    return u


def denoise(
    method: Method,
    net: Network,
    y: Tensor,
    sigma: float,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Denoised:
    """Result of the denoiser at `y` (B, C, H, W) and noise level `sigma` > 0.

    The posterior mean E is clamped to the `bounds` of the images: beyond is only a network's error.

    The noise y - x is a Student t with D degrees of freedom and scale sigma. Given x, its precision
    is w, and the kernel k = p(y | x) has the derivatives

        w = (N + D) / (||y - x||^2 + D sigma^2),
        d(log k)/dy = -w (y - x),    d(log k)/dsigma = -w D sigma + a term without x.

    Differentiating the posterior mean with these gives

        E[w (x - E)(x - E)^T] = dE/dy + c (y - E)^T,  c = Cov(x, w) = -dE/dsigma / (D sigma),

    which is symmetric and positive, as dE/dy alone is not, and, from E[w / w] = 1,

        E[w] (||y - E||^2 + D sigma^2) = N + D - tr(dE/dy) + c^T (y - E),

    whose trace a probe measures (Hutchinson 1990). For infinite D, c = 0 and w = 1 / sigma^2.
    """
    degrees, n = method.degrees_of_freedom, y[0].numel()
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        level = torch.tensor(sigma, dtype=torch.float64)
        if math.isinf(degrees):
            image = y - sigma * method.slope(net, y, level)
        else:
            level = level.to(y).repeat(len(y)).requires_grad_()  # one for each image
            image = y - spread(level, y) * method.slope(net, y, level)
    clamped = image.detach().clamp(*bounds)
    deviation = y.detach() - clamped

    def products(v: Tensor) -> tuple[Tensor, Tensor]:
        """(dE/dy)^T v (B, C, H, W), and c^T v (B, 1, 1, 1)."""
        if math.isinf(degrees):
            return torch.autograd.grad(image, y, v, retain_graph=True)[0], y.new_zeros(())
        by_y, by_level = torch.autograd.grad(image, (y, level), v, retain_graph=True)
        return by_y, spread(by_level / (-degrees * sigma), y)

    def covariance(v: Tensor) -> Tensor:
        by_y, c = products(v)
        return by_y + c * deviation

    if math.isinf(degrees):
        variance = spread(y.new_full((len(y),), sigma**2), y)
    else:
        generator = torch.Generator().manual_seed(0)
        signs = (torch.randint(2, y.shape[1:], generator=generator).to(y) * 2 - 1).expand_as(y)
        trace = (signs * products(signs)[0]).flatten(1).sum(1)
        precision = n + degrees - spread(trace, y) + products(deviation)[1]  # times the numerator
        square = spread(deviation.flatten(1).square().sum(1), y)
        variance = (square + degrees * sigma**2) / precision.clamp(min=min(degrees, 1.0))
    return Denoised(clamped, covariance, sigma, variance, method.sigma_unit)


class Restoring(WithSlope):
    """A method whose ODE, and SDE where it has one, lead to images that agree with `measurement`.

    Its slope is (y - E[x | y, m]) / sigma, where the restorer gives E[x | y, m] - E[x | y], the
    change of the denoised image; for Gaussian noise the change is sigma^2 dlog p(m | y)/dy. Both
    means lie within the `bounds` of the images, and are clamped to them: far from the data a small
    relative error of the slope puts the denoised image far outside.
    """

    def __init__(
        self,
        method: Method,
        measurement: Measurement,
        restorer: Callable[[Measurement, Denoised], Tensor],
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ):
        super().__init__(method)
        self.measurement, self.restorer, self.bounds = measurement, restorer, bounds

    def slope(self, net, y, sigma):
        denoised = denoise(self.method, net, y, float(sigma), self.bounds)
        image = denoised.image + self.restorer(self.measurement, denoised)
        return (y - image.clamp(*self.bounds)) / sigma


# --- replacement ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replacement:
    """Replacement of a state's measured part by the measurement, perturbed to the state's time.

    Source: Song et al. 2021 (arXiv 2011.13456), appendix I.2.
    """

    sde: Method
    measurement: Measurement

    def acts(self, t: Tensor) -> bool:
        """True if A x / alpha at time `t` () is at least as noisy as the measurement.

        Where both are equally noisy, the measurement is a sample of A x / alpha. Given x the image
        does not depend on it any further: from then on one pass of the reverse SDE draws it.
        """
        return self._lack(t) >= 0

    def __call__(self, generator: torch.Generator | None, x: Tensor, t: Tensor) -> Tensor:
        """`x` (B, C, H, W) at time `t` (), its measured part replaced if `acts(t)`."""
        lack = self._lack(t)
        if lack < 0:
            return x
        m, alpha = self.measurement, self.sde.alpha(t).item()
        noise = m.operator.forward(noise_like(x, generator)) * math.sqrt(lack / m.operator.gram)
        return alpha * Measurement(m.operator, m.value + noise).project(x / alpha)

    def _lack(self, t: Tensor) -> float:
        """Variance that the measurement lacks to be as noisy as A x / alpha; may be negative."""
        m = self.measurement
        return m.operator.gram * self.sde.sigma(t).item() ** 2 - m.noise**2
