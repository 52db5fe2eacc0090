"""The optimisation around the loss: EMA weights, learning rate, clipping, the step."""

import copy
import math

import pytest
import torch
from conftest import objective_of, train_state
from torch import nn

import execution
import training
from configs.pfgmpp import digits_ddpmpp as pfgmpp_digits
from configs.poisson import cifar10_ddpmpp, digits_ddpmpp
from configs.ve import digits_ncsnpp as ve_digits
from configs.vp import digits_ddpmpp as vp_digits
from datasets import keyed_generator
from models import create_model
from models.ema import ExponentialMovingAverage, exponent_of
from models.weights import load_ema
from sources.batch import Batch, Conditions


def test_ema_matches_published_trace(golden):
    """The EMA of (i, sin i, 2), step by step, from zero."""
    parameter = nn.Parameter(torch.zeros(3))
    ema = ExponentialMovingAverage([parameter], golden["ema/decay"])
    for i, expected in enumerate(golden["ema/trace"]):
        value = torch.tensor(float(i))
        parameter.data = torch.stack([value, value.sin(), torch.tensor(2.0)])
        ema.update([parameter], torch.ones(()))
        torch.testing.assert_close(ema.shadow_params[0], expected, rtol=1e-5, atol=1e-5)


def test_ema_of_another_shape_is_refused():
    state = train_state(cifar10_ddpmpp.get_config(), Line())
    saved = state.state_dict()
    saved["ema"] = saved["ema"] | {"shadow_params": [torch.ones(3)]}
    with pytest.raises(ValueError, match=r"ema\.shadow_params\.0 has the shape \(3,\)"):
        load_ema(state.model, saved)


@pytest.mark.parametrize("batch_size, small_batch_size", [(50, 0), (4000, 50)])
def test_ema_with_a_half_life_in_images(batch_size, small_batch_size):
    """EDM's rule: half-life min(half_life, 5 % of images seen), decay 0.5^(batch / half-life).

    Images that only the reference batch holds do not count as seen.
    """
    config = pfgmpp_digits.get_config()
    config.training.update(batch_size=batch_size, small_batch_size=small_batch_size)
    config.model.ema_half_life = 1000.0
    model = Line()
    state = train_state(config, model)
    expected, images_seen = state.parameters[0].detach().clone(), 0
    for step in range(700):  # 5 % of the images are 1000 from step 400 on
        with torch.no_grad():
            state.parameters[0].fill_(math.sin(step))
        state.ema.update(state.parameters, torch.ones(()))
        beta = 0.5 ** (50 / max(min(1000, 0.05 * images_seen), 1e-8))
        expected = beta * expected + (1 - beta) * math.sin(step)
        images_seen += 50
        torch.testing.assert_close(state.ema.shadow_params[0], expected, rtol=1e-4, atol=1e-5)
    config.model.ema_half_life = -1.0
    with pytest.raises(ValueError, match=r"model\.ema_half_life must be at least 0, not -1"):
        train_state(config, model)


def test_ema_swaps_in_and_out_even_after_an_error():
    parameter = nn.Parameter(torch.zeros(2))
    ema = ExponentialMovingAverage([parameter], 0.5)
    parameter.data.fill_(1.0)
    with pytest.raises(RuntimeError), ema.swapped_into([parameter]):
        assert parameter.tolist() == [0.0, 0.0]
        raise RuntimeError
    assert parameter.tolist() == [1.0, 1.0]
    assert ema.shadow_params[0].tolist() == [0.0, 0.0]


def test_learning_rate_rises_and_falls():
    schedule = {"n_iters": 100, "warmup": 10, "cooldown": 20}
    factors = [training.learning_rate_factor(step, **schedule) for step in range(100)]
    assert factors[:3] == [0.0, 0.1, 0.2]
    assert factors[10:81] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert training.learning_rate_factor(10**6, n_iters=1300001) == 1.0


def test_the_learning_rate_follows_the_config():
    config = cifar10_ddpmpp.get_config()
    config.training.n_iters = 10
    config.optim.update(lr=0.8, warmup=2, cooldown=4)
    state, rates = train_state(config, Line()), []
    for state.step in range(10):
        state.set_learning_rate()
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.6, 0.4, 0.2])


IMAGES = Batch(torch.zeros(1, 1, 1, 1))


