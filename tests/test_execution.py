"""Precision, compiler and memory format change how a network runs, not what it computes."""

import logging
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_small_runs import tiny
from torch import nn

import execution
import experiment
import run_lib
import sampling
from configs.poisson import cifar10_ddpmpp, cifar10_ncsnpp, digits_ddpmpp
from methods import get_method
from models import create_model
from models.layers import Attention, conv
from storage.checkpoints import load_checkpoint


@pytest.fixture
def small():
    """Config and network of the digits, its last layers not near zero."""
    config = digits_ddpmpp.get_config()
    config.model.nf = 8
    torch.manual_seed(0)
    model = create_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return config, model


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(*arguments, **options):
        def fail(*inputs):
            raise RuntimeError("no working C++ compiler\nwas found")

        return fail

    execution._compiler_works.cache_clear()
    monkeypatch.setattr(torch, "compile", refuse)
    yield
    execution._compiler_works.cache_clear()


def outputs(network):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    return network(x, torch.rand(4, generator=generator) + 0.5)


def with_gradient(model, out):
    """`out`, and the gradient of its square in all parameters that have one."""
    model.zero_grad()
    sum(field.square().sum() for field in out).backward()
    return *out, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def relative_difference(values, references):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(values, references, strict=True))


def test_by_default_the_network_itself_is_trained(small):
    _, model = small
    assert execution.for_training(model) is model


def test_bfloat16_is_near_and_keeps_weights_and_outputs_float32(small):
    _, model = small
    truth = outputs(model)
    try:
        network = execution.for_training(model, "bf16")
    except ValueError:
        pytest.skip("this CPU has no bfloat16")
    results = outputs(network)
    assert all(out.dtype == torch.float32 for out in results)
    assert 1e-5 < relative_difference(results, truth) < 3e-2  # 8 bits: 4e-3 for every rounding
    sum(out.square().sum() for out in results).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_channels_last_changes_nothing_but_rounding(small):
    _, model = small
    truth = outputs(model)
    network = execution.for_training(model, channels_last=True)
    assert network.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert relative_difference(outputs(network), truth) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_a_precision_that_the_device_lacks_is_one_line(small, monkeypatch, precision):
    _, model = small
    monkeypatch.setattr(execution, f"_has_{'bfloat16' if precision == 'bf16' else precision}", no)
    with pytest.raises(ValueError, match=rf"training\.precision='{precision}': cpu has no .*"):
        execution.for_training(model, precision)


def no(device):
    return False


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_only_training_needs_its_precision(tmp_path, monkeypatch, precision):
    """Sampling and evaluation work on a machine that lacks the precision of training."""
    monkeypatch.setattr(execution, "_has_bfloat16", no)
    config = tiny("poisson/digits_ddpmpp.py", tmp_path)
    config.training.snapshot_sampling = False
    assert run_lib.train(config, tmp_path)
    config.training.precision = precision
    try:
        samples = experiment.load(tmp_path, config=config).sample(seeds=[1])
        run_lib.evaluate(config, tmp_path)
        with pytest.raises(ValueError, match=rf"training\.precision='{precision}': cpu has no .*"):
            run_lib.train(config, tmp_path)
    finally:
        execution.set_float32_products("fp32")
    assert samples.shape == (1, 1, 8, 8) and samples.isfinite().all()
    assert [*tmp_path.glob("eval/report_*.npz")]


