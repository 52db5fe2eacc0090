"""Poisson flow (Xu, Liu, Tegmark and Jaakkola 2022, arXiv 2209.11178)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from configs.schema import LENGTH, NOISE_LEVEL, Flag, Key, Number, whole
from methods.base import Method, spread
from methods.field import own_class, poisson_field
from sources.batch import Batch

FARTHEST = 1e9  # reach of perturbations: its square, summed over an image, fits a float32


class PoissonRange(NamedTuple):
    """Reach of the perturbations, and the prior plane that follows; see `Poisson`."""

    M: int
    z_max: float
    upper_norm: float


def poisson_range(
    data_norm: float, data_dim: int, sigma: float = 0.01, tau: float = 0.03
) -> PoissonRange:
    """The range of a Poisson flow for data of a given size.

    Args:
        data_norm: mean Euclidean norm of the scaled images.
        data_dim: N = C * H * W, the entries of an image.
        sigma, tau: `model.sigma_end` and `training.tau`.

    Raises:
        ValueError: a number is out of its range, or the data are no larger than their perturbation.

    Source: Xu et al. 2022 (arXiv 2209.11178), appendix B.1.1.
    """
    if not (all(0 < n < math.inf for n in (data_norm, data_dim, sigma)) and tau >= 1e-12):
        raise ValueError(
            "data_norm, data_dim and sigma must be positive and finite, and tau at least 1e-12"
        )
    log_ratio = 2 * (math.log(data_norm) - math.log(sigma)) - math.log(2 * math.sqrt(data_dim))
    if log_ratio <= 0:
        raise ValueError(f"data of norm {data_norm:g} are lost in perturbations of sigma {sigma:g}")
    return range_of(int(0.75 * log_ratio / math.log1p(tau)) + 1, data_dim, sigma, tau)


def range_of(m: int, data_dim: int, sigma: float, tau: float) -> PoissonRange:
    """The range for `M = m`; see `poisson_range`.

    Raises:
        ValueError: a number is not positive, or perturbations reach farther than `FARTHEST`.
    """
    positive = sigma > 0 and tau > 0 and m >= 1
    log_reach = math.log(sigma) + m * math.log1p(tau) if positive else math.inf
    if not log_reach <= math.log(FARTHEST):
        raise ValueError(
            f"training.M={m}, training.tau={tau} and model.sigma_end={sigma} are no range of "
            f"perturbations: all must be positive, and sigma_end * (1 + tau)^M at most {FARTHEST:g}"
        )
    reach = math.exp(log_reach)
    return PoissonRange(m, math.sqrt(2 / math.pi) * reach, math.sqrt(data_dim) * reach)


@dataclass(frozen=True, kw_only=True)
class Examples(Batch):
    """Images perturbed to the heights `z` (B,)."""

    z: Tensor


KEYS = {
    "training.gamma": Key(
        5.0, Number(0, 10**6), "Poisson: added to the field's norm before it divides"
    ),
    "training.tau": Key(
        0.03,
        Number(1e-6, 10),
        "Poisson: perturbed points lie about sigma_end * (1 + tau)^m away, m <= M",
    ),
    "training.M": Key(None, whole(1), "Poisson; None: measured from the data"),
    "training.restrict_M": Key(True, Flag(), "Poisson: a smaller M close to the data"),
    "model.sigma_end": Key(0.01, NOISE_LEVEL, "Poisson: perturbation of points next to the data"),
    "sampling.z_max": Key(
        None,
        LENGTH,
        "Poisson: the prior's plane, where the ODE starts; None: measured from the data",
    ),
    "sampling.z_min": Key(1e-3, LENGTH, "Poisson: where the ODE ends, below z_max"),
    "sampling.z_exp": Key(
        5.0,
        Number(0, 10**9),
        "Poisson: below it, the field's z entry is computed from z, not by the network",
    ),
    "sampling.upper_norm": Key(
        None,
        LENGTH,
        "Poisson: the prior sample's norm is clipped to it; None: measured from the data",
    ),
    "sampling.radius": Key(
        0.0,
        Number(0, 10**9),
        "Poisson: largest norm of a scaled image, which bounds how flat a field line can be; for "
        "data of few dimensions; 0: no bound",
    ),
}
OPEN = ("training.M", "sampling.z_max", "sampling.upper_norm")  # measured where they are None


@dataclass(frozen=True, kw_only=True)
class Poisson(Method):
    """PFGM: data are charges on the plane z = 0, and samples follow field lines back to it.

    Images have N entries, and the field N + 1, x and z. Time is log z. The network gives one
    channel more than the image has, whose spatial mean is the field's z entry.

    Attributes:
        sigma_end: scale of the smallest perturbation.
        tau, M: perturbations grow as (1 + tau)^m, m in [0, M].
        restrict_M: points that start within 0.005 of the plane keep m below 0.7 M.
        gamma: added to the field's norm; see `poisson_field`.
        z_max, z_min: height of the prior plane, and where sampling stops.
        z_exp: below this height the z entry of the field is inferred from the x entries.
        upper_norm: largest norm of a prior sample.
        radius: of a ball around 0 that has all data in it; 0: unknown.
    """

    sigma_end: float
    tau: float
    M: float
    restrict_M: bool
    gamma: float
    z_max: float
    z_min: float
    z_exp: float
    upper_norm: float
    radius: float = 0.0

    keys = KEYS
    options = {key.partition(".")[2]: key for key in KEYS}
    name = "PFGM"
    extra_channels = 1
    uses_reference_batch = True
    degrees_of_freedom = 1.0
    noisy_end = False

    def __post_init__(self):
        if None in (self.M, self.z_max, self.upper_norm):
            raise ValueError(
                "training.M, sampling.z_max and sampling.upper_norm are not all set: training "
                "measures them at its first start; python3 hyper_parameters.py --config FILE "
                "prints them"
            )
        self.check_rising("z_min", "z_max")
        range_of(self.M, 1, self.sigma_end, self.tau)  # ValueError where out of range
        if self.gamma < 0:
            raise ValueError(f"training.gamma must be at least 0, not {self.gamma}")

    @classmethod
    def measure(cls, values, dim, data):
        if None not in (values[key] for key in OPEN):
            return {}
        scales = values["model.sigma_end"], values["training.tau"]
        if values["training.M"] is None:
            measured = poisson_range(data.mean_norm(), dim, *scales)
        else:
            measured = range_of(values["training.M"], dim, *scales)
        return {k: v for k, v in zip(OPEN, measured, strict=True) if values[k] is None}

    # --- training ---

    def draw(self, batch, generator=None):
        points = self.perturb(batch.images, generator)
        x, z = points[:, :-1].view_as(batch.images), points[:, -1]
        return Examples(images=x, conditions=batch.conditions, z=z)

    def perturb(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augmented points (B, N+1) around images `x` (B, C, H, W) (Algorithm 2)."""
        draw = {"generator": generator, "device": x.device, "dtype": x.dtype}
        z_noise = torch.randn(len(x), 1, **draw)
        m = self.restrict(
            torch.rand(len(x), 1, **draw) * self.M, z_noise, torch.rand(len(x), 1, **draw)
        )
        radial_noise = torch.randn(len(x), x[0].numel(), **draw)
        direction = torch.randn(len(x), x[0].numel(), **draw)
        return self.displace(x, m, z_noise, radial_noise, direction)

    def restrict(self, m: Tensor, z_noise: Tensor, uniform: Tensor) -> Tensor:
        """Exponents (B, 1) with those of points near the plane redrawn from U[0, floor(0.7 M)]."""
        if not self.restrict_M:
            return m
        near = self.sigma_end * z_noise.abs() < 0.005
        return torch.where(near, uniform * math.floor(0.7 * self.M), m)

    def displace(
        self, x: Tensor, m: Tensor, z_noise: Tensor, radial_noise: Tensor, direction: Tensor
    ) -> Tensor:
        """Algorithm 2 with its draws: m and z_noise (B, 1), radial_noise and direction (B, N).

        s = sigma_end (1 + tau)^m
        x <- x + s ||radial_noise|| direction / ||direction||,    z = s |z_noise|
        """
        scale = self.sigma_end * (1 + self.tau) ** m
        radius = scale * radial_noise.norm(dim=1, keepdim=True)
        direction = direction / direction.norm(dim=1, keepdim=True)
        return torch.cat([x.flatten(1) + radius * direction, scale * z_noise.abs()], dim=1)

    def target(self, examples, reference):
        points = torch.cat([examples.images.flatten(1), examples.z[:, None]], dim=1)
        among = own_class(examples, reference)
        return poisson_field(points, reference.images, self.gamma, among)

    def predict(self, net, examples):
        x, z = net(examples.images, examples.z.clamp(min=1e-10))
        return torch.cat([x.flatten(1), z[:, None]], dim=1)

    # --- sampling ---

    def slope(self, net, y, sigma):
        """dx/dz = v_x / v_z (B, C, H, W) along the field line at (y, z = sigma) (equation 6).

        Near the plane the small v_z is hard to learn. Below `z_exp` it follows from the length of
        v_x, which fixes the distance rho to the charges (appendix B.2.3 of the paper):

            a = ||v_x|| / sqrt(N),  rho^2 = (gamma a / (1 - a))^2 + z^2,
            v_z = -sqrt(N) z / (rho + gamma).

        In few dimensions, where many lines are nearly flat, a predicted v_z may have the wrong
        sign. The field points to (E[y | x, z], 0), and with all data within `radius` of 0

            |v_z| >= ||v_x|| z / (||x|| + radius).
        """
        z = torch.as_tensor(sigma, dtype=y.dtype).to(y.device, non_blocking=True)
        v_x, v_z = net(y, z.expand(len(y)).clamp(min=1e-10))
        sqrt_dim = math.sqrt(y[0].numel())
        a = (v_x.flatten(1).norm(dim=1) / sqrt_dim).clamp(max=1 - 1e-5)
        rho = torch.hypot(self.gamma * a / (1 - a), z)
        v_z = torch.where(z < self.z_exp, -sqrt_dim * z / (rho + self.gamma), v_z)
        v_z = v_z + 1e-5
        if self.radius:
            flattest = z / (y.flatten(1).norm(dim=1) + self.radius)
            v_z = torch.minimum(v_z, -flattest * v_x.flatten(1).norm(dim=1))
        return v_x / spread(v_z, y)

    def ode(self, net, x, t):
        """dx/dt = z dx/dz with t = log z."""
        z = torch.as_tensor(t, dtype=x.dtype).exp()
        return z * self.slope(net, x, z)

    @property
    def t_prior(self) -> float:
        return math.log(self.z_max)

    @property
    def t_data(self) -> float:
        return math.log(self.z_min)

    def sigma(self, t):
        """The height z, which is the scale of the Cauchy distribution that a charge makes there."""
        return t.exp()

    def time(self, sigma):
        return sigma.log()

    def prior_sampling(self, shape, generator=None, device="cpu"):
        """Points where the field lines of the data cross z = z_max: an N-variate Cauchy law.

        From so far the data are one point. The heavy tail is cut: norms are clipped to
        [1, upper_norm], as published.
        """
        draw = {"generator": generator, "device": device}
        x = torch.randn(shape, **draw).flatten(1)
        height = torch.randn(len(x), 1, **draw).abs()  # 0 in one of some 10^7 draws
        x = self.z_max * x / height.clamp(min=1e-6)
        norm = x.norm(dim=1, keepdim=True)
        return (x * (norm.clamp(1, self.upper_norm) / norm)).view(shape)

    def prior_norms(self, dim):
        """`upper_norm` and a quarter of it; the network is not trained for larger norms."""
        return self.upper_norm / 4, self.upper_norm
