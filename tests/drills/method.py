"""A new method in one file: EDM (Karras et al. 2022, arXiv 2206.00364)."""

import math
from dataclasses import dataclass

import ml_collections
import torch
from torch import Tensor

import methods
from configs.vp import digits_ddpmpp
from methods.base import Method, Preconditioning, spread
from sources.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Examples(Batch):
    """Images perturbed to the noise levels `sigma` (B,), and the `clean` ones (B, C, H, W)."""

    sigma: Tensor
    clean: Tensor


@dataclass(frozen=True, kw_only=True)
class EDM(Method):
    """x = y + sigma noise; the time is ln sigma, and the network gives the denoised image."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2

    noisy_end = True

    @classmethod
    def from_config(cls, config):
        return cls(sigma_max=config.model.sigma_max)

    @property
    def t_prior(self) -> float:
        return math.log(self.sigma_max)

    @property
    def t_data(self) -> float:
        return math.log(self.sigma_min)

    @property
    def precondition(self) -> Preconditioning:
        """Table 1, as functions of sigma; its output is the denoised image."""
        sd = self.sigma_data
        return Preconditioning(
            c_noise=lambda sigma: sigma.log() / 4,
            c_in=lambda sigma: (sigma**2 + sd**2).rsqrt(),
            c_out=lambda sigma: sigma * sd * (sigma**2 + sd**2).rsqrt(),
            c_skip=lambda sigma: sd**2 / (sigma**2 + sd**2),
        )

    def draw(self, batch, generator=None):
        y = batch.images
        draw = {"generator": generator, "device": y.device}
        t = self.P_mean + self.P_std * torch.randn(len(y), dtype=torch.float64, **draw)
        x = self.perturb_at(y, t, generator)
        return Examples(images=x, labels=batch.labels, sigma=t.exp(), clean=y)

    def target(self, examples, reference):
        return examples.clean.flatten(1)

    def predict(self, net, examples):
        return self.precondition(net, examples.images, examples.sigma).flatten(1)

    def weight(self, examples):
        sigma, sd = examples.sigma, self.sigma_data
        return (sigma**2 + sd**2) / (sigma * sd) ** 2

    def sigma(self, t):
        return t.exp()

    def time(self, sigma):
        return sigma.log()

    def slope(self, net, y, sigma):
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return (y - self.precondition(net, y, sigma)) / spread(sigma, y)

    def ode(self, net, x, t):
        """dx/dt = sigma dx/dsigma."""
        sigma = torch.as_tensor(t, dtype=torch.float64).exp()
        return spread(sigma, x) * self.slope(net, x, sigma)

    def perturb_at(self, images, t, generator=None):
        draw = {"generator": generator, "device": images.device, "dtype": images.dtype}
        return images + spread(self.sigma(t), images) * torch.randn(images.shape, **draw)

    def prior_sampling(self, shape, generator=None, device="cpu"):
        return self.sigma_max * torch.randn(shape, generator=generator, device=device)

    def prior_norms(self, dim):
        return self.sigma_max * math.sqrt(dim) / 2, self.sigma_max * math.sqrt(dim)

    def prior_logp(self, x):
        squared = (x.double().flatten(1) / self.sigma_max).square().sum(1)
        constant = x[0].numel() * (0.5 * math.log(2 * math.pi) + math.log(self.sigma_max))
        return (-0.5 * squared - constant).to(x.dtype)


methods.METHODS["edm"] = EDM


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.training.sde = "edm"
    config.model.sigma_max = 80.0
    config.sampling.ode_solver = "heun"
    return config
