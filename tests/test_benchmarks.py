"""Benchmarks: the plain form of a step computes the same; the measures of robustness."""

import contextlib
import importlib.util
import json
import math
import sys

import pytest
import torch
from conftest import ROOT
from test_small_runs import report_of, tiny
from torch import nn
from warm_start import Program

import methods
import run_lib
from configs.poisson import digits_ddpmpp
from models.layers import NIN
from sampling import solve_ode
from solvers import heun
from storage import run_config


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["poisson/digits_ncsnpp", "vp/digits_ddpmpp"])
def test_the_plain_form_of_a_step_has_the_same_losses(experiment, tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks/train.py",
        f"--config={ROOT}/configs/{experiment}.py",
        "--config.model.nf=8",
        "--config.optim.warmup=0",
        "--config.training.batch_size=96",
        "--config.training.accumulate=2",
        f"--json={tmp_path / 'figures.json'}",
    ]
    Program(command).finish()
    figures = json.loads((tmp_path / "figures.json").read_text())
    ours, plain = figures["forms"]["ours"], figures["forms"]["plain"]
    assert len(ours["losses"]) == 4
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    for form in (ours, plain):
        assert sum(form["phases"].values()) == pytest.approx(2 * form["phases"]["step"])
        assert form["images_per_second"] > 0
        assert 0 < form["model_flop_utilisation"] < 1


@pytest.mark.parametrize("name", ["edm", "poisson", "vpsde"])
def test_the_plain_loop_of_sampling_is_heuns_method(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks/sampling.py")
    spec.loader.exec_module(speed := importlib.util.module_from_spec(spec))
    config = digits_ddpmpp.get_config()
    config.training.sde, config.sampling.N = name, 6
    method = methods.get_method(config)
    x = method.prior_sampling((3, 1, 8, 8), torch.Generator().manual_seed(0))

    def net(x, noise_label):
        out = torch.tanh(x) * (1 + noise_label).view(-1, 1, 1, 1)
        return (out, -noise_label - 1) if name == "poisson" else out

    expected, _ = solve_ode(method, net, x, "heun", 6, noise_removal=True)
    samples = speed.plain_heun(method, net, x, config.sampling)
    torch.testing.assert_close(samples, expected)


@pytest.fixture
def robustness(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("robustness")


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_quantization_keeps_the_grid_and_errs_by_half_a_step(bits, robustness):
    largest = 2 ** (bits - 1) - 1
    grid = torch.arange(-largest, largest + 1) / 8
    assert torch.equal(robustness.quantize(grid, bits), grid)
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    quantized_weight = robustness.quantize(weight, bits)
    step = weight.abs().max() / largest
    assert (quantized_weight - weight).abs().max() <= step / 2 * (1 + 1e-12)
    assert quantized_weight.abs().max() == weight.abs().max()
    assert len(quantized_weight.unique()) <= 2**bits - 1
    assert torch.equal(robustness.quantize(torch.zeros(3), bits), torch.zeros(3))


def test_convolutions_alone_are_quantized_and_get_their_weights_back(robustness):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), NIN(3, 4), nn.Linear(4, 5), nn.GroupNorm(1, 5))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with robustness.quantized(net, 4):
        within = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], within[name])}
    assert changed == {"0.weight", "1.W"}
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_noise_is_injected_before_each_step(robustness):
    """dx/dsigma = x / sigma, whose steps are exact: x / sigma gains alpha e in each of them."""
    levels = torch.tensor([80.0, 20.0, 3.0, 0.5], dtype=torch.float64)
    x = torch.full((100_000,), 7.0, dtype=torch.float64)
    calls = []

    def slope(x, level):
        calls.append(level)
        return x / level

    def solve(alpha):
        generator = torch.Generator().manual_seed(0)
        return robustness.noisy_heun(slope, x, levels, alpha=alpha, generator=generator)

    assert torch.equal(solve(0.0), heun(slope, x, levels))
    assert calls == 2 * [80.0, 20.0, 20.0, 3.0, 3.0]
    relative = solve(0.2) / 0.5
    assert relative.mean().item() == pytest.approx(7 / 80, abs=0.005)  # 5 standard errors
    assert relative.std().item() == pytest.approx(0.2 * math.sqrt(3), rel=0.015)


