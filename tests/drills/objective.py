"""A new objective in one file: a table has a learned log variance of each range of noise levels.

The loss is error / exp(u) + u. It is smallest where exp(u) is the mean error in a range, so that
all ranges come to weigh alike. (`objectives/uncertainty.py` learns a smooth u.)
"""

import ml_collections
import torch
from torch import Tensor, nn

import losses
from configs.edm import digits_ddpmpp
from configs.schema import Key, whole

LOWEST, HIGHEST = -4.0, 2.0  # ln sigma of the outer ranges' borders


class Table(losses.Regression):
    """u is the entry of `table` (bins,) for the range that ln sigma is in."""

    keys = {"training.bins": Key(32, whole(1, 4096), "Table: ranges of the noise level")}
    options = losses.Regression.options | {"bins": "training.bins"}

    def __init__(self, method, *, bins: int, **numbers):
        super().__init__(method, **numbers)
        self.table = nn.Parameter(torch.zeros(bins))

    def loss(self, net, examples, reference):
        error = self.squared_errors(net, examples, reference).mean(1)
        u = self.uncertainty(examples.t)
        return (error / u.exp() + u).mean()

    def uncertainty(self, t: Tensor) -> Tensor:
        """u (B,) at times `t` (B,)."""
        share = (self.method.sigma(t).log() - LOWEST) / (HIGHEST - LOWEST)
        bins = len(self.table)
        return self.table[(share * bins).long().clamp(0, bins - 1)]


losses.OBJECTIVES["table"] = Table


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.training.objective = "table"
    return config
