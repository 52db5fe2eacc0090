"""Consistency: the objective against published numbers and known trajectories, and its sampler."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDEN, train_state
from known_laws import denoising_network, pfgmpp
from scipy.integrate import solve_ivp
from scipy.stats import chi2, f, gamma
from torch import nn

import methods
from configs.pfgmpp import digits_consistency
from execution import HalfPrecision
from methods.base import spread
from methods.field import posterior_mean
from models.mlp import MLP
from objectives.consistency import Consistency, LevelPairs
from optimizers import OPTIMIZERS
from sources.batch import Batch, Conditions
from training import accumulate_gradient, train_step

DIMENSIONS = (4.0, 128.0, math.inf)


def objective_for(method, batch_size=8, **numbers):
    return Consistency(method, batch_size, 0, **numbers)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- published numbers ----------------------------------------------------------------------------


class StandIn(methods.EDM):
    """EDM with a denoiser in closed form, that of the published numbers."""

    def denoise(self, net, y, sigma, **conditions):
        t = spread(torch.as_tensor(sigma), y)
        return 0.25 / (0.25 + t**2) * y + 0.1 * (y * t).tanh() / (1 + t)


@pytest.fixture(scope="module")
def ect():
    with np.load(GOLDEN / "ect.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


CASES = [(2, 0), (2, 3), (2, 7), (256, 0), (4, 1)]


@pytest.mark.parametrize("c", [0.0, 0.06])
@pytest.mark.parametrize(("q", "stage"), CASES)
def test_noise_levels_and_losses_equal_those_of_ect_as_published(ect, monkeypatch, q, stage, c):
    """Numbers of locuslab/ect for D(x, t) = 0.25 / (0.25 + t^2) x + 0.1 tanh(x t) / (1 + t)."""
    numbers = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    method = StandIn(P_mean=-1.2, P_std=1.2, **numbers)
    objective = objective_for(method, 6, q=q, c=c, stages=8, growth=1.0, n_iters=8)
    draws = iter([ect["normal"].double(), ect["noise"]])
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: next(draws))
    pairs = objective.draw(Batch(ect["y"]), step=stage)
    monkeypatch.undo()
    expected = {name: ect[f"q{q}_stage{stage}_c{c}/{name}"] for name in ("t", "r", "loss")}
    torch.testing.assert_close(pairs.t.float(), expected["t"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pairs.r.float(), expected["r"], rtol=1e-5, atol=1e-7)
    losses = objective.losses(nn.Identity(), pairs, None)
    torch.testing.assert_close(losses, expected["loss"], rtol=1e-5, atol=1e-6)
    mean = objective.loss(nn.Identity(), pairs, None)
    torch.testing.assert_close(mean, expected["loss"].mean(), rtol=1e-5, atol=1e-6)


def test_stages_grow_over_a_share_of_the_steps_and_then_stay():
    objective = objective_for(pfgmpp(), stages=4, growth=0.5, n_iters=80)
    stages = [objective.stage(step) for step in range(80)]
    assert stages[:40] == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 10
    assert set(stages[40:]) == {4}
    assert objective.phase(15) == "stage_2"
    assert objective_for(pfgmpp(), stages=4, growth=0.0, n_iters=80).stage(0) == 4


# --- pairs ----------------------------------------------------------------------------------------


class InputRecorder:
    """A network that records the x that it is given."""

    def __init__(self):
        self.x = []

    def __call__(self, x, noise_label, **conditions):
        self.x.append(x * (4 * noise_label).exp().square().add(0.25).sqrt().view(-1, 1, 1, 1))
        return x


@pytest.mark.parametrize("D", [0.5, 1.0, *DIMENSIONS])
def test_a_pair_lies_on_one_ray_from_its_image(D):
    """Both points share the noise's direction and scale; its width is that of a Student t."""
    y = torch.randn(4000, 1, 2, 2, generator=generator())
    objective, net = objective_for(pfgmpp(D), len(y)), InputRecorder()
    pairs = objective.draw(Batch(y), 3, generator(1))
    assert torch.equal(pairs.clean, y)
    assert ((pairs.r >= 0) & (pairs.r < pairs.t)).all()
    objective.losses(net, pairs, Batch(y))
    above = pairs.r > 0  # at 0 the image itself is the end
    earlier, later = (each.double()[above] - y[above] for each in net.x)
    ray = spread(pairs.r / pairs.t, y)[above] * later
    scale = later.abs().amax((1, 2, 3), keepdim=True) + 1
    torch.testing.assert_close(earlier / scale, ray / scale, rtol=0, atol=2e-6)
    noise = ((pairs.images.double() - y) / spread(pairs.t, y)).flatten(1).square().sum(1)
    # |n|^2 / 4 is of an F distribution with 4 and D degrees of freedom
    median = chi2.median(4) if math.isinf(D) else 4 * f.median(4, D)
    assert (noise < median).double().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("D", DIMENSIONS)
