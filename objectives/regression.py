"""Regression: the squared error of a method's prediction."""

import torch
from torch import Tensor

from methods.base import Method, Network, conditioned
from objectives.base import Objective
from sources.batch import Batch


class Regression(Objective):
    """The squared error between a method's prediction and its target.

    Half the sum over the entries of an example, or with `reduce_mean` their mean, weighted by the
    method, averaged over the examples.

    Attributes:
        reduce_mean: see above.
    """

    options = {"reduce_mean": "training.reduce_mean", **Objective.options}

    def __init__(
        self,
        method: Method,
        reduce_mean: bool,
        batch_size: int,
        examples: int,
        label_dropout: float = 0.0,
        condition_dropout: float = 0.0,
    ):
        super().__init__(method, batch_size, examples, label_dropout, condition_dropout)
        self.reduce_mean = reduce_mean

    @property
    def settings(self):
        return {"reduce_mean": self.reduce_mean}

    def loss(self, net: Network, examples: Batch, reference: Batch) -> Tensor:
        losses = self.losses(net, examples, reference)
        return losses.mean() if self.reduce_mean else 0.5 * losses.sum(1).mean()

    def losses(self, net: Network, examples: Batch, reference: Batch) -> Tensor:
        """The loss (B, K) of each entry: its weighted squared error."""
        return self.squared_errors(net, examples, reference)

    def squared_errors(self, net: Network, examples: Batch, reference: Batch) -> Tensor:
        """The weighted squared errors (B, K) of the entries; for the arguments see `loss`."""
        with torch.no_grad():
            target = self.method.target(examples, reference)
            weight = self.method.weight(examples)
        prediction = self.method.predict(conditioned(net, examples.conditions), examples)
        squared = (prediction - target).square()
        return squared if weight is None else weight.to(squared)[:, None] * squared
