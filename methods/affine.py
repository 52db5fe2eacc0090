"""Affine paths between data and a Student t: the base of PFGM++, EDM, flows and EDM's table 1."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch

from configs.schema import NOISE_LEVEL, Key, Number, OneOf
from methods.base import Method, conditioned, linear, scaled, spread
from methods.field import own_class, posterior_mean
from methods.preconditioning import Preconditioning
from methods.transport import transport

TARGETS = ("image", "posterior_mean")
COUPLINGS = ("independent", "transport")

KEYS = {
    "training.target": Key(
        "image",
        OneOf(TARGETS),
        "PFGM++, EDM and flows: what the denoiser learns, the clean image or its posterior mean "
        "over the reference batch",
    ),
    "sampling.sigma_min": Key(
        0.002,
        NOISE_LEVEL,
        "PFGM++, EDM and flows: last noise level before 0, below sigma_max",
        scales="level",
    ),
    "sampling.sigma_max": Key(
        80.0,
        NOISE_LEVEL,
        "PFGM++, EDM and flows: first noise level; None: 160 times sigma_data",
        opens=True,
        scales="level",
    ),
    "model.D": Key(
        2048.0,
        Number(0.5, 10**12, or_inf=True),
        "PFGM++: augmenting dimensions; inf is EDM. Flows: degrees of freedom of their noise; inf: "
        "Gaussian",
    ),
    "model.sigma_data": Key(
        0.5,
        Number(0.001, 1000),
        "PFGM++, EDM and flows: standard deviation of the scaled images' entries; None: measured; "
        "all noise levels of the config, which are meant for 0.5, then follow it (docs/guide.md)",
        opens=True,
    ),
    "model.sigma_unit": Key(
        1.0,
        NOISE_LEVEL,
        "PFGM++, EDM and flows: unit of noise levels in the network's noise label, ln(sigma / "
        "sigma_unit) / 4; a measured sigma_data makes it sigma_data / 0.5",
        scales="level",
    ),
    "model.P_mean": Key(
        -1.2,
        Number(-10, 10),
        "PFGM++, EDM and flow.times='edm': mean of ln sigma in training; None: "
        "ln(sigma_data / 0.5) - 1.2",
        opens=True,
        scales="log",
    ),
    "model.P_std": Key(
        1.2, Number(0.001, 4), "PFGM++, EDM and flow.times='edm': deviation of ln sigma in training"
    ),
    "model.coupling": Key(
        "independent",
        OneOf(COUPLINGS),
        "PFGM++, EDM and flows: how the noise of a training step is paired with its images: "
        "'independent' of them, or by optimal 'transport', within classes, so that the sum of "
        "squared distances is least",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Affine(Method):
    """An affine path, x = alpha(t) y + std(t) n with n from a Student t of D degrees of freedom.

    A subclass gives `alpha`, `sigma`, `time` and `precondition`; the ends are noise levels. Noise
    levels of training, target and weight of the loss are EDM's unless it overrides them.

    Attributes:
        D: augmenting dimensions, the degrees of freedom of the noise, > 0, or `math.inf`.
        sigma_min, sigma_max: noise levels where sampling ends, before a step to 0, and starts.
        sigma_data: standard deviation of the scaled images' entries.
        sigma_unit: unit of noise levels in the noise label.
        P_mean, P_std: mean and standard deviation of ln sigma in training, which is normal.
        target_kind: "image", the clean one; or its "posterior_mean" over the reference batch.
        coupling: of noise and images in training: "independent"; "transport", see `transport`. The
            ODE is then that of the coupled noise, which depends on the image.
    """

    D: float
    sigma_min: float
    sigma_max: float
    sigma_data: float
    P_mean: float
    P_std: float
    target_kind: str = "image"
    sigma_unit: float = field(default=1.0, repr=False)  # in origins by their keys
    coupling: str = field(default="independent", repr=False)

    title: ClassVar[str]
    keys = KEYS
    options = {
        **{name: f"model.{name}" for name in ("D", "sigma_data", "P_mean", "P_std", "sigma_unit")},
        **{name: f"sampling.{name}" for name in ("sigma_min", "sigma_max")},
        "target_kind": "training.target",
        "coupling": "model.coupling",
    }
    predicts = "image"
    positive_labels = False
    denoises = True

    def __post_init__(self):
        measured = ("sigma_data", "sigma_max", "P_mean")
        self.check_measured(*(name for name in measured if name in self.options))
        self.check_rising("sigma_min", "sigma_max")
        for key, value, known in (
            ("training.target", self.target_kind, TARGETS),
            ("model.coupling", self.coupling, COUPLINGS),
        ):
            if value not in known:
                raise ValueError(f"unknown {key}={value!r}; known: {', '.join(known)}")
        for name in ("D", "sigma_data", "sigma_unit", "P_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} must be positive, not {getattr(self, name)}")
        if self.coupled and self.target_kind != "image":
            raise ValueError(
                f"model.coupling={self.coupling!r} needs training.target='image': the posterior "
                "mean over the reference batch takes noise to be independent of the images"
            )

    @classmethod
    def measure(cls, values, dim, data):
        if values["model.sigma_data"] is not None:
            return {}
        return {"model.sigma_data": data.standard_deviation()}

    @property
    def name(self) -> str:
        noise = "" if math.isinf(self.D) else f", D = {self.D:g}"
        return f"{self.title}{noise}{', optimal transport' if self.coupled else ''}"

    @property
    def uses_reference_batch(self) -> bool:
        return self.target_kind == "posterior_mean"

    @property
    def degrees_of_freedom(self) -> float:
        return self.D

    @property
    def coupled(self) -> bool:
        return self.coupling != "independent"

    @property
    def gaussian(self) -> bool:
        return not self.coupled  # exactly for D = inf; for a finite D as published

    def check_kernel(self, feature):
        if self.coupled:
            raise ValueError(
                f"{feature} needs noise that is independent of the images: a network of "
                f"model.coupling={self.coupling!r} has only its ODE and likelihood"
            )

    def check_conditions(self, names):
        others = [name for name in names if name != "class_labels"]
        if self.coupled and others:
            raise ValueError(
                f"model.coupling={self.coupling!r} exchanges noise within classes, which a "
                f"condition {min(others)!r} of each image rules out"
            )

    @cached_property
    def edm_preconditioning(self) -> Preconditioning:
        """Map from the network's output to the denoised image, in natural variables y and sigma.

        Source: Karras et al. 2022 (arXiv 2206.00364), table 1, last column.
        """
        sd = self.sigma_data
        return Preconditioning(
            c_noise=lambda sigma: (sigma / self.sigma_unit).log() / 4,
            c_in=lambda sigma: (sigma**2 + sd**2).rsqrt(),
            c_out=lambda sigma: sigma * sd * (sigma**2 + sd**2).rsqrt(),
            c_skip=lambda sigma: sd**2 / (sigma**2 + sd**2),
        )

    # --- the path ---

    @cached_property
    def t_prior(self) -> float:
        return self.time(torch.tensor(self.sigma_max, dtype=torch.float64)).item()

    @cached_property
    def t_data(self) -> float:
        return self.time(torch.tensor(self.sigma_min, dtype=torch.float64)).item()

    @property
    def alpha_data(self) -> float:
        return self.alpha(torch.tensor(self.t_data, dtype=torch.float64)).item()

    # --- training ---

    def draw_times(self, n, generator=None, device="cpu"):
        draw = {"generator": generator, "device": device, "dtype": torch.float64}
        return self.time((self.P_mean + self.P_std * torch.randn(n, **draw)).exp())

    def training_noise(self, batch, generator=None):
        normal, width = super().training_noise(batch, generator)
        if not self.coupled:
            return normal, width
        self.check_conditions([*batch.conditions])
        order = transport(batch.images, scaled(width, normal), batch.labels)
        return normal[order], width[order]

    def target_image(self, examples, y, sigma, reference):
        if self.target_kind == "image":
            return examples.clean
        among = own_class(examples, reference)
        return posterior_mean(y, reference.images, sigma, self.D, among)

    def target(self, examples, reference):
        if self.target_kind == "image":
            return super().target(examples, reference)
        x, alpha, std = examples.images, self.alpha(examples.t), self.std(examples.t)
        natural = x / spread(alpha, x)
        image = self.target_image(examples, natural, self.sigma(examples.t), reference)
        noise = (x - scaled(alpha, image)) / spread(std, x)
        return super().target(replace(examples, clean=image, noise=noise), reference)

    def weight(self, examples):
        """1 / c_out^2, which gives the error of the network's output itself the weight 1."""
        sigma, sd = self.sigma(examples.t), self.sigma_data
        return (sigma**2 + sd**2) / (sigma * sd) ** 2

    # --- sampling ---

    def denoise(self, net, y, sigma, **conditions):
        # from the output at once: y - sigma * slope would lose digits
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        t = self.time(sigma)
        of_state, of_output = self.slope_factors(t)
        inputs = self.precondition.inputs(scaled(self.alpha(t), y), t)
        output = conditioned(net, conditions)(*inputs)
        return linear(1 - sigma * of_state, y, -sigma * of_output, output)