def test_with_posterior_means_a_pair_lies_on_a_step_of_the_ode(D):
    """The step is Euler's, by the slope (x - E[y | x, t]) / t of the data of the batch."""
    y = torch.randn(64, 1, 2, 2, generator=generator())
    objective, net = objective_for(pfgmpp(D, target_kind="posterior_mean"), len(y)), InputRecorder()
    pairs = objective.draw(Batch(y), 3, generator(1))
    objective.losses(net, pairs, Batch(y))
    mean = posterior_mean(pairs.images, y, pairs.t, D)
    step = spread((pairs.r - pairs.t) / pairs.t, y) * (pairs.images - mean)
    above = pairs.r > 0
    expected = (pairs.images + step)[above]
    torch.testing.assert_close(net.x[0][above], expected.float(), rtol=1e-4, atol=1e-4)


def test_labels_are_dropped_alike_in_both_passes():
    labels = []

    def net(x, noise_label, class_labels):
        labels.append(class_labels.clone())
        return x

    batch = Batch(torch.zeros(64, 1, 2, 2), Conditions(class_labels=torch.ones(64).long()))
    objective = Consistency(pfgmpp(), 64, 0, 0.3)
    pairs = objective.draw(batch, 0, generator())
    objective.loss(net, pairs, batch)
    assert torch.equal(*labels)
    assert 5 <= (labels[0] == -1).sum() <= 35


