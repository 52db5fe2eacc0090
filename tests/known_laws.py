"""Methods and networks whose distributions are known in closed form."""

import math

import methods
from methods.base import WithSlope, spread

_PUBLISHED = {"N": 1000, "continuous": True, "likelihood_weighting": False}
VE = methods.VESDE(sigma_min=0.01, sigma_max=50.0, **_PUBLISHED)
VP = methods.VPSDE(beta_min=0.1, beta_max=20.0, **_PUBLISHED)
SUBVP = methods.SubVPSDE(beta_min=0.1, beta_max=20.0, **_PUBLISHED)
SDES = {"ve": VE, "vp": VP, "subvp": SUBVP}  # as the golden numbers were measured with


def pfgmpp(D=math.inf, sigma_min=0.002, sigma_max=80.0, target_kind="image"):
    """PFGM++ with the numbers of EDM."""
    return methods.PFGMPP(
        D=D,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        sigma_data=0.5,
        P_mean=-1.2,
        P_std=1.2,
        target_kind=target_kind,
    )


class WithFunction(WithSlope):
    """A method whose slope is a function of y and the noise level, whatever the network."""

    def __init__(self, method, function):
        super().__init__(method)
        self.function = function

    def slope(self, net, y, sigma):
        return self.function(y, sigma)


FAMILY = {"edm": pfgmpp(), "pfgmpp": pfgmpp(4.0)}


def time_of(sde, noise_label):
    """The time that a network is told as `noise_label` (B,), by the definition of each label."""
    if isinstance(sde, methods.VESDE):
        if sde.continuous:
            return sde.time(noise_label)
        return 1 - noise_label.double() / (sde.N - 1)
    return noise_label / (999 if sde.continuous else sde.N - 1)


def gaussian_network(method, mean=0.0, std=0.5):
    """A network that is exact for Gaussian noise on data N(mean, std^2), of independent entries."""
    if isinstance(method, methods.PFGMPP):
        return denoising_network(
            lambda x, sigma: (
                (std**2 * x + spread(sigma**2, x) * mean) / spread(std**2 + sigma**2, x)
            )
        )

    def net(x, noise_label):
        alpha, noise = (spread(c, x) for c in method.kernel(time_of(method, noise_label)))
        score = (alpha * mean - x) / ((alpha * std) ** 2 + noise**2)
        return score if isinstance(method, methods.VESDE) else -noise * score

    return net


def denoising_network(denoise, sd=0.5):
    """The network F whose EDM denoiser c_skip x + c_out F(c_in x, ln(sigma) / 4) is `denoise`.

    `denoise(x, sigma)` takes noise levels (B,); `sd` is the method's sigma_data.
    """

    def net(scaled, noise_label, **conditions):
        sigma = (4 * noise_label.double()).exp()
        s = spread(sigma, scaled)
        root = (s**2 + sd**2).sqrt()
        x = scaled * root
        return (denoise(x, sigma, **conditions) - sd**2 / root**2 * x) * root / (s * sd)

    return net
