"""Drills: one file of tests/drills adds a part at each seam, with the program unchanged."""

import ast
import importlib.util
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.datasets import load_digits
from warm_start import run_main

import datasets
import losses
import methods
import models
import optimizers
import run_lib
import sampling
import solvers
import sources
from datasets import Data
from experiment import Experiment, load
from library.trained import Trained
from likelihood import get_likelihood_fn
from losses import get_loss_fn
from methods import restoration
from metrics import table
from sources import codec
from sources.batch import Batch, Conditions
from storage import run_config
from storage.checkpoints import load_checkpoint, save_checkpoint
from storage.files import save_png
from storage.run_config import flatten

DRILLS = ROOT / "tests/drills"
REGISTRIES = (
    sources.SOURCES,
    models.NETWORKS,
    methods.METHODS,
    losses.OBJECTIVES,
    optimizers.OPTIMIZERS,
    codec.CODECS,
    solvers.SOLVERS,
    solvers.SCHEDULES,
    table.METRICS,
    restoration.RESTORERS,
)
TINY = {
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.attn_resolutions": (),
    "training.n_iters": 20,
    "training.batch_size": 96,
    "training.snapshot_freq": 20,
    "sampling.N": 3,
    "eval.num_samples": 20,
    "eval.enable_bpd": False,
}


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
    arguments = ["--mode", mode, "--workdir", str(workdir)]
    if config:
        arguments += ["--config", str(DRILLS / f"{name}.py")]
        arguments += [f"--config.{key}={value}" for key, value in TINY.items()]
        arguments += [f"--config.eval.stats_dir={workdir}/stats"]
    return run_main([*arguments, *overrides]).stdout


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
    """Its own options are part of the run; `mixer_depth` is not the default."""
    overrides = ["--config.sampling.ode_solver=forward_euler", "--config.model.mixer_depth=1"]
    program("train", "network", tmp_path, *overrides)
    content = load_checkpoint(tmp_path / "checkpoints/checkpoint_20.pth")
    assert content["config"]["model.mixer_depth"] == 1
    assert content["model"]["blocks.0.among.0.weight"].shape == (32, 16)
    assert "blocks.1.among.0.weight" not in content["model"]
    head = content["model"]["head.weight"]
    assert head.shape == (8, 2, 2, 2)  # 2 outputs: the image's channel and the field's height
    report, _, page = evaluated("network", tmp_path, *overrides)
    assert report["nfe"] == 3
    assert re.search(r"<dd>mixer, [\d,]+ parameters</dd>", page)


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


def tiny(module, **changes):
    """The config of a drill, in-process; `changes` have __ in place of the dot."""
    config = module.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(TINY | {"training.snapshot_sampling": False} | changes)
    return config