def test_full_float32_beside_the_newer_settings_of_pytorch():
    """PyTorch's older precision flags raise when read once its newer ones have been set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with execution.full_float32():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
        execution.set_float32_products("fp32")


def test_loading_changes_nothing_of_the_callers_process(tmp_path, monkeypatch):
    config = tiny("poisson/digits_ddpmpp.py", tmp_path)
    config.training.snapshot_sampling = False
    assert run_lib.train(config, tmp_path)
    monkeypatch.setattr(execution, "keep_freed_memory", pytest.fail)  # mallopt tells no values
    before = torch.random.get_rng_state()
    try:
        for precision, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = allowed
            experiment.load(tmp_path).sample(seeds=[1])
            assert torch.get_float32_matmul_precision() == precision
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        execution.set_float32_products("fp32")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("precision, allowed", [("fp32", False), ("tf32", True), ("bf16", False)])
def test_tf32_is_used_where_it_is_asked_for_only(precision, allowed):
    try:
        execution.set_float32_products(precision)
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
    finally:
        execution.set_float32_products("fp32")


def test_full_float32_gives_back_what_it_found():
    torch.set_float32_matmul_precision("high")
    try:
        with execution.full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_unknown_precision_names_the_known(small):
    _, model = small
    with pytest.raises(ValueError, match="precision='fp8'; known: fp32, tf32, bf16, fp16"):
        execution.for_training(model, "fp8")


# --- what 'auto' takes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plain, in_bfloat16, expected",
    [(3, 1, "bf16"), (1, 3, "fp32"), (21, 20, "fp32"), (6, 5, "bf16")],
)
def test_auto_takes_bfloat16_where_it_pays(small, monkeypatch, plain, in_bfloat16, expected):
    """The clock moves by the network's calls alone, of which the first is slow."""
    monkeypatch.setattr(execution, "_has_bfloat16", lambda device: True)
    clock, called = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run(network):
        clock[0] += in_bfloat16 if isinstance(network, execution.HalfPrecision) else plain
        clock[0] += 0 if network in called else 1000 * len(called)
        called.append(network)

    precision, reason = execution.measured_precision(small[1], run)
    assert precision == expected
    gain = f"{plain / in_bfloat16:.2f}"
    assert reason == f"bfloat16 is measured to be {gain} times as fast as float32"
    assert len(called) == 8


def test_auto_does_not_take_what_the_device_lacks(small, monkeypatch):
    monkeypatch.setattr(execution, "_has_bfloat16", no)
    precision, reason = execution.measured_precision(small[1], pytest.fail)
    assert (precision, reason) == ("fp32", "cpu has no bfloat16")


@pytest.fixture
def deciding(monkeypatch):
    """Set the precisions that `measured_precision` will give; each still runs the network once."""
    if not execution._has_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU has no bfloat16")

    def decide(*precisions):
        answers = iter(precisions)

        def measured(net, run):
            run(net)
            return next(answers), "of this test"

        monkeypatch.setattr(execution, "measured_precision", measured)

    return decide


def test_a_resumed_run_keeps_the_precision_that_it_measured(tmp_path, deciding, caplog):
    config = tiny("poisson/digits_ddpmpp.py", tmp_path, training__precision="auto")
    config.sampling.precision = "auto"
    config.training.snapshot_sampling = config.eval.enable_sampling = False
    deciding("bf16", "fp32")
    caplog.set_level(logging.INFO)
    assert run_lib.train(config, tmp_path / "a")
    assert "training.precision='auto' is 'bf16': of this test" in caplog.text
    path = tmp_path / "a/checkpoints-meta/checkpoint.pth"
    stored = load_checkpoint(path)["config"]
    assert (stored["training.precision"], stored["sampling.precision"]) == ("bf16", "fp32")
    # measuring again would fail: no answer is left
    deciding()
    config.training.n_iters = 4
    caplog.clear()
    assert run_lib.train(config, tmp_path / "a")
    assert "training.precision='auto' is 'bf16': as the run has it" in caplog.text
    assert "training.precision: " not in caplog.text  # no difference from the run's config
    # the weights are those of a run that asked for it
    config.training.precision, config.sampling.precision = "bf16", "fp32"
    config.training.n_iters = 2
    assert run_lib.train(config, tmp_path / "b")
    config.training.n_iters = 4
    assert run_lib.train(config, tmp_path / "b")
    weights = [load_checkpoint(tmp_path / w / "checkpoints/checkpoint_4.pth") for w in "ab"]
    for a, b in zip(*(w["model"].values() for w in weights), strict=True):
        assert torch.equal(a, b)
    # an evaluation asks for its own machine
    config.training.precision = config.sampling.precision = "auto"
    deciding("bf16")
    assert run_lib.evaluate(config, tmp_path / "a") is None
    assert "sampling.precision='auto' is 'bf16': of this test" in caplog.text