class LossOf(nn.Module):
    """An objective whose loss is a function of the network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def reference(self, batch, generator=None):
        return batch

    def draw(self, batch, step, generator=None):
        return batch

    def loss(self, net, examples, reference):
        return self.function(net)


def step_of(state, function):
    """A step of `state` whose loss is a function of the network."""
    state.objective = LossOf(function)
    return training.train_step(state, IMAGES)


class Line(nn.Module):
    """A network of one weight whose gradient is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))


def test_step_clips_the_gradient_by_its_norm_and_warms_up():
    config = cifar10_ddpmpp.get_config()
    config.optim.warmup = 4
    config.optim.grad_clip = 0.5
    state = train_state(config, Line())
    gradients = []

    for _ in range(3):
        step_of(state, lambda net: 100 * net.weight.sum())
        gradients.append(state.model.weight.grad.item())
        assert state.optimizer.param_groups[0]["lr"] == config.optim.lr * (state.step - 1) / 4
    assert gradients == pytest.approx([0.5] * 3, rel=1e-4)
    # Adam's step is the learning rate whatever the gradient's scale
    moved = config.optim.lr * (0 + 1 + 2) / 4
    assert 1 - state.model.weight.item() == pytest.approx(moved, rel=1e-3)


def test_the_gradient_is_clipped_by_the_norm_of_all_that_is_trained():
    """(10, 20, 20, 0) of the network and 40 of the objective have the norm 50."""
    config = cifar10_ddpmpp.get_config()
    config.optim.grad_clip = 0.5
    objective = LossOf(lambda net: net.weight @ torch.tensor([10.0, 20, 20, 0]) + 40 * offset)
    objective.offset = offset = nn.Parameter(torch.zeros(()))
    state = train_state(config, Points(), objective)
    training.train_step(state, IMAGES)
    torch.testing.assert_close(state.model.weight.grad, torch.tensor([0.1, 0.2, 0.2, 0]))
    torch.testing.assert_close(offset.grad, torch.tensor(0.4))


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda weight: weight.sum() * torch.nan,
        lambda weight: weight.sum() + torch.inf,  # the loss is not finite
        lambda weight: (weight.sum() - weight.sum().detach()).sqrt(),  # only its gradient is not
    ],
    ids=["loss and gradient", "loss", "gradient"],
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("grad_clip", [1.0, -1.0])
def test_a_step_without_a_finite_gradient_changes_nothing_but_the_counts(spoilt, first, grad_clip):
    config = cifar10_ddpmpp.get_config()
    config.optim.update(grad_clip=grad_clip, warmup=0, weight_decay=0.1)
    state = train_state(config, Line())
    if not first:
        step_of(state, lambda net: net.weight.square().sum())
    before = copy.deepcopy(state.state_dict())
    loss = step_of(state, lambda net: spoilt(net.weight))
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
    good, bad = (
        lambda net: net.weight.square().sum(),
        lambda net: net.weight.sum() / 0,
    )
    states = [train_state(config, Line()) for _ in range(2)]
    for state, steps in zip(states, ((good, bad, good), (good, good)), strict=True):
        for loss in steps:
            step_of(state, loss)
    assert torch.equal(*(state.model.weight for state in states))
    assert not torch.equal(states[0].model.weight, torch.ones(1))


def test_a_skipped_step_counts_in_the_power_function_averages():
    """Weights after steps 1 to 3 weigh s^g; after the skipped third they are the second's."""
    config = cifar10_ddpmpp.get_config()
    config.optim.update(warmup=0, lr=0.1)
    config.model.ema_stds = (0.1, 0.25)
    state, weights = train_state(config, Line()), []
    for loss in (torch.square, torch.square, lambda weight: weight / 0):
        step_of(state, lambda net, loss=loss: loss(net.weight).sum())
        weights.append(state.model.weight.detach().clone())
    assert weights[0] != weights[1] == weights[2]
    for std, average in state.averages.items():
        ends = (torch.arange(4) / 3) ** (exponent_of(std) + 1)
        expected = ends.diff() @ torch.stack(weights)
        torch.testing.assert_close(average.shadow_params[0], expected)


