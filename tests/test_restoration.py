"""Restoration against the posterior of Gaussian data, which has a closed form."""

import math
from dataclasses import replace
from functools import partial

import torch
from known_laws import FAMILY, SDES, denoising_network, pfgmpp, time_of

import methods
from methods.base import spread
from methods.restoration import (
    RESTORERS,
    Guided,
    Measurement,
    get_operator,
    replacement,
)
from sampling import solve_ode
from solvers.predictor_corrector import predictor_corrector

POISSON = methods.Poisson(
    sigma_end=0.01,
    tau=0.03,
    M=291,
    restrict_M=True,
    gamma=5.0,
    z_max=60.0,
    z_min=1e-3,
    z_exp=0.0,
    upper_norm=1e6,
)
METHODS = {**SDES, **FAMILY, "pfgmpp2048": pfgmpp(2048.0), "poisson": POISSON}
KNOWN = torch.tensor([[True, True], [False, False]])


class GaussianData:
    """Images N(mean, covariance) of `shape`, with neighbouring pixels and channels alike."""

    def __init__(self, shape, white=False):
        self.shape, n = shape, math.prod(shape)
        generator = torch.Generator().manual_seed(1)
        places = torch.cartesian_prod(*(torch.arange(side) for side in shape)).double()
        covariance = 0.25 * (-torch.cdist(places, places) / 2).exp()
        self.covariance = torch.eye(n).double() if white else covariance
        self.mean = 0.2 * torch.randn(n, generator=generator, dtype=torch.float64)
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def sample(self, generator):
        noise = torch.randn(len(self.mean), generator=generator, dtype=torch.float64)
        return (self.mean + self.vectors @ (self.values.sqrt() * noise)).view(1, *self.shape)

    def denoise(self, degrees, y, sigma):
        """E[x | y] where y is x and a Student t: a mean over the noise's scale, given y."""
        c = (y.double().flatten(1) - self.mean) @ self.vectors  # in the basis of the components
        if math.isinf(degrees):
            shrunk = c * self.values / (self.values + sigma[:, None] ** 2)
        else:
            n = len(self.mean)  # g lies between what an image of no variance says, and its prior
            low = ((n + degrees) / (degrees + c.square().sum(1) / sigma**2)).log() - 28 / (
                n + degrees
            )
            high = math.log((n + degrees) / degrees) + 2.5
            shares = torch.linspace(0, 1, 150, dtype=torch.float64)[:, None, None]
            log_g = (low + shares[..., 0] * (high - low))[..., None]  # (150, B, 1)
            total = self.values + sigma[:, None] ** 2 * (-log_g).exp()  # (150, B, n)
            log_p = 0.5 * degrees * (log_g[..., 0] - log_g[..., 0].exp())
            log_p = log_p - 0.5 * (total.log() + c**2 / total).sum(-1)
            shrunk = (log_p.softmax(0)[..., None] * self.values / total).sum(0) * c
        return (self.mean + shrunk @ self.vectors.T).view_as(y)

    def network(self, method):
        """The network that is exact for these data."""
        denoise = partial(self.denoise, method.degrees_of_freedom)
        if isinstance(method, methods.PFGMPP):
            return denoising_network(denoise)
        if isinstance(method, methods.Poisson):

            def field(x, z):
                g = torch.cat([(denoise(x, z) - x).flatten(1), -z[:, None]], dim=1)
                norm = g.norm(dim=1, keepdim=True)
                g = math.sqrt(x[0].numel()) * g / (norm + method.gamma)
                return g[:, :-1].view_as(x), g[:, -1]

            return field

        def net(x, noise_label):
            t = time_of(method, noise_label)
            alpha, std = method.kernel(t)
            sigma, y = std / alpha, x / spread(alpha, x)
            noise = (y - denoise(y, sigma)) / spread(sigma, y)
            return -noise / spread(std, x) if isinstance(method, methods.VESDE) else noise

        return net

    def posterior(self, measurement):
        """Mean and covariance of x given a measurement of one image."""
        eye = torch.eye(len(self.mean), dtype=torch.float64).view(-1, *self.shape)
        A = measurement.operator.forward(eye).flatten(1).T
        A = A[A.abs().sum(1) > 0]
        value = measurement.value.flatten()
        value = value[measurement.operator.forward(eye).flatten(1).T.abs().sum(1) > 0]
        noise = measurement.noise**2 * torch.eye(len(A))
        gain = self.covariance @ A.T @ torch.linalg.inv(A @ self.covariance @ A.T + noise)
        mean = self.mean + gain @ (value - A @ self.mean)
        return mean, self.covariance - gain @ A @ self.covariance


def measured(data, task, noise):
    """A measurement of a sample of `data`."""
    generator = torch.Generator().manual_seed(2)
    operator = get_operator(task, KNOWN)
    value = operator.forward(data.sample(generator))
    added = torch.randn(data.shape, generator=generator, dtype=torch.float64)
    return Measurement(operator, value + noise * operator.forward(added[None]), noise)


def T(method):
    return torch.tensor(method.t_prior, dtype=torch.float64)


def whitened(x):
    """Rows `x` (n, N), changed a little so that their mean is 0 and their covariance 1."""
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def errors(name, task, restorer, noise=0.0, white=False, n=4000, steps=40, resample=1):
    """Relative errors of mean and covariance of n restorations."""
    method = METHODS[name]
    data = GaussianData((3, 2, 2) if task == "colour" else (1, 2, 2), white)
    one = measured(data, task, noise)
    many = replace(one, value=one.value.expand(n, *one.value.shape[1:]))
    generator, net = torch.Generator().manual_seed(0), data.network(method)
    x = method.prior_sampling((n, *data.shape), generator).double()
    if method.degrees_of_freedom == math.inf:  # leaves the restorer's error without that of n draws
        x = whitened(x.flatten(1)).view_as(x) * method.alpha(T(method)) * method.sigma(T(method))
    if restorer == "replacement":
        x = predictor_corrector(
            replace(method, N=steps),
            net,
            x,
            "euler_maruyama",
            "none",
            generator,
            noise_removal=True,
            constrain=partial(replacement, method, many),
            resample=resample,
        )
    else:
        guided = Guided(method, many, RESTORERS[restorer])
        options = {"schedule": "polynomial", "noise_removal": True}
        x, _ = solve_ode(guided, net, x, "heun", steps, **options)
    x = x if noise else many.project(x)
    x, (mean, covariance) = x.flatten(1), data.posterior(one)
    return (
        ((x.mean(0) - mean).norm() / mean.norm()).item(),
        ((x.T.cov() - covariance).norm() / covariance.norm()).item(),
    )
