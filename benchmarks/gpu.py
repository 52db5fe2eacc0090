"""Measure everything that needs a GPU, in one table: `make gpu`.

    python3 benchmarks/gpu.py

It builds the operators, checks what the card can do (self_check.py), runs the tests marked `cuda`,
and measures training, sampling, the field and the operators. What fails is reported in one line,
and the rest goes on. The table is written to docs/gpu-{card}.md, the figures to gpu-{card}.json
beside it, which users are asked to send. All this takes about a quarter of an hour, most of it
compiling. Images and weights are random.
"""

import datetime
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import common
import field
import self_check
import torch
import train

from configs.poisson import cifar10_ddpmpp
from experiment import Experiment
from op import extension, fused_leaky_relu, upfirdn2d

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs"
STEPS, SAMPLES, SOLVER_STEPS = 20, 128, 18
FIELDS = (("broadcast", 512), ("ours", 512), ("ours", 4096), ("ours", 50_000))  # form, charges
OPERATED = (128, 128, 32, 32)  # shape of the operators' input

# Forms are compared with the first of their part.
TRAINING = {
    "float32, eager": {},
    "TF32": {"training.precision": "tf32"},
    "bfloat16": {"training.precision": "bf16"},
    "bfloat16, channels_last": {"training.precision": "bf16", "training.channels_last": True},
    "bfloat16, compiled": {"training.precision": "bf16", "training.compile": True},
    "bfloat16, channels_last, compiled": {
        "training.precision": "bf16",
        "training.channels_last": True,
        "training.compile": True,
    },
}
SAMPLING = {
    "float32, eager": {},
    "float32, compiled": {"sampling.compile": True},
    "bfloat16": {"sampling.precision": "bf16"},
    "bfloat16, channels_last": {"sampling.precision": "bf16", "sampling.channels_last": True},
    "bfloat16, compiled": {"sampling.precision": "bf16", "sampling.compile": True},
}


class Figures(NamedTuple):
    """Figures of one form; NaN where nothing was measured."""

    seconds: float = math.nan
    rate: str = ""
    memory: float = math.nan  # bytes, the most at once
    utilisation: float = math.nan  # of the FLOP/s of a large matrix product or convolution


Case = tuple[str, str, Callable[[], Figures]]  # part, form, and the function that measures it


class Row(NamedTuple):
    part: str
    form: str
    figures: Figures


def step_figures(config, steps: int) -> Figures:
    """Figures of a training step, the median of `steps`."""
    trainer = train.Trainer(config)
    for _ in range(1 + steps):
        trainer.measure()
    peak = train.measure_peak(trainer.device, trainer.config.training.precision)
    summary = trainer.summary(train.count_flops(trainer), peak)
    rate = f"{summary['images_per_second']:,.0f} images/s"
    utilisation = summary["model_flop_utilisation"]
    return Figures(summary["seconds"], rate, summary["memory_bytes"], utilisation)


def training(config, steps: int) -> Iterator[Case]:
    images = config.training.small_batch_size or config.training.batch_size
    for form, options in TRAINING.items():
        measure = functools.partial(step_figures, with_options(config, options), steps)
        yield f"a training step of {images} images", form, measure


def sampling(config, num: int, steps: int) -> Iterator[Case]:
    def measure(options: dict) -> Figures:
        heun = {"sampling.ode_solver": "heun", "sampling.N": steps}
        run = Experiment.build(with_options(config, heun | options))
        sample = functools.partial(run.sampler, run.network, num)
        _, evaluations = sample()  # compiles
        ((seconds,), memory) = common.with_peak_memory(
            lambda: common.medians(sample, rounds=3, device=run.device), run.device
        )
        rate = f"{num / seconds:,.1f} images/s of {evaluations} evaluations"
        return Figures(seconds, rate, memory)

    for form, options in SAMPLING.items():
        yield f"{num} samples", form, functools.partial(measure, options)


def fields(device: torch.device, sizes: Iterable[tuple[str, int]]) -> Iterator[Case]:
    """Cases of the Poisson field for each (form, number of charges) of `sizes`."""

    def measure(form: str, n: int) -> Figures:
        function = field.functions("field", form)
        points, images = (tensor.to(device) for tensor in field.problem(n))
        run = functools.partial(function, points, images)
        run()
        ((seconds,), memory) = common.with_peak_memory(
            lambda: common.medians(run, rounds=5, device=device), device
        )
        return Figures(seconds, f"{field.B / seconds:,.0f} points/s", memory)

    for form, n in sizes:
        yield f"field of {n:,} images", form, functools.partial(measure, form, n)