def in_one_life_and_in_two(make_config, tmp_path, monkeypatch):
    """The last checkpoints of an uninterrupted run and of one that was killed in step 15 of 20."""

    def killed(state, *arguments):
        if state.step == 14:
            raise KeyboardInterrupt
        return step(state, *arguments)

    step = run_lib.train_step
    assert run_lib.train(make_config(), tmp_path / "one")
    monkeypatch.setattr(run_lib, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_lib.train(make_config(), tmp_path / "two")
    monkeypatch.setattr(run_lib, "train_step", step)
    assert load_checkpoint(tmp_path / "two/checkpoints-meta/checkpoint.pth")["step"] == 10
    assert run_lib.train(make_config(), tmp_path / "two")
    paths = (tmp_path / life / "checkpoints/checkpoint_20.pth" for life in ("one", "two"))
    return [load_checkpoint(path) for path in paths]


def leaves(tree, path=""):
    """{path: value} of nested dictionaries and lists."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in pairs for k, v in leaves(value, f"{path}.{key}").items()}
    return {path: tree}


def check_equal(one, two):
    """Bit for bit: weights, moments, averages, whatever a run's state holds."""
    one, two = leaves(one), leaves(two)
    assert one.keys() == two.keys()
    for path, value in one.items():
        same = torch.equal(value, two[path]) if torch.is_tensor(value) else value == two[path]
        assert same, path


@pytest.mark.parametrize("name", ["adamw", "radam", "lion"])
def test_an_optimiser(drill, tmp_path, monkeypatch, one_thread, name):
    module = drill("optimizer")
    betas = {"optim__beta2": 0.9} if name == "lion" else {}

    def make_config():
        preemption = {"training__snapshot_freq_for_preemption": 10}
        return tiny(module, optim__optimizer=name, optim__warmup=0, **preemption, **betas)

    one, two = in_one_life_and_in_two(make_config, tmp_path, monkeypatch)
    check_equal(one, two)
    groups, state = one["optimizer"]["param_groups"], one["optimizer"]["state"]
    decay = {"adamw": [0.1, 0.0], "radam": [0.0], "lion": [0.1]}[name]
    assert [group["weight_decay"] for group in groups] == decay
    if name == "lion":
        assert groups[0]["betas"][1] == one["config"]["optim.beta2"] == 0.9
        assert {key for moments in state.values() for key in moments} == {"momentum"}
    if name == "adamw":
        matrices, vectors = (group["params"] for group in groups)
        assert all(state[n]["exp_avg"].dim() > 1 for n in matrices if n in state)
        assert all(state[n]["exp_avg"].dim() <= 1 for n in vectors if n in state)
    assert any((moments[key] != 0).any() for moments in state.values() for key in moments)


def test_an_objective_with_a_parameter(drill, tmp_path, monkeypatch, one_thread):
    module = drill("objective")

    def make_config():
        options = {"training__snapshot_freq_for_preemption": 10}
        return tiny(module, training__bins=8, optim__warmup=0, **options)

    one, two = in_one_life_and_in_two(make_config, tmp_path, monkeypatch)
    check_equal(one, two)
    assert one["objective"]["table"].shape == (8,)
    assert (one["objective"]["table"] != 0).all()
    n = len(one["optimizer"]["param_groups"][0]["params"])
    assert one["optimizer"]["state"][n - 1]["exp_avg"].shape == (8,)
    assert len(one["ema"]["shadow_params"]) == n - 1  # all but the objective's weight
    overrides = ["--config.training.bins=8"]
    report, _, _ = evaluated("objective", tmp_path / "one", *overrides)
    assert report["num_samples"] == 20


def test_the_loss_of_an_evaluation_is_that_of_the_learned_objective(drill, tmp_path, one_thread):
    module, losses_found = drill("objective"), []
    config = tiny(module, optim__warmup=0, training__n_iters=4, training__snapshot_freq=4)
    config.eval.enable_sampling = False
    assert run_lib.train(config, tmp_path / "learned")
    content = load_checkpoint(tmp_path / "learned/checkpoints/checkpoint_4.pth")
    content["objective"]["table"].zero_()
    save_checkpoint(tmp_path / "none/checkpoints/checkpoint_4.pth", content)
    for name in ("learned", "none"):
        run_lib.evaluate(config, tmp_path / name)
        with np.load(tmp_path / name / "eval/report_1.npz") as file:
            losses_found.append(file["loss"])
    assert losses_found[0] != losses_found[1]


def test_a_codec(tmp_path):
    program("train", "codec", tmp_path)
    weights = load_checkpoint(tmp_path / "checkpoints/checkpoint_20.pth")["model"]
    assert weights["stem.weight"].shape[1] == 3
    bpd = ["--config.eval.enable_bpd=True", "--config.eval.bpd_num_repeats=1"]
    bpd += ["--config.sampling.rtol=0.5", "--config.sampling.atol=0.5"]
    report, _, _ = evaluated("codec", tmp_path, *bpd)
    assert np.isfinite(report["bpd"])
    with np.load(tmp_path / "codec/ckpt_1/samples_0.npz") as file:
        assert file["samples"].shape == (20, 8, 8, 1)
    save_png(tmp_path / "digit.png", np.uint8(load_digits().images[0] / 16 * 255)[..., None])
    overrides = ["--config.sampling.seeds=0-3", "--config.sampling.film=True"]
    overrides += [f"--config.sampling.encode={tmp_path}/digit.png"]
    output = program("sample", "codec", tmp_path, *overrides, f"--outdir={tmp_path}/drawn")
    assert "digit.png: " in output
    with np.load(tmp_path / "drawn/encoded.npz") as file:
        assert file["latents"].shape == (1, 3, 4, 4)
        assert file["decoded"].shape == (1, 8, 8, 1)
    with np.load(tmp_path / "drawn/film.npz") as film, np.load(tmp_path / "drawn/samples.npz") as s:
        assert (film["frames"][-1] == s["samples"]).all()


def test_a_condition(drill, tmp_path, one_thread):
    """Two numbers of each image travel to the network, are dropped, and guide samples."""
    module = drill("condition")
    config = tiny(module, training__n_iters=20, training__snapshot_freq=20, eval__enable_bpd=False)
    calls, forward = [], module.Conditional.forward

    def look(self, x, noise_label, vector=None):
        calls.append(vector)
        return forward(self, x, noise_label, vector)

    module.Conditional.forward = look
    assert run_lib.train(config, tmp_path)
    rows = torch.cat([vector for vector in calls if vector is not None and len(vector) > 20])
    dropped = (rows == 0).all(1).double().mean().item()
    assert 0.1 < dropped < 0.3  # training.label_dropout = 0.2
    images = Data(config.data)
    vectors = images.conditions("train")["vector"]
    assert vectors.shape == (300, 2) and images.get("train").labels is None
    calls.clear()
    run_lib.evaluate(config, tmp_path)
    draws = [vector for vector in calls if vector is not None]
    assert len(draws) < len(calls)  # guidance asks the network without the vector too
    assert all((vectors[:, None] == row).all(2).any() for vector in draws[:1] for row in vector[:3])
    with np.load(tmp_path / "eval/report_1.npz") as file:
        assert file["num_samples"] == 20 and np.isfinite(file["fid"])
    trained = load(tmp_path, config=config)
    alone, beside = trained.sample([3]), trained.sample([4, 3])[1:]
    torch.testing.assert_close(alone, beside)  # the seed draws the vector too


def test_the_page_of_the_data_has_the_numbers_of_a_condition(drill, tmp_path, one_thread):
    module = drill("condition")
    config = module.get_config()
    config.update_from_flattened_dict(TINY)
    run_lib.look_at_data(config, tmp_path / "run")
    cells = re.findall(r"<td>(.*?)</td>", (tmp_path / "run/data.html").read_text())
    vectors = module.open_stripes(config.data, "train").vectors
    rows = [i for i, cell in enumerate(cells) if cell == "vector"]
    assert [cells[i + 1] for i in rows] == ["0", "1"]
    for i, column in zip(rows, vectors.T, strict=True):
        numbers = [float(cell.replace("−", "-")) for cell in cells[i + 2 : i + 6]]
        expected = column.min(), column.max(), column.mean(), column.std()
        np.testing.assert_allclose(numbers, expected, rtol=2e-3)


def test_rows_without_a_condition_are_none():
    batch = Conditions(
        class_labels=torch.arange(4), vector=torch.ones(4, 2), augment_labels=torch.ones(4, 9)
    )
    assert batch.droppable() and not Conditions(augment_labels=torch.ones(4, 9)).droppable()
    mask = torch.tensor([True, False, False, True])
    dropped = batch.drop(mask)
    assert dropped["class_labels"].tolist() == [-1, 1, 2, -1]
    assert dropped["vector"].tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
    assert torch.equal(dropped["augment_labels"], torch.ones(4, 9))


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


def test_rectified_flow_takes_15_lines():
    source = (DRILLS / "method.py").read_text()
    statements = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef | ast.Assign)]
    assert len(statements) == 2
    assert sum(bool(s.strip()) for n in statements for s in ast.unparse(n).splitlines()) <= 15


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
    steps = []
    sample = sampling.get_sampling_fn(config, method)
    images, nfe = sample(gaussian_network, x=x, callback=steps.append)
    assert nfe == 2 * 400 - 1
    assert [steps[0].level, len(steps)] == [pytest.approx(999), 400]
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
    mean_loss = loss(gaussian_network, images, torch.Generator().manual_seed(1)).item()
    t = torch.linspace(0, 1, 10001, dtype=torch.float64)
    expected = (0.09 / (((1 - t) * 0.3) ** 2 + t**2)).mean()
    assert mean_loss == pytest.approx(expected.item(), rel=0.03)


