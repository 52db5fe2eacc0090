"""A new method in one file: rectified flow (Liu et al. 2023, arXiv 2209.03003)."""

import ml_collections

import methods
from configs.vp import digits_ddpmpp
from methods.base import Method, Preconditioning


class RectifiedFlow(Method):
    """x = (1 - t) y + t noise; the network predicts the velocity, noise - y."""

    t_prior, t_data = 0.999, 1e-3
    predicts = "velocity"
    precondition = Preconditioning(c_noise=lambda t: 999 * t)

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t / (1 - t)

    def time(self, sigma):
        return sigma / (1 + sigma)


methods.METHODS["rectified"] = RectifiedFlow


def get_config() -> ml_collections.ConfigDict:
    config = digits_ddpmpp.get_config()
    config.training.sde = "rectified"
    config.sampling.ode_solver = "heun"
    return config
