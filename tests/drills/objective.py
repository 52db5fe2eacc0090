"""A new objective in one file: the uncertainty of each noise level is learned (arXiv 2312.02696).

The loss is error / exp(u) + u. It is smallest where exp(u) is the mean error at a noise level, so
that all levels come to weigh alike.
"""

import math

import ml_collections
import torch
from torch import Tensor, nn

import losses
from configs.edm import digits_ddpmpp
from configs.schema import Key, whole


class LearnedUncertainty(losses.Regression):
    """u is a linear layer on `features` Fourier features of the noise label."""

    keys = {"training.uncertainty_features": Key(32, whole(1, 4096), "Fourier features of u")}
    options = losses.Regression.options | {"features": "training.uncertainty_features"}

    def __init__(self, method, *, features: int, **numbers):
        super().__init__(method, **numbers)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def loss(self, net, examples, reference):
        error = self.squared_errors(net, examples, reference).mean(1)
        u = self.uncertainty(examples.t)
        return (error / u.exp() + u).mean()

    def uncertainty(self, t: Tensor) -> Tensor:
        """u (B,) at times `t` (B,)."""
        label = self.method.precondition.c_noise(t).to(self.frequencies)
        return self.linear((label[:, None] * self.frequencies + self.phases).cos())[:, 0]


losses.OBJECTIVES["uncertainty"] = LearnedUncertainty


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.training.objective = "uncertainty"
    return config
