"""Schedule and solver 'fitted': what they choose, and the files they keep beside a checkpoint."""

import itertools
import math
import signal
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, train_state
from hypothesis import given, settings
from hypothesis import strategies as st
from known_laws import FAMILY, gaussian_network
from scipy.optimize import minimize
from warm_start import MAIN, Program, run_main

import datasets
import run_lib
import sampling
from configs.edm import digits_ddpmpp
from library.fitting import for_trajectories
from models.weights import load_ema
from solvers import fitted
from solvers.base import Step
from solvers.fixed_steps import linear_multistep
from storage.checkpoints import fit as fit_checkpoint
from storage.checkpoints import load_checkpoint, save_checkpoint
from storage.run_checkpoints import drop_checkpoints, fitted_path


def steps_along(state, slope, levels):
    """Steps of a callback along the solutions `state(level)` (B, C) with derivative `slope`."""
    return [Step(i, s, state(s), slope(s)) for i, s in enumerate(levels.tolist())]


# --- which levels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_the_cheapest_path_is_that_of_all_paths(n):
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64)

    def total(path):
        return sum(cost[i, j].item() for i, j in itertools.pairwise(path))

    inner = itertools.combinations(range(1, 7), n - 1)
    assert fitted.cheapest_path(cost, n) == list(min(((0, *p, 7) for p in inner), key=total))


def test_errors_are_those_of_euler_steps():
    """An Euler step of dy/ds = 2 v s errs by |v| h^2, in units of the distance from the mean."""
    v = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    levels = torch.tensor([4.0, 3.5, 2.0, 0.5], dtype=torch.float64)
    steps = steps_along(lambda s: v * s**2, lambda s: 2 * v * s, levels)
    errors = fitted.euler_errors(steps)
    apart = (v[0] - v[1]).norm().double() / 2 * levels.square()
    expected = (5 + 1) * (levels[:, None] - levels).square().triu(1) / apart
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fitted.step_costs(errors), expected**4, rtol=1e-4, atol=1e-5)


def test_trajectories_count_alike_however_far_out_they_are():
    """Straight ones, on which no step errs, add nothing, and hide nothing of the others."""
    levels = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    v = torch.tensor([[1.0], [-1.0]])
    near = fitted.euler_errors(steps_along(lambda s: v * s**2, lambda s: 2 * v * s, levels))
    both = fitted.euler_errors(
        steps_along(
            lambda s: torch.cat([v * s**2, 100 * v * s]),
            lambda s: torch.cat([2 * v * s, 100 * v]),
            levels,
        )
    )
    torch.testing.assert_close(both, near, rtol=1e-4, atol=1e-4)


def test_costs_are_finite_where_all_trajectories_meet():
    levels = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    v = torch.tensor([[1.0], [2.0]])
    steps = steps_along(lambda s: v * s**2, lambda s: 2 * v * s, levels)
    assert fitted.step_costs(fitted.euler_errors(steps)).isfinite().all()