class DropoutNetwork(nn.Module):
    """A small network with dropout that records its outputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4))
        self.outputs = []

    def forward(self, x, noise_label):
        out = self.layers(x.flatten(1)).view_as(x)
        self.outputs.append(out)
        return out


def at_one_level(objective, batch):
    """Pairs whose two levels are the same."""
    pairs = objective.draw(batch, 0, generator())
    # an image of 0, so that x - y + y is x to the last bit
    return replace(pairs, r=pairs.t, clean=torch.zeros_like(pairs.clean))


def test_both_passes_have_the_same_dropout():
    """Equal levels give equal outputs to the last bit; the next step has another mask."""
    objective, net = objective_for(pfgmpp(4.0)), DropoutNetwork()
    pairs = at_one_level(objective, Batch(torch.randn(8, 1, 2, 2)))
    objective.losses(net, pairs, None)
    objective.losses(net, pairs, None)
    first, second, third, _ = net.outputs
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.slow
def test_both_passes_have_the_same_dropout_when_compiled():
    weight, outputs = torch.ones((), requires_grad=True), []

    @partial(torch.compile, dynamic=False)
    def dropout(x):  # twice, in two graphs: without gradients and with
        return nn.functional.dropout(nn.functional.dropout(x * weight, 0.3).sin(), 0.3)

    def net(x, noise_label):
        outputs.append(dropout(x))
        return outputs[-1]

    objective = objective_for(pfgmpp(4.0))
    objective.losses(net, at_one_level(objective, Batch(torch.randn(8, 1, 2, 2))), None)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-7)
    assert 4 < (outputs[0] == 0).sum() < 28


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", DIMENSIONS)
def test_the_exact_denoiser_of_a_single_image_has_loss_zero(D):
    """A denoiser that is off by sigma / (1 + sigma) has a positive loss."""
    y = torch.randn(1, 1, 2, 2, generator=generator()).expand(16, 1, 2, 2)
    objective = objective_for(pfgmpp(D), 16)
    pairs = objective.draw(Batch(y), 5, generator(1))
    exact = denoising_network(lambda x, sigma: y.double())
    other = denoising_network(lambda x, sigma: y.double() + spread(sigma / (1 + sigma), y))
    assert objective.losses(exact, pairs, None).abs().max() < 1e-4
    assert objective.losses(other, pairs, None).min() > 1e-4


def test_where_the_smaller_level_is_zero_the_target_is_the_image():
    objective = objective_for(pfgmpp(), q=2.0, k=8.0, b=1.0)
    y = torch.randn(8, 1, 2, 2, generator=generator())
    pairs = objective.draw(Batch(y), 0, generator(1))
    assert (pairs.r == 0).sum() > 2
    net = denoising_network(lambda x, sigma: 0.5 * x.double())
    earlier = y + spread(pairs.r / pairs.t, y) * (pairs.images - y)
    ends = torch.where(spread(pairs.r == 0, y) > 0, y, 0.5 * earlier)
    apart = (0.5 * pairs.images - ends).double().flatten(1).norm(dim=1)
    expected = ((apart**2 + 0.06**2).sqrt() - 0.06) / (pairs.t - pairs.r)
    losses = objective.losses(net, pairs, None)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("c", [0.0, 0.06])
def test_no_difference_has_no_gradient(c):
    """Equal outputs have gradient 0, even for c = 0, where the distance's slope has no limit."""
    objective = objective_for(pfgmpp(), c=c)
    bias = torch.zeros((), requires_grad=True)
    pairs = at_one_level(objective, Batch(torch.zeros(8, 1, 2, 2)))
    pairs, net = replace(pairs, r=pairs.t / 2), lambda x, noise_label: x + bias
    pairs = replace(pairs, images=torch.zeros_like(pairs.images))
    (gradient,) = torch.autograd.grad(objective.losses(net, pairs, None).sum(), bias)
    assert gradient == 0


POINTS = torch.tensor([[1.0, 0.2], [-0.7, 0.5], [0.1, -1.1]], dtype=torch.float64)


@pytest.mark.parametrize("D", DIMENSIONS)
@pytest.mark.parametrize("c", [0.06, 1e5])
def test_the_gradient_becomes_that_of_the_trajectorys_derivative(D, c):
    """Its error falls linearly in t - r; the noise is summed over the posterior of x_t.

    For f of a parameter w, with the ODE's slope (x - E[y | x]) / t, it becomes

        df/dw . (df/dt + df/dx slope) / c,    1 / c the curvature of the distance.
    """
    t, x = 0.9, torch.tensor([[0.5, -0.3]], dtype=torch.float64)
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def f(x, sigma):
        s = sigma.double().view(-1, 1, 1, 1)
        return (w * x.double()).tanh() / (1 + w * s) + 0.3 * (w + s).sin() * x.double().flip(1)

    net, n = denoising_network(f), len(POINTS)
    objective = objective_for(pfgmpp(D), n, c=c)
    # the posterior of each point: its kernel's density at x
    log_p = -(2 + D) / 2 * ((x - POINTS).square().sum(1) / (D * t**2)).log1p()
    if math.isinf(D):
        log_p = -(x - POINTS).square().sum(1) / (2 * t**2)
    p = log_p.softmax(0)
    mean = posterior_mean(x.view(1, 2, 1, 1), POINTS.view(n, 2, 1, 1), torch.tensor([t]), D)
    torch.testing.assert_close(p @ POINTS, mean.double().view(2), rtol=1e-5, atol=1e-6)
    slope = ((x - p @ POINTS) / t).view(1, 2, 1, 1)
    points = POINTS.view(n, 2, 1, 1)
    of_points = {"clean": points, "noise": (x.view(1, 2, 1, 1) - points) / t}

    value, rate = torch.func.jvp(
        lambda x, s: f(x, s),
        (x.view(1, 2, 1, 1), torch.tensor([t], dtype=torch.float64)),
        (slope, torch.ones(1, dtype=torch.float64)),
    )
    (exact,) = torch.autograd.grad((value * rate.detach()).sum() / c, w)
    errors = []
    for gap in torch.tensor([1, 0.5, 0.25]) * (2e-3 if c > 1 else 2e-4):
        times = torch.full((n,), t, dtype=torch.float64)
        levels = {"t": times, "r": times - gap.item()}
        pairs = LevelPairs(images=x.view(1, 2, 1, 1).expand(n, 2, 1, 1), **levels, **of_points)
        loss = (p * objective.losses(net, pairs, None)).sum()
        errors.append((torch.autograd.grad(loss, w)[0] - exact).item() / exact.item())
    assert abs(errors[-1]) < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.08)


