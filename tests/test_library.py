"""`experiment.load` and the methods of what it returns, against laws in closed form."""

import math
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from known_laws import SDES, VP, gaussian_network, pfgmpp
from many_lives import small_config
from test_configs import load as load_config

import run_lib
from experiment import Experiment, Trained, load
from library.sample_folder import seeds_of
from likelihood import log_likelihood
from methods.base import spread
from methods.restoration import Measurement, get_operator
from sampling import encode, solve_ode
from solvers.base import Step
from solvers.states import States
from storage.checkpoints import load_checkpoint, save_checkpoint

MEAN, STD = 0.2, 0.25  # Gaussian data, in the network's units


def exact_edm(**overrides):
    """The network that is exact for images of independent normal pixels, under EDM."""
    config = load_config("edm/digits_ddpmpp.py")
    config.update_from_flattened_dict({"model.nf": 8, "model.sigma_data": 0.5} | overrides)
    experiment = Experiment.build(config)
    experiment.network = gaussian_network(pfgmpp(), MEAN, STD)
    return Trained(experiment, Path("none"), 0)


def random_network(path, **overrides):
    """A small untrained network whose output depends on every input."""
    config = load_config(path)
    small = {"model.nf": 8, "model.ch_mult": (1,), "model.attn_resolutions": ()}
    config.update_from_flattened_dict(small | overrides)
    experiment = Experiment.build(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experiment.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    experiment.network.eval()
    return Trained(experiment, Path("none"), 0)


# --- against closed forms -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    """Images of the law that the exact network knows, in [0, 1]."""
    scaled = MEAN + STD * torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return ((scaled + 1) / 2).clamp(0, 1)


def test_latents_are_those_of_the_linear_flow(images):
    """x - mean grows as the standard deviation of data with noise; decode leads back."""
    run = exact_edm()
    growth = math.sqrt((STD**2 + 80**2) / (STD**2 + 0.002**2))
    expected = MEAN + growth * (2 * images - 1 - MEAN)
    latents = run.encode(images)
    assert (latents - expected).abs().max() < 2e-3 * expected.std()
    assert (run.decode(latents) - images).abs().max() < 1e-3


def test_log_likelihood_is_over_the_unit_interval(images):
    """The prior's log density at the latent plus the log of the flow's and the codec's scaling."""
    run = exact_edm()
    growth = math.sqrt((STD**2 + 80**2) / (STD**2 + 0.002**2))
    latent = (MEAN + growth * (2 * images.double() - 1 - MEAN)).flatten(1)
    prior = torch.distributions.Normal(0.0, 80.0).log_prob(latent).sum(1)
    expected = prior + 64 * math.log(2 * growth)
    assert (run.log_likelihood(images) - expected).abs().max() < 0.2  # nats; 0.005 bits/dim


@pytest.mark.parametrize("sigma", [0.01, 0.1, 3.0])
def test_denoised_images_are_posterior_means(images, sigma):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    noisy, mean, variance = images + sigma * noise, (MEAN + 1) / 2, (STD / 2) ** 2
    expected = (variance * noisy + sigma**2 * mean) / (variance + sigma**2)
    assert (exact_edm().denoise(noisy, sigma) - expected).abs().max() < 1e-5


def test_samples_of_many_seeds_have_the_law_of_the_data():
    run = exact_edm(**{"sampling.ode_solver": "heun", "sampling.N": 100})
    scaled = 2 * run.sample(range(200)).flatten(1) - 1
    pixels = 200 * 64
    assert abs(scaled.mean() - MEAN) < 5 * STD / math.sqrt(pixels)
    assert abs(scaled.std() - STD) < 5 * STD / math.sqrt(2 * pixels)
    assert np.corrcoef(scaled.numpy())[~np.eye(200, dtype=bool)].max() < 0.7


def test_encode_and_solve_ode_are_inverse():
    """Encoding and solving back in float64, at tight tolerances, returns the images."""
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    for method in SDES.values():
        net, fine = gaussian_network(method, MEAN, STD), {"rtol": 1e-9, "atol": 1e-9}
        latents, evaluations = encode(method, net, x, **fine)
        back, _ = solve_ode(method, net, latents, **fine)
        assert evaluations > 10
        assert (back - x).abs().max() < 1e-6


# --- seeds ----------------------------------------------------------------------------------------

# config, what it changes, and the number of seeds
SAMPLERS = {
    "heun of a Poisson flow": ("poisson/digits_ddpmpp.py", {}, 32),
    "heun with churn": ("edm/digits_ddpmpp.py", {"sampling.S_churn": 2.0}, 7),
    "guidance": (
        "pfgmpp/digits_ddpmpp.py",
        {"data.num_classes": 10, "sampling.guidance": 2.0},
        7,
    ),
    "predictor": (
        "ve/digits_ncsnpp.py",
        {"sampling.method": "pc", "sampling.corrector": "none", "model.num_scales": 3},
        7,
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_depends_on_its_seed_alone(name):
    path, overrides, n = SAMPLERS[name]
    steps = {"sampling.ode_solver": "heun", "sampling.N": 3}
    run, samples = random_network(path, **steps | overrides), []
    for run.batch_size in (1, 5, 32):
        samples.append(run.sample(range(n)))
    assert max((other - samples[0]).abs().max() for other in samples) < 1 / 255
    differences = (samples[0][1:] - samples[0][:-1]).abs().flatten(1).mean(1)
    assert differences.min() > 0.01
    assert (run.sample([3, 2**62])[0] - samples[0][3]).abs().max() < 1 / 255


def test_samplers_of_one_step_size_draw_alone():
    for path in ("poisson/digits_ddpmpp.py", "ve/digits_ncsnpp.py"):
        assert random_network(path).at_once > 1
        assert random_network(path, **{"sampling.ode_solver": "rk45"}).at_once == 1
    path, overrides, _ = SAMPLERS["predictor"]
    assert random_network(path, **overrides).at_once > 1
    assert random_network(path, **overrides | {"sampling.corrector": "langevin"}).at_once == 1


def test_seeds():
    assert seeds_of("0-3") == [0, 1, 2, 3]
    assert seeds_of("1,2,5-7,6,1") == [1, 2, 5, 6, 7]
    assert seeds_of("") == []
    for text, says in {
        "5-3": "the range 5-3 falls",
        "0-999999999": "are more than 1,000,000",
    }.items():
        with pytest.raises(ValueError, match=says):
            seeds_of(text)


def test_class_labels():
    run = random_network("vp/digits_ddpmpp.py", **{"data.num_classes": 3})
    counts = run.labels(None, 3000, range(3000)).bincount(minlength=3)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(3000 * 2 / 9)
    assert run.labels(None, 2, [5, 6]).tolist() == run.labels(None, 4, [4, 5, 6, 7])[1:3].tolist()
    assert run.labels(None, 2).tolist() == [-1, -1]  # no seeds, so no labels
    assert run.labels(2, 2).tolist() == [2, 2]
    assert run.labels([0, -1], 2).tolist() == [0, -1]
    for wrong in (3, -2, [0, 3], 1.5, [0, 1, 2]):
        with pytest.raises(ValueError, match="class_label"):
            run.labels(wrong, 2)
    run.experiment.objective.label_dropout = 0.0  # then the network does not know images without
    with pytest.raises(ValueError, match=r"class_label=-1 .* those from 0 to 2"):
        run.labels(None, 2)
    with pytest.raises(ValueError, match=r"class_label=0 is no class .* none"):
        random_network("vp/digits_ddpmpp.py").labels(0, 2)


# --- the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("timed", [False, True])
def test_states_between_steps(timed):
    """y = a + b sigma passes the levels asked for; an SDE's solver tells x = alpha y at times."""
    a, b = torch.ones(2, 1, 1, 1).double(), torch.arange(2).view(2, 1, 1, 1).double()
    states = States(VP, torch.tensor([40.0, 12.0, 7.0, 3.0, 0.5]), timed, lambda y: y)
    for i, sigma in enumerate((40.0, 10.0, 4.0, 0.6)):
        t = VP.time(torch.tensor(sigma).double())
        alpha = VP.alpha(t) if timed else 1.0
        states(Step(i, t.item() if timed else sigma, alpha * (a + b * sigma), None))
    trajectory = states.end(a)
    expected = torch.tensor([40.0, 12.0, 7.0, 3.0, 0.5, 0.0]).double()
    assert trajectory.shape == (6, 2, 1, 1, 1)
    assert torch.allclose(trajectory.flatten(1), 1 + expected[:, None] * torch.tensor([0.0, 1.0]))


def test_a_film_ends_with_the_samples():
    run = random_network("vp/digits_ddpmpp.py", **{"sampling.ode_solver": "heun", "sampling.N": 4})
    film = run.film(range(3), frames=7)
    assert film.shape == (7, 3, 1, 8, 8) and film.dtype == torch.uint8
    assert torch.equal(film[-1], (run.sample(range(3)) * 255).round().to(torch.uint8))
    prior = film[0].float().flatten(1)  # normal noise, clipped at one standard deviation
    assert 100 < prior.mean() < 155 and ((prior == 0) | (prior == 255)).float().mean() > 0.25


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir after a few steps, whose sampler takes few evaluations."""
    workdir = tmp_path_factory.mktemp("trained")
    config = small_config(
        **{"training.n_iters": 12, "sampling.ode_solver": "heun", "sampling.N": 4}
    )
    config.sampling.update(rtol=1e-2, atol=1e-2)
    assert run_lib.train(config, workdir)
    return workdir


def test_the_five_lines_of_the_readme(trained, tmp_path, monkeypatch):
    page = (Path(run_lib.__file__).parent / "README.md").read_text()
    (code,) = [c.split("```")[0] for c in page.split("```python\n")[1:] if "import load" in c]
    assert len([line for line in code.splitlines() if line]) == 5
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == names["latents"].shape == (64, 1, 8, 8)
    assert (names["images"][5:6] - names["run"].sample([5])).abs().max() < 1 / 255
    assert names["nats"].shape == (64,)


def test_loading_draws_nothing_and_takes_the_ema_weights(trained):
    state = torch.get_rng_state()
    load(trained, {"sampling.precision": "auto"})  # measured on a network and images of its own
    assert torch.equal(torch.get_rng_state(), state)
    run = load(trained, {"sampling.N": 3, "sampling.guidance_interval": [0.0, 1.0]})
    assert torch.equal(torch.get_rng_state(), state)
    assert run.experiment.config.sampling.N == 3 and run.step == 12
    saved = load_newest(trained)
    ema = [*map(torch.Tensor.double, saved["ema"]["shadow_params"])]
    held = [p.double() for p in run.experiment.network.parameters()]
    assert all(map(torch.equal, ema, held))
    numbered = load(trained / "checkpoints/checkpoint_10.pth")
    assert numbered.step == 10


def test_six_frames_lead_from_a_sample_to_the_network(trained):
    """Frames of the project's files, models/ apart, when Heun's method enters the network."""
    run, stacks = load(trained), []
    assert run.experiment.sampler.solver == "heun"

    def look(network, inputs):
        stacks.append([frame for frame in traceback.extract_stack() if is_own(frame)])

    def is_own(frame):
        path = Path(frame.filename)
        place = path.relative_to(ROOT).parts[0] if path.is_relative_to(ROOT) else "elsewhere"
        return place not in ("elsewhere", ".venv", "tests", "models")

    run.experiment.network.register_forward_pre_hook(look)
    run.sample([0])
    assert len(stacks) == 2 * 4 - 1
    for frames in stacks:
        lines = [f"{f.filename}:{f.lineno} {f.name}" for f in frames]
        assert 3 <= len(frames) <= 6, "\n".join(lines)


def load_newest(workdir):
    return load_checkpoint(workdir / "checkpoints-meta/checkpoint.pth")


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(trained, tmp_path):
    newest = tmp_path / "checkpoints-meta/checkpoint.pth"
    save_checkpoint(newest.with_name("checkpoint.prev.pth"), load_newest(trained))
    newest.write_bytes(b"damaged")
    assert load(tmp_path).path.name == "checkpoint.prev.pth"
    assert newest.read_bytes() == b"damaged"


def test_what_cannot_be_loaded_is_one_line(trained, tmp_path):
    content = load_newest(trained)
    del content["config"]
    save_checkpoint(tmp_path / "old.pth", content)
    (tmp_path / "empty").mkdir()
    for path, overrides, error, says in [
        ("nowhere", {}, FileNotFoundError, "nowhere does not exist"),
        ("empty", {}, FileNotFoundError, "no checkpoint in .*empty"),
        ("old.pth", {}, ValueError, "old.pth carries no config"),
        (trained, {"sampling.schedul": "auto"}, ValueError, 'Did you mean "sampling.schedule"'),
        (trained, {"sampling.N": 0}, ValueError, "sampling.N must be .*, not 0"),
        (trained, {"model.nf": 16}, ValueError, "does not fit .* model.nf: 8 -> 16"),
    ]:
        with pytest.raises(error, match=says) as raised:
            load(tmp_path / path, overrides)
        assert "\n" not in str(raised.value)


def test_what_a_network_cannot_be_asked_is_one_line(images):
    run = exact_edm()
    for ask, says in [
        (lambda: run.sample([-1]), "a seed must be a whole number from 0 .*, not -1"),
        (lambda: run.sample([0.5]), "a seed must be .*, not 0.5"),
        (lambda: run.encode(images * 255), r"images must be floats in \[0, 1\]; divide"),
        (lambda: run.encode((images * 255).byte()), r"images must be floats in \[0, 1\]; divide"),
        (lambda: run.encode(images * math.nan), r"images must be floats in \[0, 1\]"),
        (lambda: run.encode(images[0]), r"images must be a tensor \(n, 1, 8, 8\), not \(1, 8, 8\)"),
        (lambda: run.encode(images.numpy()), r"a tensor \(n, 1, 8, 8\), not ndarray"),
        (lambda: run.decode(images[..., :4]), r"latents must be a tensor .*, not \(5, 1, 8, 4\)"),
        (lambda: run.denoise(images, 0.0), "sigma must be a noise level from 0.001 to 40, not 0.0"),
        (lambda: run.encode(images, 3), "class_label=3 is no class of the network: it has none"),
    ]:
        with pytest.raises(ValueError, match=says):
            ask()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_images_and_latents_that_are_no_floats_are_one_line(images, dtype):
    run, x = exact_edm(), (images * 255).to(dtype)
    for ask, says in [
        (lambda: run.denoise(x, 0.5), f"noisy images must be floats, not {dtype}; divide bytes"),
        (lambda: run.decode(x), f"latents must be floats, not {dtype}"),
        (lambda: run.encode(x), r"images must be floats in \[0, 1\]"),
        (lambda: run.log_likelihood(x), r"images must be floats in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=says):
            ask()


def test_seeds_of_numpy_and_pytorch():
    quick = {"sampling.ode_solver": "heun", "sampling.N": 2}
    quick |= {"sampling.rtol": 0.1, "sampling.atol": 0.1}  # quick likelihoods
    run = random_network("vp/digits_ddpmpp.py", **quick)
    expected = run.sample([3, 4])
    for seeds in (
        torch.tensor([3, 4]),
        torch.tensor([3, 4], dtype=torch.uint8),
        np.array([3, 4], np.uint64),
        [torch.tensor(3), np.int32(4)],
        range(3, 5),
        (seed for seed in (3, 4)),
    ):
        assert torch.equal(run.sample(seeds), expected)
    x = torch.full((1, 1, 8, 8), 0.5)
    nats = run.log_likelihood(x, seed=2)
    assert torch.equal(run.log_likelihood(x, seed=torch.tensor(2)), nats)
    assert torch.equal(run.log_likelihood(x, seed=np.int16(2)), nats)
    for seeds in (3, torch.tensor(3), np.array(3), None):
        with pytest.raises(ValueError, match="seeds must be several whole numbers, as range"):
            run.sample(seeds)
    for seeds in ([torch.tensor(0.5)], torch.rand(2), ["1"], np.array([-1])):
        with pytest.raises(ValueError, match="a seed must be a whole number from 0"):
            run.sample(seeds)
    for frames in (0, -1, 1.5):
        with pytest.raises(ValueError, match="frames must be a whole number of at least 1, not "):
            run.film([0], frames=frames)


def test_overrides_of_numpy_and_pytorch(trained, tmp_path):
    config = load(
        trained,
        {
            "sampling.N": np.int64(3),
            "sampling.rtol": np.float32(0.5),
            "sampling.noise_removal": np.bool_(False),
            "sampling.ode_solver": np.str_("heun"),
            "sampling.guidance_interval": np.array([0.0, 1.0]),
            "sampling.atol": torch.tensor(0.25),
            "eval.batch_size": torch.tensor(7),
            "eval.stats_dir": tmp_path,
        },
    ).experiment.config
    sampling = config.sampling
    assert (sampling.N, sampling.rtol, sampling.atol, config.eval.batch_size) == (3, 0.5, 0.25, 7)
    assert sampling.noise_removal is False and type(sampling.N) is int
    assert sampling.guidance_interval == (0.0, 1.0)
    assert config.eval.stats_dir == str(tmp_path)
    with pytest.raises(ValueError, match="sampling.N must be .*, not 0"):
        load(trained, {"sampling.N": np.int64(0)})
    with pytest.raises(ValueError, match="path=~no-such-user/run: ~no-such-user is no home"):
        load("~no-such-user/run")


@pytest.mark.parametrize("path", ["poisson/digits_ddpmpp.py", "edm/digits_ddpmpp.py"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_noise_level_for_each_image(path, kind):
    run = random_network(path)
    x, sigmas = torch.rand(5, 1, 8, 8), [0.1, 0.5, 2.0, 0.5, 0.25]
    alone = [run.denoise(x[i : i + 1], sigma) for i, sigma in enumerate(sigmas)]
    run.batch_size = 2
    assert torch.allclose(run.denoise(x, kind(sigmas)), torch.cat(alone), atol=1e-5)
    assert torch.allclose(run.denoise(x[:1], kind(sigmas[:1])), alone[0], atol=1e-5)
    for wrong, says in [
        ([0.1, 0.5], "sigma must be one noise level or 5, not 2"),
        ([0.1, 0.5, 0.0, 0.5, 0.5], "sigma must be a noise level from .*, not 0.0"),
        ([0.1, 0.5, math.nan, 0.5, 0.5], "sigma must be a noise level from .*, not nan"),
    ]:
        with pytest.raises(ValueError, match=says):
            run.denoise(x, kind(wrong))
    with pytest.raises(ValueError, match="sigma must be a number or 5 of them, not 'much'"):
        run.denoise(x, "much")


@pytest.mark.parametrize(
    "name", ["vp/digits_ddpmpp.py", "ve/digits_ncsnpp.py", "subvp/digits_ddpmpp.py"]
)
def test_a_noise_level_for_each_image_of_an_sde(name):
    run = random_network(name)
    x, sigmas = torch.rand(3, 1, 8, 8), [0.1, 2.0, 0.5]
    alone = [run.denoise(x[i : i + 1], sigma) for i, sigma in enumerate(sigmas)]
    assert torch.allclose(run.denoise(x, sigmas), torch.cat(alone), atol=1e-4)


def test_autocast_and_default_dtype_of_the_caller_change_nothing(trained, monkeypatch):
    options = {"sampling.ode_solver": "heun", "sampling.N": 2}
    options |= {"sampling.rtol": 0.1, "sampling.atol": 0.1}
    run = random_network("vp/digits_ddpmpp.py", **options)

    def ask():
        x = run.sample([0, 1])
        latents = run.encode(x)
        results = [x, latents, run.denoise(x, 0.5), run.decode(latents), run.log_likelihood(x)]
        return [*results, run.film([0], frames=3)]

    def fitted(experiment, path):
        assert not torch.is_autocast_enabled("cpu")
        return experiment.sampler

    monkeypatch.setattr(Experiment, "fitted_sampler", fitted)
    expected = ask()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, ask(), expected))
        load(trained)
        assert torch.is_autocast_enabled("cpu")
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, ask(), expected))
        weights = load(trained).experiment.network.parameters()
        assert {weight.dtype for weight in weights} == {torch.float32}
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# --- gradients ------------------------------------------------------------------------------------


def finite_difference(function, x, direction, step):
    """Derivative of `function` at `x` along `direction`, by central differences of fourth order."""
    at = [function(x + k * step * direction) for k in (-2, -1, 1, 2)]
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("what", ["denoise", "encode", "log_likelihood"])
def test_gradients_are_finite_differences(name, what):
    """Float64 gradients of a network whose Jacobian is neither constant nor symmetric."""
    method, generator = SDES[name], torch.Generator().manual_seed(0)
    x, direction, probe = torch.randn(3, 2, 1, 2, 2, generator=generator).double()
    mix = 0.2 * torch.randn(4, 4, generator=generator).double()
    net_of_law = gaussian_network(method, MEAN, STD)

    def net(x, label, **conditions):
        mixed = 0.1 * (x.flatten(1) @ mix).sin().view_as(x)
        score = method is SDES["ve"]  # VE's output is a score: noise over the level, its label
        return net_of_law(x, label, **conditions) + (mixed / spread(label, x) if score else mixed)

    limits = {"rtol": 1e-8, "atol": 1e-8}
    functions = {
        "denoise": lambda x: method.denoise(net, x, torch.tensor([0.5, 2.0]).double()),
        "encode": lambda x: encode(method, net, x, **limits)[0],
        "log_likelihood": lambda x: log_likelihood(method, net, x, probe[None], **limits)[0],
    }

    def total(x):
        value = functions[what](x)
        return (value * torch.arange(1, 1 + value.numel()).double().view_as(value).cos()).sum()

    (gradient,) = torch.autograd.grad(total(x.requires_grad_()), x)
    with torch.no_grad():
        expected = finite_difference(total, x, direction, 1e-3)
        assert not total(x).requires_grad
    assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_of_a_trained_network(images):
    """The exact network has a linear flow, a linear posterior mean and a Gaussian density."""
    run, x = exact_edm(), images.clone().requires_grad_()
    growth = math.sqrt((STD**2 + 80**2) / (STD**2 + 0.002**2))
    (nats,) = torch.autograd.grad(run.log_likelihood(x).sum(), x)
    expected = -2 * (2 * images - 1 - MEAN) * growth**2 / 80**2
    assert (nats - expected).abs().max() < 2e-3 * expected.abs().max()
    (latent,) = torch.autograd.grad(run.encode(x).sum(), x)
    assert latent.numpy() == pytest.approx(2 * growth, rel=2e-3)
    (mean,) = torch.autograd.grad(run.denoise(x, [0.1, 0.2, 0.3, 0.4, 0.5]).sum(), x)
    sigma = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).view(5, 1, 1, 1)
    slope = (STD / 2) ** 2 / ((STD / 2) ** 2 + sigma**2)
    assert (mean - slope).abs().max() < 1e-4
    with torch.no_grad():
        assert not run.denoise(x, 0.5).requires_grad
    for result in (run.denoise(images, 0.5), run.encode(images), run.bits_per_dim(images)):
        assert not result.requires_grad
    assert not run.sample([0]).requires_grad


@pytest.mark.parametrize("path", ["poisson/digits_ddpmpp.py", "pfgmpp/digits_ddpmpp.py"])
def test_gradients_pass_through_attention_and_the_rest_of_a_network(path):
    run = random_network(path, **{"model.attn_resolutions": (8,)})
    net, generator = run.experiment.network.double().requires_grad_(False), torch.Generator()
    x, direction, probe = torch.randn(3, 2, 1, 8, 8, generator=generator.manual_seed(0)).double()
    ends = {"z_min": 0.5, "z_max": 1.0} if "poisson" in path else {"sigma_min": 0.5, "sigma_max": 1}
    method = replace(run.experiment.method, **ends)
    for function in (
        lambda x: method.denoise(net, x, torch.tensor(0.7).double()).sin().sum(),
        lambda x: log_likelihood(method, net, x, probe[None], rtol=1e-6, atol=1e-6)[0].sum(),
    ):
        (gradient,) = torch.autograd.grad(function(x.requires_grad_()), x)
        with torch.no_grad():
            expected = finite_difference(function, x, direction, 1e-4)
        assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-3)


# --- restoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, noise", [("inpaint", 0.0), ("super2", 0.1), ("denoise", 0.2)])
def test_restorations_have_the_posterior_of_gaussian_images(images, name, noise):
    """Restored pixels of law N(m, s^2) have the mean and spread of x given A x + noise."""
    trained = exact_edm(**{"sampling.ode_solver": "heun", "sampling.N": 30})
    mean, std = (MEAN + 1) / 2, STD / 2
    missing, generator = torch.zeros(8, 8, dtype=torch.bool), torch.Generator().manual_seed(1)
    missing[:4] = True
    measurement, options = images, {"missing": missing} if name == "inpaint" else {"noise": noise}
    expected, spread = torch.where(missing, mean, images), torch.where(missing, std, 0.0)
    if name == "super2":
        measurement = torch.nn.functional.avg_pool2d(images, 2)
    if noise:
        measurement = measurement + noise * torch.randn(measurement.shape, generator=generator)
        variance = std**2 / (4 if name == "super2" else 1)  # variance of a measured value
        change = (measurement - mean) * variance / (variance + noise**2)
        if name == "super2":
            change = change.repeat_interleave(2, -1).repeat_interleave(2, -2)
        expected = mean + change
        spread = torch.tensor(std**2 - variance**2 / (variance + noise**2)).sqrt()
    restored = trained.restore(measurement, name, range(100), **options)
    assert restored.shape == (5, 100, 1, 8, 8)
    assert (restored.mean(1) - expected).abs().max() < 5 * std / 10
    assert (restored.mean(1) - expected).square().mean().sqrt() < 1.5 * std / 10
    assert (restored.std(1) - spread).square().mean().sqrt() < 0.2 * std
    if name == "inpaint":
        error = restored[..., 4:, :] - images[:, None, :, 4:]
        assert error.abs().max() < 1e-5


def test_a_restoration_depends_on_its_image_and_seed(images):
    trained = exact_edm(**{"sampling.ode_solver": "heun", "sampling.N": 4})
    masks = torch.zeros(5, 8, 8, dtype=torch.bool)
    masks[torch.arange(5), torch.arange(5)] = True  # another row of each
    every = trained.restore(images, "inpaint", [3, 1], missing=masks)
    last = trained.restore(images[4:], "inpaint", [1], missing=masks[4])
    torch.testing.assert_close(every[4, 1], last[0, 0], rtol=0, atol=1e-5)
    assert not torch.equal(every[4, 0], every[4, 1])
    operator = get_operator("inpaint", ~masks[:, None])
    value = operator.forward(trained.experiment.codec.encode(images))
    again = trained.restore(Measurement(operator, value), seeds=[3, 1])
    torch.testing.assert_close(again, every, rtol=0, atol=1e-6)


def test_restorations_have_the_class_of_their_image():
    trained = random_network(
        "pfgmpp/digits_ddpmpp.py",
        **{"data.num_classes": 10, "training.label_dropout": 0.1, "sampling.N": 2},
    )
    small = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    none, three, mixed = (trained.restore(small, "super2", [0, 1], c) for c in (None, 3, [-1, 3]))
    assert torch.equal(mixed[0], none[0]) and torch.equal(mixed[1], three[1])
    assert not torch.equal(three, none)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "blur"}, "inpaint, colour, super2, .*not 'blur'"),
        ({"name": "super2"}, r"floats in \[0, 1\] of the shape \(n, 1, 4, 4\), not .*\(5, 1, 8, 8"),
        ({"name": "inpaint"}, "'inpaint' needs the missing pixels"),
        ({"name": "inpaint", "missing": torch.ones(4, 4)}, r"\(H, W\) or \(n, H, W\), not \(4, 4"),
        ({"name": "denoise"}, "restore_noise above 0"),
        ({"name": "colour"}, "colour images; these have 1"),
    ],
)
def test_what_cannot_be_restored_is_one_line(images, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        exact_edm().restore(images, **arguments)
    assert "\n" not in str(raised.value)
