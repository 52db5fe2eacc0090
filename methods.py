"""The generative methods: how each perturbs data, what its network learns, and how it samples.

Everything that distinguishes one method from another lives here, behind one interface. A further
method is one class, one entry of `METHODS` and one config; no other file changes.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A network: (x (B, C, H, W), cond (B,)) -> what the method says it predicts.
Network = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]


class Method(abc.ABC):
    """What a method tells the training loop, the solvers and the likelihood.

    Its sampling ODE `dx/dt` runs from `t_prior` to `t_data`. Solvers with a fixed number of steps
    walk instead along `nodes`, values of the method's natural variable u, where field lines are
    straightest; `slope` is dx/du.
    """

    t_prior: float
    t_data: float

    @abc.abstractmethod
    def regress(
        self,
        net: Network,
        batch: Tensor,
        generator: torch.Generator | None = None,
        charges: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The pair (prediction, target), each (b, K), that a training step brings together.

        Args:
            net: the network.
            batch: scaled images (B, C, H, W); b <= B of them are perturbed.
            generator: source of every random draw.
            charges: scaled images (n, C, H, W) that make the target. Where they are given all of
                `batch` is perturbed; else `batch` is its own charges. A method whose target needs
                one image only has no use for them.
        """

    @abc.abstractmethod
    def ode(self, net: Network, x: Tensor, t: float | Tensor) -> Tensor:
        """The sampling ODE's dx/dt (B, C, H, W) at `x` and time `t` (a float or 0-d tensor)."""

    @abc.abstractmethod
    def nodes(self, n: int) -> Tensor:
        """The n + 1 values (float64) of u, from prior to data, between which fixed steps go."""

    def images_per_step(self, batch_size: int) -> int:
        """Images that the network sees in a training step on a batch of `batch_size`."""
        return batch_size

    def slope(self, net: Network, x: Tensor, u: float | Tensor) -> Tensor:
        """dx/du (B, C, H, W); the same as `ode` where the natural variable is t."""
        return self.ode(net, x, u)

    @abc.abstractmethod
    def prior_sampling(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Samples of `shape` (B, C, H, W) from the distribution at `t_prior`."""

    @abc.abstractmethod
    def prior_logp(self, x: Tensor) -> Tensor:
        """Log density (B,), in nats, of `x` (B, C, H, W) under the distribution at `t_prior`."""


# --- Poisson flow (Xu, Liu, Tegmark and Jaakkola 2022, arXiv 2209.11178) --------------------------

# Charges that `poisson_field` converts to float64 at a time: bounds its memory to this many rows.
FIELD_CHUNK = 2048


def poisson_field(perturbed: Tensor, data: Tensor, gamma: float) -> Tensor:
    """The normalised empirical Poisson field that `data` make at `perturbed` (Algorithm 1).

    The field of a charge falls with the (D+1)-th power of its distance d_j, so the field is
    g = sum_j w_j (y_j, 0) - p with weights w = softmax(-(D+1) log d_j): distances and the weighted
    sum are matrix products, accumulated over chunks of charges (a running softmax), and nothing of
    size B * n * D exists. All of it is float64: distances come as differences of squares, which in
    float32 would leave an error of 1e-5.

    Args:
        perturbed: augmented points p = (x, z), (B, D+1).
        data: charges on the plane z = 0, (n, ...) with D entries each.
        gamma: keeps the field small near a charge, where its direction is uncertain; >= 0.

    Returns:
        sqrt(D) g / (||g|| + gamma), (B, D+1), in the dtype of `perturbed`.
    """
    x, z = perturbed[:, :-1].double(), perturbed[:, -1:].double()
    dim = x.shape[1]
    point_norm = x.square().sum(1, keepdim=True) + z.square()

    log_total = torch.full_like(z, -torch.inf)
    centre = torch.zeros_like(x)  # the weighted mean of the charges seen so far
    for chunk in data.flatten(1).split(FIELD_CHUNK):
        y = chunk.double()
        distance = torch.addmm(torch.linalg.vector_norm(y, dim=1).square(), x, y.T, alpha=-2)
        distance = (distance + point_norm).clamp(min=torch.finfo(x.dtype).tiny)
        log_weight = -0.5 * (dim + 1) * distance.log()
        log_chunk = log_weight.logsumexp(1, keepdim=True)
        log_sum = torch.logaddexp(log_total, log_chunk)
        centre = torch.addmm(centre * (log_total - log_sum).exp(), (log_weight - log_sum).exp(), y)
        log_total = log_sum

    field = torch.cat([centre - x, -z], dim=1)
    norm = torch.linalg.vector_norm(field, dim=1, keepdim=True)
    return (math.sqrt(dim) * field / (norm + gamma)).to(perturbed.dtype)


@dataclass(frozen=True, kw_only=True)
class Poisson(Method):
    """Poisson flow: data are charges on the plane z = 0, samples follow field lines back to it.

    Attributes:
        sigma: scale of the smallest perturbation.
        tau, M: perturbations grow as (1 + tau)^m, m in [0, M].
        restrict_M: whether points that start within 0.005 of the plane keep m below 0.7 M.
        gamma: see `poisson_field`.
        small_batch_size: images perturbed per step; the whole batch are charges.
        z_max, z_min: height of the prior plane, and where sampling stops.
        z_exp: below this height the z entry of the field is inferred from the x entries.
        upper_norm: largest norm of a prior sample.
    """

    sigma: float
    tau: float
    M: float
    restrict_M: bool
    gamma: float
    small_batch_size: int
    z_max: float
    z_min: float
    z_exp: float
    upper_norm: float

    @property
    def t_prior(self) -> float:
        return math.log(self.z_max)

    @property
    def t_data(self) -> float:
        return math.log(self.z_min)

    def perturb(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augmented points (B, D+1) around images `x` (B, C, H, W) (Algorithm 2)."""
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
        near = self.sigma * z_noise.abs() < 0.005
        return torch.where(near, uniform * math.floor(0.7 * self.M), m)

    def displace(
        self, x: Tensor, m: Tensor, z_noise: Tensor, radial_noise: Tensor, direction: Tensor
    ) -> Tensor:
        """Algorithm 2 given its draws: m, z_noise (B, 1), radial_noise and direction (B, D)."""
        scale = self.sigma * (1 + self.tau) ** m
        radius = scale * radial_noise.norm(dim=1, keepdim=True)
        direction = direction / direction.norm(dim=1, keepdim=True)
        return torch.cat([x.flatten(1) + radius * direction, scale * z_noise.abs()], dim=1)

    def images_per_step(self, batch_size):
        return min(self.small_batch_size, batch_size)

    def regress(self, net, batch, generator=None, charges=None):
        x = batch
        if charges is None:
            x, charges = batch[: self.small_batch_size], batch
        with torch.no_grad():
            perturbed = self.perturb(x, generator)
            target = poisson_field(perturbed, charges, self.gamma)
        field_x, field_z = self.field(net, perturbed[:, :-1].view_as(x), perturbed[:, -1])
        return torch.cat([field_x.flatten(1), field_z[:, None]], dim=1), target

    def field(self, net: Network, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted field, (B, C, H, W) and (B,), at `x` (B, C, H, W) and heights `z` (B,)."""
        return net(x, z.clamp(min=1e-10))

    def slope(self, net, x, u):
        """dx/dz = v_x / v_z (B, C, H, W) along the field line through (x, z = u) (equation 6).

        Near the plane the small v_z is hard to learn; below `z_exp` it follows from the length of
        v_x, which fixes the distance rho to the charges (appendix B.2.3 of the paper).
        """
        z = torch.as_tensor(u, dtype=x.dtype, device=x.device)
        v_x, v_z = self.field(net, x, z.expand(len(x)))
        sqrt_dim = math.sqrt(x[0].numel())
        a = (v_x.flatten(1).norm(dim=1) / sqrt_dim).clamp(max=1 - 1e-5)
        rho = torch.hypot(self.gamma * a / (1 - a), z)
        v_z = torch.where(z < self.z_exp, -sqrt_dim * z / (rho + self.gamma), v_z)
        return v_x / (v_z + 1e-5).view(-1, 1, 1, 1)

    def ode(self, net, x, t):
        """dx/dt = z dx/dz with t = log z."""
        z = torch.as_tensor(t, dtype=x.dtype, device=x.device).exp()
        return z * self.slope(net, x, z)

    def nodes(self, n):
        return torch.linspace(self.t_prior, self.t_data, n + 1, dtype=torch.float64).exp()

    def prior_sampling(self, shape, generator=None, device="cpu"):
        """Where field lines of a far point charge cross z = z_max: a D-variate Cauchy law.

        Its heavy tail is cut: norms are kept within [1, upper_norm], as published.
        """
        x = torch.randn(shape, generator=generator, device=device).flatten(1)
        x = self.z_max * x / torch.randn(len(x), 1, generator=generator, device=device).abs()
        norm = x.norm(dim=1, keepdim=True)
        return (x * (norm.clamp(1, self.upper_norm) / norm)).view(shape)

    def prior_logp(self, x):
        """log of z_max Gamma((D+1)/2) / pi^((D+1)/2) (||x||^2 + z_max^2)^(-(D+1)/2)."""
        half = 0.5 * (x[0].numel() + 1)
        squared = x.double().flatten(1).square().sum(1) + self.z_max**2
        constant = math.log(self.z_max) + math.lgamma(half) - half * math.log(math.pi)
        return (constant - half * squared.log()).to(x.dtype)


def _poisson(config) -> Poisson:
    training, sampling = config.training, config.sampling
    if not 0 < sampling.z_min < sampling.z_max:
        raise ValueError(
            f"sampling.z_min must lie between 0 and sampling.z_max: "
            f"{sampling.z_min} and {sampling.z_max} do not"
        )
    if not 0 < training.small_batch_size <= training.batch_size:
        raise ValueError(
            f"training.small_batch_size must be between 1 and training.batch_size "
            f"({training.batch_size}), not {training.small_batch_size}"
        )
    return Poisson(
        sigma=config.model.sigma_end,
        tau=training.tau,
        M=training.M,
        restrict_M=training.restrict_M,
        gamma=training.gamma,
        small_batch_size=training.small_batch_size,
        z_max=sampling.z_max,
        z_min=sampling.z_min,
        z_exp=sampling.z_exp,
        upper_norm=sampling.upper_norm,
    )


METHODS = {"poisson": _poisson}


def get_method(config) -> Method:
    """The method that `config.training.sde` names, its numbers read from the config once.

    Raises:
        ValueError: the method is unknown, or its numbers contradict each other.
    """
    name = config.training.sde.lower()
    if name not in METHODS:
        raise ValueError(f"unknown method training.sde={name!r}; known: {', '.join(METHODS)}")
    return METHODS[name](config)
