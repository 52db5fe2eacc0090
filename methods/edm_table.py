"""EDM's preconditioning of VP, VE and iDDPM: columns of table 1 of Karras et al. 2022.

The table (arXiv 2206.00364) puts networks of other methods into EDM's terms, y + sigma n, to train
and sample them as EDM does. The networks predict the noise, so the denoised image is

    y - sigma F(y / sqrt(1 + sigma^2), noise label)     VP and iDDPM
    y + sigma F(y, noise label)                         VE,

whose squared error has the weight 1 / sigma^2. Noise levels are in units of `sigma_unit`.
"""

import abc
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from methods.affine import KEYS, Affine
from methods.preconditioning import Preconditioning

_UNREAD = ("model.P_mean", "model.P_std")


@dataclass(frozen=True, kw_only=True)
class TableColumn(Affine, abc.ABC):
    """A column of the table: noise levels of the time, the noise label, the network's output.

    Attributes:
        level_ends: the noise levels, in units, that the network is trained at; sampling starts and
            ends there where `sigma_max` and `sigma_min` are beyond, as published.
        variance_preserving: true where the network is given y / sqrt(1 + sigma^2).
        sign: of the network's output in the denoised image.
    """

    P_mean: float = field(default=math.nan, init=False, repr=False)
    P_std: float = field(default=1.0, init=False, repr=False)

    level_ends: ClassVar[tuple[float, float]]
    variance_preserving: ClassVar[bool] = True
    sign: ClassVar[int] = -1
    keys = {name: key for name, key in KEYS.items() if name not in _UNREAD}
    options = {name: key for name, key in Affine.options.items() if key not in _UNREAD}

    def __post_init__(self):
        super().__post_init__()
        if self.D <= 2:
            raise ValueError(
                f"{self.title} needs model.D above 2, not {self.D:g}: its network predicts the "
                "noise, which has no variance there; PFGM++ takes any D"
            )

    @abc.abstractmethod
    def level(self, t: Tensor) -> Tensor:
        """The noise level of time `t`, in units."""

    @abc.abstractmethod
    def time_of(self, level: Tensor) -> Tensor:
        """The inverse of `level`."""

    @abc.abstractmethod
    def label(self, t: Tensor) -> Tensor:
        """The noise label of time `t`."""

    def sigma(self, t):
        return self.sigma_unit * self.level(t)

    def time(self, sigma):
        return self.time_of(sigma / self.sigma_unit)

    def _end(self, sigma: float) -> float:
        low, high = self.level_ends
        level = min(max(sigma / self.sigma_unit, low), high)
        return self.time_of(torch.tensor(level, dtype=torch.float64)).item()

    @cached_property
    def t_prior(self) -> float:
        return self._end(self.sigma_max)

    @cached_property
    def t_data(self) -> float:
        return self._end(self.sigma_min)

    @cached_property
    def precondition(self) -> Preconditioning:
        preserving = self.variance_preserving
        return Preconditioning(
            c_noise=self.label,
            c_in=lambda t: (
                ((1 + self.level(t) ** 2).rsqrt() if preserving else 1) / self.sigma_unit
            ),
            c_out=lambda t: self.sign * self.sigma(t),
            c_skip=lambda t: 1.0,
        )

    def weight(self, examples):
        return self.sigma(examples.t) ** -2


class EDMVP(TableColumn):
    """VP in EDM's terms: sigma = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), label 999 t.

    Training times are uniform from 1e-5 to 1; published sampling ends at 1e-3.
    """

    title = "VP, EDM's preconditioning"
    positive_labels = True
    beta_d, beta_min = 19.9, 0.1
    t_least = 1e-5
    level_ends = tuple(math.sqrt(math.expm1(19.9 * t**2 / 2 + 0.1 * t)) for t in (1e-5, 1.0))

    def level(self, t):
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()

    def time_of(self, level):
        decay = (level**2).log1p()
        # the root of the quadratic equation, without a difference of like numbers
        return 2 * decay / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * decay).sqrt())

    def label(self, t):
        return 999 * t

    def draw_times(self, n, generator=None, device="cpu"):
        t = torch.rand(n, dtype=torch.float64, generator=generator, device=device)
        return 1 + t * (self.t_least - 1)


class EDMVE(TableColumn):
    """VE in EDM's terms: ln sigma is linear in t from ln 0.02 to ln 100, label ln(sigma / 2)."""

    title = "VE, EDM's preconditioning"
    variance_preserving = False
    sign = 1
    level_ends = (0.02, 100.0)

    def level(self, t):
        low, high = self.level_ends
        return low * (high / low) ** t

    def time_of(self, level):
        low, high = self.level_ends
        return (level / low).log() / math.log(high / low)

    def label(self, t):
        return (self.level(t) / 2).log()

    def draw_times(self, n, generator=None, device="cpu"):
        return torch.rand(n, dtype=torch.float64, generator=generator, device=device)


def _iddpm_levels(steps: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> Tensor:
    """The noise levels u_0 > ... > u_M = 0 of iDDPM's M `steps`, with a cosine schedule."""
    alpha_bars = [math.sin(math.pi / 2 * j / (steps * (C_2 + 1))) ** 2 for j in range(steps + 1)]
    levels = [0.0]
    for j in range(steps, 0, -1):
        ratio = max(alpha_bars[j - 1] / alpha_bars[j], C_1)
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / ratio - 1))
    return torch.tensor(levels[::-1], dtype=torch.float64)


class IDDPM(TableColumn):
    """iDDPM in EDM's terms (Nichol and Dhariwal 2021, arXiv 2102.09672): M = 1000 noise levels.

    Time is 1 - j / M at the level u_j, linear in ln sigma between levels; the label is the number
    M - 1 - j of the nearest one.
    """

    title = "iDDPM, EDM's preconditioning"
    levels = _iddpm_levels()
    level_ends = (levels[-2].item(), levels[0].item())

    @property
    def _rising(self) -> Tensor:
        """The logs of the levels but 0, from u_(M-1) up."""
        return self.levels[:-1].flip(0).log()

    def level(self, t):
        rising = self._rising.to(t.device)
        place = (t * len(rising)).clamp(1, len(rising)) - 1
        below = place.floor().long().clamp(max=len(rising) - 2)
        share = place - below
        return ((1 - share) * rising[below] + share * rising[below + 1]).exp()

    def time_of(self, level):
        rising, log = self._rising.to(level.device), level.log()
        below = torch.searchsorted(rising, log.contiguous(), right=True).sub(1)
        below = below.clamp(0, len(rising) - 2)
        share = ((log - rising[below]) / (rising[below + 1] - rising[below])).clamp(0, 1)
        return (below + share + 1) / len(rising)

    def label(self, t):
        levels = self.levels.to(t.device)
        nearest = (self.level(t).unsqueeze(-1) - levels).abs().argmin(-1)
        return (len(levels) - 2 - nearest).double()

    def draw_times(self, n, generator=None, device="cpu"):
        numbers = torch.randint(len(self.levels) - 1, (n,), generator=generator, device=device)
        return 1 - numbers.double() / (len(self.levels) - 1)