class Points(nn.Module):
    """A network of four weights, each with a different gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.unused = nn.Parameter(torch.ones(1))


def test_a_gradient_is_sanitised_as_edm_publishes():
    """nan -> 0 and +-inf -> +-1e5 before the step, which is applied; other entries stay."""
    config = cifar10_ddpmpp.get_config()
    config.optim.update(nonfinite="replace", grad_clip=-1.0, warmup=0, eps=1e-8)
    state = train_state(config, Points())
    gradient = torch.tensor([math.nan, math.inf, -math.inf, 0.25])
    state.model.weight.register_hook(lambda grad: gradient.clone())
    loss = step_of(state, lambda net: net.weight.sum())
    assert state.model.weight.grad.tolist() == [0.0, 1e5, -1e5, 0.25]
    # Adam's first step is the learning rate against the sign of the gradient
    moved = state.model.weight.detach() / config.optim.lr
    torch.testing.assert_close(moved, torch.tensor([0.0, -1.0, 1.0, -1.0]))
    assert loss == 0 and state.step == 1
    assert state.model.unused == 1
    state.optimizer.zero_grad()
    loss = step_of(state, lambda net: net.weight.sum() * math.inf)
    assert not loss.isfinite()  # the loss is reported, so that many such steps end the run


def test_negative_grad_clip_means_none():
    config = cifar10_ddpmpp.get_config()
    config.optim.grad_clip = -1.0
    state = train_state(config, Line())
    step_of(state, lambda net: 100 * net.weight.sum())
    assert state.model.weight.grad.item() == 100


def test_a_resumed_run_follows_the_config(tmp_path):
    config = cifar10_ddpmpp.get_config()
    saved = train_state(config, Line()).state_dict()
    config.optim.weight_decay = 0.25
    config.optim.beta1 = 0.5
    config.model.ema_rate = 0.75
    state = train_state(config, Line())
    state.load_state_dict(saved)
    (group,) = state.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.5, 0.999))
    assert state.ema.decay == 0.75


def test_a_resumed_ema_goes_on_at_its_update():
    """Update k = 4 moves the EMA by 1 - (1 + k) / (10 + k) of the way, as without the stop."""
    config = cifar10_ddpmpp.get_config()
    state = train_state(config, Line())
    for _ in range(3):
        step_of(state, lambda net: net.weight.square().sum())
    saved = copy.deepcopy(state.state_dict())
    state = train_state(config, Line())
    state.load_state_dict(saved)
    before = state.ema.shadow_params[0].clone()
    with torch.no_grad():
        state.model.weight.fill_(5.0)
    state.ema.update(state.parameters, torch.ones(()))
    torch.testing.assert_close(state.ema.shadow_params[0], before + 9 / 14 * (5 - before))


def test_ruined_weights_are_noticed():
    state = train_state(cifar10_ddpmpp.get_config(), Line())
    assert state.is_finite()
    state.model.weight.data.fill_(torch.nan)
    assert not state.is_finite()


def test_unknown_optimizer_names_the_known():
    config = cifar10_ddpmpp.get_config()
    config.optim.optimizer = "SGD"
    with pytest.raises(
        ValueError, match=r"optim\.optimizer must be one of 'adam', 'muon', 'radam', not 'SGD'"
    ):
        train_state(config, Line())
    for config.optim.optimizer in ("adam", "ADAM"):
        assert type(train_state(config, Line()).optimizer) is torch.optim.Adam


@pytest.mark.parametrize("experiment", [digits_ddpmpp, pfgmpp_digits, vp_digits, ve_digits])
@pytest.mark.parametrize("turns", [2, 3])
def test_accumulated_gradient_is_that_of_the_whole_batch(experiment, turns):
    config = experiment.get_config()
    config.model.nf = 8
    config.training.batch_size = 24
    config.training.target = "posterior_mean"
    if config.training.small_batch_size:
        config.training.small_batch_size = 12
    torch.manual_seed(0)
    state = train_state(config, create_model(config).double())
    with torch.no_grad():  # last layers that start near zero would hide a difference
        for parameter in state.parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    images = Batch(torch.rand(24, 1, 8, 8, dtype=torch.float64))
    results = {}
    for state.accumulate in (1, turns):
        state.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(3)
        loss = training.accumulate_gradient(state, images, generator)
        gradients = [p.grad for p in state.parameters if p.grad is not None]
        results[state.accumulate] = loss, [g.clone() for g in gradients]
    (loss, whole), (loss_in_turns, in_turns) = results[1], results[turns]
    torch.testing.assert_close(loss_in_turns, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(in_turns, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("experiment", [digits_ddpmpp, pfgmpp_digits, vp_digits])
def test_gradient_in_bfloat16_is_near_and_float32(experiment):
    config = experiment.get_config()
    config.model.nf = 8
    config.training.update(batch_size=64, small_batch_size=0)
    torch.manual_seed(0)
    model = create_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss_fn = objective_of(config)
    images, gradients = Batch(torch.rand(64, 1, 8, 8)), {}
    for precision in ("fp32", "bf16"):
        try:
            net = execution.for_training(model, precision)
        except ValueError:
            pytest.skip("this CPU has no bfloat16")
        model.zero_grad()
        loss = loss_fn(net, images, torch.Generator().manual_seed(3))
        loss.backward()
        assert loss.dtype == torch.float32
        gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients[precision] = torch.cat(gradient)
    assert gradients["bf16"].dtype == torch.float32
    error = (gradients["bf16"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert 1e-5 < error < 3e-2  # 8 bits: 4e-3 for every rounding


def test_examples_that_cannot_be_shared_are_refused():
    config = vp_digits.get_config()
    config.training.accumulate = 5
    state = train_state(config, Line())
    with pytest.raises(ValueError, match="96 rows cannot be split evenly into 5 shards"):
        training.train_step(state, Batch(torch.zeros(96, 1, 8, 8)))


class Labelled(nn.Module):
    """A network that records the labels of its calls."""

    def forward(self, x, noise_label, class_labels):
        self.class_labels = class_labels
        return x


def test_labels_travel_with_their_examples():
    config = vp_digits.get_config()
    config.training.label_dropout = 0.0
    loss = objective_of(config)
    batch = Batch(torch.rand(96, 1, 8, 8), Conditions(class_labels=torch.arange(96)))
    examples = loss.draw(batch, 0, torch.Generator().manual_seed(0))
    net = Labelled()
    loss.loss(net, examples.shard(1, 4), batch)
    assert net.class_labels.tolist() == list(range(24, 48))
    assert batch.to("cpu")[torch.tensor([5, 3])].labels.tolist() == [5, 3]
    assert [len(piece) for piece in batch.split(40)] == [40, 40, 16]


@pytest.mark.parametrize("small, message", [(97, "between 0 and .* not 97"), (-1, "not -1")])
def test_examples_are_part_of_the_batch(small, message):
    config = vp_digits.get_config()
    config.training.small_batch_size = small
    with pytest.raises(ValueError, match=message):
        objective_of(config)


def test_only_a_reference_batch_is_larger_than_the_examples():
    for experiment, images in ((digits_ddpmpp, 4096), (vp_digits, 96)):
        config = experiment.get_config()
        config.training.update(batch_size=4096, small_batch_size=96)
        loss = objective_of(config)
        assert (loss.batch_size, loss.examples) == (images, 96)


@pytest.mark.cuda
@pytest.mark.parametrize("experiment", [digits_ddpmpp, pfgmpp_digits, vp_digits, ve_digits])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("turns, optimizer", [(1, "Adam"), (2, "Adam"), (1, "Muon")])
def test_a_step_never_waits_for_the_gpu(experiment, precision, turns, optimizer):
    config = experiment.get_config()
    config.optim.optimizer, config.training.accumulate = optimizer, turns
    model, objective = create_model(config).cuda(), objective_of(config).cuda()
    state = train_state(config, model, objective)
    state.network = execution.for_training(model, precision)
    images = Batch(torch.rand(96, 1, 8, 8, device="cuda"))
    training.train_step(state, images, keyed_generator("cuda", "test", 0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2):
            training.train_step(state, images, keyed_generator("cuda", "test", step))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_resumed_moments_have_the_layout_of_the_weights():
    """The fused step pairs memory, not indices; the layout is the config's, of either start."""
    config = ve_digits.get_config()
    config.model.nf = 8
    images = Batch(torch.rand(96, 1, 8, 8))
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        state = train_state(config, create_model(config))
        for second in (False, True):
            if second:
                saved = copy.deepcopy(state.state_dict())
                model = create_model(config).to(memory_format=layout)
                state = train_state(config, model)
                state.load_state_dict(saved)
            state.step = 100  # warmed up
            training.train_step(state, images, torch.Generator().manual_seed(1))
        weights.append([p.detach().contiguous() for p in state.parameters])
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