def test_nothing_is_measured_where_nothing_is_open(small, tmp_path):
    config, _ = small
    assert experiment.Experiment.build(config).remarks == []
    config.sampling.precision = config.training.precision = "auto"
    with pytest.raises(ValueError, match=r"sampling\.precision='auto' is open"):
        sampling.get_sampling_fn(config, get_method(config))
    with pytest.raises(ValueError, match=r"training\.precision='auto' is open"):
        execution.for_training(small[1], "auto")


# --- sampling -------------------------------------------------------------------------------------


def samples_of(config, model, **options):
    config.sampling.update(ode_solver="heun", N=4, **options)
    method, states = get_method(config), []
    x = method.prior_sampling((8, 1, 8, 8), torch.Generator().manual_seed(0))
    sample = sampling.get_sampling_fn(config, method)
    samples, _ = sample(model.eval(), x=x, callback=states.append)
    assert {step.x.dtype for step in states} == {samples.dtype} == {torch.float32}
    return samples


def test_sampling_in_bfloat16_is_near_and_keeps_the_state_float32(small):
    config, model = small
    truth = samples_of(config, model)
    try:
        execution.check_precision("bf16", torch.device("cpu"), "sampling.precision")
    except ValueError:
        pytest.skip("this CPU has no bfloat16")
    error = (samples_of(config, model, precision="bf16") - truth).square().mean().sqrt()
    assert 1e-5 < error < 0.05


def test_sampling_channels_last_changes_nothing_but_rounding(small):
    config, model = small
    truth, layouts = samples_of(config, model), []
    before = {name: p.stride() for name, p in model.named_parameters()}
    model.middle1.register_forward_hook(
        lambda module, inputs, output: layouts.append(
            inputs[0].is_contiguous(memory_format=torch.channels_last)
        )
    )
    samples = samples_of(config, model, channels_last=True)
    torch.testing.assert_close(samples, truth, rtol=0, atol=1e-4)
    assert layouts and all(layouts)
    assert before == {name: p.stride() for name, p in model.named_parameters()}


def test_a_sampling_precision_that_the_device_lacks_is_one_line(small, monkeypatch):
    config, _ = small
    config.sampling.precision = "bf16"
    monkeypatch.setattr(execution, "_has_bfloat16", no)
    with pytest.raises(ValueError, match=r"sampling\.precision='bf16': cpu has no bfloat16"):
        experiment.Experiment.build(config)


