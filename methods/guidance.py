"""Guidance: a sampler follows a slope mixed of that of the network and that of a worse one."""

import torch
from torch import Tensor

from methods.base import Method, Network


class Guided:
    """`method` as a sampler sees it under guidance, u + weight (c - u): the rest is the method's.

    c is what the network that samples gives, and u what `other` gives: the same network without
    class labels (classifier-free guidance; Ho and Salimans 2022, arXiv 2207.12598), or a weaker one
    (autoguidance; Karras et al. 2024, arXiv 2406.02507). Mixed are slopes, and dx/dt and scores,
    which are linear in them at a given x; a Poisson flow's slope is not linear in its field.

    Args:
        method: whose slope, ODE and score are mixed.
        other: takes (x, noise_label), its conditions bound.
        weight: 1 gives c, 0 gives u.
        interval: noise levels sigma, low < sigma <= high, where there is guidance; elsewhere c
            alone (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """

    def __init__(
        self, method: Method, other: Network, weight: float, interval: tuple[float, float]
    ):
        self.method, self.other, self.weight, self.interval = method, other, weight, interval

    def __getattr__(self, name: str):
        return getattr(self.method, name)

    denoise = Method.denoise

    def slope(self, net: Network, y: Tensor, sigma: float | Tensor) -> Tensor:
        return self._mix(self.method.slope, net, y, sigma, sigma)

    def ode(self, net: Network, x: Tensor, t: float | Tensor) -> Tensor:
        return self._mix(self.method.ode, net, x, t, self._sigma(t))

    def score(self, net: Network, x: Tensor, t: Tensor) -> Tensor:
        """Of an SDE; `t` ()."""
        return self._mix(self.method.score, net, x, t, self._sigma(t))

    def _sigma(self, t: float | Tensor) -> Tensor:
        return self.method.sigma(torch.as_tensor(t, dtype=torch.float64))

    def _mix(self, function, net, x, t, sigma) -> Tensor:
        c, (low, high) = function(net, x, t), self.interval
        if not low < torch.as_tensor(sigma).max().item() <= high:
            return c
        u = function(self.other, x, t)
        return u + self.weight * (c - u)
