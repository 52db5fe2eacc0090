"""PFGM++ (Xu et al. 2023, arXiv 2302.04265) and EDM (Karras et al. 2022, arXiv 2206.00364)."""

import math
from dataclasses import dataclass, field

import torch

from methods.affine import KEYS, Affine
from methods.base import conditioned


@dataclass(frozen=True, kw_only=True)
class PFGMPP(Affine):
    """PFGM++: data of N dimensions are charges in N + D, whose field lines lead back to them.

    By symmetry only the distance r from the data in the D augmenting dimensions counts. Time is the
    noise level sigma = r / sqrt(D), and with n of a Student t with D degrees of freedom

        x = y + sigma n                                 the kernel: PFGM's for D = 1, EDM's for inf
        dx/dsigma = (x - E[y | x, sigma]) / sigma       the sampling ODE, for every D.

    Preconditioning, law of the noise levels and weight of the loss are EDM's.
    """

    @property
    def title(self) -> str:
        return "EDM" if math.isinf(self.D) else "PFGM++"

    @property
    def precondition(self):
        return self.edm_preconditioning

    @property
    def t_prior(self) -> float:
        return self.sigma_max

    @property
    def t_data(self) -> float:
        return self.sigma_min

    def sigma(self, t):
        return t

    def time(self, sigma):
        return sigma

    def ode(self, net, x, t):
        return self.slope(net, x, t)  # since t is sigma

    def denoise(self, net, y, sigma, **conditions):
        # the prediction itself: y - sigma * slope would lose digits
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return self.precondition(conditioned(net, conditions), y, sigma)


@dataclass(frozen=True, kw_only=True)
class EDM(PFGMPP):
    """PFGM++ with D = inf, which reads no `model.D`."""

    D: float = field(default=math.inf, init=False)

    keys = {name: key for name, key in KEYS.items() if name != "model.D"}
    options = {name: key for name, key in PFGMPP.options.items() if name != "D"}
