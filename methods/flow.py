"""Flows: rectified flow and TrigFlow, whose networks predict the velocity of the path."""

import abc
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from configs.schema import Key, OneOf
from methods import affine
from methods.affine import Affine
from methods.preconditioning import Preconditioning

TIMES = ("uniform", "logit_normal", "edm")

KEYS = {
    "flow.times": Key(
        "uniform",
        OneOf(TIMES),
        "flows: distribution of the training times; 'uniform'; 'logit_normal': ln(sigma / "
        "sigma_unit) is standard normal; 'edm': ln sigma is normal, with model.P_mean and "
        "model.P_std",
    ),
}


@dataclass(frozen=True, kw_only=True)
class VelocityFlow(Affine, abc.ABC):
    """An affine path whose network predicts the velocity dx/dt = alpha' y + std' n.

    Noise with D <= 2 has no variance, nor has the velocity then: the network gives the denoised
    image, with EDM's preconditioning and weight.

    Attributes:
        times: law of the training times, see `flow.times`.
    """

    times: str = "uniform"

    keys = affine.KEYS | KEYS
    options = Affine.options | {"times": "flow.times"}
    positive_labels = True

    def __post_init__(self):
        super().__post_init__()
        if self.times not in TIMES:
            raise ValueError(f"unknown flow.times={self.times!r}; known: {', '.join(TIMES)}")

    @property
    @abc.abstractmethod
    def unit(self) -> float:
        """Standard deviation of the noise that x ends in, by which the network is scaled."""

    @abc.abstractmethod
    def std(self, t): ...

    @abc.abstractmethod
    def label(self, t):
        """The noise label of time `t`."""

    def sigma(self, t):
        return self.std(t) / self.alpha(t)

    @property
    def predicts(self) -> str:
        return "velocity" if self.D > 2 else "image"

    @cached_property
    def precondition(self) -> Preconditioning:
        if self.predicts == "image":
            along = self.edm_preconditioning.along(self.alpha, self.sigma)
            return replace(along, c_noise=self.label)
        return Preconditioning(
            c_noise=self.label, c_in=lambda t: 1 / self.unit, c_out=lambda t: self.unit
        )

    def draw_times(self, n, generator=None, device="cpu"):
        draw = {"generator": generator, "device": device, "dtype": torch.float64}
        if self.times == "uniform":
            return self.t_data + (self.t_prior - self.t_data) * torch.rand(n, **draw)
        if self.times == "logit_normal":
            return self.time(self.sigma_unit * torch.randn(n, **draw).exp())
        return super().draw_times(n, generator, device)

    def weight(self, examples):
        """1 / c_out^2, which gives the error of the network's output itself the weight 1."""
        if self.predicts == "image":
            return super().weight(examples)
        return None if self.unit == 1 else torch.full_like(examples.t, self.unit**-2)


class RectifiedFlow(VelocityFlow):
    """Rectified flow, also called flow matching with straight paths: x = (1 - t) y + t n.

    The velocity is n - y. With 'logit_normal' logit t, which is ln sigma, is normal.

    Sources: Liu et al. 2023 (arXiv 2209.03003), Lipman et al. 2023 (arXiv 2210.02747), Esser et
    al. 2024 (arXiv 2403.03206) for the logit-normal times.
    """

    title = "Rectified flow"

    @property
    def unit(self) -> float:
        return self.sigma_unit

    def alpha(self, t):
        return 1 - t

    def std(self, t):
        return self.unit * t

    def time(self, sigma):
        return sigma / (self.unit + sigma)

    def label(self, t):
        return 1000 * t


class TrigFlow(VelocityFlow):
    """TrigFlow (Lu and Song 2025, arXiv 2410.11081): x = cos(t) y + sigma_data sin(t) n.

    The velocity is sigma_data cos(t) n - sin(t) y, which the network gives over sigma_data.
    """

    title = "TrigFlow"

    @property
    def unit(self) -> float:
        return self.sigma_data

    def alpha(self, t):
        return t.cos()

    def std(self, t):
        return self.unit * t.sin()

    def time(self, sigma):
        return (sigma / self.unit).atan()

    def label(self, t):
        return t