# --- trained --------------------------------------------------------------------------------------


def gaussian_end(D, std, radius, level):
    """|f(x, level)| at |x| = `radius` in the plane, for data N(0, std^2 I), by quadrature and ODE.

    Given the scale g of the Student t, all is Gaussian.
    """
    if math.isinf(D):
        return std * radius / math.sqrt(std**2 + level**2)
    shares = (np.arange(400) + 0.5) / 400
    g = gamma.ppf(shares, D / 2, scale=2 / D)

    def slope(sigma, r):
        variance = std**2 + sigma**2 / g
        weight = np.exp(-(r**2) / (2 * variance)) / variance
        return r * (1 - (weight * std**2 / variance).sum() / weight.sum()) / sigma

    end = solve_ivp(lambda s, r: slope(s, r[0]), (level, 1e-4), [radius], rtol=1e-8, atol=1e-10)
    return end.y[0, -1]


def trained_in_the_plane(D, steps, draw):
    """Objective, and a network trained from new weights on images `draw(n)` (n, 2, 1, 1)."""
    torch.manual_seed(0)
    net = MLP((2, 1, 1), 2, nf=32, num_blocks=2, nonlinearity="swish")
    options = {"lr": 4e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    options |= {"weight_decay": 0.0, "amsgrad": False}
    optimizer = OPTIMIZERS["adam"]([*net.named_parameters()], options)
    objective = objective_for(pfgmpp(D), 512, stages=6, n_iters=steps)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        optimizer.zero_grad()
        objective(net, Batch(draw(512)), step=step).backward()
        optimizer.step()
    return objective, net


@pytest.mark.slow
@pytest.mark.parametrize("D", [4.0, math.inf])
def test_a_network_trained_on_one_point_gives_that_point(D, one_thread):
    point = torch.tensor([0.4, -0.7]).view(1, 2, 1, 1)
    objective, net = trained_in_the_plane(D, 300, lambda n: point.expand(n, 2, 1, 1))
    for level in (0.1, 1.0, 10.0):
        x = point + level * torch.randn(64, 2, 1, 1, generator=generator())
        with torch.no_grad():
            ends = objective.method.denoise(net, x, level)
        assert (ends - point).flatten(1).norm(dim=1).mean() < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("D", [128.0, math.inf])
def test_a_trained_network_approaches_the_ends_of_the_trajectories(D, one_thread):
    """Training from new weights on Gaussian data in the plane; errors grow with the level."""
    std = 0.5
    objective, net = trained_in_the_plane(D, 500, lambda n: std * torch.randn(n, 2, 1, 1))
    directions = torch.linspace(0, 2 * math.pi, 33)[:-1]
    errors = {}
    for level in (0.1, 0.3, 1.0, 3.0, 10.0):
        radius = 1.2 * math.sqrt(std**2 + level**2)
        x = radius * torch.stack([directions.cos(), directions.sin()], 1).view(-1, 2, 1, 1)
        with torch.no_grad():
            ends = objective.method.denoise(net, x, level)
        exact = x / radius * gaussian_end(D, std, radius, level)
        errors[level] = (ends - exact).flatten(1).norm(dim=1).mean().item() / std
    print(errors)
    assert errors[0.1] < 0.02
    assert max(errors.values()) < 0.15  # a denoiser's mean is 1.14 from the end at level 10


# --- steps ----------------------------------------------------------------------------------------


def small_state(**overrides):
    config = digits_consistency.get_config()
    config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
    config.training.update(batch_size=8, small_batch_size=0, n_iters=8)
    config.update_from_flattened_dict(overrides)
    torch.manual_seed(0)
    state = train_state(config)
    for p in state.parameters:  # new networks have hardly a gradient
        p.data += 0.02 * torch.randn_like(p)
    return state


def gradient_of(state):
    return torch.cat([p.grad.flatten() for p in state.parameters])


def digits(number, **conditions):
    return Batch(torch.rand(number, 1, 8, 8, generator=generator()) * 2 - 1, Conditions(conditions))


@pytest.mark.parametrize("target", ["image", "posterior_mean"])
def test_neither_shards_nor_micro_batches_change_the_gradient(target, one_thread):
    batch, gradients = digits(32), []
    for accumulate, shards in ((1, 1), (4, 1), (2, 2)):
        state = small_state(
            **{
                "training.target": target,
                "training.accumulate": accumulate,
                "training.batch_size": 32,
                "training.small_batch_size": 8,
            }
        )
        state.step = 5
        for k in range(shards):
            accumulate_gradient(state, batch, generator(1), (k, shards))
        gradients.append(gradient_of(state) / shards)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-5)
    assert gradients[0].norm() > 0.1