def test_levels_lie_where_trajectories_bend():
    """Two trajectories beside each other are lines above level 1 and arcs of circles below."""
    levels = torch.cat([torch.linspace(4, 1, 31), torch.linspace(1, 0, 31)[1:]]).double()

    def state(s):
        angle = torch.tensor(min(s, 1.0) * 3)
        point = torch.stack([angle.sin(), -angle.cos()]) / 3
        x, y = point + max(s - 1, 0) * torch.stack([angle.cos(), angle.sin()])
        return torch.stack([x, y, torch.ones(())]) * torch.tensor([[1.0, 1, 1], [1, 1, -1]])

    def slope(s):
        angle = torch.tensor(min(s, 1.0) * 3)
        return torch.stack([angle.cos(), angle.sin(), torch.zeros(())]).expand(2, 3)

    errors = fitted.euler_errors(steps_along(state, slope, levels))
    chosen = fitted.schedule(levels, errors, None, 6, 7.0)
    # A step along the line leads on along the tangent as one from its end does: the circle is cut
    # into six equal arcs, since its curvature is the same everywhere.
    expected = torch.tensor([4, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], dtype=torch.float64)
    torch.testing.assert_close(chosen, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_fine_trajectories_are_those_of_the_ode_from_prior_to_data(name):
    """For data N(0, std^2 I) the ODE scales states in proportion to sqrt(std^2 + sigma^2)."""
    method, std, steps = FAMILY[name], 0.5, []
    levels = fitted.fine_levels(method, 61, 7.0)
    assert len(levels) == 62
    assert levels[[0, -2]].tolist() == pytest.approx([method.sigma_max, method.sigma_min])
    assert (levels.diff() < 0).all()
    sampler = sampling.get_sampling_fn(digits_ddpmpp.get_config(), method)
    sample = replace(for_trajectories(sampler), fit=fitted.Fit(fitted.fine_levels))
    x = method.prior_sampling((16, 1, 8, 8), torch.Generator().manual_seed(0))
    sample(gaussian_network(method, std=std), x=x, callback=steps.append)
    assert [step.level for step in steps] == levels[:-1].tolist()
    for step in steps:
        exact = x * math.hypot(std, step.level) / math.hypot(std, method.sigma_max)
        assert (step.x - exact).norm() < 3e-4 * exact.norm(), step.level


@pytest.mark.parametrize("dim, number", [(64, 1024), (3072, 341), (12288, 85), (3 * 2**20, 16)])
def test_larger_images_need_fewer_trajectories(dim, number):
    assert fitted.number_of_trajectories(dim, 1024) == number
    assert fitted.at_once(dim) * dim <= max(2**18, 2 * dim)  # two at least, to have distances


# --- which steps ----------------------------------------------------------------------------------


def random_step(seed, k, scatter=0.0):
    """x, `k` slopes, target, 1 + k weights and offset of a step exact but for `scatter`."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, slopes = draw(40, 2, 3), [draw(40, 2, 3) for _ in range(k)]
    weights, offset = draw(1 + k), draw(2, 3)
    target = led_by(weights, [x, *slopes]) + offset
    return x, slopes, target + scatter * draw(40, 2, 3), weights, offset


def led_by(weights, terms):
    return sum(w * term for w, term in zip(weights, terms, strict=True))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 4))
def test_a_step_that_state_and_slopes_can_take_is_found(seed, k):
    x, slopes, target, weights, offset = random_step(seed, k)
    fitted_weights, added = fitted.fit_step(x, slopes, target)
    torch.testing.assert_close(fitted_weights, weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(added, offset, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("scatter", [0.1, 1.0])
def test_of_all_steps_that_keep_the_second_moment_it_errs_least(k, scatter):
    """A general solver of the constrained least squares, from several starts, agrees."""
    x, slopes, target, *_ = random_step(k, k, scatter)
    rows = [value.flatten(1).numpy() for value in (target, x, *slopes)]
    shares = 1 / np.square(rows[0] - rows[0].mean(0)).sum(1)
    shares /= shares.sum()
    centred, *terms = (row - shares @ row for row in rows)

    def error(weights):
        return shares @ np.square(led_by(weights, terms) - centred).sum(1)

    def moment(weights):
        return shares @ (np.square(led_by(weights, terms)).sum(1) - np.square(centred).sum(1))

    starts = np.random.default_rng(0).normal(size=(5, 1 + k))
    best = min(
        (minimize(error, start, constraints={"type": "eq", "fun": moment}) for start in starts),
        key=lambda solution: solution.fun if abs(moment(solution.x)) < 1e-6 else np.inf,
    )
    weights, offset = (value.numpy() for value in fitted.fit_step(x, slopes, target))
    assert moment(weights) == pytest.approx(0, abs=1e-9)
    assert weights == pytest.approx(best.x, rel=1e-3, abs=1e-3)
    mean = shares @ led_by(weights, rows[1:])
    assert mean + offset.flatten() == pytest.approx(shares @ rows[0])


def test_parallel_slopes_and_a_slope_of_zero_make_a_step():
    x, (slope,), target, *_ = random_step(0, 1)
    for slopes in ([slope, 2 * slope, -slope], [slope, torch.zeros_like(slope)]):
        weights, offset = fitted.fit_step(x, slopes, target)
        torch.testing.assert_close(led_by(weights, [x, *slopes]) + offset, target)


def test_a_step_at_a_high_noise_level_takes_what_little_the_slope_tells():
    """The target keeps half of the noise and all of d, which is 7e-5 of the state."""
    draw = partial(torch.randn, 256, 2, 3, generator=torch.Generator().manual_seed(0))
    sigma, d = 1348.0, 0.1 * draw()
    x = sigma * draw() + d
    target = (x + d) / 2
    slope = (x - d) / sigma
    weights, offset = fitted.fit_step(x, [slope], target)
    assert weights.tolist() == pytest.approx([1, -sigma / 2], rel=1e-3)
    error = (led_by(weights, [x, slope]) + offset - target).std()
    assert error < 0.01 * d.std()  # the state alone would leave an error of d / 2


def test_a_step_to_one_point_leads_there():
    x, slopes, target, *_ = random_step(1, 2)
    target = target[:1].expand_as(target)
    weights, offset = fitted.fit_step(x, slopes, target)
    torch.testing.assert_close(led_by(weights, [x, *slopes]) + offset, target)


def test_the_state_without_noise_is_a_step_of_eulers_method_beyond_the_last():
    v = torch.tensor([[3.0], [4.0]])
    levels = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    steps = steps_along(lambda s: v * s + 1, lambda s: v, levels)
    states = fitted.states_at(torch.tensor([1.0, 0.0], dtype=torch.float64), steps)
    torch.testing.assert_close(torch.stack(states), torch.stack([v + 1, torch.ones_like(v)]))


@pytest.mark.parametrize("name", FAMILY)
def test_fitted_steps_lead_other_samples_to_the_law_of_a_gaussian(name):
    """Its flow scales every state by one factor for each level, so that steps can be exact."""
    method, fine_steps, n = FAMILY[name], [], 3
    generator, shape = torch.Generator().manual_seed(0), (16, 1, 4, 4)
    follow = partial(sampling.solve_ode, method, gaussian_network(method))
    x = method.prior_sampling(shape, generator)
    follow(x, "unipc", 61, schedule=fitted.fine_levels, callback=fine_steps.append)
    fine = torch.tensor([step.level for step in fine_steps], dtype=torch.float64)
    levels = fine[torch.linspace(0, 60, n + 1).long()]
    steps = fitted.Fitting(fitted.states_at(levels[1:], fine_steps))
    options = {"schedule": lambda *_: levels, "noise_removal": False}
    follow(x, "fitted", n, advance=steps, **options)
    weights = torch.stack([torch.nn.functional.pad(w, (0, 4 - len(w))) for w in steps.weights])
    stored_fit = fitted.stored_steps(levels, weights, torch.stack(steps.offsets))
    other = method.prior_sampling(shape, generator)
    sample, evaluations = follow(other, "fitted", n, advance=stored_fit, **options)
    assert evaluations == n
    exact, _ = follow(other, "rk45", rtol=1e-7, atol=1e-7)
    plain, _ = follow(other, "multistep", n, **options)
    error, beside = ((value - exact).norm() / exact.norm() for value in (sample, plain))
    # the error of the fine solutions: where slopes are parallel a fit is exact
    assert error < 1e-3, error
    assert beside > 0.1, beside


# --- the files beside the checkpoint --------------------------------------------------------------


@pytest.fixture(autouse=True)
def files_in_little_time(request):
    if "tmp_path" in request.fixturenames:
        request.getfixturevalue("few_trajectories")


def tiny(tmp_path):
    config = digits_ddpmpp.get_config()
    config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
    config.training.n_iters = 4
    config.sampling.update(ode_solver="multistep", N=5, schedule="fitted")
    config.eval.update(enable_loss=False, enable_bpd=False, enable_sampling=False)
    config.eval.update(save_images=True, num_samples=10, batch_size=10)
    config.eval.stats_dir = str(tmp_path / "stats")
    return config


def save(config, workdir, seed):
    """A checkpoint of weights that `seed` draws; returns its path."""
    torch.manual_seed(seed)
    state = train_state(config)
    state.step = 4
    generator = torch.Generator().manual_seed(seed)
    for parameter in state.ema.shadow_params:  # the last layers start at zero, and bend nothing
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = workdir / "checkpoints/checkpoint_4.pth"
    save_checkpoint(path, state.state_dict())
    return path


def fit(config, workdir):
    """Arrays that an evaluation writes beside the checkpoint, but for the time that it took."""
    run_lib.evaluate(config, workdir)
    with np.load(workdir / "checkpoints/checkpoint_4.fitted.npz") as file:
        return {name: file[name] for name in ("relative_errors", "origin")}


def test_two_fits_are_equal_bit_for_bit_and_one_of_other_weights_is_not(tmp_path, caplog):
    config, folders = tiny(tmp_path), [tmp_path / name for name in "ab"]
    for folder in folders:
        save(config, folder, seed=1)
    first, second = (fit(config, folder) for folder in folders)
    assert first["relative_errors"][0, -1] > 0
    assert first["relative_errors"].tobytes() == second["relative_errors"].tobytes()
    save(config, folders[0], seed=2)
    other = fit(config, folders[0])
    differ = other["relative_errors"] != first["relative_errors"]
    assert differ[np.triu_indices(61, 1)].mean() > 0.9
    # another ODE of the same weights is another fit
    config.sampling.sigma_max = 40.0
    assert (fit(config, folders[0])["relative_errors"] != other["relative_errors"]).any()


@pytest.mark.parametrize("at_once, sizes", [(3, [3, 3, 3, 3, 2, 2]), (16, [16])])
def test_trajectories_are_solved_in_even_parts(tmp_path, monkeypatch, at_once, sizes):
    """Parts are even, since a part of one trajectory has no other to take a distance to."""
    config, parts = tiny(tmp_path), []
    save(config, tmp_path, seed=1)
    monkeypatch.setattr(fitted, "MOST_FOR_LEVELS", 16)
    monkeypatch.setattr(fitted, "at_once", lambda dim: at_once)
    measure = fitted.euler_errors
    monkeypatch.setattr(fitted, "euler_errors", lambda part: parts.append(part) or measure(part))
    fitted_sampler(config, tmp_path)
    assert [len(part[0].x) for part in parts] == sizes
    first = torch.cat([part[0].x for part in parts])
    generator = datasets.keyed_generator(torch.device("cpu"), "fitted", config.seed)
    method = run_lib.Experiment.build(config).method
    torch.testing.assert_close(first, method.prior_sampling((16, 1, 8, 8), generator))


def test_samples_take_the_levels_that_cost_least(tmp_path, monkeypatch):
    config, steps = tiny(tmp_path), []
    save(config, tmp_path, seed=1)
    draw = run_lib.draw_images

    def draw_and_look(evaluated, number):
        draw(evaluated, number)
        evaluated.experiment.sampler(evaluated.experiment.network, 2, callback=steps.append)

    monkeypatch.setattr(run_lib, "draw_images", draw_and_look)
    arrays = fit(config, tmp_path)
    # of N = 5 steps, the last one leads from sigma_min to 0
    cost = fitted.step_costs(torch.from_numpy(arrays["relative_errors"]))
    levels = fitted.fine_levels(run_lib.Experiment.build(config).method, 61, 7.0)[:61]
    assert [step.level for step in steps] == levels[fitted.cheapest_path(cost, 4)].tolist()
    assert levels[[0, -1]].tolist() == pytest.approx([config.sampling.sigma_max, 0.002])


def test_a_fit_serves_every_number_of_steps_and_a_later_start(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    save(config, tmp_path, seed=1)
    first = fit(config, tmp_path)

    def fail(*arguments):
        raise AssertionError("fitted again")

    monkeypatch.setattr(fitted, "euler_errors", fail)
    config.sampling.update(ode_solver="heun", N=60)
    assert fit(config, tmp_path)["relative_errors"].tobytes() == first["relative_errors"].tobytes()
    fitted_path(tmp_path / "checkpoints/checkpoint_4.pth").write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="fitted again"):
        fit(config, tmp_path)


@pytest.mark.parametrize("noise_removal", [True, False])
def test_fitted_steps_are_kept_for_each_number_of_them(tmp_path, monkeypatch, noise_removal):
    config = tiny(tmp_path)
    config.sampling.update(ode_solver="fitted", schedule="auto", noise_removal=noise_removal)
    checkpoint = save(config, tmp_path, seed=1)
    fit(config, tmp_path)
    with np.load(fitted_path(checkpoint, 5)) as file:
        first = {name: file[name] for name in ("weights", "offsets")}
    shapes = {name: value.shape for name, value in first.items()}
    assert shapes == {"weights": (5, 4), "offsets": (5, 1, 8, 8)}
    assert first["weights"][0, 2:].tolist() == [0, 0]  # the first step has one slope
    assert (first["weights"][2:] != 0).all()
    picture = (tmp_path / "eval/ode_images_4.png").read_bytes()

    fitting = fitted.Fitting

    def fail(*arguments):
        raise AssertionError("fitted again")

    monkeypatch.setattr(fitted, "Fitting", fail)
    run_lib.evaluate(config, tmp_path, "again")
    assert (tmp_path / "again/ode_images_4.png").read_bytes() == picture
    config.sampling.N = 6
    with pytest.raises(AssertionError, match="fitted again"):
        fit(config, tmp_path)
    monkeypatch.setattr(fitted, "Fitting", fitting)
    fit(config, tmp_path)
    assert fitted_path(checkpoint, 6).exists() and fitted_path(checkpoint, 5).exists()
    save(config, tmp_path, seed=2)
    config.sampling.N = 5
    fit(config, tmp_path)
    with np.load(fitted_path(checkpoint, 5)) as file:
        second = file["weights"]
    assert (second != first["weights"]).any()
    # other levels are other steps, whatever they come from
    measured = fitted_sampler(config, tmp_path).fit.schedule
    cost = fitted.step_costs
    monkeypatch.setattr(fitted, "step_costs", lambda errors: cost(errors) ** 0.1)
    schedule = fitted_sampler(config, tmp_path).fit.schedule
    assert (schedule(None, 4, 7.0) != measured(None, 4, 7.0)).any()
    with np.load(fitted_path(checkpoint, 5)) as file:
        assert (file["weights"] != second).any()


def fitted_sampler(config, workdir):
    """The sampler of `config`, fitted to the checkpoint of `workdir`."""
    run, path = run_lib.Experiment.build(config), workdir / "checkpoints/checkpoint_4.pth"
    fit_checkpoint(partial(load_ema, run.network), load_checkpoint(path), path)
    return run.fitted_sampler(path)


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_steps_than_the_order_are_fitted(tmp_path, n):
    config = tiny(tmp_path)
    config.sampling.update(ode_solver="fitted", schedule="auto", N=n)
    save(config, tmp_path, seed=1)
    fit(config, tmp_path)
    assert (tmp_path / "eval/ode_images_4.png").exists()


def test_a_solve_with_another_order_than_the_fit_is_refused():
    steps = fitted.stored_steps(torch.tensor([2.0, 1.0, 0.0]), torch.ones(2, 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="^the steps were fitted with order 1, but"):
        linear_multistep(
            lambda x, s: x, torch.ones(1, 1), torch.tensor([2.0, 1.0, 0.0]), advance=steps
        )


def test_a_killed_evaluation_fits_once(tmp_path):
    config = tiny(tmp_path)
    fit_file = fitted_path(save(config, tmp_path, seed=1))
    options = ["--config.model.nf=8", "--config.model.ch_mult=(1,)"]
    options += ["--config.model.attn_resolutions=()", "--config.training.n_iters=4"]
    options += ["--config.sampling.ode_solver=multistep", "--config.sampling.N=60"]
    options += ["--config.sampling.schedule=fitted", "--config.eval.enable_loss=False"]
    options += ["--config.eval.enable_bpd=False", "--config.eval.num_samples=100"]
    options += [f"--config.eval.stats_dir={tmp_path}/stats", "--config.eval.batch_size=20"]
    flags = ["--mode", "eval", "--workdir", str(tmp_path)]
    flags += ["--config", str(ROOT / "configs/edm/digits_ddpmpp.py"), *options]
    process = Program([*MAIN, *flags])
    deadline = time.monotonic() + 200
    while not fit_file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    before = fit_file.stat()
    output = run_main(flags).stdout
    assert "trajectories in fine steps" not in output
    assert fit_file.stat().st_mtime_ns == before.st_mtime_ns
    assert (tmp_path / "eval/report_4.npz").exists()


def test_a_fit_goes_with_its_checkpoint(tmp_path):
    config = tiny(tmp_path)
    path = save(config, tmp_path, seed=1)
    for fit_file in (fitted_path(path), fitted_path(path, 10)):
        fit_file.write_bytes(b"")
    drop_checkpoints(tmp_path, [4, 8], keep=1)
    assert not any((tmp_path / "checkpoints").iterdir())


# --- what is refused ------------------------------------------------------------------------------


def test_what_fitted_cannot_do_is_one_line(tmp_path):
    config = tiny(tmp_path)
    method = FAMILY["edm"]
    with pytest.raises(ValueError, match="are made for a network"):
        sampling.get_sampling_fn(config, method)(lambda x, label: x, x=torch.zeros(1, 1, 8, 8))
    config.sampling.N = 61
    with pytest.raises(ValueError, match=r"chooses among 60 steps: sampling\.N can be no more"):
        sampling.get_sampling_fn(config, method)
    config.sampling.update(N=10, ode_solver="fitted", schedule="polynomial")
    with pytest.raises(ValueError, match=r"needs sampling.schedule='fitted' or 'auto', not"):
        sampling.get_sampling_fn(config, method)
    config.sampling.update(schedule="auto", order=5)
    with pytest.raises(ValueError, match=r"order=5: sampling.ode_solver='fitted' has the orders"):
        sampling.get_sampling_fn(config, method)
    config.sampling.update(order=None, schedule="fitted", ode_solver="rk45")
    with pytest.raises(ValueError, match=r"rk45' chooses its own steps: .* 'auto', not 'fitted'"):
        sampling.get_sampling_fn(config, method)


def test_a_fit_that_diverges_is_named(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    save(config, tmp_path, seed=1)

    def follow(*arguments, **options):
        raise FloatingPointError("the slope is not finite")

    monkeypatch.setattr(sampling.ODESampler, "__call__", follow)
    with pytest.raises(FloatingPointError, match="^fitting the sampler: the slope"):
        fit(config, tmp_path)


@pytest.mark.parametrize("solver", ["multistep", "fitted"])
def test_training_draws_with_the_solvers_own_schedule(tmp_path, solver):
    config = tiny(tmp_path)
    config.sampling.ode_solver = solver
    assert run_lib.train(config, tmp_path)
    assert (tmp_path / "samples/iter_4/sample.png").exists()
    assert not list(tmp_path.glob("checkpoints/*.fitted*.npz"))
