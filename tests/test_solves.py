"""Solvers while they run: progress, the limit of evaluations, signals, snapshots."""

import os
import signal
import time

import pytest
import torch
from conftest import ROOT
from known_laws import FAMILY, SDES, gaussian_network
from warm_start import MAIN, Program, run_main

import methods
import run_lib
import sampling
from configs.edm import digits_ddpmpp as edm_digits
from configs.vp import digits_ddpmpp as vp_digits
from likelihood import log_likelihood, unit_vectors
from reports.progress import solver_bar
from solvers import SOLVERS
from solvers.base import TooManyEvaluations
from storage.checkpoints import load_checkpoint

METHODS = SDES | FAMILY
TINY = {"nf": 8, "ch_mult": (1,), "attn_resolutions": ()}
# more evaluations than any test waits for
ENDLESS = {"ode_solver": "rk45", "rtol": 1e-12, "atol": 1e-12, "max_evaluations": 10**9}


def tiny(module=edm_digits, **sampling_options):
    config = module.get_config()
    config.model.update(TINY)
    config.training.update(n_iters=4, snapshot_freq=2, picture_freq=1)
    config.sampling.update(sampling_options)
    return config


# --- what is told ---------------------------------------------------------------------------------


def check_told(calls, evaluations, method, rising=False):
    """Each evaluation once, and levels that lie between prior and data, which come in order."""
    assert [count for count, _ in calls] == list(range(evaluations))
    ends = method.sigma(torch.tensor([method.t_prior, method.t_data], dtype=torch.float64))
    high, low = ends.tolist()
    levels = [level for _, level in calls]
    assert all(level == 0 or low * (1 - 1e-9) <= level <= high * (1 + 1e-9) for level in levels)
    assert levels[0] == pytest.approx(low if rising else high)
    thirds = levels[0], levels[len(levels) // 2], levels[-1]
    assert sorted(thirds, reverse=not rising) == list(thirds)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["vp", "edm"])
def test_a_solver_tells_of_each_evaluation(name, solver):
    method, calls = METHODS[name], []
    x = method.prior_sampling((3, 1, 2, 2), torch.Generator().manual_seed(0))
    _, evaluations = sampling.solve_ode(
        method,
        gaussian_network(method),
        x,
        solver,
        8,
        noise_removal=True,
        watch=lambda *call: calls.append(call),
    )
    check_told(calls, evaluations, method)


@pytest.mark.parametrize("corrector", ["none", "langevin"])
def test_predictor_and_corrector_tell_of_each_evaluation(corrector):
    config, calls = tiny(vp_digits, method="pc", corrector=corrector), []
    config.model.num_scales = 30
    method = methods.get_method(config)
    _, evaluations = sampling.get_sampling_fn(config, method)(
        gaussian_network(method),
        x=torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
        generator=torch.Generator().manual_seed(1),
        watch=lambda *call: calls.append(call),
    )
    assert evaluations == (30 if corrector == "none" else 60)
    check_told(calls, evaluations, method)


@pytest.mark.parametrize("name", ["vp", "pfgmpp"])
def test_a_likelihood_tells_of_each_evaluation(name):
    method, calls = METHODS[name], []
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    *_, evaluations = log_likelihood(
        method,
        gaussian_network(method),
        x,
        unit_vectors(x),
        watch=lambda *call: calls.append(call),
    )
    check_told(calls, evaluations, method, rising=True)


