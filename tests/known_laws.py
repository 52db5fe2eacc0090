"""Score SDEs and networks whose distributions are known in closed form."""

import methods
from methods.base import spread

_PUBLISHED = {"N": 1000, "continuous": True, "likelihood_weighting": False}
VE = methods.VESDE(sigma_min=0.01, sigma_max=50.0, **_PUBLISHED)
VP = methods.VPSDE(beta_min=0.1, beta_max=20.0, **_PUBLISHED)
SUBVP = methods.SubVPSDE(beta_min=0.1, beta_max=20.0, **_PUBLISHED)
SDES = {"ve": VE, "vp": VP, "subvp": SUBVP}  # as the golden numbers were measured with


def time_of(sde, noise_label):
    """The time that a network is told as `noise_label` (B,), by the definition of each label."""
    if isinstance(sde, methods.VESDE):
        if sde.continuous:
            return sde.time(noise_label)
        return 1 - noise_label.double() / (sde.N - 1)
    return noise_label / (999 if sde.continuous else sde.N - 1)


def gaussian_network(sde, mean=0.0, std=0.5):
    """A network with the exact score of data N(mean, std^2), of independent entries."""

    def net(x, noise_label):
        alpha, noise = (spread(c, x) for c in sde.kernel(time_of(sde, noise_label)))
        score = (alpha * mean - x) / ((alpha * std) ** 2 + noise**2)
        return score if isinstance(sde, methods.VESDE) else -noise * score

    return net
