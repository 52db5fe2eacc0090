"""The optimisation around the loss: average of weights, learning rate, clipping, the step."""

import copy

import pytest
import torch
from torch import nn

import losses
from configs.poisson import cifar10_ddpmpp


def test_ema_matches_published_trace(golden):
    """The average of (i, sin i, 2), step by step, from zero."""
    parameter = nn.Parameter(torch.zeros(3))
    ema = losses.ExponentialMovingAverage([parameter], golden["ema/decay"])
    for i, expected in enumerate(golden["ema/trace"]):
        value = torch.tensor(float(i))
        parameter.data = torch.stack([value, value.sin(), torch.tensor(2.0)])
        ema.update([parameter])
        torch.testing.assert_close(ema.shadow_params[0], expected, rtol=1e-5, atol=1e-5)


def test_ema_refuses_other_shapes():
    ema = losses.ExponentialMovingAverage([nn.Parameter(torch.zeros(3))], 0.5)
    state = ema.state_dict() | {"shadow_params": [torch.ones(1)]}
    with pytest.raises(ValueError, match="other shapes"):
        ema.load_state_dict(state)


def test_ema_swaps_in_and_out_even_after_an_error():
    parameter = nn.Parameter(torch.zeros(2))
    ema = losses.ExponentialMovingAverage([parameter], 0.5)
    parameter.data.fill_(1.0)
    with pytest.raises(RuntimeError), ema.swapped_into([parameter]):
        assert parameter.tolist() == [0.0, 0.0]
        raise RuntimeError
    assert parameter.tolist() == [1.0, 1.0]
    assert ema.shadow_params[0].tolist() == [0.0, 0.0]


def test_learning_rate_rises_and_falls():
    schedule = {"n_iters": 100, "warmup": 10, "cooldown": 20}
    factors = [losses.learning_rate_factor(step, **schedule) for step in range(100)]
    assert factors[:3] == [0.0, 0.1, 0.2]
    assert factors[10:81] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert losses.learning_rate_factor(10**6, n_iters=1300001) == 1.0


class Line(nn.Module):
    """A network of one weight whose gradient is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))


def test_step_clips_the_gradient_by_its_norm_and_warms_up():
    config = cifar10_ddpmpp.get_config()
    config.optim.warmup = 4
    config.optim.grad_clip = 0.5
    state = losses.TrainState(config, Line())
    seen = []

    def loss_fn(net, batch, generator):
        return 100 * net.weight.sum()

    for _ in range(3):
        losses.train_step(state, loss_fn, torch.zeros(1))
        seen.append(state.model.weight.grad.item())
        assert state.optimizer.param_groups[0]["lr"] == config.optim.lr * (state.step - 1) / 4
    assert seen == pytest.approx([0.5] * 3, rel=1e-4)
    # Adam's step is the learning rate whatever the gradient's scale
    moved = config.optim.lr * (0 + 1 + 2) / 4
    assert 1 - state.model.weight.item() == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda weight: weight.sum() * torch.nan,
        lambda weight: weight.sum() + torch.inf,  # its gradient is finite
        lambda weight: (weight.sum() - weight.sum().detach()).sqrt(),  # its gradient alone is not
    ],
    ids=["loss and gradient", "loss", "gradient"],
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("grad_clip", [1.0, -1.0])
def test_a_step_without_a_finite_gradient_changes_nothing_but_the_counts(spoilt, first, grad_clip):
    config = cifar10_ddpmpp.get_config()
    config.optim.update(grad_clip=grad_clip, warmup=0, weight_decay=0.1)
    state = losses.TrainState(config, Line())
    if not first:
        losses.train_step(state, lambda net, *_: net.weight.square().sum(), torch.zeros(1))
    before = copy.deepcopy(state.state_dict())
    loss = losses.train_step(state, lambda net, *_: spoilt(net.weight), torch.zeros(1))
    assert loss.isnan()
    after = state.state_dict()
    assert after["step"] == before["step"] + 1
    assert torch.equal(after["model"]["weight"], before["model"]["weight"])
    assert torch.equal(after["ema"]["shadow_params"][0], before["ema"]["shadow_params"][0])
    moments = after["optimizer"]["state"][0]
    expected = {name: torch.zeros_like(value) for name, value in moments.items()}
    expected = expected if first else before["optimizer"]["state"][0]
    assert all(torch.equal(moments[name], expected[name]) for name in expected)


def test_a_skipped_step_leaves_the_next_ones_as_they_would_be():
    """Weights after good, bad, good are those of two good steps at the same learning rates."""
    config = cifar10_ddpmpp.get_config()
    config.optim.warmup = 0
    good, bad = (lambda net, *_: net.weight.square().sum()), (lambda net, *_: net.weight.sum() / 0)
    states = [losses.TrainState(config, Line()) for _ in range(2)]
    for state, steps in zip(states, ((good, bad, good), (good, good)), strict=True):
        for loss_fn in steps:
            losses.train_step(state, loss_fn, torch.zeros(1))
    assert torch.equal(*(state.model.weight for state in states))
    assert not torch.equal(states[0].model.weight, torch.ones(1))


def test_negative_grad_clip_means_none():
    config = cifar10_ddpmpp.get_config()
    config.optim.grad_clip = -1.0
    state = losses.TrainState(config, Line())
    losses.train_step(state, lambda net, batch, generator: 100 * net.weight.sum(), torch.zeros(1))
    assert state.model.weight.grad.item() == 100


def test_a_resumed_run_follows_the_config(tmp_path):
    config = cifar10_ddpmpp.get_config()
    saved = losses.TrainState(config, Line()).state_dict()
    config.optim.weight_decay = 0.25
    config.optim.beta1 = 0.5
    config.model.ema_rate = 0.75
    state = losses.TrainState(config, Line())
    state.load_state_dict(saved)
    (group,) = state.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.5, 0.999))
    assert state.ema.decay == 0.75


def test_ruined_weights_are_noticed():
    state = losses.TrainState(cifar10_ddpmpp.get_config(), Line())
    assert state.is_finite()
    state.model.weight.data.fill_(torch.nan)
    assert not state.is_finite()


def test_unknown_optimizer_names_the_known():
    config = cifar10_ddpmpp.get_config()
    config.optim.optimizer = "SGD"
    with pytest.raises(ValueError, match=r"optim\.optimizer='SGD'; known: Adam"):
        losses.TrainState(config, Line())
