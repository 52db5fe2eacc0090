"""Check in a minute or two what a card can do, and print a line for each check that fails.

    python3 benchmarks/self_check.py

Kernels are compared with their definition, the field with broadcasting, training steps of a thin
network of every kind with those in float32, and each network with itself on the CPU. Then two
published configs take a step with their whole batch. The program goes on after a check that fails.
`make gpu` begins with all these checks.
"""

import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import common
import field
import torch
import train
from torch import Tensor

import execution
from experiment import Experiment
from op import extension, leaky_relu, upfirdn

# A config of each kind of network, and the channels of its thin form.
NETWORKS = {
    "DDPM++": ("poisson.cifar10_ddpmpp", 32),
    "NCSN++": ("poisson.cifar10_ncsnpp", 32),
    "DDPM": ("vp.ddpm.cifar10", 32),
    "DDPM++ of EDM": ("pfgmpp.cifar10_ddpmpp", 32),
    "ADM": ("edm.imagenet64_adm", 64),
    "EDM2": ("edm2.imagenet64_xs", 64),
    "DiT": ("pfgmpp.digits_dit", 64),
    "NCSN": ("ve.ncsn.cifar10", 32),
    "MLP": ("poisson.toy_mlp", 32),
}
THIN = {
    "model.num_res_blocks": 1,
    "model.dropout": 0.0,  # dropout masks depend on compiler and memory format
    "optim.warmup": 0,
    "training.batch_size": 64,
    "training.small_batch_size": 16,
}
FORMS = {  # options of each form, and how far its losses may be from those in float32
    "float32": ({}, 0.0),  # the reference, compared with itself
    "TF32": ({"training.precision": "tf32"}, 0.01),
    "bfloat16": ({"training.precision": "bf16"}, 0.05),
    "bfloat16, channels_last": (
        {"training.precision": "bf16", "training.channels_last": True},
        0.05,
    ),
    "float16": ({"training.precision": "fp16"}, 0.05),
    "compiled": ({"training.compile": True}, 0.001),
}
COMPILED = ("DDPM++", "DDPM++ of EDM")  # the others would take minutes to compile
PUBLISHED = ("poisson.cifar10_ddpmpp", "pfgmpp.cifar10_ddpmpp")
STEPS = 2


class Check(NamedTuple):
    """A check: `run` returns a remark or None, and raises where it fails."""

    name: str
    run: Callable[[], str | None]


class Wrong(Exception):
    """A check's result is not what it should be."""


def config_of(name: str, options: dict):
    """The config of the module `name` in configs/, with the values of keys in `options`."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict(options)
    return config


def compare(result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise Wrong where `result` is off by more than `tolerance` times the largest entry."""
    expected = expected.double().cpu()
    error = (result.double().cpu() - expected).abs().max() / expected.abs().max()
    if not error <= tolerance:
        raise Wrong(f"differs by {error:.1e} of the largest entry, more than {tolerance:.0e}")


def kernels(device: torch.device) -> Iterator[Check]:
    """Check each operator and its gradient against plain PyTorch in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, taps = (torch.randn(shape, generator=generator) for shape in ((2, 4, 12, 10), (4, 4)))
    operators = {
        "upfirdn2d, up": (upfirdn.upfirdn2d, {"up": 2, "pad": (2, 1)}, taps),
        "upfirdn2d, down": (upfirdn.upfirdn2d, {"down": 2, "pad": (1, 1)}, taps),
        "fused_leaky_relu": (leaky_relu.fused_leaky_relu, {}, taps[0]),
    }

    def with_gradient(operator, options, x, other):
        x = x.detach().requires_grad_()
        out = operator(x, other, **options)
        (gradient,) = torch.autograd.grad((out * out).sum(), x)
        return out.detach(), gradient

    def run(operator, options, other, dtype):
        on_device = torch.ones(1, device=device)
        if extension.enabled(on_device) and extension.kernels(on_device) is None:
            raise Wrong("the kernels are not built, and plain PyTorch takes their place")
        exact = (tensor.to(dtype).double() for tensor in (x, other))
        ours = (tensor.to(device, dtype) for tensor in (x, other))
        expected = with_gradient(operator, options, *exact)
        for result, value in zip(with_gradient(operator, options, *ours), expected, strict=True):
            compare(result, value, 8 * torch.finfo(dtype).eps)

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for (name, arguments), dtype in itertools.product(operators.items(), dtypes):
        operator, options, other = arguments
        words = f"{name}, {str(dtype).removeprefix('torch.')}"
        yield Check(words, partial(run, operator, options, other, dtype))


def the_field(device: torch.device) -> Check:
    def run() -> None:
        points, images = field.problem(field.B)
        points = points[:8]
        ours = field.functions("field", "ours")(points.to(device), images.to(device))
        exact = field.functions("field", "broadcast")(points.double(), images.double())
        compare(ours, exact, 1e-4)

    return Check("the field against broadcasting", run)


def thin(name: str, options: dict):
    """The config of the network `name` in its thin form."""
    path, channels = NETWORKS[name]
    return config_of(path, {**THIN, "model.nf": channels, **options})


def outputs(name: str) -> None:
    """Compare a network's output on the device with that on the CPU."""
    run = Experiment.build(thin(name, {}))
    generator = torch.Generator().manual_seed(0)
    network = run.network.eval()
    x = torch.randn(2, *run.codec.shape, generator=generator)
    label = torch.rand(2, generator=generator) + 0.5
    with torch.no_grad(), execution.full_float32():
        for parameter in network.parameters():  # the last layers of a new network are near 0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise.to(run.device))
        ours = network(x.to(run.device), label.to(run.device))
        expected = network.cpu()(x, label)
    for result, value in zip(*map(_tuple, (ours, expected)), strict=True):
        compare(result, value, 1e-3)


