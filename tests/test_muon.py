"""Muon against its definition by singular values, in float64, and against Adam."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_configs import load
from test_small_runs import tiny
from torch import nn
from torch.overrides import TorchFunctionMode

import run_lib
from losses import get_loss_fn
from methods import get_method
from models import create_model
from optimizers import OPTIMIZERS
from optimizers.muon import COEFFICIENTS, MOMENTUM, STEPS, is_matrix, mark_tables, orthogonalise
from storage.checkpoints import load_checkpoint
from training import TrainState

sides, decay = st.integers(1, 40), st.floats(0, 3)
OPTIONS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
OPTIONS |= {"weight_decay": 0.0, "amsgrad": False}


def defined(matrix):
    """`matrix` (rows, columns) with the polynomial on its singular values, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(STEPS):
        a, b, c = COEFFICIENTS
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


def optimizer_of(*weights, kind="muon", **options):
    """An optimiser of `weights`, as `TrainState` makes it."""
    return OPTIMIZERS[kind]([(f"{i}.weight", w) for i, w in enumerate(weights)], OPTIONS | options)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(seed, rows, columns, decay):
    """A matrix with singular values 1, 2^-decay, 3^-decay, ..."""
    u, s, vh = torch.linalg.svd(draw(seed, rows, columns).double(), full_matrices=False)
    return ((u * torch.arange(1, len(s) + 1).double() ** -decay) @ vh).float()


@settings(deadline=None)
@given(st.lists(st.tuples(sides, sides, decay, st.integers(-12, 12)), min_size=1, max_size=4))
def test_orthogonalise_is_the_polynomial_of_singular_values(shapes):
    """Matrices of any size and scale, whose singular values fall as a power of their index."""
    draws = [with_spectrum(k, *shape) for k, (*shape, _) in enumerate(shapes)]
    results = orthogonalise([x * 10.0**power for x, (*_, power) in zip(draws, shapes, strict=True)])
    for x, result in zip(draws, results, strict=True):
        torch.testing.assert_close(result.double(), defined(x), rtol=0, atol=2e-3)


def test_vanishing_matrices_stay_finite_and_tf32_is_left_out():
    x = draw(0, 9, 9)
    for power in (-45, -30, -24, -20):
        (result,) = orthogonalise([x * 10.0**power])
        assert result.isfinite().all() and result.norm() < 4
    result, precisions = orthogonalise([torch.zeros(3, 9)])[0], []
    assert torch.equal(result, torch.zeros(3, 9))

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.baddbmm):
                precisions.append(torch.get_float32_matmul_precision())
            return function(*args, **kwargs or {})

    torch.set_float32_matmul_precision("high")
    try:
        with Seeing():
            orthogonalise([x])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(precisions) > 10 and set(precisions) == {"highest"}


def test_singular_values_come_near_one():
    u, _ = torch.linalg.qr(draw(0, 12, 12).double())
    v, _ = torch.linalg.qr(draw(1, 30, 12).double())
    s = torch.logspace(-1.9, 0, 12, dtype=torch.float64)
    singular_values = torch.linalg.svdvals(orthogonalise([(u * s) @ v.T])[0])
    assert singular_values.min() > 0.68 and singular_values.max() < 1.14


def test_a_zero_gradient_moves_nothing_at_first():
    w = torch.ones(9, 9, requires_grad=True)
    w.grad = torch.zeros_like(w)
    optimizer_of(w).step()
    assert torch.equal(w.detach(), torch.ones(9, 9))


@pytest.mark.parametrize(
    "shape, channels_last",
    [
        ((16, 10), False),
        ((40, 8), False),
        ((40, 1, 3, 3), False),
        ((8, 12, 3, 3), False),
        ((8, 12, 3, 3), True),
    ],
)
def test_a_matrix_moves_along_its_orthogonalised_momentum(shape, channels_last):
    """Two steps, by the definition: m <- 0.95 m + 0.05 g; Nesterov's g + 0.95 (m - g)."""
    start, gradients = draw(2, *shape), [draw(3, *shape), draw(4, *shape)]
    laid_out = {"memory_format": torch.channels_last} if channels_last else {}
    w = start.clone().to(**laid_out).requires_grad_()
    other = draw(5, *shape).requires_grad_()  # equal in shape, without a gradient
    optimizer = optimizer_of(w, other)
    expected, m = start.double().flatten(1), torch.zeros_like(start).double()
    rows, columns = expected.shape
    for g in gradients:
        w.grad = g.clone().to(**laid_out)
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
    results = []
    for kind in ("muon", "adam"):
        w, matrix = draw(0, *shape).requires_grad_(), draw(1, 9, 9).requires_grad_()
        optimizer = optimizer_of(w, matrix, kind=kind)
        for seed in range(3):
            w.grad, matrix.grad = draw(seed, *shape), draw(seed, 9, 9)
            optimizer.step()
        results.append((w.detach(), matrix.detach()))
    (w_muon, matrix_muon), (w_adam, matrix_adam) = results
    assert torch.equal(w_muon, w_adam)
    assert not torch.equal(matrix_muon, matrix_adam)


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


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path):
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


@pytest.mark.parametrize(
    "experiment, last, has_tables",
    [
        ("poisson/digits_ddpmpp.py", "head.conv", False),
        ("ve/ncsn/cifar10.py", "end_conv", True),
        ("edm/digits_ddpmpp.py", "head.conv", False),
        ("pfgmpp/toy_mlp.py", "head.1", False),
    ],
)
def test_what_counts_as_a_matrix_in_a_network(experiment, last, has_tables):
    """Nearly all weights, and not those of the last layer, of embeddings, biases and norms."""
    config = load(experiment)
    config.model.nf = 64 if config.model.name == "mlp" else 16
    if config.model.name == "edm_unet":  # linear layers named as embeddings
        config.data.num_classes, config.model.augment_dim = 10, 9
    model = create_model(config)
    mark_tables(model)
    names = {name for name, p in model.named_parameters() if is_matrix(p)}
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert bool(tables) == has_tables
    linear = {f"{n}.weight" for n, m in model.named_modules() if type(m) is nn.Linear}
    assert {n for n in linear if min(model.get_parameter(n).shape) >= 8} <= names
    assert f"{last}.weight" in dict(model.named_parameters())
    assert f"{last}.weight" not in names and not tables & names
    assert not any(name.endswith("bias") for name in names)
    sizes = {name: p.numel() for name, p in model.named_parameters() if name not in tables}
    assert sum(sizes[name] for name in names) > 0.95 * sum(sizes.values())


def test_tables_are_told_by_their_type_and_not_by_their_name():
    network = nn.ModuleDict(
        {
            "patch_embed": nn.Conv2d(3, 16, 4),
            "label_embedder": nn.ModuleDict({"table": nn.Embedding(10, 16)}),
            "words": nn.EmbeddingBag(10, 16),
        }
    )
    config = load("pfgmpp/toy_mlp.py")
    config.optim.optimizer = "Muon"
    state = TrainState.from_config(config, network, get_loss_fn(config, get_method(config)))
    kinds = {name: len(state.optimizer.state[p]) for name, p in state.named_parameters}
    assert {name for name, entries in kinds.items() if entries == 2} == {"patch_embed.weight"}