def test_a_long_solve_shows_where_it_is(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with solver_bar(FAMILY["edm"]) as watch:
        watch(0, 80.0)
        now[0] += 0.5
        watch(3, 70.0)
        assert capsys.readouterr().err == ""  # a short one shows nothing
        now[0] += 60
        watch(4, 2.5)
        output = capsys.readouterr().err
    assert "4 evaluations" in output
    assert "noise level 2.5 of 0.002 to 80" in output


def test_every_evaluation_can_end_the_solver():
    class Enough(Exception):
        pass

    method = SDES["vp"]
    for solver in SOLVERS:
        calls = []

        def net(x, label, calls=calls):
            calls.append(label)
            return gaussian_network(method)(x, label)

        def watch(evaluations, sigma):
            if evaluations == 5:
                raise Enough

        with pytest.raises(Enough):
            sampling.solve_ode(method, net, torch.ones(1, 1, 2, 2), solver, 12, watch=watch)
        assert len(calls) == 5


# --- the limit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [8, 13, 20])
def test_rk45_takes_no_more_evaluations_than_allowed(limit):
    method, calls = SDES["vp"], []

    def net(x, label):
        calls.append(label)
        return gaussian_network(method)(x, label)

    x = torch.ones(1, 1, 2, 2)
    message = r"^rk45 reached t = \d\S*, not \S+, after \d+ evaluations: sampling\.max_evaluations"
    with pytest.raises(TooManyEvaluations, match=message) as raised:
        sampling.solve_ode(method, net, x, max_evaluations=limit)
    assert limit - 6 < len(calls) <= limit and "\n" not in str(raised.value)
    with pytest.raises(TooManyEvaluations, match=message):
        log_likelihood(method, net, x, unit_vectors(x), max_evaluations=limit)
    # a limit that suffices changes nothing
    free, needed = sampling.solve_ode(method, net, x)
    bounded, _ = sampling.solve_ode(method, net, x, max_evaluations=needed)
    assert torch.equal(free, bounded)
    with pytest.raises(TooManyEvaluations):
        sampling.solve_ode(method, net, x, max_evaluations=needed - 1)


def test_training_goes_on_where_a_young_network_takes_rk45_too_many(tmp_path, caplog):
    config = tiny(ode_solver="rk45", max_evaluations=9)
    config.training.snapshot_solver = "rk45"
    assert run_lib.train(config, tmp_path)
    lines = [r.getMessage() for r in caplog.records if "max_evaluations" in r.getMessage()]
    assert [line[:26] for line in lines] == [f"step {k}: no samples drawn: " for k in (2, 4)]
    assert load_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["step"] == 4


@pytest.mark.parametrize("part", ["enable_sampling", "enable_bpd"])
def test_an_evaluation_of_too_many_is_one_line_and_status_2(tmp_path, part):
    config = tiny()
    config.training.snapshot_sampling = False
    assert run_lib.train(config, tmp_path)
    options = [f"--config.eval.{p}={p == part}" for p in ("enable_loss", "enable_bpd")]
    options += [f"--config.eval.enable_sampling={part == 'enable_sampling'}"]
    options += ["--config.sampling.ode_solver=rk45", "--config.sampling.max_evaluations=9"]
    options += ["--config.eval.num_samples=20", f"--config.eval.stats_dir={tmp_path}/stats"]
    done = run_main(evaluation_flags(tmp_path, *options), expect=2)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: rk45 reached t = ") and "sampling.max_evaluations" in last
    assert "Traceback" not in done.stderr


# --- snapshots ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, solver, evaluations",
    [
        ({"ode_solver": "rk45"}, "heun", 35),
        ({"ode_solver": "rk45"}, "multistep", 18),
        ({"ode_solver": "multistep", "N": 3}, "heun", 3),
        ({"ode_solver": "multistep", "N": 3, "schedule": "fitted"}, "heun", 3),
        ({"ode_solver": "fitted", "N": 3}, "heun", 3),
    ],
)
def test_snapshots_take_few_evaluations(options, solver, evaluations):
    config, method = tiny(**options), FAMILY["edm"]
    sampler = sampling.get_sampling_fn(config, method)
    sample = sampling.for_snapshots(sampler, solver)
    assert sample(gaussian_network(method), x=torch.ones(1, 1, 2, 2))[1] == evaluations
    assert sampler.solver == options["ode_solver"]  # the run's sampler is as it was


def test_training_draws_with_the_snapshot_solver(tmp_path, caplog):
    caplog.set_level("INFO")
    assert run_lib.train(tiny(ode_solver="rk45"), tmp_path)
    messages = [r.getMessage() for r in caplog.records if "samples in" in r.getMessage()]
    assert len(messages) == 2 and all("samples in 35 evaluations" in line for line in messages)
    stored = load_checkpoint(tmp_path / "checkpoints/checkpoint_4.pth")["config"]
    assert stored["sampling.ode_solver"] == "rk45"