def losses(config) -> Tensor:
    """Losses of the first steps, on random images."""
    with common.patched((train, "IMAGES", 0)):
        trainer = train.Trainer(config)
    if scale := trainer.state.loss_scale:
        scale.factor.fill_(1)  # with the first scale of a run, steps may overflow and be skipped
    for _ in range(STEPS):
        trainer.measure()
    values = torch.tensor([step["loss"] for step in trainer.steps])
    if not values.isfinite().all():
        raise Wrong(f"the losses are {values.tolist()}")
    return values


@functools.cache
def float32_losses(name: str) -> Tensor:
    return losses(thin(name, {}))


def steps(name: str, form: str) -> None:
    """Compare the losses of a form with those in float32."""
    options, tolerance = FORMS[form]
    config = thin(name, options)
    if config.training.compile and not common.can_compile(config.device):
        raise Wrong("nothing can be compiled; the log says why")
    exact = float32_losses(name)
    compare(losses(config) if options else exact, exact, tolerance)


def networks() -> Iterator[Check]:
    for name in NETWORKS:
        yield Check(f"{name}: output", partial(outputs, name))
        for form in FORMS:
            if form != "compiled" or name in COMPILED:
                yield Check(f"{name}: {STEPS} steps, {form}", partial(steps, name, form))


def _tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def fitting_accumulate(config) -> tuple[int, float]:
    """Fewest micro-batches with which a step fits on the device, and the bytes that it takes."""
    accumulate = 1
    while True:
        config.training.accumulate = accumulate
        try:
            with common.patched((train, "IMAGES", 0)):
                trainer = train.Trainer(config)
            trainer.measure()
            return accumulate, trainer.steps[-1]["peak"]
        except torch.OutOfMemoryError:
            accumulate *= 2
            if accumulate > (config.training.small_batch_size or config.training.batch_size):
                raise
        finally:
            trainer = None
            common.free_memory()


def published_batches() -> Iterator[Check]:
    def run(name: str) -> str:
        accumulate, peak = fitting_accumulate(config_of(name, {}))
        return f"{peak / 2**30:.1f} GiB, training.accumulate={accumulate}"

    for name in PUBLISHED:
        yield Check(f"{name}: memory of a step of the published batch", partial(run, name))


def all_checks(device: torch.device) -> Iterator[Check]:
    yield from kernels(device)
    yield the_field(device)
    yield from networks()
    yield from published_batches()


def report(checks: Iterable[Check]) -> list[str]:
    """Run the checks, print a line for each that fails or has a remark, and return these lines."""
    lines, passed = [], []

    def note(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    start = time.perf_counter()
    for check in checks:
        try:
            remark = check.run()
            passed.append(True)
        except Exception as error:  # whatever the card, its driver or PyTorch cannot do
            reason = next(iter(str(error).splitlines()), "")
            remark = f"FAILED: {type(error).__name__}: {reason:.150}"
            passed.append(False)
        finally:
            common.free_memory()
        if remark:
            note(f"{check.name}: {remark}")
    seconds = time.perf_counter() - start
    note(f"{sum(passed)} of {len(passed)} checks passed in {seconds:.0f} s")
    return lines


def main() -> None:
    common.options(__doc__)
    device = common.card()
    execution.prepare_process("fp32", device)
    report(all_checks(device))


if __name__ == "__main__":
    main()