def operators(device: torch.device, shape: tuple[int, int, int, int]) -> Iterator[Case]:
    kernel = torch.ones(4, 4, device=device)
    upsample = functools.partial(upfirdn2d, kernel=kernel, up=2, pad=(2, 1))
    downsample = functools.partial(upfirdn2d, kernel=kernel, down=2, pad=(1, 1))
    bias = torch.ones(shape[1], device=device)
    cases = {
        "upfirdn2d, up": upsample,
        "upfirdn2d, down": downsample,
        "upfirdn2d": functools.partial(upfirdn2d, kernel=kernel, pad=(2, 1)),
        "fused_leaky_relu": functools.partial(fused_leaky_relu, bias=bias),
    }

    def measure(operator: Callable, dtype: torch.dtype, fused: str) -> Figures:
        x = torch.randn(shape, device=device).to(dtype)
        calls = 10

        def run() -> None:
            for _ in range(calls):
                operator(x)

        with mock.patch.dict(os.environ, PFGM_FUSED_OPS=fused):
            moved = (x.numel() + operator(x).numel()) * x.element_size()
            (seconds,) = common.medians(run, rounds=7, device=device)
        seconds /= calls
        return Figures(seconds, f"{moved / seconds / 1e9:,.0f} GB/s")

    for (name, operator), dtype in itertools.product(
        cases.items(), (torch.float32, torch.bfloat16)
    ):
        part = f"{name}, {str(dtype).removeprefix('torch.')}"
        yield part, "plain", functools.partial(measure, operator, dtype, "0")
        yield part, "kernel", functools.partial(measure, operator, dtype, "1")


def with_options(config, options: dict):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(options)
    return config


def attempt(action: Callable[[], Figures]) -> Figures:
    """Figures that `action` returns; where it fails, the reason stands in place of the rate."""
    try:
        return action()
    except Exception as error:  # whatever the card, its driver or PyTorch cannot do
        return Figures(rate=f"{type(error).__name__}: {error}".splitlines()[0][:80])
    finally:
        common.free_memory()


def markdown(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of a table in which each form is compared with the first of its part."""
    yield "| | form | milliseconds | rate | times the first | GiB | MFU |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    first: dict[str, float] = {}
    for part, form, figures in rows:
        base = first.setdefault(part, figures.seconds)
        cells = (
            (1e3 * figures.seconds, ",.3f"),
            (base / figures.seconds, ".2f"),
            (figures.memory / 2**30, ".2f"),
            (figures.utilisation, ".1%"),
        )
        seconds, ratio, memory, mfu = (
            "" if math.isnan(value) else format(value, kind) for value, kind in cells
        )
        yield f"| {part} | {form} | {seconds} | {figures.rate} | {ratio} | {memory} | {mfu} |"


def write(
    folder: Path, title: str, facts: Iterable[str], cases: Iterable[Case], command: str = "make gpu"
) -> Path:
    """Measure the cases, print each row, and write the page `title` and its JSON file."""
    today = datetime.date.today().isoformat()
    lines = [f"# {title}", "", f"`{command}` - {today}", "", *facts, ""]
    rows: list[Row] = []

    def measured() -> Iterator[Row]:
        for part, form, action in cases:
            rows.append(Row(part, form, attempt(action)))
            yield rows[-1]

    for line in markdown(measured()):
        print(line, flush=True)
        lines.append(line)
    path = folder / f"gpu-{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}.md"
    path.write_text("\n".join(lines) + "\n")
    content = {"title": title, "command": command, "date": today, "facts": [*facts]}
    content["figures"] = [
        {"part": row.part, "form": row.form, "rate": row.figures.rate}
        | {k: v for k, v in row.figures._asdict().items() if k != "rate" and not math.isnan(v)}
        for row in rows
    ]
    path.with_suffix(".json").write_text(json.dumps(content, indent=1))
    return path


def build_operators(device: torch.device) -> str:
    watch = common.Stopwatch()
    with watch.phase("build"):
        kernels = extension.kernels(torch.ones(1, device=device))
    if kernels is None:
        return "could not be built, so that `kernel` below is plain PyTorch; the log says why"
    return f"built or found in {watch.seconds['build']:.0f} s"


def run_tests() -> tuple[bool, str]:
    """True if the tests marked `cuda` passed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    lines = (done.stdout + done.stderr).split("\n")
    return done.returncode == 0, next(line for line in reversed(lines) if line).strip("= ")


def main() -> None:
    common.options(__doc__)
    device = common.card()
    built = build_operators(device)
    checks = self_check.report(self_check.all_checks(device))
    passed, tests = run_tests()
    facts = [
        f"{common.setting(device)}, CUDA {torch.version.cuda}. The operators: {built}. "
        f"Tests marked `cuda`: {tests}. Self-check:",
        "",
        *(f"- {line}" for line in checks),
        "",
        "CIFAR-10 DDPM++ of Poisson flow. MFU is the share of the FLOP/s that a large matrix "
        "product or convolution of that precision reaches here.",
    ]
    config = cifar10_ddpmpp.get_config()
    cases = itertools.chain(
        training(config, STEPS),
        sampling(config, SAMPLES, SOLVER_STEPS),
        fields(device, FIELDS),
        operators(device, OPERATED),
    )
    path = write(PAGES, common.device_name(device), facts, cases)
    print(f"table: {path}; to be sent: {path.with_suffix('.json')}")
    if not passed:
        sys.exit(f"make gpu: tests marked cuda: {tests}")


if __name__ == "__main__":
    main()
