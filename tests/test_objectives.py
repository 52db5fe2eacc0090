"""Objectives that draw examples of their own: in training, in the held-out loss, in evaluation."""

from types import SimpleNamespace

import pytest
import torch
from conftest import objective_of, train_state
from test_small_runs import tiny
from torch import nn

import distributed
import evaluation
import losses
import run_lib
import training
from configs.edm import digits_ddpmpp
from library.evaluated import Evaluated, Split
from sources.batch import Batch, Conditions
from sources.codec import EightBitImages
from sources.stream import Resident


class OfOwnDraws(losses.Regression):
    """An objective whose loss is the step in its examples; it records train and eval modes."""

    modes: list[bool]

    def __init__(self, *arguments, **numbers):
        super().__init__(*arguments, **numbers)
        self.scale, self.inner, self.modes = nn.Parameter(torch.ones(())), nn.Dropout(), []

    def draw(self, batch, step=0, generator=None):
        examples = super().draw(batch, step, generator)
        self.modes.append(self.inner.training)
        return Batch(
            examples.images, Conditions(vector=torch.full((len(examples), 1), float(step)))
        )

    def loss(self, net, examples, reference):
        self.modes.append(self.inner.training)
        return self.scale * examples.conditions["vector"].mean() + 0 * net(examples.images).sum()


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(losses.OBJECTIVES, "own", OfOwnDraws)
    config = digits_ddpmpp.get_config()
    config.training.update(objective="own", batch_size=4, small_batch_size=2)
    config.data.image_size = 2
    return config


def evaluated(objective, folder, step):
    experiment = SimpleNamespace(
        device=torch.device("cpu"),
        method=objective.method,
        objective=objective,
        objective_settings={"training.objective": "own"},
        network=lambda x, label=None, **conditions: torch.zeros_like(x),
        codec=EightBitImages((1, 2, 2)),
    )
    return Evaluated(
        experiment=experiment, folder=folder, k=1, step=step, origin={}, seed=0, batch_size=4
    )


def images_of(number):
    return (torch.rand(number, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 255).byte()


def test_the_loss_of_an_evaluation_is_of_the_draws_of_the_objective(config, tmp_path):
    objective = objective_of(config)
    data = Resident(images_of(6), Conditions())
    assert evaluation.loss(evaluated(objective, tmp_path, 7), Split("test", data), 6)["loss"] == 7
    assert not any(objective.modes)


def test_the_loss_of_an_evaluation_is_of_every_image_and_with_its_conditions():
    config = digits_ddpmpp.get_config()
    config.training.update(batch_size=4, small_batch_size=1, label_dropout=1.0)
    objective = objective_of(config)
    batch = Batch(torch.zeros(4, 1, 2, 2), Conditions(vector=torch.ones(4, 2)))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    examples = objective.whole().draw(batch, 0, generators[0])
    expected = objective.method.draw(batch, generators[1])
    assert torch.equal(examples.images, expected.images)
    assert torch.equal(examples.conditions["vector"], torch.ones(4, 2))
    assert objective.draw(batch).conditions["vector"].sum() == 0
    assert len(objective.draw(batch)) == 1  # the objective is as it was


def test_the_objective_trains_and_evaluates_with_the_network(config):
    state = train_state(config, nn.Linear(2, 2))
    modes, batch = state.objective.modes, Batch(torch.zeros(4, 1, 2, 2))
    training.train_step(state, batch)
    assert modes == [True, True]
    with state.with_ema():
        training.held_out_loss(state, batch, torch.Generator())
    assert modes == [True, True, False, False]


def test_an_objective_is_told_the_number_of_the_step(config):
    """Steps count from 0; the held-out loss after a step has the number of the next."""
    config.optim.warmup = 10**6  # so that the objective's parameter stays 1
    state = train_state(config, nn.Linear(2, 2))
    state.step, batch = 7, Batch(torch.zeros(4, 1, 2, 2))
    losses = [training.train_step(state, batch).item() for _ in range(2)]
    losses.append(training.held_out_loss(state, batch, torch.Generator()).item())
    assert losses == pytest.approx([7, 8, 9], rel=1e-4)


def test_every_step_has_draws_of_its_own_and_a_resumed_run_the_same(monkeypatch, tmp_path):
    """Recorded draws: the step's batch, its generator and the global one, which dropout uses."""
    draws = []

    class Recorded(losses.Regression):
        def draw(self, batch, step=0, generator=None):
            if self.training:
                numbers = torch.rand((), generator=generator), torch.rand(())
                draws.append((batch.images.double().sum().item(), *map(float, numbers)))
            return super().draw(batch, step, generator)

    monkeypatch.setitem(losses.OBJECTIVES, "recorded", Recorded)
    options = {"training__objective": "recorded", "training__snapshot_sampling": False}
    runs = {}
    for workdir, stops in (("whole", (4,)), ("resumed", (2, 4))):
        for n_iters in stops:
            config = tiny("vp/digits_ddpmpp.py", tmp_path, **options, training__n_iters=n_iters)
            assert run_lib.train(config, tmp_path / workdir)
        runs[workdir] = draws[:]
        draws.clear()
    assert runs["whole"] == runs["resumed"]
    for numbers in zip(*runs["whole"], strict=True):  # four steps each
        assert len({*numbers}) == 4


@pytest.mark.parametrize("target, transformations", [("image", 32), ("posterior_mean", 1)])
def test_a_reference_batch_is_transformed_as_one(monkeypatch, tmp_path, target, transformations):
    """For posterior means; where the image is the target, each has a transformation of its own."""
    labels = []

    class Recorded(losses.Regression):
        def draw(self, batch, step=0, generator=None):
            if self.training:
                labels.append(batch.conditions["augment_labels"])
            return super().draw(batch, step, generator)

    monkeypatch.setitem(losses.OBJECTIVES, "recorded", Recorded)
    options = {"objective": "recorded", "augment": 1.0, "target": target, "n_iters": 1}
    options["snapshot_sampling"] = False
    options = {f"training__{key}": value for key, value in options.items()}
    config = tiny("pfgmpp/digits_ddpmpp.py", tmp_path, model__augment_dim=9, **options)
    assert run_lib.train(config, tmp_path)
    assert len(labels[0].unique(dim=0)) == transformations


def test_processes_agree_on_the_parameters_of_the_objective_too(config, monkeypatch):
    state, compared = train_state(config, nn.Linear(2, 2)), []
    monkeypatch.setattr(distributed, "check_agreement", lambda _, rows: compared.extend(rows))
    state.check_agreement()
    assert any(each is state.objective.scale for each in compared)
    assert len(compared) == 3
