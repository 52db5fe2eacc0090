"""`make gpu` without a GPU: every line of it but those that only a GPU can run."""

import importlib
import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from own_files import cifar_python, write_tar
from test_op import StandIn
from test_small_runs import tiny
from warm_start import Program

import execution
from experiment import Experiment
from op import extension
from sources.batch import Batch
from training import TrainState, train_step

# Lines that the tests do not run, and why.
ONLY_ON_A_GPU = {
    'return torch.device("cuda")': "the card",
    "torch.compiler.reset()": "the compiler keeps what it compiled for a card",
    "gc.collect()": "the allocator",
    "torch.cuda.empty_cache()": "the allocator",
    "torch.cuda.reset_peak_memory_stats(device)": "the allocator",
    "return action(), torch.cuda.max_memory_allocated(device)": "the allocator",
    "torch.cuda.synchronize(self.device)": "streams",
    "return torch.cuda.get_device_name(device)": "the card",
}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_the_table_of_a_gpu(gpu):
    rows = [
        gpu.Row("step", "plain", gpu.Figures(2.0, "64 images/s", 3 * 2**30, 0.125)),
        gpu.Row("step", "faster", gpu.Figures(0.5, "256 images/s")),
        gpu.Row("step", "larger", gpu.Figures(rate="CUDA out of memory")),
        gpu.Row("field", "ours", gpu.Figures(0.00125)),
    ]
    assert list(gpu.markdown(rows))[2:] == [
        "| step | plain | 2,000.000 | 64 images/s | 1.00 | 3.00 | 12.5% |",
        "| step | faster | 500.000 | 256 images/s | 4.00 |  |  |",
        "| step | larger |  | CUDA out of memory |  |  |  |",
        "| field | ours | 1.250 |  | 1.00 |  |  |",
    ]


def lines_of(code: CodeType, names=None):
    """Numbers of the lines within functions of a module (of those `names`), but for their first."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            is_function = constant.co_flags & inspect.CO_OPTIMIZED  # no class
            if is_function and (names is None or constant.co_name in names):
                lines = {line for *_, line in constant.co_lines()}
                yield from lines - {None, constant.co_firstlineno}
            yield from lines_of(constant, names)


class Lines:
    """Within the `with` block notes which lines of modules run.

    `functions` are the names of those that count, by module; None for all.
    """

    def __init__(self, functions):
        self.functions = {module.__file__: names for module, names in functions.items()}
        self.ran = {path: set() for path in self.functions}

    def __enter__(self):
        sys.settrace(lambda frame, *_: self.note if self.is_watched(frame) else None)
        return self

    def is_watched(self, frame):
        return frame.f_code.co_filename in self.ran

    def note(self, frame, event, _):
        self.ran[frame.f_code.co_filename].add(frame.f_lineno)
        return self.note

    def __exit__(self, *_):
        sys.settrace(None)

    def missing(self):
        """Text of the lines that did not run."""
        for path, names in self.functions.items():
            text = Path(path).read_text()
            lines = text.splitlines()
            for number in {*lines_of(compile(text, path, "exec"), names)} - self.ran[path]:
                yield lines[number - 1].strip()


BATCHES = {"training.batch_size": 8, "training.small_batch_size": 4}


class Compiled(torch.nn.Module):
    """Stands in for what torch.compile returns."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs, **conditions):
        return self.function(*inputs, **conditions)


