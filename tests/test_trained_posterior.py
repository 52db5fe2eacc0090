"""Draws of a network that is trained on Gaussian pairs, against their posterior in closed form."""

import math

import pytest
import torch
from known_laws import pfgmpp
from test_posterior import CODEC, DIM, GaussianPairs, seeded
from torch import nn

from losses import Regression
from samplers.ode import ODESampler
from sources.batch import Batch, Conditions

STEPS, BATCH = 2000, 256
CONDITIONS, DRAWS = 8, 4000
FREQUENCIES = torch.linspace(0.5, 4, 8)


class MLP(nn.Module):
    """A network of x, the condition, and waves of the noise label."""

    def __init__(self, width=128):
        super().__init__()
        layers = [nn.Linear(2 * DIM + 2 * len(FREQUENCIES), width), nn.SiLU()]
        layers += [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, DIM)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, label, image):
        waves = label.float().expand(len(x))[:, None] * FREQUENCIES
        inputs = [x.flatten(1), image.flatten(1), waves.sin(), waves.cos()]
        return self.layers(torch.cat(inputs, 1)).view_as(x)


def trained(pairs, method):
    """An MLP trained on new pairs in each step, with a learning rate that falls to 0."""
    torch.manual_seed(0)
    net, objective = MLP(), Regression(method, False, BATCH, BATCH)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        images, conditions = pairs.draw(BATCH, seed=100 + step)
        loss = objective(net, Batch(images, Conditions(image=conditions)), seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


@pytest.mark.slow
@pytest.mark.parametrize("D", [64.0, math.inf])
def test_draws_of_a_trained_network_have_mean_and_covariance_of_the_posterior(D):
    """Relative errors over new conditions; those of exact draws are 1 % and 1.7 %."""
    pairs, method = GaussianPairs(), pfgmpp(D)
    net = trained(pairs, method)
    _, conditions = pairs.draw(CONDITIONS, seed=1)
    means, spread = pairs.mean(conditions), pairs.posterior
    sampler = ODESampler(method=method, codec=CODEC, solver="unipc", n=30)
    rows = {"image": conditions.repeat_interleave(DRAWS, 0)}
    draws, _ = sampler(net, len(rows["image"]), generator=seeded(2), conditions=rows)
    draws = draws.double().view(CONDITIONS, DRAWS, DIM)
    assert (draws.mean(1) - means).norm() / means.norm() < 0.05
    centred = (draws - draws.mean(1, keepdim=True)).flatten(0, 1)
    measured = centred.T @ centred / (len(centred) - CONDITIONS)
    assert (measured - spread).norm() / spread.norm() < 0.05
