"""Guidance: a sampler follows a slope mixed of that of the network and that of a worse one."""

import torch
from torch import Tensor

from methods.base import Method, Network, WithSlope


class Guided(WithSlope):
    """A method under guidance: its slope is u + weight (c - u).

    c is the slope of the network that samples, and u that of `other`: the same network without
    class labels (classifier-free guidance; Ho and Salimans 2022, arXiv 2207.12598), or a weaker one
    (autoguidance; Karras et al. 2024, arXiv 2406.02507). At a given x the sampling ODE and the
    score are linear in the slope, so that they are mixed alike; a Poisson flow's slope is not
    linear in its field.

    Args:
        method: whose slope is mixed.
        other: takes (x, noise_label), its conditions bound.
        weight: 1 gives c, 0 gives u.
        interval: noise levels sigma, low < sigma <= high, where there is guidance; elsewhere c
            alone (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """

    def __init__(
        self, method: Method, other: Network, weight: float, interval: tuple[float, float]
    ):
        super().__init__(method)
        self.other, self.weight, self.interval = other, weight, interval

    def slope(self, net: Network, y: Tensor, sigma: float | Tensor) -> Tensor:
        """dy/dsigma (B, C, H, W) at `y` and noise level `sigma` (a float or 0-d tensor)."""
        c, (low, high) = self.method.slope(net, y, sigma), self.interval
        if not low < torch.as_tensor(sigma).max().item() <= high:
            return c
        u = self.method.slope(self.other, y, sigma)
        return u + self.weight * (c - u)