def test_old_gpus_have_neither_bfloat16_nor_tf32(monkeypatch):
    for capability, has in (((7, 5), False), ((8, 0), True), ((8, 9), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert execution._has_bfloat16(torch.device("cuda")) is has
        assert execution._has_tf32(torch.device("cuda")) is has


def test_without_a_compiler_one_warning_and_the_network_as_it_is(small, no_compiler, caplog):
    config, model = small
    config.sampling.compile = True
    config.sampling.ode_solver, config.sampling.N = "forward_euler", 2
    with caplog.at_level(logging.WARNING):
        assert execution.for_training(model, compiles=True) is model
        sample = sampling.get_sampling_fn(config, get_method(config))
        samples, _ = sample(model.eval(), 2)
    assert samples.shape == (2, 1, 8, 8)
    (record,) = caplog.records
    assert record.getMessage().endswith("RuntimeError: no working C++ compiler was found")


def test_a_machine_without_a_compiler_trains(tmp_path):
    """The whole program trains where the named compiler does not exist."""
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "main.py",
            f"--config={ROOT}/configs/poisson/digits_ddpmpp.py",
            "--mode=train",
            f"--workdir={tmp_path / 'run'}",
            "--config.model.nf=8",
            "--config.training.n_iters=4",
            "--config.training.compile",
            "--noconfig.training.snapshot_sampling",
        ],
        env={
            **os.environ,
            "CXX": "/nonexistent/c++",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("not compiled, which only costs speed") == 1
    assert "trained to step 4" in done.stdout


@pytest.mark.slow
def test_a_compiled_network_computes_the_same_and_is_compiled_once():
    """Gradients and samples of one graph equal the plain ones; skipped without a compiler."""
    if not execution._compiler_works(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    config = digits_ddpmpp.get_config()
    # a minute faster to compile than convolutions, of which the next test says they are one graph
    config.model.update(name="mlp", nf=8, num_res_blocks=1)
    config.sampling.ode_solver, config.sampling.N = "forward_euler", 3
    model, method = create_model(config), get_method(config)
    network = execution.for_training(model, compiles=True)
    assert network is not model
    torch._dynamo.utils.counters.clear()
    results = [with_gradient(model, outputs(run)) for run in (model, network)]
    assert relative_difference(*results) < 1e-5

    model.eval()
    x = method.prior_sampling((4, 1, 8, 8), torch.Generator().manual_seed(0))
    truth, _ = sampling.get_sampling_fn(config, method)(model, x=x)
    config.sampling.compile = True
    sample = sampling.get_sampling_fn(config, method)
    samples, _ = sample(model, x=x)
    torch.testing.assert_close(samples, truth, rtol=1e-3, atol=1e-3)
    statistics = torch._dynamo.utils.counters["stats"]
    graphs = statistics["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]
    sample(model, x=x)
    assert statistics["unique_graphs"] == graphs > 0


@pytest.mark.slow
def test_compiled_layers_of_a_unet_compute_the_same(one_thread):
    """A convolution, group norm and attention; a whole U-Net takes a minute to compile."""
    if not execution._compiler_works(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    model = nn.Sequential(conv(1, 8), Attention(8, init_scale=1.0, skip_rescale=True))
    assert isinstance(model[1].norm, nn.GroupNorm)
    network, x = execution.for_training(model, compiles=True), torch.randn(2, 1, 4, 4)
    assert network is not model
    results = [with_gradient(model, [run(x)]) for run in (model, network)]
    assert relative_difference(*results) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [cifar10_ncsnpp, cifar10_ddpmpp])
def test_a_network_is_one_graph_for_the_compiler_and_for_export(experiment, one_thread):
    config = experiment.get_config()
    config.data.image_size = 16
    config.model.update(nf=8, num_res_blocks=1, ch_mult=(1, 1), attn_resolutions=())
    model = create_model(config).eval()
    x, z = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 3.0])
    exported = torch.export.export(model, (x, z))
    graph = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = with_gradient(model, model(x, z))
    for run in (exported.module(), graph):
        assert relative_difference(with_gradient(model, run(x, z)), expected) < 1e-5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_of_freed_tensors_serves_the_next_ones():
    """Pages that the system provides for 60 tensors of 4 and of 64 MiB, one after another.

    The first ones still enlarge the heap, some seven times before memalign of older glibc finds
    room. In a process of its own.
    """
    code = """
import resource, torch, execution

def pages(size):
    first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(60):
        torch.zeros(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first

print(pages(2**20), pages(2**24))
execution.keep_freed_memory()
print(pages(2**20), pages(2**24))
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    small, large, small_after, large_after = map(int, run.stdout.split())
    if tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35):
        assert large_after == pytest.approx(large, rel=0.1)
    else:
        assert large_after < 0.3 * large
    assert small_after < 1.1 * small + 1000
