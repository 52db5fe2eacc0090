"""Sampling that starts at a lower noise level than that of the prior."""

import torch

from methods.base import Method, WithSlope


class StartingAt(WithSlope):
    """A method whose ODE is followed from the noise `level` on instead of from the prior's."""

    t_prior: float = 0.0

    def __init__(self, method: Method, level: float):
        super().__init__(method)
        self.t_prior = method.time(torch.tensor(level, dtype=torch.float64)).item()

    def slope(self, net, y, sigma):
        return self.method.slope(net, y, sigma)