def test_all_weights_learn_in_bfloat16(one_thread):
    """The first pass, without gradients, leaves no weights behind that have none."""
    full, half = small_state(), small_state()
    half.network = HalfPrecision(half.model, torch.bfloat16)
    for state in (full, half):
        accumulate_gradient(state, digits(8), generator(1))
    a, b = gradient_of(full), gradient_of(half)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95
    for p, q in zip(full.parameters, half.parameters, strict=True):
        assert (q.grad.norm() > 0) == (p.grad.norm() > 0)


@pytest.mark.parametrize("optimizer", ["Adam", "Muon", "RAdam"])
def test_a_resumed_state_goes_on_bit_for_bit(optimizer, one_thread):
    """A state resumed across a change of stage, with dropout and labels, goes on bit for bit."""
    overrides = {
        "optim.optimizer": optimizer,
        "model.dropout": 0.3,
        "data.num_classes": 10,
        "consistency.stages": 4,
    }
    batch = digits(8, class_labels=torch.arange(8))

    def steps(state, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            train_step(state, batch, generator(step))
        return state

    whole = steps(small_state(**overrides), 0, 6)
    begun = steps(small_state(**overrides), 0, 3)
    resumed = small_state(**overrides)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    steps(resumed, 3, 6)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert all(map(torch.equal, whole.ema.shadow_params, resumed.ema.shadow_params))


def test_radam_follows_its_definition():
    """Algorithm 2 of Liu et al. 2020 (arXiv 1908.03265), in float64."""
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-12}
    options |= {"weight_decay": 0.0, "amsgrad": False}
    optimizer = OPTIMIZERS["radam"]([("p", p)], options)
    x, m, v = p.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    longest = 2 / (1 - 0.999) - 1
    for t in range(1, 12):
        p.grad = torch.tensor([math.sin(t), math.cos(t) + 0.5], dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
        length = longest - 2 * t * 0.999**t / (1 - 0.999**t)
        step = m / (1 - 0.9**t)
        if length > 5:
            rectified = (length - 4) * (length - 2) * longest
            rectified /= (longest - 4) * (longest - 2) * length
            step = step * math.sqrt(rectified) * ((1 - 0.999**t) / v).sqrt()
        x = x - 0.1 * step
        optimizer.step()
        torch.testing.assert_close(p.detach(), x, rtol=1e-9, atol=1e-12)
