"""Drills: a new thing of each kind is one file of tests/drills, and the program takes it as is."""

import importlib.util
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import datasets
import methods
import models
import sampling
import solvers
import sources
from likelihood import get_likelihood_fn
from losses import get_loss_fn
from methods import restoration
from metrics import table
from storage import run_config
from storage.checkpoints import load_checkpoint
from storage.run_config import flatten

DRILLS = ROOT / "tests/drills"
REGISTRIES = (
    sources.SOURCES,
    models.NETWORKS,
    methods.METHODS,
    solvers.SOLVERS,
    solvers.SCHEDULES,
    table.METRICS,
    restoration.RESTORERS,
)
TINY = [
    "--config.model.nf=8",
    "--config.model.ch_mult=(1,)",
    "--config.model.attn_resolutions=()",
    "--config.training.n_iters=20",
    "--config.training.batch_size=96",
    "--config.training.snapshot_freq=20",
    "--config.sampling.N=3",
    "--config.eval.num_samples=20",
    "--config.eval.enable_bpd=False",
]


@pytest.fixture
def drill():
    """`drill(name)`: the module of a drill, loaded; its registration ends with the test."""
    before = [dict(registry) for registry in REGISTRIES]

    def load(name):
        spec = importlib.util.spec_from_file_location(f"drill_{name}", DRILLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def program(mode, name, workdir, *overrides, config=True):
    command = [sys.executable, str(ROOT / "main.py"), "--mode", mode, "--workdir", str(workdir)]
    if config:
        command += ["--config", str(DRILLS / f"{name}.py"), *TINY]
        command += [f"--config.eval.stats_dir={workdir}/stats"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *overrides], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def evaluated(name, workdir, *overrides):
    """Report, output and page of an evaluation by the drill `name`."""
    output = program("eval", name, workdir, f"--eval_folder={name}", *overrides)
    with np.load(workdir / name / "report_1.npz") as file:
        report = dict(file)
    for key in ("fid", "loss"):
        assert np.isfinite(report[key]), key
    return report, output, (workdir / name / "report.html").read_text()


# --- by the program -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir trained on a new source; the tests evaluate it in their ways."""
    workdir = tmp_path_factory.mktemp("drills")
    log = program("train", "source", workdir, "--config.sampling.ode_solver=heun")
    assert "data: stripes, 300 images to train on and 60 to test on" in log
    return workdir


def test_a_source(trained):
    report, _, page = evaluated("source", trained, "--config.sampling.ode_solver=heun")
    assert (report["num_samples"], report["nfe"]) == (20, 5)
    assert "<dd>stripes, 8 × 8, grey</dd>" in page


def test_a_network(tmp_path):
    override = "--config.sampling.ode_solver=forward_euler"
    program("train", "network", tmp_path, override)
    weights = load_checkpoint(tmp_path / "checkpoints/checkpoint_20.pth")["model"]
    assert weights["blocks.1.attention.in_proj_weight"].shape == (96, 32)
    assert weights["head.weight"].shape == (32, 2, 2, 2)  # the image's channel and the field's
    report, _, page = evaluated("network", tmp_path, override)
    assert report["nfe"] == 3
    assert re.search(r"<dd>dit, [\d,]+ parameters</dd>", page)


def test_a_method(tmp_path):
    program("train", "method", tmp_path)
    bpd = ["--config.eval.enable_bpd=True", "--config.eval.bpd_num_repeats=1"]
    bpd += ["--config.sampling.rtol=0.5", "--config.sampling.atol=0.5"]
    report, output, page = evaluated("method", tmp_path, *bpd, "--config.eval.enable_rescale=True")
    assert report["nfe"] == 2 * 3 - 1
    assert np.isfinite(report["bpd"])
    assert "Bits/dim (test)" in output
    assert "<dd>RectifiedFlow</dd>" in page
    assert "Temperature" in page


def test_a_solver(trained):
    report, output, page = evaluated("solver", trained)
    assert report["nfe"] == 2 * 3
    assert re.search(r"evaluations +6\n", output)
    assert "midpoint, 6 evaluations" in page


def test_a_schedule(trained):
    report, output, _ = evaluated("schedule", trained)
    assert report["nfe"] == 2 * 3 - 1
    assert "differs from that of the run: sampling.schedule: 'auto' -> 'cosine'" in output


def test_a_metric(trained):
    report, output, page = evaluated("metric", trained)
    value = f"{float(report['means']):.6g}"
    assert re.search(rf"Distance of means +{re.escape(value)}\n", output)
    assert "<h3>Distance of means</h3>" in page
    assert "Distance of means\u00a0↓" in page


# --- in closed form -------------------------------------------------------------------------------


def gaussian_network(x, noise_label, mean=0.1, std=0.3):
    """The exact mean velocity, E[noise - y | x], of data y ~ N(mean, std^2) in each entry."""
    t = (noise_label.double() / 999)[:, None, None, None]
    deviation = (x - (1 - t) * mean) / (((1 - t) * std) ** 2 + t**2)
    return t * deviation - (mean + (1 - t) * std**2 * deviation)


@pytest.fixture
def rectified(drill):
    config = drill("method").get_config()
    return config, methods.get_method(config)


def test_rectified_flow_denoises_gaussian_data(rectified):
    _, method = rectified
    y = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for sigma in (0.002, 0.3, 80.0):
        expected = (0.3**2 * y + sigma**2 * 0.1) / (0.3**2 + sigma**2)
        denoised = method.denoise(gaussian_network, y, sigma)
        torch.testing.assert_close(denoised, expected, rtol=1e-9, atol=1e-9)


def test_rectified_flow_samples_gaussian_data(rectified):
    """The flow is linear: noise of std s keeps its quantile in N(mean, std^2 + sigma^2)."""
    config, method = rectified
    config.sampling.N = 400
    x = method.prior_sampling((50, 1, 8, 8), torch.Generator().manual_seed(0)).double()
    seen = []
    sample = sampling.get_sampling_fn(config, method)
    images, nfe = sample(gaussian_network, x=x, callback=seen.append)
    assert nfe == 2 * 400 - 1
    assert [seen[0].level, len(seen)] == [pytest.approx(999), 400]
    expected = 0.1 + (x - 0.001 * 0.1) * 0.3 / math.hypot(0.001 * 0.3, 0.999)
    torch.testing.assert_close(images, ((expected + 1) / 2).clamp(0, 1), rtol=0, atol=2e-4)


def test_rectified_flow_has_the_likelihood_of_gaussian_data(rectified):
    config, method = rectified
    config.eval.divergence = "exact"
    config.data.image_size = 2
    config.sampling.rtol = config.sampling.atol = 1e-6
    x = 0.1 + 0.3 * torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    bits, _, _ = get_likelihood_fn(config, method)(gaussian_network, x)
    law = torch.distributions.Normal(0.999 * 0.1, math.hypot(0.999 * 0.3, 0.001))
    log_p = law.log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(bits.double(), -log_p / (4 * math.log(2)) + 7, rtol=0, atol=2e-3)


def test_rectified_flow_has_the_loss_of_exact_velocities(rectified):
    """Their posterior variance, std^2 over that of x, for uniform times."""
    config, method = rectified
    images = 0.1 + 0.3 * torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    config.training.update(batch_size=4000, reduce_mean=True)
    loss = get_loss_fn(config, method)
    found = loss(gaussian_network, images, torch.Generator().manual_seed(1)).item()
    t = torch.linspace(0, 1, 10001, dtype=torch.float64)
    expected = (0.09 / (((1 - t) * 0.3) ** 2 + t**2)).mean()
    assert found == pytest.approx(expected.item(), rel=0.03)


def test_steps_lie_where_the_schedule_says(drill):
    config = drill("schedule").get_config()
    config.sampling.N, config.sampling.noise_removal = 6, False
    method, seen = methods.get_method(config), []
    x = method.prior_sampling((2, 1, 8, 8))
    sampling.get_sampling_fn(config, method)(lambda x, label: x, x=x, callback=seen.append)
    levels = solvers.SCHEDULES["cosine"](method, 6, 7.0)
    assert [step.level for step in seen] == levels[:-1].tolist()
    assert torch.tensor([t.atan() for t in levels]).diff().std() < 1e-6


def test_the_midpoint_rule_is_of_order_two(drill):
    solve = drill("solver").midpoint
    errors = []
    for n in (10, 20):
        levels = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        x = solve(lambda x, level: level * x, torch.ones(1, dtype=torch.float64), levels)
        errors.append(abs(x.item() - math.exp(-0.5)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_what_is_not_registered_is_one_line(drill):
    """A stored config names a drill, which only its file registers."""
    config = run_config.restore(flatten(drill("network").get_config()))
    assert isinstance(models.create_model(config), torch.nn.Module)
    del models.NETWORKS["dit"]
    with pytest.raises(ValueError, match="model.name.*'dit'"):
        models.create_model(config)
    config.data.dataset = "stripes"
    with pytest.raises(ValueError, match="data.dataset must be one of .*, not 'stripes'"):
        datasets.get_dataset(config, "train")
