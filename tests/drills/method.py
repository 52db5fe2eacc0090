"""A new method in one file: rectified flow (Liu et al. 2023, arXiv 2209.03003)."""

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
    """Images at the times `t` (B,) of their lines, and their `velocity` (B, C, H, W)."""

    t: Tensor
    velocity: Tensor


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Method):
    """x = (1 - t) y + t noise; the network gives the velocity, noise - y, whose mean is dx/dt."""

    t_prior = 0.999
    t_data = 1e-3
    noisy_end = True

    @classmethod
    def from_config(cls, config):
        return cls()

    @property
    def precondition(self) -> Preconditioning:
        return Preconditioning(c_noise=lambda t: 999 * t)

    def draw(self, batch, generator=None):
        y = batch.images
        draw = {"generator": generator, "device": y.device}
        t = torch.rand(len(y), dtype=torch.float64, **draw)
        noise = torch.randn(y.shape, dtype=y.dtype, **draw)
        x = spread(1 - t, y) * y + spread(t, y) * noise
        return Examples(images=x, labels=batch.labels, t=t, velocity=noise - y)

    def target(self, examples, reference):
        return examples.velocity.flatten(1)

    def predict(self, net, examples):
        return self.precondition(net, examples.images, examples.t).flatten(1)

    def ode(self, net, x, t):
        return self.precondition(net, x, torch.as_tensor(t, dtype=torch.float64))

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t / (1 - t)

    def time(self, sigma):
        return sigma / (1 + sigma)

    def slope(self, net, y, sigma):
        """The noise: x + (1 - t) velocity."""
        t = self.time(torch.as_tensor(sigma, dtype=torch.float64))
        x = spread(1 - t, y) * y
        return x + spread(1 - t, x) * self.ode(net, x, t)

    def perturb_at(self, images, t, generator=None):
        draw = {"generator": generator, "device": images.device, "dtype": images.dtype}
        t = torch.as_tensor(t)
        return spread(1 - t, images) * images + spread(t, images) * torch.randn(
            images.shape, **draw
        )

    def prior_sampling(self, shape, generator=None, device="cpu"):
        return self.t_prior * torch.randn(shape, generator=generator, device=device)

    def prior_norms(self, dim):
        return math.sqrt(dim) / 2, math.sqrt(dim)

    def prior_logp(self, x):
        normal = torch.distributions.Normal(0.0, self.t_prior)
        return normal.log_prob(x).flatten(1).sum(1)


methods.METHODS["rectified"] = RectifiedFlow


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.training.sde = "rectified"
    config.sampling.ode_solver = "heun"
    return config
