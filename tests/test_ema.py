"""Power-function averages of weights, and EMAs of other lengths rebuilt from them."""

import logging

import numpy as np
import pytest
import torch
from test_small_runs import report_of, tiny
from torch import nn

import run_lib
from library import ema
from library.ema import rebuild_ema
from models import create_model
from models.ema import (
    ExponentialMovingAverage,
    exponent_of,
    products,
    rebuilding_weights,
    rise_of_power,
)
from models.weights import load_ema
from storage.checkpoints import load_checkpoint, open_checkpoint

STDS = (0.05, 0.10)


def profile(g, t, s):
    return np.where(s <= t, (g + 1) * s**g / t ** (g + 1), 0.0)


def quadrature(f, end, points=200):
    """Gauss and Legendre's, from 0 to `end`: exact for polynomials below twice the `points`."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return end / 2 * (weights * f(end / 2 * (nodes + 1))).sum()


@pytest.mark.parametrize("std, published", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_have_the_relative_width(std, published):
    g = exponent_of(std)
    assert g == pytest.approx(published, abs=0.01)
    mean = quadrature(lambda s: s * profile(g, 1.0, s), 1.0)
    variance = quadrature(lambda s: (s - mean) ** 2 * profile(g, 1.0, s), 1.0)
    assert variance**0.5 == pytest.approx(std, rel=1e-10)


@pytest.mark.parametrize("t, u", [(100, 100), (50, 100), (300, 250), (1, 7)])
@pytest.mark.parametrize("g, h", [(16.97, 6.94), (2.0, 2.0), (0.5, 40.0)])
def test_inner_products_are_those_of_quadrature(t, u, g, h):
    expected = quadrature(lambda s: profile(g, t, s) * profile(h, u, s), min(t, u))
    np.testing.assert_allclose(products(t, g, u, h), expected, rtol=1e-6)  # of s^2.5 at 0
    np.testing.assert_allclose(products(u, h, t, g), expected, rtol=1e-6)


def random_walk(steps, numbers=50, seed=0):
    """Weights (steps, numbers) whose start is as far from 0 as they go."""
    random = np.random.default_rng(seed)
    start = steps**0.5 * random.standard_normal(numbers)
    return start + random.standard_normal((steps, numbers)).cumsum(0)


def tracked(walk, stds, at):
    """{(step, std): average} that training keeps of the walk, in float32."""
    parameter = nn.Parameter(torch.zeros(walk.shape[1]))
    averages = {s: ExponentialMovingAverage([parameter], 1.0, rise_of_power(s)) for s in stds}
    history = {}
    for step, weights in enumerate(walk, 1):
        parameter.data = torch.from_numpy(weights).float()
        for std, average in averages.items():
            average.update([parameter], torch.ones(()))
            if step in at:
                history[step, std] = average.shadow_params[0].numpy().astype(np.float64)
    return history


def test_an_average_weighs_steps_by_the_integral_of_its_profile():
    walk = random_walk(200)
    for (step, std), average in tracked(walk, STDS, at=(1, 2, 77, 200)).items():
        ends = (np.arange(step + 1) / step) ** (exponent_of(std) + 1)
        np.testing.assert_allclose(average, np.diff(ends) @ walk[:step], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("std", [0.06, 0.075, 0.15])
@pytest.mark.parametrize("step", [600, 800])
def test_an_ema_that_was_not_kept_is_within_a_percent_of_one_that_was(std, step):
    walk, at = random_walk(800), range(100, step + 1, 100)
    averages, expected = tracked(walk, STDS, at), tracked(walk, [std], [step])[step, std]
    weights, error = rebuilding_weights(*zip(*averages, strict=True), step, std)
    rebuilt = weights @ np.stack([*averages.values()])
    assert np.linalg.norm(rebuilt - expected) < 0.01 * np.linalg.norm(expected)
    # the newest weights and the nearest average are at least five times farther
    for other in (walk[step - 1], *(averages[step, s] for s in STDS)):
        assert np.linalg.norm(rebuilt - expected) < 0.2 * np.linalg.norm(other - expected)
    assert error < 0.06
    assert weights.sum() == pytest.approx(1)


def test_the_error_of_the_profile_is_that_of_quadrature():
    steps, stds = [50, 50, 100, 100], [*STDS, *STDS]
    weights, error = rebuilding_weights(steps, stds, 100, 0.075)
    s = np.linspace(0, 100, 400_001)[:-1] + 1.25e-4
    target = profile(exponent_of(0.075), 100, s)
    mixture = sum(
        w * profile(exponent_of(std), t, s) for w, t, std in zip(weights, steps, stds, strict=True)
    )
    expected = np.linalg.norm(mixture - target) / np.linalg.norm(target)
    assert error == pytest.approx(expected, rel=1e-3)
    # no other weights of sum 1 err less
    for change in np.random.default_rng(0).standard_normal((20, 4)):
        change -= change.mean()
        other = mixture + sum(
            c * profile(exponent_of(std), t, s)
            for c, t, std in zip(1e-3 * change, steps, stds, strict=True)
        )
        assert np.linalg.norm(other - target) > np.linalg.norm(mixture - target)


def test_one_that_is_kept_is_rebuilt_as_it_is():
    weights, error = rebuilding_weights([100, 100], STDS, 100, 0.05)
    np.testing.assert_allclose(weights, [1, 0], atol=1e-6)
    assert error < 1e-5


# --- runs -----------------------------------------------------------------------------------------

OPTIONS = {
    "training__snapshot_freq": 2,
    "training__snapshot_sampling": False,
    "eval__enable_sampling": False,
}


def run_of(tmp_path, **overrides):
    return tiny("edm/digits_ddpmpp.py", tmp_path, **OPTIONS | overrides)


def test_a_run_keeps_averages_and_evaluates_any_other(tmp_path, caplog):
    """Resumed at step 3 it has the averages of an uninterrupted run, of augmented images too."""
    augmented = {"training__augment": 0.5, "model__augment_dim": 9, "model__ema_stds": STDS}
    for workdir, stops in (("a", (8,)), ("b", (3, 8))):
        for n_iters in stops:
            config = run_of(tmp_path, training__n_iters=n_iters, **augmented)
            config.optim.update(warmup=0, cooldown=0)
            assert run_lib.train(config, tmp_path / workdir)
    paths = [tmp_path / w / "checkpoints/checkpoint_8.pth" for w in "ab"]
    weights = [load_checkpoint(path)["model"].values() for path in paths]
    assert all(map(torch.equal, *weights))
    one, other = (load_checkpoint(path)["averages"] for path in paths)
    assert [average["std"] for average in one] == [*STDS]
    for a, b in zip(one, other, strict=True):
        assert all(map(torch.equal, a["shadow_params"], b["shadow_params"]))

    config = run_of(tmp_path, training__n_iters=8, eval__ema_std=0.075, **augmented)
    config.eval.update(steps="", begin_ckpt=4, end_ckpt=4)
    with caplog.at_level(logging.INFO):
        run_lib.evaluate(config, tmp_path / "a")
    assert "checkpoint_8.pth: the EMA of relative width 0.075 from 8 averages of 4" in caplog.text
    report = report_of(tmp_path / "a", 4)
    assert report["ema_std"] == 0.075 and np.isfinite(report["loss"])

    config.eval.update(steps="", begin_ckpt=1, end_ckpt=1, ema_std=0.2)
    with pytest.raises(ValueError, match=r"ema_std=0\.2: .* 2 averages of 1 checkpoints: its") as e:
        run_lib.evaluate(config, tmp_path / "a")
    assert "training.snapshot_freq" in str(e.value) and "\n" not in str(e.value)

    config = run_of(tmp_path, training__n_iters=9, **augmented)
    config.model.ema_stds = (0.05, 0.2)
    with pytest.raises(ValueError, match="averages are of the widths 0.05, 0.1"):
        run_lib.train(config, tmp_path / "a")


def test_a_run_without_averages_says_so(tmp_path):
    config = run_of(tmp_path)
    assert run_lib.train(config, tmp_path)
    assert "averages" not in load_checkpoint(tmp_path / "checkpoints/checkpoint_2.pth")
    config.eval.update(steps="", begin_ckpt=1, end_ckpt=1, ema_std=0.1)
    with pytest.raises(ValueError, match=r"it has no power-function averages \(model\.ema_stds\)"):
        run_lib.evaluate(config, tmp_path)
    config.model.ema_stds = STDS
    config.training.n_iters = 3
    with pytest.raises(ValueError, match=r"no power-function .* model\.ema_stds: \[\] -> \[0\.05,"):
        run_lib.train(config, tmp_path)


def test_the_rebuilt_weights_are_those_of_the_checkpoints(tmp_path):
    """The average of a network with one weight, summed by hand over its checkpoints."""
    config = run_of(tmp_path, training__n_iters=6, model__ema_stds=STDS)
    assert run_lib.train(config, tmp_path)
    config.eval.update(steps="", begin_ckpt=3, end_ckpt=3, ema_std=0.08)
    model = create_model(config)
    path = tmp_path / "checkpoints/checkpoint_6.pth"
    content = load_checkpoint(path)
    load_ema(model, content)
    rebuild_ema(model, 0.08, tmp_path, path, content)
    made_of = [
        (step, average["std"], average["shadow_params"][0])
        for step in (2, 4, 6)
        for average in load_checkpoint(path.with_name(f"checkpoint_{step}.pth"))["averages"]
    ]
    steps, stds, averages = zip(*made_of, strict=True)
    weights, _ = rebuilding_weights(steps, stds, 6, 0.08)
    expected = sum(w * k for w, k in zip(weights, averages, strict=True))
    torch.testing.assert_close(next(model.parameters()).detach(), expected)


@pytest.mark.parametrize("removed", [2, 4])
def test_averages_that_training_removes_are_done_without(tmp_path, monkeypatch, removed):
    config = run_of(tmp_path, training__n_iters=6, model__ema_stds=STDS)
    assert run_lib.train(config, tmp_path)
    paths = {step: tmp_path / f"checkpoints/checkpoint_{step}.pth" for step in (2, 4, 6)}
    made_of = [
        (step, average["std"], average["shadow_params"][0])
        for step in {*paths} - {removed}
        for average in load_checkpoint(paths[step])["averages"]
    ]

    def open_after_removal(path, intact):
        paths[removed].unlink(missing_ok=True)  # after the folder was listed
        return open_checkpoint(path, intact=intact)

    monkeypatch.setattr(ema, "open_checkpoint", open_after_removal)
    model, content = create_model(config), load_checkpoint(paths[6])
    load_ema(model, content)
    line = rebuild_ema(model, 0.09, tmp_path, paths[6], content)
    assert "from 4 averages of 2 checkpoints" in line
    steps, stds, averages = zip(*sorted(made_of, key=lambda each: each[:2]), strict=True)
    weights, _ = rebuilding_weights(steps, stds, 6, 0.09)
    expected = sum(w * average for w, average in zip(weights, averages, strict=True))
    torch.testing.assert_close(next(model.parameters()).detach(), expected)
