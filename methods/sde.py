"""Score SDEs: VE, VP and sub-VP (Song et al. 2021, arXiv 2011.13456)."""

import abc
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from configs.schema import NOISE_LEVEL, Flag, Key, Number, whole
from methods.base import Method, Network, Preconditioning, spread

KEYS = {
    "training.continuous": Key(
        True, Flag(), "SDEs: noise levels are continuous; False: SMLD and DDPM"
    ),
    "training.likelihood_weighting": Key(False, Flag(), "SDEs: weigh the loss by g(t)^2"),
    "model.num_scales": Key(
        1000, whole(2, 10**6), "noise levels, or time steps of an SDE's discretisation"
    ),
}


def reverse(
    drift: Tensor, diffusion: Tensor, score: Tensor, probability_flow: bool = False
) -> tuple[Tensor, Tensor]:
    """Drift and diffusion of the reverse SDE dx = (f - g^2 score) dt + g dw (equation 6).

    With `probability_flow` those of the ODE of the same marginals (equation 13), where half of
    g^2 score is left and no diffusion. A Markov chain's step is reversed alike (appendix E).

    Args:
        drift, diffusion: f (B, C, H, W) and g, () or (B,), of `SDE.sde` or `SDE.discretize`.
        score: at the same x and t, (B, C, H, W).
    """
    share = 0.5 if probability_flow else 1.0
    drift = drift - share * spread(diffusion**2, score) * score
    return drift, torch.zeros_like(diffusion) if probability_flow else diffusion