def test_mistakes_of_the_sampler_show_although_snapshots_have_another(tmp_path):
    config = tiny(ode_solver="rk45", schedule="uniform")
    with pytest.raises(ValueError, match="chooses its own steps"):
        run_lib.train(config, tmp_path)


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_snapshot_at_its_next_evaluation(tmp_path, monkeypatch, caplog, name):
    caplog.set_level("INFO")
    config = tiny(**ENDLESS)
    config.training.snapshot_solver = "rk45"
    evaluations = []
    build = run_lib.Experiment.build

    def build_and_hook(*arguments):
        run = build(*arguments)

        def count(module, inputs):
            if not module.training and not torch.is_grad_enabled():
                evaluations.append(inputs)
                if len(evaluations) == 30:
                    os.kill(os.getpid(), getattr(signal, name))

        run.network.register_forward_pre_hook(count)
        return run

    config.training.eval_freq = 1000  # no other evaluations of the network than the snapshot's
    monkeypatch.setattr(run_lib.Experiment, "build", build_and_hook)
    assert not run_lib.train(config, tmp_path)
    assert len(evaluations) == 30
    log = [record.getMessage() for record in caplog.records]
    assert f"step 2: no samples drawn: {name}; the next start draws them" in log
    assert f"stopped by {name} at step 2, which is saved" in log
    assert load_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["step"] == 2
    # the next start, with a solver that comes to an end, draws it and goes on
    monkeypatch.setattr(run_lib.Experiment, "build", build)
    assert run_lib.train(tiny(ode_solver="heun", N=2), tmp_path)
    folders = {path.parent.name for path in tmp_path.glob("samples/*/sample.png")}
    assert folders == {"iter_2", "iter_4"}


def options_of(values):
    flags = {f"model.{key}": value for key, value in TINY.items()}
    flags |= {"training.n_iters": 4, "training.snapshot_freq": 2, "training.picture_freq": 1}
    flags |= values
    return [f"--config.{key}={str(value).replace(' ', '')}" for key, value in flags.items()]


def program_flags(mode, workdir, *options):
    config = ROOT / "configs/edm/digits_ddpmpp.py"
    flags = ["--config", str(config), "--mode", mode, "--workdir", str(workdir)]
    return [*flags, *options_of({}), *options]


def evaluation_flags(workdir, *options):
    return program_flags("eval", workdir, *options)


def signalled(flags, ready, number):
    """Exit status and output of a program that is sent the signal a second after `ready()`."""
    process = Program([*MAIN, *flags])
    try:
        deadline = time.monotonic() + 200
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)  # an evaluation takes a tenth of a second
    finally:
        process.kill()
    return process.returncode, errors + output


def test_the_program_stops_within_a_snapshot_and_can_go_on(tmp_path):
    options = [f"--config.sampling.{key}={value}" for key, value in ENDLESS.items()]
    flags = program_flags("train", tmp_path, *options, "--config.training.snapshot_solver=rk45")
    saved = tmp_path / "checkpoints-meta/checkpoint.pth"
    status, output = signalled(flags, saved.exists, signal.SIGTERM)
    assert status == 75, output
    assert "no samples drawn: SIGTERM; the next start draws them" in output
    assert "stopped by SIGTERM at step 2, which is saved" in output
    assert "to go on: " in output.splitlines()[-1]
    run_main(program_flags("train", tmp_path))
    folders = {path.parent.name for path in tmp_path.glob("samples/*/sample.png")}
    assert folders == {"iter_2", "iter_4"}


def test_an_evaluation_stops_within_a_solve_and_can_go_on(tmp_path):
    """A signal ends the evaluation as any process; samples drawn before it are saved."""
    config = tiny()
    config.training.snapshot_sampling = False
    assert run_lib.train(config, tmp_path)
    common = ["--config.eval.enable_loss=False", "--config.eval.enable_bpd=False"]
    common += ["--config.eval.num_samples=20", f"--config.eval.stats_dir={tmp_path}/stats"]
    endless = [f"--config.sampling.{key}={value}" for key, value in ENDLESS.items()]
    log = tmp_path / "stdout.txt"
    status, output = signalled(
        evaluation_flags(tmp_path, *common, *endless),
        lambda: "evaluating" in log.read_text(),
        signal.SIGTERM,
    )
    assert status == -signal.SIGTERM, output
    assert "Traceback" not in output
    run_main(evaluation_flags(tmp_path, *common))
    assert (tmp_path / "eval/report_2.npz").exists()
