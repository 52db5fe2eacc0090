"""The examples of docs/extending.md, run as they stand there."""

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, train_state
from known_laws import denoising_network, pfgmpp, time_of
from test_seams import REGISTRIES

import datasets
import methods
import models
import sampling
import solvers
import sources
from configs.default import check
from configs.poisson import digits_ddpmpp as poisson_digits
from configs.ve import digits_ncsnpp as ve_digits
from configs.vp import digits_ddpmpp as vp_digits
from likelihood import get_likelihood_fn
from losses import get_loss_fn
from methods import restoration
from methods.base import spread
from metrics import table
from metrics.distances import Gaussian
from metrics.reference import Reference
from sources.batch import Batch
from sources.codec import from_config as get_codec

PAGE = (ROOT / "docs/extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE, re.M | re.S))


@pytest.fixture(autouse=True)
def registries():
    """Each test starts with the registries as they are, and leaves them so."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def run(section):
    names = {"__name__": "example"}
    exec(compile(SECTIONS[section], section, "exec"), names)
    return names


def test_eleven_examples_of_at_most_twenty_lines():
    assert len(SECTIONS) == PAGE.count("```python") == 11
    for section, code in SECTIONS.items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 20, section
        assert max(map(len, lines)) <= 100, section


def test_source():
    run("A data source")
    config = vp_digits.get_config()
    config.data.dataset = "Checkerboards"
    data = [datasets.get_dataset(config, split) for split in ("train", "test")]
    assert [d.shape for d in data] == [(4, 1, 8, 8), (2, 1, 8, 8)]
    assert data[0][1, 0, 0].tolist() == [0, 0, 255, 255, 0, 0, 255, 255]


def test_codec():
    run("A codec")
    config = vp_digits.get_config()
    config.data.update(codec="scaled", scale=0.25)
    codec, images = get_codec(config), torch.rand(5, 1, 8, 8)
    assert codec.encode(torch.tensor([0.0, 1.0])).tolist() == list(codec.bounds) == [-0.25, 0.25]
    torch.testing.assert_close(codec.decode(codec.encode(images)), images)
    # bits/dim are those of the images, in whatever units the network sees them
    config.eval.divergence, config.data.image_size = "exact", 2
    config.sampling.update(rtol=1e-6, atol=1e-6)
    x, bits = images[:, :, :2, :2].double(), []
    for name, scale in (("", 1.0), ("scaled", 0.25)):
        config.data.codec = name
        method = pfgmpp(sigma_min=0.002 * scale, sigma_max=80 * scale)
        method, variance = replace(method, sigma_data=0.5 * scale), (0.6 * scale) ** 2
        net = denoising_network(
            lambda y, sigma, v=variance: y * v / (v + spread(sigma, y) ** 2), sd=0.5 * scale
        )
        bits.append(get_likelihood_fn(config, method)(net, get_codec(config).encode(x))[0])
    torch.testing.assert_close(*bits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("default", [poisson_digits, vp_digits])
def test_network(default):
    run("A network")
    config = default.get_config()
    config.model.update(name="two_layers", width=16)
    net, method = models.create_model(config), methods.get_method(config)
    loss = get_loss_fn(config, method)(net, torch.rand(96, 1, 8, 8))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_method():
    run("A method")
    config = ve_digits.get_config()
    config.training.sde = "lognormal_ve"
    config.model.update({"nf": 8, "scale_by_sigma": True})
    method = methods.get_method(config)
    t = method.draw_times(20000, torch.Generator().manual_seed(0))
    assert method.sigma(t).log().median().item() == pytest.approx(-1.2, abs=0.05)
    assert method.t_data <= t.min() < t.max() <= method.t_prior
    loss = get_loss_fn(config, method)(models.create_model(config), torch.rand(96, 1, 8, 8))
    assert loss.isfinite()
    config.sampling.N = 2
    config.sampling.ode_solver = "heun"
    sample = sampling.get_sampling_fn(config, method)
    images, nfe = sample(models.create_model(config).eval(), num=2)
    assert (images.shape, nfe) == ((2, 1, 8, 8), 3)


def test_objective():
    run("An objective")
    config = vp_digits.get_config()
    config.training.update(objective="huber", huber=2.0, batch_size=96)
    method, net = methods.get_method(config), lambda x, label: torch.zeros_like(x)
    objective, batch = get_loss_fn(config, method), Batch(torch.rand(96, 1, 8, 8))
    examples = objective.draw(batch, generator=torch.Generator().manual_seed(0))
    squared = examples.noise.square().flatten(1).sum(1)
    expected = ((squared + 4).sqrt() - 2).mean()
    torch.testing.assert_close(objective.loss(net, examples, batch), expected)
    assert objective.batch_size == 96


def test_optimiser():
    run("An optimiser")
    config = vp_digits.get_config()
    config.optim.update(optimizer="sgd", momentum=0.5, lr=0.1, warmup=0, cooldown=0)
    config.model.nf = 8
    state = train_state(config)
    before = [p.detach().clone() for p in state.parameters]
    for p in state.parameters:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        state.set_learning_rate()
        state.apply_gradient(torch.tensor(True))
    for p, start in zip(state.parameters, before, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.1 * (1 + 1.5))
    other = train_state(config)
    other.load_state_dict(copy.deepcopy(state.state_dict()))
    buffers = [s.optimizer.state[s.parameters[0]]["momentum_buffer"] for s in (state, other)]
    assert torch.equal(*buffers)


def test_solver():
    run("A solver")
    solve, errors = solvers.SOLVERS["ralston"].solve, []
    for n in (20, 40):
        levels, steps = torch.linspace(1, 0, n + 1, dtype=torch.float64), []
        one = torch.ones(1, dtype=torch.float64)
        x = solve(lambda x, level: level * x, one, levels, steps.append)
        errors.append(abs(x.item() - math.exp(-0.5)))
        assert [step.level for step in steps] == levels[:-1].tolist()
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # order 2
    method = methods.get_method(vp_digits.get_config())
    noise = method.prior_sampling((2, 1, 8, 8))
    _, nfe = sampling.solve_ode(method, lambda x, label: x, noise, "ralston", 5)
    assert nfe == 10


def test_schedule():
    run("A schedule")
    method = methods.get_method(poisson_digits.get_config())
    levels = solvers.SCHEDULES["trigonometric"](method, 8, 7.0)
    assert levels[[0, -1]].tolist() == pytest.approx([method.z_max, method.z_min])
    lengths = levels.atan().diff()
    torch.testing.assert_close(lengths, lengths[:1].expand(8))
    noise, net, steps = method.prior_sampling((2, 1, 8, 8)), lambda x, z: (x, -z), []
    options = {"schedule": "trigonometric", "callback": steps.append}
    sampling.solve_ode(method, net, noise, "forward_euler", 8, **options)
    assert [step.level for step in steps] == levels[:-1].tolist()


def test_callback():
    example = run("Guidance, films, progress")
    assert example["evaluations"] == 2 * 5 - 1
    film = torch.stack(example["film"])
    assert film.shape == (5, 4, 1, 8, 8)
    assert film.isfinite().all()
    last = ((film[-1] + 1) / 2).clamp(0, 1)  # the last step is Euler's, to noise level 0
    torch.testing.assert_close(example["images"], last, rtol=0, atol=1e-5)


def test_restorer():
    run("A restorer")
    config = vp_digits.get_config()
    config.sampling.update(restorer="null_space", ode_solver="heun", N=4)
    check(config)
    operator, steps = restoration.superresolution(2), []
    value = operator.forward(torch.rand(3, 1, 8, 8) - 0.5)
    measurement = restoration.Measurement(operator, value)
    method = methods.get_method(config)
    sample = replace(sampling.get_sampling_fn(config, method), measurement=measurement)

    def net(x, label):  # the denoised image is grey
        return x / method.kernel(time_of(method, label))[1].view(-1, 1, 1, 1)

    images, _ = sample(
        net,
        num=3,
        generator=torch.Generator().manual_seed(0),
        callback=steps.append,
    )
    for step in steps:  # the denoised image of every step has the measurement
        denoised = step.x - step.level * step.slope
        torch.testing.assert_close(operator.forward(denoised), value, rtol=0, atol=2e-3)
    assert images.shape == (3, 1, 8, 8)


def test_metric():
    run("A metric")
    features = np.random.default_rng(0).normal(size=(2000, 3))
    reference = Reference(gaussian=Gaussian.fit(features / 2))
    values = table.compare(table.Comparison(features, None, reference))
    assert values["variance"] == pytest.approx(4, rel=1e-3)
    assert values["fid"] > 0
    assert sources.SOURCES.keys() >= {"digits", "folder"}
