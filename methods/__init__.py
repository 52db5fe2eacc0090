"""The generative methods: how each perturbs data, what its network learns, and how it samples.

Everything that distinguishes one method from another lives here, behind one interface. A further
method is one class, one entry of `METHODS` and one config; no other file changes.
"""

import abc
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# A network: (x (B, C, H, W), cond (B,)) -> what the method says it predicts.
Network = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]


# The k-th of n equal slices of a batch's examples, as (k, n); what ranks and accumulation share.
Part = tuple[int, int]


def spread(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient, one for all images () or one each (B,), so that it multiplies `x` (B, ...)."""
    return c.to(x).view(-1, *[1] * (x.dim() - 1))


def take(part: Part, *rows: Tensor) -> list[Tensor]:
    """The rows (B / n, ...) of each tensor (B, ...) that belong to `part`."""
    k, n = part
    return [r[k * len(r) // n : (k + 1) * len(r) // n] for r in rows]


class Method(abc.ABC):
    """What a method tells the training loop, the samplers and the likelihood.

    Its sampling ODE `dx/dt` runs from `t_prior` to `t_data`. Solvers with a fixed number of steps
    see it in natural variables instead, in which its solutions are straightest: y = x / signal(t)
    over u = level(t), the noise in y. `slope` is dy/du, and y - u dy/du the denoised image.

    Times and levels are tensors of any shape, float64 where accuracy matters.

    Attributes:
        t_prior, t_data: where sampling starts and ends.
        noisy_end: whether noise of scale level(t_data) is left in samples, for one more step to 0.
        predictors, correctors: those that `sampling.method='pc'` can take; none without an SDE.
    """

    t_prior: float
    t_data: float
    noisy_end = False
    predictors: tuple[str, ...] = ()
    correctors: tuple[str, ...] = ()

    @abc.abstractmethod
    def regress(
        self,
        net: Network,
        batch: Tensor,
        generator: torch.Generator | None = None,
        charges: Tensor | None = None,
        part: Part = (0, 1),
    ) -> tuple[Tensor, Tensor]:
        """The pair (prediction, target), each (b, K), that a training step brings together.

        Args:
            net: the network.
            batch: scaled images (B, C, H, W); b <= B of them are perturbed.
            generator: source of every random draw.
            charges: scaled images (n, C, H, W) that make the target. Where they are given all of
                `batch` is perturbed; else `batch` is its own charges. A method whose target needs
                one image only has no use for them.
            part: the examples that are wanted, (k, n) for the k-th of n equal slices. The draws
                are always those of the whole batch, so that the slices together are the whole.
        """

    @abc.abstractmethod
    def ode(self, net: Network, x: Tensor, t: float | Tensor) -> Tensor:
        """The sampling ODE's dx/dt (B, C, H, W) at `x` and time `t` (a float or 0-d tensor)."""

    def signal(self, t: Tensor) -> Tensor:
        """The factor of the data in x at time `t`, of the shape of `t`."""
        return torch.ones_like(t)

    @abc.abstractmethod
    def level(self, t: Tensor) -> Tensor:
        """u at time `t`."""

    @abc.abstractmethod
    def time(self, u: Tensor) -> Tensor:
        """t at level `u`, the inverse of `level`."""

    @abc.abstractmethod
    def slope(self, net: Network, y: Tensor, u: float | Tensor) -> Tensor:
        """dy/du (B, C, H, W) at `y` and level `u` (a float or 0-d tensor)."""

    def images_per_step(self, batch_size: int) -> int:
        """Images that the network sees in a training step on a batch of `batch_size`."""
        return batch_size

    @abc.abstractmethod
    def prior_sampling(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Samples of `shape` (B, C, H, W) from the distribution at `t_prior`."""

    @abc.abstractmethod
    def prior_norms(self, dim: int) -> tuple[float, float]:
        """From where to where rescaling a prior sample of `dim` entries changes its image."""

    @abc.abstractmethod
    def prior_logp(self, x: Tensor) -> Tensor:
        """Log density (B,), in nats, of `x` (B, C, H, W) under the distribution at `t_prior`."""


# --- Poisson flow (Xu, Liu, Tegmark and Jaakkola 2022, arXiv 2209.11178) --------------------------

# Charges that `poisson_field` converts to float64 at a time: bounds its memory to this many rows.
FIELD_CHUNK = 2048

# CUDA devices whose float64 runs at half the rate of float32 (or the like): the data-centre cards
# P100, V100, A100, H100 and B200, and AMD's CDNA 3. All others have 1/32 or 1/64 of it. Source: the
# throughput table of NVIDIA's CUDA C++ Programming Guide; AMD's MI300X data sheet.
FAST_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (9, 4), (10, 0)}

# Columns of which `split_products` sums the leading bits exactly: 2^12 products of 6 by 6 bits and
# their sums fit the 24 bits of a float32.
SPLIT_COLUMNS, SPLIT_BITS = 4096, 6


def poisson_field(perturbed: Tensor, data: Tensor, gamma: float) -> Tensor:
    """The normalised empirical Poisson field that `data` make at `perturbed` (Algorithm 1).

    The field of a charge falls with the (D+1)-th power of its distance d_j, so the field is
    g = sum_j w_j (y_j, 0) - p with weights w = softmax(-(D+1) log d_j): distances and the weighted
    sum are matrix products, accumulated over chunks of charges (a running softmax), and nothing of
    size B * n * D exists. Distances come as differences of squares and count D + 1 times in the
    weights, which in float32 would leave an error of 1e-5. So everything is float64; where a device
    is slow at it, only what is of size B * n, and the large products are made of float32 ones.

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
    whole = perturbed.dtype == torch.float64 or has_fast_double(perturbed.device)

    log_total = torch.full_like(z, -torch.inf)
    centre = torch.zeros_like(x)  # the weighted mean of the charges seen so far
    for y in data.flatten(1).split(FIELD_CHUNK):
        y = y.double() if whole else y.float()
        products = x @ y.T if whole else split_products(x.float(), y)
        charge_norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64).square()
        distance = torch.add(charge_norm, products, alpha=-2).add_(point_norm)
        distance = distance.clamp_(min=torch.finfo(x.dtype).tiny)
        log_weight = distance.log_().mul_(-0.5 * (dim + 1))
        log_chunk = log_weight.logsumexp(1, keepdim=True)
        log_sum = torch.logaddexp(log_total, log_chunk)
        with full_float32():  # weights are at most 1, so float32 products leave a rounding of y
            inflow = (log_weight - log_sum).exp_().to(y.dtype) @ y
        centre = centre * (log_total - log_sum).exp() + inflow
        log_total = log_sum

    field = torch.cat([centre - x, -z], dim=1)
    norm = torch.linalg.vector_norm(field, dim=1, keepdim=True)
    return (math.sqrt(dim) * field / (norm + gamma)).to(perturbed.dtype)


def has_fast_double(device: torch.device) -> bool:
    """Whether float64 matrix products are the fast way to accurate ones on `device`."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in FAST_DOUBLE


def split_products(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T (B, n), float64, from float32 matrix products of `x` (B, D) and `y` (n, D), float32.

    Each operand is its leading bits, on one grid for a row, and a rest. Products of leading bits
    are sums of integers, at most 2^24, exact in whichever order; those with a rest are 2^6 times
    smaller, and with them the rounding: some 2^-30 of the terms. The idea is that of Ozaki et al.
    (Numerical Algorithms 59, 2012), cut off after the first slice.
    """
    total = x.new_zeros(len(x), len(y), dtype=torch.float64)
    with full_float32():
        for a, b in zip(x.split(SPLIT_COLUMNS, 1), y.split(SPLIT_COLUMNS, 1), strict=True):
            a_high, b_high = leading_bits(a), leading_bits(b)
            total += a_high @ b_high.T
            total += torch.addmm(a_high @ (b - b_high).T, a - a_high, b.T)
    return total


def leading_bits(x: Tensor) -> Tensor:
    """`x` (B, K), float32, rounded to multiples of its rows' largest power of two / 2^5."""
    largest = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    power_of_two = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    unit = power_of_two * 2.0 ** (1 - SPLIT_BITS)
    return (x / unit).round_() * unit


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within the `with` block float32 matrix products are that, also where TF32 is allowed."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


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

    def regress(self, net, batch, generator=None, charges=None, part=(0, 1)):
        x = batch
        if charges is None:
            x, charges = batch[: self.small_batch_size], batch
        with torch.no_grad():
            x, perturbed = take(part, x, self.perturb(x, generator))
            target = poisson_field(perturbed, charges, self.gamma)
        field_x, field_z = self.field(net, perturbed[:, :-1].view_as(x), perturbed[:, -1])
        return torch.cat([field_x.flatten(1), field_z[:, None]], dim=1), target

    def field(self, net: Network, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted field, (B, C, H, W) and (B,), at `x` (B, C, H, W) and heights `z` (B,)."""
        return net(x, z.clamp(min=1e-10))

    def slope(self, net, y, u):
        """dx/dz = v_x / v_z (B, C, H, W) along the field line through (y, z = u) (equation 6).

        Near the plane the small v_z is hard to learn; below `z_exp` it follows from the length of
        v_x, which fixes the distance rho to the charges (appendix B.2.3 of the paper).
        """
        z = torch.as_tensor(u, dtype=y.dtype, device=y.device)
        v_x, v_z = self.field(net, y, z.expand(len(y)))
        sqrt_dim = math.sqrt(y[0].numel())
        a = (v_x.flatten(1).norm(dim=1) / sqrt_dim).clamp(max=1 - 1e-5)
        rho = torch.hypot(self.gamma * a / (1 - a), z)
        v_z = torch.where(z < self.z_exp, -sqrt_dim * z / (rho + self.gamma), v_z)
        return v_x / spread(v_z + 1e-5, y)

    def ode(self, net, x, t):
        """dx/dt = z dx/dz with t = log z."""
        z = torch.as_tensor(t, dtype=x.dtype, device=x.device).exp()
        return z * self.slope(net, x, z)

    def level(self, t):
        return t.exp()

    def time(self, u):
        return u.log()

    def prior_sampling(self, shape, generator=None, device="cpu"):
        """Where field lines of a far point charge cross z = z_max: a D-variate Cauchy law.

        Its heavy tail is cut: norms are kept within [1, upper_norm], as published.
        """
        x = torch.randn(shape, generator=generator, device=device).flatten(1)
        x = self.z_max * x / torch.randn(len(x), 1, generator=generator, device=device).abs()
        norm = x.norm(dim=1, keepdim=True)
        return (x * (norm.clamp(1, self.upper_norm) / norm)).view(shape)

    def prior_norms(self, dim):
        """Up to the largest; with larger ones the network has not been trained."""
        return self.upper_norm / 4, self.upper_norm

    def prior_logp(self, x):
        """log of z_max Gamma((D+1)/2) / pi^((D+1)/2) (||x||^2 + z_max^2)^(-(D+1)/2)."""
        half = 0.5 * (x[0].numel() + 1)
        squared = x.double().flatten(1).square().sum(1) + self.z_max**2
        constant = math.log(self.z_max) + math.lgamma(half) - half * math.log(math.pi)
        return (constant - half * squared.log()).to(x.dtype)


# --- Score SDEs (Song et al. 2021, arXiv 2011.13456) ----------------------------------------------


def reverse(
    drift: Tensor, diffusion: Tensor, score: Tensor, probability_flow: bool = False
) -> tuple[Tensor, Tensor]:
    """What runs an SDE backwards (equation 6), or one step of a Markov chain (appendix E).

    Args:
        drift, diffusion: of `SDE.sde` or `SDE.discretize`, (B, C, H, W) and () or (B,).
        score: at the same x and t, (B, C, H, W).
        probability_flow: give the ODE of the same marginals (equation 13).

    Returns:
        Drift and diffusion, of the same shapes; time runs backwards, so x <- x - drift + noise.
    """
    share = 0.5 if probability_flow else 1.0
    drift = drift - share * spread(diffusion**2, score) * score
    return drift, torch.zeros_like(diffusion) if probability_flow else diffusion


@dataclass(frozen=True, kw_only=True)
class SDE(Method):
    """Noise is added by dx = c(t) x dt + g(t) dw, t in [0, 1], and removed by the learned score.

    An SDE is its marginal (`signal`, `noise`), its coefficients (`coefficients`) and its prior
    N(0, prior_std^2 I); everything else, and what runs backwards, is derived from these here.

    Attributes:
        N: steps of the discretisation, or noise levels of a discretely trained network; >= 2.
        continuous: trained at all times, else at the N levels (SMLD, DDPM).
        likelihood_weighting: the loss is weighted to bound the likelihood (arXiv 2101.09258).
    """

    N: int
    continuous: bool
    likelihood_weighting: bool

    t_prior = 1.0
    noisy_end = True
    prior_std = 1.0
    predictors = ("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "none")
    correctors = ("langevin", "ald", "none")

    @abc.abstractmethod
    def noise(self, t: Tensor) -> Tensor:
        """Standard deviation of x at time `t` around signal(t) times the data."""

    @abc.abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c and g of the SDE at time `t`, each of its shape."""

    @abc.abstractmethod
    def score(self, net: Network, x: Tensor, t: Tensor) -> Tensor:
        """The score, the gradient of log p_t at `x` (B, C, H, W), `t` () or (B,), as `net` has it.

        The one place that knows what the network is told and what it predicts.
        """

    def transition(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of the Markov chain's step to time `t`, x <- a x + b noise: here Euler's."""
        c, g = self.coefficients(t)
        return 1 + c / self.N, g / math.sqrt(self.N)

    def kernel(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise at time `t` that the network is trained with."""
        return self.signal(t), self.noise(t)

    # What follows is the same for every SDE.

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift (B, C, H, W) and diffusion (B,) at `x` and times `t` (B,)."""
        c, g = self.coefficients(t)
        return spread(c, x) * x, g.to(x)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and standard deviation (B,), given the data `x`, at times `t` (B,)."""
        return spread(self.signal(t), x) * x, self.noise(t)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """f (B, C, H, W) and G (B,) of the chain's step x <- x + f + G noise to times `t` (B,)."""
        a, b = self.transition(t)
        return spread(a - 1, x) * x, b.to(x)

    def ode(self, net, x, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        return reverse(*self.sde(x, t), self.score(net, x, t), probability_flow=True)[0]

    def level(self, t):
        return self.noise(t) / self.signal(t)

    def slope(self, net, y, u):
        """dy/du = -noise * score, the predicted noise (Karras et al. 2022, arXiv 2206.00364)."""
        t = self.time(torch.as_tensor(u, dtype=torch.float64))
        return -spread(self.noise(t), y) * self.score(net, spread(self.signal(t), y) * y, t)

    def regress(self, net, batch, generator=None, charges=None, part=(0, 1)):
        """Denoising score matching: score against -z / noise, weighted (equation 7).

        The weight of their squared distance is noise^2, or g^2 for the likelihood. At the levels of
        a discretely trained network this is the loss of SMLD (equation 1) or DDPM (equation 3).
        """
        t = self.draw_times(len(batch), generator, batch.device)
        z = torch.randn(batch.shape, generator=generator, device=batch.device, dtype=batch.dtype)
        batch, t, z = take(part, batch, t, z)
        signal, noise = (spread(c, batch) for c in self.kernel(t))
        weight = spread(self.coefficients(t)[1], batch) if self.likelihood_weighting else noise
        score = self.score(net, signal * batch + noise * z, t)
        return (weight * score).flatten(1), (-weight / noise * z).flatten(1)

    def draw_times(self, n: int, generator=None, device: torch.device | str = "cpu") -> Tensor:
        """Times (n,) of a training step: uniform in [t_data, 1], or one of the N levels'."""
        draw = {"generator": generator, "device": device}
        if self.continuous:
            t = torch.rand(n, dtype=torch.float64, **draw)
            return self.t_data + (self.t_prior - self.t_data) * t
        return torch.randint(self.N, (n,), **draw).double() / (self.N - 1)

    def index(self, t: Tensor) -> Tensor:
        """The last k (int64) of 0 .. N-1 whose time k / (N-1) is not after `t` but for rounding."""
        return (t.double() * (self.N - 1) + 5e-4).long()

    def prior_sampling(self, shape, generator=None, device="cpu"):
        return self.prior_std * torch.randn(shape, generator=generator, device=device)

    def prior_norms(self, dim):
        """Up to where almost all prior samples lie."""
        typical = self.prior_std * math.sqrt(dim)
        return typical / 2, typical

    def prior_logp(self, x):
        scaled = x.double().flatten(1) / self.prior_std
        constant = 0.5 * math.log(2 * math.pi) + math.log(self.prior_std)
        return (-0.5 * scaled.square() - constant).sum(1).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class VESDE(SDE):
    """Variance exploding: the noise grows geometrically, the data stay (equation 9; SMLD).

    Attributes:
        sigma_min, sigma_max: the noise at t = 0 and 1.
    """

    sigma_min: float
    sigma_max: float

    t_data = 1e-5

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def noise(self, t):
        return self.sigma_min * (self.log_ratio * t).exp()

    def coefficients(self, t):
        return torch.zeros_like(t), self.noise(t) * math.sqrt(2 * self.log_ratio)

    def transition(self, t):
        """One noise level up (equation 8)."""
        sigma, lower = self.adjacent(t)
        return torch.ones_like(sigma), (sigma**2 - lower**2).sqrt()

    def ancestral_std(self, t: Tensor) -> Tensor:
        """Noise of an ancestral step from `t`: that of x one level down, given x and the data."""
        sigma, lower = self.adjacent(t)
        return lower / sigma * (sigma**2 - lower**2).sqrt()

    def adjacent(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noise level of `t`, one of N, and the next lower one; 0 lies below the lowest."""
        k, levels = self.index(t), self._levels.to(t.device, non_blocking=True)
        return levels[k], torch.where(k > 0, levels[k - 1], 0.0)

    @cached_property
    def _levels(self) -> Tensor:
        """The N noise levels, rising; rounded to float32, as networks were trained with them."""
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.linspace(*ends, self.N).exp().double()

    def time(self, u):
        return (u / self.sigma_min).log() / self.log_ratio

    def score(self, net, x, t):
        """The network's output; it is told sigma, or the level's number, counted from the top."""
        if self.continuous:
            return net(x, self.noise(t).to(x).expand(len(x)))
        return net(x, ((1 - t) * (self.N - 1)).round().long().to(x.device).expand(len(x)))


@dataclass(frozen=True, kw_only=True)
class VPSDE(SDE):
    """Variance preserving: data fade while noise comes up to variance 1 (equation 11; DDPM).

    Attributes:
        beta_min, beta_max: the rate beta(t) of forgetting rises linearly between them.
    """

    beta_min: float
    beta_max: float

    t_data = 1e-3

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def decay(self, t: Tensor) -> Tensor:
        """The integral of beta from 0 to `t`."""
        return t * self.beta_min + 0.5 * t**2 * (self.beta_max - self.beta_min)

    def signal(self, t):
        return (-0.5 * self.decay(t)).exp()

    def noise(self, t):
        return (-torch.expm1(-self.decay(t))).sqrt()

    def coefficients(self, t):
        return -0.5 * self.beta(t), self.beta(t).sqrt()

    def transition(self, t):
        """A step of DDPM (equation 10)."""
        beta = self.beta(self.index(t).double() / (self.N - 1)) / self.N
        return (1 - beta).sqrt(), beta.sqrt()

    def ancestral_std(self, t: Tensor) -> Tensor:
        """Noise of an ancestral step from `t`: as published, as much as the forward step adds."""
        return self.transition(t)[1]

    def kernel(self, t):
        if self.continuous:
            return super().kernel(t)
        power = self._signal_power.to(t.device, non_blocking=True)
        variance = 1 - power[self.index(t)]
        return (1 - variance).sqrt(), variance.sqrt()

    @cached_property
    def _signal_power(self) -> Tensor:
        """Squared signal at each of the N levels of DDPM."""
        _, b = self.transition(torch.arange(self.N, dtype=torch.float64) / (self.N - 1))
        return (1 - b**2).cumprod(0)

    def time(self, u):
        return self._time_of_decay((u**2).log1p())

    def _time_of_decay(self, decay: Tensor) -> Tensor:
        growth = self.beta_max - self.beta_min
        return 2 * decay / (self.beta_min + (self.beta_min**2 + 2 * growth * decay).sqrt())

    def score(self, net, x, t):
        """Minus output over noise; the network is told 999 t, or t (N - 1)."""
        label = t * (999 if self.continuous else self.N - 1)
        return -net(x, label.to(x).expand(len(x))) / spread(self.kernel(t)[1], x)


class SubVPSDE(VPSDE):
    """sub-VP: VP with less noise on the way (equation 12). It has no discrete form."""

    predictors = ("euler_maruyama", "reverse_diffusion", "none")

    def noise(self, t):
        return -torch.expm1(-self.decay(t))

    def coefficients(self, t):
        c, g = super().coefficients(t)
        return c, g * (-torch.expm1(-2 * self.decay(t))).sqrt()

    def transition(self, t):
        return SDE.transition(self, t)

    def time(self, u):
        return self._time_of_decay(2 * (u / 2).asinh())


# --- by name --------------------------------------------------------------------------------------


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
    if training.M < 1:
        raise ValueError(f"training.M must be at least 1, not {training.M}")
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


def _sde_options(config) -> dict:
    training, model = config.training, config.model
    if model.num_scales < 2:
        raise ValueError(f"model.num_scales must be at least 2, not {model.num_scales}")
    if training.likelihood_weighting and not training.continuous:
        raise ValueError(
            "training.likelihood_weighting needs training.continuous: the losses of SMLD and DDPM "
            "have no such weighting"
        )
    return {
        "N": model.num_scales,
        "continuous": training.continuous,
        "likelihood_weighting": training.likelihood_weighting,
    }


def _vesde(config) -> VESDE:
    low, high = config.model.sigma_min, config.model.sigma_max
    if not 0 < low < high:
        raise ValueError(
            f"model.sigma_min must lie between 0 and model.sigma_max: {low} and {high} do not"
        )
    return VESDE(sigma_min=low, sigma_max=high, **_sde_options(config))


def _vpsde(config, method: type[VPSDE] = VPSDE) -> VPSDE:
    low, high = config.model.beta_min, config.model.beta_max
    if not 0 < low <= high:
        raise ValueError(
            f"model.beta_min must lie between 0 and model.beta_max: {low} and {high} do not"
        )
    return method(beta_min=low, beta_max=high, **_sde_options(config))


def _subvpsde(config) -> SubVPSDE:
    if not config.training.continuous:
        raise ValueError("subvpsde has no discrete form: training.continuous must be True")
    return _vpsde(config, SubVPSDE)


METHODS = {"poisson": _poisson, "vesde": _vesde, "vpsde": _vpsde, "subvpsde": _subvpsde}


def get_method(config) -> Method:
    """The method that `config.training.sde` names, its numbers read from the config once.

    Raises:
        ValueError: the method is unknown, or its numbers contradict each other.
    """
    name = config.training.sde.lower()
    if name not in METHODS:
        raise ValueError(f"unknown method training.sde={name!r}; known: {', '.join(METHODS)}")
    return METHODS[name](config)