@pytest.fixture
def small(gpu, monkeypatch, tmp_path):
    """`make gpu` of little networks, with a CPU in place of the card."""
    check = gpu.self_check
    networks = {"DDPM++": ("poisson.digits_ddpmpp", 8), "MLP": ("poisson.toy_mlp", 8)}
    monkeypatch.setattr(check, "NETWORKS", networks | {"broken": ("poisson.none", 0)})
    monkeypatch.setattr(check, "COMPILED", ("MLP", "DDPM++"))
    monkeypatch.setattr(check, "PUBLISHED", ("poisson.digits_ddpmpp",))
    monkeypatch.setattr(check, "FORMS", {k: v for k, v in check.FORMS.items() if "last" not in k})
    monkeypatch.setattr(check, "THIN", check.THIN | BATCHES)
    check.float32_losses.cache_clear()
    monkeypatch.setattr(execution, "_compiler_works", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda network, **_: Compiled(network))
    config = tiny("poisson/cifar10_ddpmpp.py", tmp_path, training__batch_size=4)
    monkeypatch.setattr(gpu.cifar10_ddpmpp, "get_config", lambda: config)
    monkeypatch.setattr(gpu.train, "measure_peak", lambda device, precision: 1e15)
    monkeypatch.setattr(gpu.train, "IMAGES", 1)
    for name, value in {
        "TRAINING": {"float32": {}, "missing": {"training.precision": "tf32"}},
        "SAMPLING": {"float32": {}},
        "PAGES": tmp_path,
        "STEPS": 1,
        "SAMPLES": 2,
        "SOLVER_STEPS": 2,
        "FIELDS": [("ours", 128)],
        "OPERATED": (1, 2, 8, 8),
    }.items():
        monkeypatch.setattr(gpu, name, value)
    card = gpu.common.card  # which ends the program

    def cpu():
        with pytest.raises(SystemExit, match="no CUDA device"):
            card()
        return torch.device("cpu")

    monkeypatch.setattr(gpu.common, "card", cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = subprocess.CompletedProcess([], 1, "=== 1 failed, 3 passed ===\n", "")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    return gpu


def faults(gpu, monkeypatch):
    """Checks of what is wrong: each fails, and only they."""
    check, cpu = gpu.self_check, torch.device("cpu")
    monkeypatch.setattr(extension, "enabled", lambda x: x.dtype != torch.float64)  # of the truth

    def outcomes(kernels):
        monkeypatch.setattr(extension, "kernels", lambda x: kernels)
        *lines, last = check.report(check.kernels(cpu))
        return last.partition(" in ")[0], {line.partition(": FAILED: ")[2] for line in lines}

    assert outcomes(StandIn()) == ("9 of 9 checks passed", set())
    assert gpu.build_operators(cpu).startswith("built or found in 0 s")
    wrong = StandIn()
    wrong.upfirdn2d = lambda *arguments: 1.2 * StandIn().upfirdn2d(*arguments)
    count, reasons = outcomes(wrong)
    assert count == "3 of 9 checks passed"
    assert all(re.match("Wrong: differs by [24].0e-01 of the largest", line) for line in reasons)
    count, reasons = outcomes(None)
    assert count == "0 of 9 checks passed" and "kernels are not built" in reasons.pop()
    assert gpu.build_operators(cpu).startswith("could not be built")

    class Trainer:
        """Its loss is no number, and it needs four micro-batches."""

        def __init__(self, config):
            self.steps, self.accumulate = [], config.training.accumulate
            self.state = SimpleNamespace(loss_scale=None)

        def measure(self):
            if self.accumulate < needed:
                raise torch.OutOfMemoryError
            self.steps.append({"loss": math.nan, "peak": 2**30})

    monkeypatch.setattr(gpu.train, "Trainer", Trainer)
    needed = 4
    config = check.config_of("poisson.digits_ddpmpp", {})
    assert check.fitting_accumulate(config) == (4, 2**30)
    with pytest.raises(check.Wrong, match="nan"):
        check.losses(config)
    needed = 1000
    with pytest.raises(torch.OutOfMemoryError):
        check.fitting_accumulate(config)
    with monkeypatch.context() as patch:
        patch.setattr(check.common, "can_compile", lambda device: False)
        with pytest.raises(check.Wrong, match="nothing can be compiled"):
            check.steps("MLP", "compiled")
        patch.setattr(check, "all_checks", lambda device: ())
        check.main()


def test_every_line_runs_but_those_of_a_card(small, tmp_path, monkeypatch, capsys):
    """A failed check is one line and the rest goes on; page and figures show both."""
    common = "card", "device_name", "can_compile", "free_memory", "_wait", "with_peak_memory"
    with Lines({small: None, small.self_check: None, small.common: common}) as traced:
        with pytest.raises(SystemExit, match="1 failed, 3 passed"):
            small.main()
        lines = capsys.readouterr().out.splitlines()
        faults(small, monkeypatch)
    missing = {*traced.missing()}
    assert missing == ONLY_ON_A_GPU.keys(), missing ^ ONLY_ON_A_GPU.keys()

    failed = [line for line in lines if "FAILED" in line]
    others = [x for x in failed if not x.startswith("broken: ") and "has no TF32" not in x]
    assert not others, others
    assert any(line.startswith("broken: output: FAILED: ModuleNotFoundError: ") for line in lines)
    (memory,) = (line for line in lines if line.startswith("poisson.digits_ddpmpp: memory"))
    assert re.fullmatch(".*: 0.. GiB, training.accumulate=1", memory)

    (page,) = tmp_path.glob("gpu-*.md")
    figures = json.loads(page.with_suffix(".json").read_text())
    title, _, command, _, *facts = page.read_text().splitlines()
    assert title == f"# {small.common.device_name()}" and command.startswith("`make gpu` - ")
    assert {f"- {line}" for line in failed} < {*facts}
    table = facts[facts.index("| --- | --- | --- | --- | --- | --- | --- |") + 1 :]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert len(rows) == len(figures["figures"]) == 2 + 1 + 1 + 16
    step, refused, samples = rows[:3]
    assert refused[2] == "" and "has no TF32" in refused[3]
    assert samples[0] == "2 samples"
    assert samples[3].endswith("images/s of 3 evaluations")
    for row, entry in zip(rows, figures["figures"], strict=True):
        assert (entry["part"], entry["form"], entry["rate"]) == (row[0], row[1], row[3])
        if row is not refused:
            assert float(row[2].replace(",", "")) > 0
    assert step[6].endswith("%")


# Networks that cannot be computed on the device "meta", and why.
NOT_ON_META = {"NCSN++": "autocast, which its filters switch off, does not know that device"}


def test_a_step_of_every_network_stays_on_its_device(gpu, monkeypatch):
    """On "meta" PyTorch refuses tensors of the CPU beside those of the device, as on a GPU."""
    monkeypatch.setattr(execution, "named_device", lambda name: torch.device("meta"))
    for name in gpu.self_check.NETWORKS.keys() - NOT_ON_META.keys():
        config = gpu.self_check.thin(name, BATCHES)
        run = Experiment.build(config)
        state = TrainState.from_config(config, run.network, run.objective)
        images = torch.empty(run.objective.batch_size, *run.codec.shape, device="meta")
        loss = train_step(state, Batch(images))
        assert loss.device.type == "meta" and state.step == 1
        assert {p.device.type for p in state.ema.shadow_params} == {"meta"}


# --- make cifar10 ---------------------------------------------------------------------------------


def test_an_hour_of_cifar10_in_seconds(gpu, monkeypatch, tmp_path, capsys):
    """A thousandth of the hour; started again, it trains with the same options."""
    cifar10 = importlib.import_module("cifar10")
    noise = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
    archive = tmp_path / "cifar-10-python.tar.gz"
    write_tar(archive, cifar_python(noise, [i % 10 for i in range(48)]))
    assert cifar10.options_of(Path("cifar10-32x32.zip"), None)["data.held_out"] == 0
    assert "data.held_out" not in cifar10.options_of(archive, None)
    assert cifar10.options_of(archive, "a.pt2")["eval.inception_path"] == "a.pt2"
    thin = {"model.nf": 8, "model.ch_mult": (1,), "model.num_res_blocks": 1}
    thin |= {"model.attn_resolutions": (), "training.batch_size": 16, "eval.num_samples": 16}
    thin |= {"data.image_size": 8, "sampling.N": 2, "training.snapshot_sampling": False}
    for name, value in {
        "EVALUATION": cifar10.EVALUATION | thin,
        "STEPS": 1,
        "start": lambda command: Program(command).wait(timeout=300),
    }.items():
        monkeypatch.setattr(cifar10, name, value)
    monkeypatch.setattr(gpu, "PAGES", tmp_path)
    forms = {"float32": {}, "TF32": {"training.precision": "tf32"}}
    monkeypatch.setattr(gpu, "TRAINING", forms)
    monkeypatch.setattr(gpu.train, "measure_peak", lambda device, precision: 1e15)
    monkeypatch.setattr(gpu.common, "card", lambda: torch.device("cpu"))
    workdir = tmp_path / "run"
    argv = ["cifar10.py", str(archive), "--hours=0.0001", f"--workdir={workdir}"]
    monkeypatch.setattr(sys, "argv", argv)
    cifar10.main()
    steps = json.loads((tmp_path / "run.json").read_text())["options"]["training.n_iters"]
    assert steps >= 4
    assert (workdir / f"checkpoints/checkpoint_{steps}.pth").exists()
    (page,) = tmp_path.glob("gpu-*-cifar-10.md")
    page = page.read_text()
    assert page.startswith(f"# {gpu.common.device_name()} CIFAR-10\n")
    assert f"training.n_iters={steps}" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    rows = {row[1]: row for row in rows if len(row) == 7}
    assert float(rows["float32"][2].replace(",", "")) > 0 and "no TF32" in rows["TF32"][3]
    assert float(rows["Frechet distance"][3]) > 0 and float(rows["held-out loss"][3]) > 0
    assert rows["Frechet distance"][0] == f"step {steps:,}, 16 samples"

    monkeypatch.setattr(cifar10, "fastest", None)  # measured once
    with pytest.raises(SystemExit, match="is the plan of 0.0001 hours: go on with --hours 0.0001"):
        cifar10.planned(tmp_path / "run.json", {}, 1.0)
    monkeypatch.setattr(cifar10, "start", lambda command: 75)  # stopped by a signal
    with pytest.raises(SystemExit) as stopped:
        cifar10.main()
    assert stopped.value.code == 75
    assert f"--config.training.n_iters={steps}" in capsys.readouterr().out


def test_a_program_that_is_interrupted_saves_before_make_cifar10_ends(gpu):
    """A terminal sends Ctrl-C to both; the exit status is that of the program."""
    program = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.5)  # subprocess.run would kill it after a quarter of a second
    sys.exit(75)
signal.signal(signal.SIGINT, save)
os.kill(os.getppid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    assert importlib.import_module("cifar10").start([sys.executable, "-c", program]) == 75
