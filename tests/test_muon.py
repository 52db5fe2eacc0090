"""Muon against its definition by singular values, in float64, and against Adam."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_small_runs import tiny

import run_lib
from configs.poisson import digits_ddpmpp
from models.muon import COEFFICIENTS, MOMENTUM, STEPS, Muon, is_matrix, orthogonalise
from storage.checkpoints import load_checkpoint
from training import TrainState

sides = st.integers(1, 40)
OPTIONS = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "fused": True}


def defined(matrix):
    """`matrix` (rows, columns) with the polynomial on its singular values, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(STEPS):
        a, b, c = COEFFICIENTS
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


def optimizer_of(*weights, kind=Muon, **options):
    """An optimiser of `weights` whose moments are zero, as `TrainState` makes it."""
    optimizer = kind(weights, **OPTIONS | options)
    for w in weights:
        alone = kind is Muon and is_matrix(w)
        names = ["exp_avg"] if alone else ["exp_avg", "exp_avg_sq"]
        optimizer.state[w] = {"step": torch.zeros(()), **{n: torch.zeros_like(w) for n in names}}
    return optimizer


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.lists(st.tuples(sides, sides, st.integers(-12, 12)), min_size=1, max_size=4))
def test_orthogonalise_is_the_polynomial_of_singular_values(shapes):
    given = [draw(k, rows, columns) for k, (rows, columns, _) in enumerate(shapes)]
    ours = orthogonalise([x * 10.0**power for x, (*_, power) in zip(given, shapes, strict=True)])
    for x, found in zip(given, ours, strict=True):
        torch.testing.assert_close(found.double(), defined(x), rtol=0, atol=2e-3)


def test_singular_values_come_near_one():
    u, _ = torch.linalg.qr(draw(0, 12, 12).double())
    v, _ = torch.linalg.qr(draw(1, 30, 12).double())
    s = torch.logspace(-1.9, 0, 12, dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonalise([(u * s) @ v.T])[0])
    assert found.min() > 0.68 and found.max() < 1.14


def test_a_zero_gradient_moves_nothing():
    w = torch.ones(9, 9, requires_grad=True)
    w.grad = torch.zeros_like(w)
    optimizer_of(w).step()
    assert torch.equal(w.detach(), torch.ones(9, 9))


@pytest.mark.parametrize("shape", [(16, 10), (8, 12, 3, 3), (40, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_matrix_moves_along_its_orthogonalised_momentum(shape, channels_last):
    """Two steps, by the definition: m <- 0.95 m + 0.05 g; Nesterov's g + 0.95 (m - g)."""
    start, gradients = draw(2, *shape), [draw(3, *shape), draw(4, *shape)]
    w = start.clone()
    if channels_last and w.ndim == 4:
        w = w.to(memory_format=torch.channels_last)
    w.requires_grad_()
    other = draw(5, *shape).requires_grad_()  # of the same shape, without a gradient
    optimizer = optimizer_of(w, other)
    expected, m = start.double().flatten(1), torch.zeros_like(start).double()
    rows, columns = expected.shape
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
        assert torch.equal(w.grad, g)
        m = MOMENTUM * m + (1 - MOMENTUM) * g.double()
        u = (1 - MOMENTUM) * g.double() + MOMENTUM * m
        expected = expected - 0.1 * 0.2 * math.sqrt(max(rows, columns)) * defined(u.flatten(1))
    torch.testing.assert_close(w.detach().double().flatten(1), expected, rtol=0, atol=2e-4)
    assert torch.equal(other.detach(), draw(5, *shape))
    # entries move about as far as by Adam, whose steps are of 0.1
    assert 0.1 < (w.detach() - start).square().mean().sqrt() / 0.1 < 1.0


def test_weight_decay_is_added_to_the_gradient():
    start, g = draw(0, 9, 9), draw(1, 9, 9)
    steps = []
    for gradient, decay in ((g, 0.5), (g + 0.5 * start, 0.0)):
        w = start.clone().requires_grad_()
        w.grad = gradient.clone()
        optimizer_of(w, weight_decay=decay).step()
        steps.append(w.detach())
    torch.testing.assert_close(*steps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (30,), (3, 40), (40, 7), (1, 16, 3, 3)])
def test_all_else_moves_as_adam_moves_it(shape):
    found = []
    for kind in (Muon, torch.optim.Adam):
        w, matrix = draw(0, *shape).requires_grad_(), draw(1, 9, 9).requires_grad_()
        optimizer = optimizer_of(w, matrix, kind=kind)
        for seed in range(3):
            w.grad, matrix.grad = draw(seed, *shape), draw(seed, 9, 9)
            optimizer.step()
        found.append((w.detach(), matrix.detach()))
    (ours, our_matrix), (theirs, their_matrix) = found
    assert torch.equal(ours, theirs)
    assert not torch.equal(our_matrix, their_matrix)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_applied_changes_nothing(bad):
    w, b = draw(0, 9, 9).requires_grad_(), draw(1, 9).requires_grad_()
    optimizer = optimizer_of(w, b)
    w.grad, b.grad = draw(2, 9, 9), draw(3, 9)
    optimizer.step()
    before = [t.clone() for t in (w, b, *optimizer.state[w].values(), *optimizer.state[b].values())]
    w.grad, b.grad = torch.full_like(w, bad), torch.full_like(b, bad)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = [w, b, *optimizer.state[w].values(), *optimizer.state[b].values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_network_learns_and_a_resumed_run_goes_on_as_it_would_have(tmp_path):
    config = tiny("poisson/digits_ddpmpp.py", tmp_path, optim__optimizer="Muon")
    config.training.update(n_iters=4, snapshot_sampling=False)
    config.optim.warmup = 0
    weights = []
    for name, stops in (("once", (4,)), ("twice", (2, 4))):
        for stop in stops:
            config.training.n_iters = stop
            assert run_lib.train(config, tmp_path / name)
        weights.append(load_checkpoint(tmp_path / name / "checkpoints-meta/checkpoint.pth"))
    once, twice = weights
    for key in once["model"]:
        assert torch.equal(once["model"][key], twice["model"][key])
    moments = once["optimizer"]["state"].values()
    assert {frozenset(m) for m in moments} == {
        frozenset({"step", "exp_avg"}),
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
    }
    config.optim.optimizer = "Adam"
    with pytest.raises(ValueError, match=r"optimizer\.state\.\d+ has no exp_avg_sq"):
        run_lib.train(config, tmp_path / "twice")


def test_what_counts_as_a_matrix_in_a_network():
    """Hidden layers do; the maps from and to grey images, biases and norms do not."""
    config = digits_ddpmpp.get_config()
    config.optim.optimizer = "Muon"
    state = TrainState(config, run_lib.Experiment.build(config).state.model)
    names = {name for name, p in state.model.named_parameters() if is_matrix(p)}
    assert "head.weight" not in names and not any(name.endswith("bias") for name in names)
    hidden = sum(p.numel() for n, p in state.model.named_parameters() if n in names)
    assert hidden > 0.95 * sum(p.numel() for p in state.parameters)
