"""Guidance: the sampler's slope is a mixture of the network's and a worse network's."""

import torch

from methods.base import Method, Network, WithSlope


class Guided(WithSlope):
    """A method under guidance, whose slope is

        u + weight (c - u),

    where c is the slope of the network that samples and u that of `other`: the same network without
    class labels (classifier-free guidance; Ho and Salimans 2022, arXiv 2207.12598), or a weaker one
    (autoguidance; Karras et al. 2024, arXiv 2406.02507). The sampling ODE and the score are linear
    in the slope, so that they are mixed alike. (The slope of a Poisson flow is not linear in its
    field: slopes are mixed, not fields.)

    Args:
        method: whose slope is mixed.
        other: network of the slope u, its conditions bound.
        weight: 1 gives c, 0 gives u.
        interval: (low, high): guidance where low < sigma <= high; elsewhere the slope is c
            (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """

    def __init__(
        self, method: Method, other: Network, weight: float, interval: tuple[float, float]
    ):
        super().__init__(method)
        self.other, self.weight, self.interval = other, weight, interval

    def slope(self, net, y, sigma):
        c, (low, high) = self.method.slope(net, y, sigma), self.interval
        if not low < torch.as_tensor(sigma).max().item() <= high:
            return c
        u = self.method.slope(self.other, y, sigma)
        return u + self.weight * (c - u)
