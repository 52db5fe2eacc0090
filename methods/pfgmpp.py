"""PFGM++ (Xu et al. 2023, arXiv 2302.04265) and EDM (Karras et al. 2022, arXiv 2206.00364)."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from configs.schema import NOISE_LEVEL, Key, Number, OneOf
from methods.base import Method, Preconditioning, conditioned
from methods.field import own_class, posterior_mean

TARGETS = ("image", "posterior_mean")

KEYS = {
    "training.target": Key(
        "image",
        OneOf(TARGETS),
        "PFGM++ and EDM: what the denoiser learns, the clean image or its posterior mean over the "
        "reference batch",
    ),
    "sampling.sigma_min": Key(
        0.002,
        NOISE_LEVEL,
        "PFGM++ and EDM: last noise level before 0, below sigma_max",
        scales="level",
    ),
    "sampling.sigma_max": Key(
        80.0,
        NOISE_LEVEL,
        "PFGM++ and EDM: first noise level; None: 160 times sigma_data",
        opens=True,
        scales="level",
    ),
    "model.D": Key(
        2048.0, Number(0.5, 10**12, or_inf=True), "PFGM++: augmenting dimensions; inf is EDM"
    ),
    "model.sigma_data": Key(
        0.5,
        Number(0.001, 1000),
        "PFGM++ and EDM: standard deviation of the scaled images' entries; None: measured; all "
        "noise levels of the config, which are meant for 0.5, then follow it (docs/guide.md)",
        opens=True,
    ),
    "model.sigma_unit": Key(
        1.0,
        NOISE_LEVEL,
        "PFGM++ and EDM: the network's noise label is ln(sigma / sigma_unit) / 4; a measured "
        "sigma_data makes it sigma_data / 0.5",
        scales="level",
    ),
    "model.P_mean": Key(
        -1.2,
        Number(-10, 10),
        "PFGM++ and EDM: mean of ln sigma in training; None: ln(sigma_data / 0.5) - 1.2",
        opens=True,
        scales="log",
    ),
    "model.P_std": Key(1.2, Number(0.001, 4), "PFGM++ and EDM: its standard deviation"),
}


@dataclass(frozen=True, kw_only=True)
class PFGMPP(Method):
    """PFGM++: data of N dimensions are charges in N + D, whose field lines lead back to them.

    By symmetry only the distance r from the data in the D augmenting dimensions counts. Time is the
    noise level sigma = r / sqrt(D), and with n of a Student t with D degrees of freedom

        x = y + sigma n                                 the kernel: PFGM's for D = 1, EDM's for inf
        dx/dsigma = (x - E[y | x, sigma]) / sigma       the sampling ODE, for every D.

    Preconditioning, law of the noise levels and weight of the loss are EDM's.

    Attributes:
        D: augmenting dimensions > 0, or `math.inf`.
        sigma_min, sigma_max: noise levels where sampling ends, before a step to 0, and starts.
        sigma_data: standard deviation of the scaled images' entries.
        sigma_unit: noise level whose label is 0.
        P_mean, P_std: mean and standard deviation of ln sigma in training, which is normal.
        target_kind: "image", the clean one; or its "posterior_mean" over the reference batch.
    """

    D: float
    sigma_min: float
    sigma_max: float
    sigma_data: float
    P_mean: float
    P_std: float
    target_kind: str = "image"
    sigma_unit: float = field(default=1.0, repr=False)  # in origins by its key

    keys = KEYS
    options = {
        **{name: f"model.{name}" for name in ("D", "sigma_data", "P_mean", "P_std", "sigma_unit")},
        **{name: f"sampling.{name}" for name in ("sigma_min", "sigma_max")},
        "target_kind": "training.target",
    }
    predicts = "image"
    positive_labels = False
    gaussian = True  # exactly for D = inf; for a finite D as published

    def __post_init__(self):
        self.check_measured("sigma_data", "sigma_max", "P_mean")
        self.check_rising("sigma_min", "sigma_max")
        if self.target_kind not in TARGETS:
            raise ValueError(
                f"unknown training.target={self.target_kind!r}; known: {', '.join(TARGETS)}"
            )
        for name in ("D", "sigma_data", "sigma_unit", "P_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} must be positive, not {getattr(self, name)}")

    @classmethod
    def measure(cls, values, dim, data):
        if values["model.sigma_data"] is not None:
            return {}
        return {"model.sigma_data": data.standard_deviation()}

    @property
    def name(self) -> str:
        return "EDM" if math.isinf(self.D) else f"PFGM++, D = {self.D:g}"

    @property
    def uses_reference_batch(self) -> bool:
        return self.target_kind == "posterior_mean"

    @property
    def degrees_of_freedom(self) -> float:
        return self.D

    @cached_property
    def precondition(self) -> Preconditioning:
        """Network's output to the denoised image (arXiv 2206.00364, table 1, last column)."""
        sd = self.sigma_data
        return Preconditioning(
            c_noise=lambda sigma: (sigma / self.sigma_unit).log() / 4,
            c_in=lambda sigma: (sigma**2 + sd**2).rsqrt(),
            c_out=lambda sigma: sigma * sd * (sigma**2 + sd**2).rsqrt(),
            c_skip=lambda sigma: sd**2 / (sigma**2 + sd**2),
        )

    # --- the path ---

    @property
    def t_prior(self) -> float:
        return self.sigma_max

    @property
    def t_data(self) -> float:
        return self.sigma_min

    def sigma(self, t):
        return t

    def time(self, sigma):
        return sigma

    # --- training ---

    def draw_times(self, n, generator=None, device="cpu"):
        draw = {"generator": generator, "device": device, "dtype": torch.float64}
        return (self.P_mean + self.P_std * torch.randn(n, **draw)).exp()

    def target(self, examples, reference):
        if self.target_kind == "image":
            return super().target(examples, reference)
        x, among = examples.images, own_class(examples, reference)
        return posterior_mean(x, reference.images, examples.t, self.D, among).flatten(1)

    def weight(self, examples):
        """1 / c_out^2, by which the error of the network's output itself has the weight 1."""
        sigma, sd = examples.t, self.sigma_data
        return (sigma**2 + sd**2) / (sigma * sd) ** 2

    # --- sampling ---

    def ode(self, net, x, t):
        return self.slope(net, x, t)  # since t is sigma

    def denoise(self, net, y, sigma, **conditions):
        # the prediction itself: y - sigma * slope would lose digits
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return self.precondition(conditioned(net, conditions), y, sigma)


@dataclass(frozen=True, kw_only=True)
class EDM(PFGMPP):
    """PFGM++ with D = inf, which reads no `model.D`."""

    D: float = field(default=math.inf, init=False)

    keys = {name: key for name, key in KEYS.items() if name != "model.D"}
    options = {name: key for name, key in PFGMPP.options.items() if name != "D"}