def test_learned_uncertainty_is_the_log_of_the_mean_error(drill):
    """The loss of each noise level is smallest at that u."""
    config = drill("objective").get_config()
    config.data.image_size = 2
    config.training.update(batch_size=64, bins=4)
    method = methods.get_method(config)
    objective, net = get_loss_fn(config, method), lambda x, label: torch.zeros_like(x)
    batch = Batch(torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0)))
    examples = objective.draw(batch)
    examples = replace(examples, t=torch.full((64,), 0.7, dtype=torch.float64))
    error = objective.squared_errors(net, examples, batch).mean()
    # in the beginning u is 0, and the loss is the mean error
    assert objective.uncertainty(examples.t[:1]) == 0
    assert objective.loss(net, examples, batch).item() == pytest.approx(error.item())
    optimizer = torch.optim.LBFGS(objective.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = objective.loss(net, examples, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    u = objective.uncertainty(examples.t[:1]).item()
    assert u == pytest.approx(math.log(error.item()), abs=1e-3)
    assert closure().item() == pytest.approx(1 + math.log(error.item()), abs=1e-3)


@pytest.mark.parametrize("coefficients", [1, 3, 4])
def test_a_linear_autoencoder_is_a_projection(drill, coefficients):
    haar = drill("codec").LinearAutoencoder((2, 4, 6), coefficients)
    images = torch.rand(5, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    latents = haar.encode(images)
    assert latents.shape == (5, *haar.shape) == (5, 2 * coefficients, 2, 3)
    torch.testing.assert_close(haar.encode(haar.unclamped(latents)), latents)
    if coefficients == 4:
        torch.testing.assert_close(haar.decode(latents), images)
        norms = latents.flatten(1).norm(dim=1), (2 * images - 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(*norms)
    means = torch.nn.functional.avg_pool2d(images, 2)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(haar.unclamped(latents), 2), means)


def test_the_library_shows_images_where_the_network_sees_latents(drill):
    config = tiny(drill("codec"), sampling__rtol=0.1, sampling__atol=0.1)
    experiment = Experiment.build(config)
    experiment.network.eval()
    run = Trained(experiment, ROOT / "none", 0)
    samples = run.sample(range(3))
    assert samples.shape == (3, 1, 8, 8)
    film = run.film(range(3), frames=5)
    assert film.shape == (5, 3, 1, 8, 8)
    assert torch.equal(film[-1], (samples * 255).round().to(torch.uint8))
    latents = run.encode(samples)
    assert latents.shape == (3, 3, 4, 4)
    assert run.decode(latents).shape == (3, 1, 8, 8)
    nats, bits = run.log_likelihood(samples), run.bits_per_dim(samples)
    torch.testing.assert_close(bits, -nats / (48 * math.log(2)))
    with pytest.raises(ValueError, match="denoises latents, not images"):
        run.denoise(samples, 0.1)


def test_steps_lie_where_the_schedule_says(drill):
    config = drill("schedule").get_config()
    config.sampling.N, config.sampling.noise_removal = 6, False
    method, steps = methods.get_method(config), []
    x = method.prior_sampling((2, 1, 8, 8))
    sampling.get_sampling_fn(config, method)(lambda x, label: x, x=x, callback=steps.append)
    levels = solvers.SCHEDULES["cosine"](method, 6, 7.0)
    assert [step.level for step in steps] == levels[:-1].tolist()
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
    del models.NETWORKS["mixer"]
    with pytest.raises(ValueError, match="model.name.*'mixer'"):
        models.create_model(config)
    config.data.dataset = "stripes"
    with pytest.raises(ValueError, match="data.dataset must be one of .*, not 'stripes'"):
        datasets.get_dataset(config, "train")
