"""Learned uncertainty: regression with a learned variance of the error at each noise level."""

from torch import Tensor

from configs.schema import Key, whole
from methods.base import Method
from models.magnitude import MPFourier, MPLayer, normalise_weights
from objectives.regression import Regression


class Uncertainty(Regression):
    """`Regression` with a learned variance exp(u) of the error at each noise level.

    The loss of an entry e of the error is

        weight e^2 / exp(u) + u,    smallest where exp(u) is the mean weighted squared error,

    so that all noise levels come to weigh alike (Karras et al. 2024, arXiv 2312.02696, section
    2.2). u is a linear layer on Fourier features of ln(sigma) / 4, and not part of the network.

    Attributes:
        features, linear: the layers of u.
    """

    keys = {
        "training.uncertainty_features": Key(
            128, whole(1, 4096), "Fourier features of the learned uncertainty u"
        )
    }
    options = Regression.options | {"features": "training.uncertainty_features"}

    def __init__(self, method: Method, *, features: int = 128, **numbers):
        super().__init__(method, **numbers)
        if method.extra_channels:
            raise ValueError(
                "training.objective='uncertainty' needs an error by noise level, and "
                f"{method.name} predicts a field at heights z: use 'regression'"
            )
        self.features, self.linear = MPFourier(features), MPLayer(features, 1)

    def losses(self, net, examples, reference):
        if self.training:
            normalise_weights(self)
        u = self.log_variance(self.method.sigma(examples.t))[:, None]
        return self.squared_errors(net, examples, reference) / u.exp() + u

    def log_variance(self, sigma: Tensor) -> Tensor:
        """u (B,) at noise levels `sigma` (B,)."""
        label = (sigma / self.method.sigma_unit).log() / 4
        return self.linear(self.features(label))[:, 0]
