"""Learned uncertainty and the decay of the learning rate: EDM2's numbers, and mathematics."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import objective_of
from test_configs import load
from test_edm2 import CASES, GOLDEN, case_inputs, case_model, close, published_weight
from torch import nn

import losses
import methods
from sources.batch import Batch
from training import learning_rate_factor

pytestmark = pytest.mark.usefixtures("one_thread")


def uncertainty(path="edm/digits_ddpmpp.py", **training):
    config = load(path)
    config.training.update(objective="uncertainty", batch_size=64, **training)
    return objective_of(config)


class Published(methods.EDM):
    """The published loss has a sigma_data of its own, 0.5 in all cases."""

    def weight(self, examples):
        return (examples.t**2 + 0.25) / (0.5 * examples.t) ** 2


def published_objective(case):
    """The objective of a case, with its published weights."""
    options, state = CASES[case]["options"], dict(map(tuple, CASES[case]["state"]))
    config = load("edm/digits_ddpmpp.py")
    config.model.sigma_data = options["sigma_data"]
    objective = losses.Uncertainty(
        Published.from_config(config),
        features=options["logvar_channels"],
        reduce_mean=True,
        batch_size=3,
        examples=3,
    )
    for parameter, name in (
        (objective.features.freqs, "logvar_fourier.freqs"),
        (objective.features.phases, "logvar_fourier.phases"),
        (objective.linear.weight, "logvar_linear.weight"),
    ):
        parameter.data = published_weight(name, tuple(state[name]))
    return objective


@pytest.mark.parametrize("case", CASES)
def test_uncertainty_losses_and_gradients_are_the_published_ones(case):
    objective, model, inputs = published_objective(case), case_model(case), case_inputs(case)
    sigma = inputs["sigma"].double()
    with torch.no_grad():
        close(objective.eval().log_variance(sigma), inputs["logvar"])
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    clean, batch = inputs["clean"], Batch(inputs["clean"])
    examples = objective.method.draw(batch)
    conditions = examples.conditions
    if inputs["labels"] is not None:
        conditions = type(conditions)(class_labels=inputs["labels"])
    examples = replace(examples, images=inputs["x"], conditions=conditions, t=sigma, clean=clean)
    model.train(), objective.train()
    with torch.no_grad():  # the published pass is the second, whose weights have magnitude 1
        objective.losses(model, examples, batch)
    entries = objective.losses(model, examples, batch).view_as(clean)
    close(entries.detach(), inputs["loss"])
    objective.loss(model, examples, batch).backward()
    parameters = [*model.parameters(), *objective.parameters()]
    norms = torch.stack([p.grad.norm() for p in parameters if p.requires_grad]).double()
    torch.testing.assert_close(norms, inputs["grad_norm"], rtol=1e-4, atol=1e-4)


def test_the_learning_rate_is_the_published_one():
    """Steps of one image each; the rate rises over 10 million, and falls from step 35,000 on."""
    with np.load(GOLDEN / "edm2.npz") as file:
        images, rates = file["lr_images"], file["lr"]
    schedule = {"n_iters": 2**40, "warmup": 10_000_000, "decay_from": 35_000 * 2048}
    values = [0.012 * learning_rate_factor(int(n), **schedule) for n in images]
    np.testing.assert_allclose(values, rates, rtol=1e-12)


def test_the_learning_rate_decays_beside_its_cooldown():
    factors = [learning_rate_factor(n, 100, cooldown=20, decay_from=25) for n in (0, 25, 64, 90)]
    assert factors == pytest.approx([1, 1, 5 / 8, 0.5 * 5 / math.sqrt(90)])


def test_the_uncertainty_becomes_the_log_of_the_mean_error():
    """The loss of each noise level is smallest at that u: 1 + ln(error)."""
    objective = uncertainty(reduce_mean=True).double()
    batch = Batch(torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double())
    examples = objective.draw(batch, generator=torch.Generator().manual_seed(1))
    examples = replace(examples, t=torch.full((64,), 0.7, dtype=torch.float64))

    def net(x, label):
        return torch.zeros_like(x)

    error = objective.squared_errors(net, examples, batch).mean().item()
    optimizer = torch.optim.LBFGS([objective.linear.weight], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = objective.eval().loss(net, examples, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    log_variance = objective.log_variance(examples.t[:1]).item()
    assert log_variance == pytest.approx(math.log(error), abs=1e-3)
    assert closure().item() == pytest.approx(1 + math.log(error), abs=1e-3)


def test_the_sum_of_entries_is_half_of_all():
    objective, summed = uncertainty(reduce_mean=True), uncertainty(reduce_mean=False)
    summed.load_state_dict(objective.state_dict())
    batch = Batch(torch.randn(4, 1, 8, 8))
    examples = objective.draw(batch)

    def net(x, label):
        return x.tanh()

    mean, half = (each.loss(net, examples, batch).item() for each in (objective, summed))
    assert half == pytest.approx(64 / 2 * mean, rel=1e-5)


@pytest.mark.parametrize("path", ["pfgmpp/digits_ddpmpp.py", "vp/digits_ddpmpp.py"])
def test_other_methods_learn_it_of_their_noise_levels(path):
    objective, batch = uncertainty(path), Batch(torch.randn(4, 1, 8, 8))
    loss = objective(lambda x, label: x.tanh(), batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite() and objective.linear.weight.grad.abs().sum() > 0
    trained = [name for name, p in objective.named_parameters() if p.requires_grad]
    assert trained == ["linear.weight"]


def test_scaled_data_have_the_uncertainty_of_unscaled_ones():
    config = load("edm/digits_ddpmpp.py")
    config.training.objective, objectives = "uncertainty", []
    for unit in (1.0, 3.0):
        config.model.sigma_unit = unit
        torch.manual_seed(0)
        objectives.append(objective_of(config))
    sigma = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(*(o.log_variance(o.method.sigma_unit * sigma) for o in objectives))


def test_training_normalises_its_weights_and_evaluation_does_not():
    objective, batch = uncertainty(), Batch(torch.randn(4, 1, 8, 8))
    nn.init.constant_(objective.linear.weight, 3.0)
    for mode, size in ((False, 3.0), (True, 1.0)):
        objective.train(mode)(lambda x, label: x, batch)
        torch.testing.assert_close(
            objective.linear.weight.detach(), torch.full((1, 128), size), rtol=1e-3, atol=0
        )


def test_a_field_has_no_noise_levels():
    with pytest.raises(ValueError, match="'uncertainty' needs an error by noise level, and PFGM "):
        uncertainty("poisson/digits_ddpmpp.py", small_batch_size=0)