def test_robustness_of_two_seeds(tmp_path, robustness, monkeypatch, capsys):
    seeds = [tmp_path / "a", tmp_path / "b"]
    few = {"eval__num_samples": 30, "sampling__N": 18, "sampling__ode_solver": "heun"}
    for seed, workdir in enumerate(seeds):
        config = tiny("pfgmpp/digits_ddpmpp.py", tmp_path, model__D=16.0, seed=seed, **few)
        assert run_lib.train(config, workdir)
        run_lib.evaluate(config, workdir)
    picture = tmp_path / "plot.png"
    words = ["robustness.py", *map(str, seeds), "--num=30", f"--out={picture}"]
    monkeypatch.setattr(sys, "argv", words)
    robustness.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("PFGM++, D = 16 ")]
    assert len(rows) == len(robustness.PANELS) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")

    curve, again = robustness.measure(seeds[0], 30)
    assert curve == "PFGM++, D = 16"
    assert len(again) == len(list((seeds[0] / "robustness").glob("*.npz"))) == 11
    assert len(set(again.values())) == 11  # each setting makes other samples
    fid = report_of(seeds[0], 2)["fid"]
    assert again[robustness.Setting()] == pytest.approx(fid, rel=1e-6)

    def draw(*_):
        raise AssertionError("samples that are there are drawn again")

    monkeypatch.setattr(robustness, "draw", draw)
    assert robustness.measure(seeds[0], 30) == (curve, again)


def test_a_curve_has_runs_that_differ_in_their_seeds_alone(tmp_path, robustness):
    def workdir(name, **changes):
        (tmp_path / name).mkdir()
        config = tiny("pfgmpp/digits_ddpmpp.py", tmp_path, model__D=16.0, **changes)
        run_config.store(tmp_path / name, run_config.flatten(config))
        return tmp_path / name

    a, b = workdir("a", seed=1), workdir("b", seed=2)
    assert robustness.common.curves([a, b]) == dict.fromkeys([a, b], "PFGM++, D = 16")
    c, d = workdir("c", seed=1, optim__lr=0.5), workdir("d", seed=1, training__sde="vpsde")
    curves = robustness.common.curves([a, b, c, d])
    assert curves[a] == curves[b] == "PFGM++, D = 16, optim.lr = 0.001"
    assert curves[c] == "PFGM++, D = 16, optim.lr = 0.5"
    assert len(set(curves.values())) == 3
    copy = workdir("copy", seed=2)
    with pytest.raises(ValueError, match=f"{b} and {copy} are one seed, 2"):
        robustness.common.curves([a, b, copy])


def test_robustness_of_nothing_is_one_line(tmp_path, robustness, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["robustness.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"there is no run in {tmp_path}"):
        robustness.main()


def test_the_benchmark_of_samplers_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    """A bar for each solve, of which the name says how many there are; rows come as they are."""
    config = tiny("edm/digits_ddpmpp.py", tmp_path, training__snapshot_sampling=False)
    assert run_lib.train(config, tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks/sampling.py")
    spec.loader.exec_module(speed := importlib.util.module_from_spec(spec))
    evaluations, rows = {}, []

    @contextlib.contextmanager
    def bar(method, title):
        yield lambda count, sigma: evaluations.__setitem__(title, count + 1)
        rows.append(capsys.readouterr().out)

    monkeypatch.setattr(speed, "solver_bar", bar)
    monkeypatch.setattr(speed, "COMPARED", 2)
    speed.measure(tmp_path, 20, {speed.Setting("heun"): (3,)})
    rows.append(capsys.readouterr().out)
    assert [*evaluations] == ["exact solution", "rk45, 1 of 2", "heun, 2 of 2"]
    assert evaluations["heun, 2 of 2"] == 5
    assert "rk45" in rows[2] and rows[3].startswith("heun")
