"""PFGM++ (Xu et al. 2023, arXiv 2302.04265) and EDM (Karras et al. 2022, arXiv 2206.00364)."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from methods import student_t
from methods.base import Method, Preconditioning, conditioned, rising, spread
from methods.field import own_class, posterior_mean
from sources.batch import Batch

TARGETS = ("image", "posterior_mean")


@dataclass(frozen=True, kw_only=True)
class Examples(Batch):
    """Images perturbed to the noise levels `sigma` (B,), and the `clean` ones (B, C, H, W)."""

    sigma: Tensor
    clean: Tensor


@dataclass(frozen=True, kw_only=True)
class PFGMPP(Method):
    """Data in N dimensions are charges in N + D; by symmetry only the distance r of the D counts.

    An image becomes x = y + sigma t, t a Student t with D degrees of freedom and r = sigma sqrt(D).
    D = 1 is PFGM's kernel, D = inf a Gaussian, that of EDM. Time is the noise level sigma. For
    every D the sampling ODE is dx/dsigma = (x - E[y | x, sigma]) / sigma, and preconditioning, law
    of the noise levels and weight of the loss are EDM's.

    Attributes:
        D: augmenting dimensions, a number > 0 (configs allow 0.5 to 1e12) or `math.inf`.
        sigma_min, sigma_max: noise levels where sampling ends, before a step to 0, and starts.
        sigma_data: standard deviation of the scaled images' entries.
        P_mean, P_std: of ln sigma in training, which is normal.
        target_kind: "image", the clean one; or its "posterior_mean" over the reference batch.
    """

    D: float
    sigma_min: float
    sigma_max: float
    sigma_data: float
    P_mean: float
    P_std: float
    target_kind: str = "image"

    positive_labels = False
    gaussian = True  # exactly for D = inf; for a finite D as published
    noisy_end = True

    @classmethod
    def from_config(cls, config):
        model, target = config.model, config.training.target
        low, high = rising(config, "sampling.sigma_min", "sampling.sigma_max")
        if target not in TARGETS:
            raise ValueError(f"unknown training.target={target!r}; known: {', '.join(TARGETS)}")
        for key in ("D", "sigma_data", "P_std"):
            if not model[key] > 0:
                raise ValueError(f"model.{key} must be positive, not {model[key]}")
        numbers = {key: model[key] for key in ("D", "sigma_data", "P_mean", "P_std")}
        return cls(sigma_min=low, sigma_max=high, target_kind=target, **numbers)

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
        """The network's output as the denoised image (arXiv 2206.00364, table 1)."""
        sd = self.sigma_data
        return Preconditioning(
            c_noise=lambda sigma: sigma.log() / 4,
            c_in=lambda sigma: (sigma**2 + sd**2).rsqrt(),
            c_out=lambda sigma: sigma * sd * (sigma**2 + sd**2).rsqrt(),
            c_skip=lambda sigma: sd**2 / (sigma**2 + sd**2),
        )

    @cached_property
    def precondition_slope(self) -> Preconditioning:
        """Its output as (x - denoised) / sigma, without the difference, which would round."""
        sd = self.sigma_data
        return replace(
            self.precondition,
            c_out=lambda sigma: -sd * (sigma**2 + sd**2).rsqrt(),
            c_skip=lambda sigma: sigma / (sigma**2 + sd**2),
        )

    # --- training ---

    def draw(self, batch, generator=None):
        y = batch.images
        draw = {"generator": generator, "device": y.device, "dtype": torch.float64}
        sigma = (self.P_mean + self.P_std * torch.randn(len(y), **draw)).exp()
        x = self.perturb_at(y, sigma, generator)
        return Examples(images=x, labels=batch.labels, sigma=sigma, clean=y)

    def target(self, examples, reference):
        if self.target_kind == "image":
            return examples.clean.flatten(1)
        x, sigma = examples.images, examples.sigma
        among = own_class(examples, reference)
        return posterior_mean(x, reference.images, sigma, self.D, among).flatten(1)

    def predict(self, net, examples):
        return self.precondition(net, examples.images, examples.sigma).flatten(1)

    def weight(self, examples):
        """1 / c_out^2, so that the error of the network's own output has the weight 1."""
        sigma, sd = examples.sigma, self.sigma_data
        return (sigma**2 + sd**2) / (sigma * sd) ** 2

    # --- sampling ---

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

    def slope(self, net, y, sigma):
        return self.precondition_slope(net, y, torch.as_tensor(sigma, dtype=torch.float64))

    def ode(self, net, x, t):
        return self.slope(net, x, t)

    def denoise(self, net, y, sigma, **conditions):
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return self.precondition(conditioned(net, conditions), y, sigma)

    def perturb_at(self, images, t, generator=None):
        draw = {"generator": generator, "device": images.device}
        noise = torch.randn(images.shape, dtype=images.dtype, **draw)
        wider = student_t.inverse_root_gamma(len(images), self.D, **draw)
        sigma = torch.as_tensor(t, dtype=torch.float64, device=images.device)
        return images + spread(sigma * wider, images) * noise

    def prior_sampling(self, shape, generator=None, device="cpu"):
        return self.perturb_at(torch.zeros(shape, device=device), self.sigma_max, generator)

    def prior_norms(self, dim):
        """Up to that of Gaussian prior samples; for small D many have larger ones."""
        typical = self.sigma_max * math.sqrt(dim)
        return typical / 2, typical

    def prior_logp(self, x):
        return student_t.log_density(x, self.sigma_max, self.D)


class EDM(PFGMPP):
    """PFGM++ with D = inf, whatever `model.D` is."""

    @classmethod
    def from_config(cls, config):
        return replace(super().from_config(config), D=math.inf)