@dataclass(frozen=True, kw_only=True)
class SDE(Method):
    """Score SDE, by which data become noise and, by the learned score, noise becomes data:

        dx = c(t) x dt + g(t) dw,    t in [0, 1].

    A subclass gives its marginal (`alpha`, `std`), `coefficients` and `precondition`, which makes
    the network's output the predicted noise. Sampling starts from N(0, prior_scale^2 I).

    Attributes:
        N: steps of the discretisation, or noise levels of a discretely trained network; >= 2.
        continuous: trained at all times, else at the N levels (SMLD, DDPM).
        likelihood_weighting: the loss is weighted to bound the likelihood (arXiv 2101.09258).
    """

    N: int
    continuous: bool
    likelihood_weighting: bool

    keys = KEYS
    options = {
        "N": "model.num_scales",
        "continuous": "training.continuous",
        "likelihood_weighting": "training.likelihood_weighting",
    }
    t_prior = 1.0
    gaussian = True
    prior_scale = 1.0
    predictors = ("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "none")
    correctors = ("langevin", "ald", "none")

    def __post_init__(self):
        if self.N < 2:
            raise ValueError(f"model.num_scales must be at least 2, not {self.N}")
        if self.likelihood_weighting and not self.continuous:
            raise ValueError(
                "training.likelihood_weighting needs training.continuous: the losses of SMLD and "
                "DDPM have no such weighting"
            )

    @abc.abstractmethod
    def std(self, t: Tensor) -> Tensor:
        """Standard deviation of x at time `t` around alpha(t) times the data."""

    @abc.abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c and g of the SDE at time `t`, each of its shape."""

    def transition(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of the discretised SDE, a Markov chain whose step to time `t` is x <- a x + b e.

        Here e ~ N(0, I) and the step is Euler's; a method with a chain of its own overrides it.
        """
        c, g = self.coefficients(t)
        return 1 + c / self.N, g / math.sqrt(self.N)

    def check_chain(self) -> None:
        """Raise ValueError where `transition`, by which 'pc' samples, does not exist."""

    def check_likelihood(self):
        if not self.continuous:
            raise ValueError(
                "a network trained at discrete noise levels (training.continuous=False) has no "
                "likelihood: its ODE is not known between them"
            )

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift c x (B, C, H, W) and diffusion g (B,) at `x` and times `t` (B,)."""
        c, g = self.coefficients(t)
        return spread(c, x) * x, g.to(x, non_blocking=True)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and standard deviation (B,), given the data `x`, at times `t` (B,)."""
        return spread(self.alpha(t), x) * x, self.std(t)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """f (B, C, H, W) and G (B,) of the chain's step x <- x + f + G e to times `t` (B,)."""
        a, b = self.transition(t)
        return spread(a - 1, x) * x, b.to(x, non_blocking=True)

    def ode(self, net, x, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        return reverse(*self.sde(x, t), self.score(net, x, t), probability_flow=True)[0]

    def score(self, net: Network, x: Tensor, t: Tensor) -> Tensor:
        """The predicted score, the gradient of log p_t at `x` (B, C, H, W) and `t`, () or (B,)."""
        return -self.precondition(net, x, t) / spread(self.kernel(t)[1], x)

    def sigma(self, t):
        return self.std(t) / self.alpha(t)

    def slope_factors(self, t):
        """`Method.slope_factors`, scaled where a discrete network predicts noise of another std."""
        of_state, of_output = super().slope_factors(t)
        if self.continuous:
            return of_state, of_output
        ratio = self.std(t) / self.kernel(t)[1]
        return of_state, ratio * of_output

    def weight(self, examples):
        """1, or with `likelihood_weighting` g^2 / std^2, which gives the score's error g^2."""
        if not self.likelihood_weighting:
            return None
        return (self.coefficients(examples.t)[1] / self.kernel(examples.t)[1]).square()

    def draw_times(self, n, generator=None, device="cpu"):
        """Times (n,), uniform in [t_data, 1] or among those of the N levels."""
        if self.continuous:
            return super().draw_times(n, generator, device)
        numbers = torch.randint(self.N, (n,), generator=generator, device=device)
        return numbers.double() / (self.N - 1)

    def index(self, t: Tensor) -> Tensor:
        """Number k (int64) of the last of the times k / (N-1) up to `t`, with room for rounding."""
        return (t.double() * (self.N - 1) + 5e-4).long()


@dataclass(frozen=True, kw_only=True)
class VESDE(SDE):
    """Variance exploding: the noise grows and the data stay (equation 9; SMLD):

        std = sigma_min (sigma_max / sigma_min)^t.

    Attributes:
        sigma_min, sigma_max: the noise level at t = 0 and 1.
    """

    sigma_min: float
    sigma_max: float

    name = "VE SDE"
    gives_score = True
    t_data = 1e-5

    keys = SDE.keys | {
        "model.sigma_min": Key(0.01, NOISE_LEVEL, "VE SDE: smallest noise level"),
        "model.sigma_max": Key(
            50.0,
            NOISE_LEVEL,
            "VE SDE: largest noise level; None: the largest distance between two of up to "
            "2,000 training images",
            opens=True,
        ),
    }
    options = SDE.options | {name: f"model.{name}" for name in ("sigma_min", "sigma_max")}

    def __post_init__(self):
        super().__post_init__()
        self.check_measured("sigma_max")
        self.check_rising("sigma_min", "sigma_max")

    @classmethod
    def measure(cls, values, dim, data):
        """`model.sigma_max` by technique 1 of Song and Ermon (2020, arXiv 2006.09011)."""
        if values["model.sigma_max"] is not None:
            return {}
        return {"model.sigma_max": data.largest_distance()}

    @property
    def prior_scale(self) -> float:
        return self.sigma_max

    @property
    def log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def std(self, t):
        return self.sigma_min * (self.log_ratio * t).exp()

    def coefficients(self, t):
        return torch.zeros_like(t), self.std(t) * math.sqrt(2 * self.log_ratio)

    def transition(self, t):
        """a and b of SMLD's step up to the noise level of `t` (equation 8)."""
        sigma, lower = self.adjacent(t)
        return torch.ones_like(sigma), (sigma**2 - lower**2).sqrt()

    def ancestral_std(self, t: Tensor) -> Tensor:
        """Standard deviation of x one noise level below `t`, given x at `t` and the data."""
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

    def time(self, sigma):
        return (sigma / self.sigma_min).log() / self.log_ratio

    @property
    def precondition(self):
        """Network: the score, given sigma or, of discrete levels, their numbers from the top."""
        label = self.std if self.continuous else self._label
        return Preconditioning(c_noise=label, c_out=lambda t: -self.std(t))

    def _label(self, t: Tensor) -> Tensor:
        return ((1 - t) * (self.N - 1)).round().long()


@dataclass(frozen=True, kw_only=True)
class VPSDE(SDE):
    """Variance preserving: the data fade while the noise grows to variance 1 (equation 11; DDPM):

        alpha^2 = exp(-decay),    std^2 = 1 - exp(-decay),    decay = the integral of beta.

    Attributes:
        beta_min, beta_max: the rate beta(t) of forgetting rises linearly between them.
    """

    beta_min: float
    beta_max: float

    name = "VP SDE"
    t_data = 1e-3

    keys = SDE.keys | {
        "model.beta_min": Key(0.1, Number(1e-6, 100), "VP and sub-VP SDE: beta at the data"),
        "model.beta_max": Key(20.0, Number(1e-6, 100), "VP and sub-VP SDE: beta at the prior"),
    }
    options = SDE.options | {name: f"model.{name}" for name in ("beta_min", "beta_max")}

    def __post_init__(self):
        super().__post_init__()
        self.check_rising("beta_min", "beta_max", equal=True)
        if not self.continuous:
            self.check_chain()

    def check_chain(self):
        if self.beta_max >= self.N:
            raise ValueError(
                f"model.beta_max={self.beta_max:g} must be below model.num_scales={self.N} where "
                "the SDE is taken in steps, whose variance is beta / num_scales"
            )

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def decay(self, t: Tensor) -> Tensor:
        """The integral of beta from 0 to `t`."""
        return t * self.beta_min + 0.5 * t**2 * (self.beta_max - self.beta_min)

    def alpha(self, t):
        return (-0.5 * self.decay(t)).exp()

    def std(self, t):
        return (-torch.expm1(-self.decay(t))).sqrt()

    def coefficients(self, t):
        return -0.5 * self.beta(t), self.beta(t).sqrt()

    def transition(self, t):
        """a and b of DDPM's step (equation 10)."""
        beta = self.beta(self.index(t).double() / (self.N - 1)) / self.N
        return (1 - beta).sqrt(), beta.sqrt()

    def ancestral_std(self, t: Tensor) -> Tensor:
        """Standard deviation of an ancestral step's noise: the forward step's, as published."""
        return self.transition(t)[1]

    def kernel(self, t):
        if self.continuous:
            return super().kernel(t)
        squared = self._alpha_squared.to(t.device, non_blocking=True)
        variance = 1 - squared[self.index(t)]
        return (1 - variance).sqrt(), variance.sqrt()

    @cached_property
    def _alpha_squared(self) -> Tensor:
        """Squared alpha at each of the N levels of DDPM."""
        _, b = self.transition(torch.arange(self.N, dtype=torch.float64) / (self.N - 1))
        return (1 - b**2).cumprod(0)

    def time(self, sigma):
        return self.time_of_decay((sigma**2).log1p())

    def time_of_decay(self, decay: Tensor) -> Tensor:
        """The time at which the integral of beta is `decay`, the inverse of `decay(t)`."""
        growth = self.beta_max - self.beta_min
        return 2 * decay / (self.beta_min + (self.beta_min**2 + 2 * growth * decay).sqrt())

    @property
    def precondition(self):
        """Network: the noise, given 999 t or, of discrete times, their numbers t (N - 1)."""
        return Preconditioning(c_noise=lambda t: t * (999 if self.continuous else self.N - 1))


class SubVPSDE(VPSDE):
    """VP with less noise on the way, std = 1 - exp(-decay) (equation 12); no discrete form."""

    name = "sub-VP SDE"
    predictors = ("euler_maruyama", "reverse_diffusion", "none")

    def __post_init__(self):
        if not self.continuous:
            raise ValueError("subvpsde has no discrete form: training.continuous must be True")
        super().__post_init__()

    def std(self, t):
        return -torch.expm1(-self.decay(t))

    def coefficients(self, t):
        c, g = super().coefficients(t)
        return c, g * (-torch.expm1(-2 * self.decay(t))).sqrt()

    def transition(self, t):
        return SDE.transition(self, t)

    def time(self, sigma):
        return self.time_of_decay(2 * (sigma / 2).asinh())
