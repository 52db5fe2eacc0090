"""A training step of a config, phase by phase, against its plain form, in one process in turn.

    python3 benchmarks/train.py --config configs/poisson/cifar10_ddpmpp.py [--config.x=y ...]
        [--steps 3] [--noplain] [--json FILE]

The plain form is the step as its ancestors have it: the same network, weight for weight, with
attention and 1x1 maps as einsums and resampling by reshapes (benchmarks/networks.py), the field by
broadcasting, Adam and the average of weights tensor by tensor, the loss read at every step; float32
and not compiled. Both start from the same weights and draw the same noise, so that their losses
agree. Images are random: what they show costs nothing.
"""

import contextlib
import ctypes
import functools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from absl import app, flags
from ml_collections import config_flags
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from field import broadcast_field, memory, reset_peak  # noqa: E402
from networks import plain  # noqa: E402

import datasets  # noqa: E402
import execution  # noqa: E402
import losses  # noqa: E402
import methods  # noqa: E402
from run_lib import Experiment  # noqa: E402

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Experiment to measure, a file of configs/.")
flags.DEFINE_integer("steps", 3, "Steps of each form, after one that is not counted.", 1)
flags.DEFINE_bool("plain", True, "Measure the plain form too.")
flags.DEFINE_string("json", None, "Where the figures go; by default runs/train_{config}.json.")
flags.mark_flag_as_required("config")

PHASES = ("data", "field", "forward", "backward", "optimiser", "average")
PLAIN_POINTS = 8  # points whose broadcast field is computed at once, so that it fits the memory
IMAGES = 2**26  # bytes of random images, or a batch where that is more


class Stopwatch:
    """Seconds by phase; with `waits` the device is waited for at either end of one."""

    def __init__(self, device: torch.device, waits: bool):
        self.device, self.waits = device, waits
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] += time.perf_counter() - start

    def wait(self) -> None:
        if self.waits and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*arguments, **options):
            with self.phase(name):
                return function(*arguments, **options)

        return run


class Trainer:
    """What `run_lib.train` does in a step, on random images."""

    def __init__(self, config):
        self.config, self.run = config, Experiment.build(config)
        self.state, self.device = self.run.state, self.run.device
        self.state.network = execution.for_training(config, self.state.model)
        data, size = config.data, config.training.batch_size
        shape = (data.num_channels, data.image_size, data.image_size)
        number = max(size, IMAGES // (data.num_channels * data.image_size**2))
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (number, *shape), generator=generator, dtype=torch.uint8)
        self.batches = datasets.shuffled_batches(images, size, config.seed)
        self.examples = self.run.method.images_per_step(size)
        self.optimise = losses.train_step

    def step(self, watch: Stopwatch) -> Tensor:
        seed, state = self.config.seed, self.state
        execution.set_float32_products(self.config.training.precision)
        with watch.phase("data"):
            generator = datasets.keyed_generator(self.device, "training", seed, state.step)
            torch.manual_seed(datasets.keyed_seed("dropout", seed, state.step))
            images = next(self.batches).images.to(self.device, non_blocking=True)
            options = {"flip": self.config.data.random_flip}
            options["dequantize"] = self.config.data.uniform_dequantization
            batch = self.run.scaler(datasets.to_unit_interval(images, generator, **options))
        with self.watched(watch):
            return self.optimise(state, self.run.loss_fn, batch, generator)

    @contextlib.contextmanager
    def watched(self, watch: Stopwatch) -> Iterator[None]:
        """Within the `with` block the phases of a step are timed."""
        network, state = self.state.network, self.state
        with contextlib.ExitStack() as stack:
            for target, name, phase in (
                (methods, "poisson_field", "field"),
                (state, "network", "forward"),
                (Tensor, "backward", "backward"),
                (nn.utils, "clip_grad_norm_", "optimiser"),
                (state.optimizer, "step", "optimiser"),
                (state.ema, "update", "average"),
            ):
                timed = watch.timed(phase, getattr(target, name))
                stack.enter_context(mock.patch.object(target, name, timed))
            yield
        assert state.network is network


class PlainTrainer(Trainer):
    """The plain form; see above."""

    def __init__(self, config):
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.training.update(precision="fp32", compile=False, channels_last=False)
            config.model.checkpoint_activations = False
        super().__init__(config)
        hyper = self.state.hyper_parameters | {"fused": False, "foreach": False}
        self.state.optimizer = torch.optim.Adam(self.state.parameters, **hyper)
        self.state.ema.update = functools.partial(plain_average, self.state.ema)
        self.state.apply_gradient = functools.partial(plain_update, self.state)
        self.optimise = self.plain_step

    def step(self, watch: Stopwatch) -> Tensor:
        with plain(), mock.patch.object(methods, "poisson_field", plain_field):
            return super().step(watch)

    @staticmethod
    def plain_step(state, loss_fn, batch, generator) -> Tensor:
        loss = losses.train_step(state, loss_fn, batch, generator)
        loss.item()
        return loss


def plain_field(points: Tensor, charges: Tensor, gamma: float) -> Tensor:
    return torch.cat([broadcast_field(p, charges, gamma) for p in points.split(PLAIN_POINTS)])


def plain_update(state, finite: Tensor) -> None:
    state.optimizer.step()
    state.step += 1
    state.ema.update(state.parameters, finite)


@torch.no_grad()
def plain_average(ema, parameters, applied: Tensor) -> None:
    ema.num_updates += 1
    decay = min(ema.decay, (1 + ema.num_updates) / (10 + ema.num_updates))
    for shadow, parameter in zip(ema.shadow_params, parameters, strict=True):
        shadow.sub_((1 - decay) * (shadow - parameter))


class Record:
    """Times, memory and losses of a trainer's steps."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.cuda = trainer, trainer.device.type == "cuda"
        self.seconds, self.losses, self.phases, self.peak = [], [], {}, 0

    def step(self, waits: bool = False) -> None:
        """One step; with `waits` the phases are told apart on a GPU, at the cost of its speed."""
        watch = Stopwatch(self.trainer.device, waits or not self.cuda)
        whole = Stopwatch(self.trainer.device, waits=True)
        before = self.reset_peak()
        with whole.phase("step"):
            loss = self.trainer.step(watch)
        self.peak = max(self.peak, self.read_peak() - before)
        if watch.waits:
            self.phases.setdefault("step", []).append(whole.seconds["step"])
            for phase in PHASES:
                self.phases.setdefault(phase, []).append(watch.seconds[phase])
        if not waits:
            self.seconds.append(whole.seconds["step"])
        self.losses.append(loss.item())

    def reset_peak(self) -> int:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return 0  # everything counts, the weights too
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps left would hide what this one takes
        reset_peak()
        return memory("VmRSS")

    def read_peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else memory("VmHWM")

    def forget(self) -> None:
        self.seconds, self.phases, self.peak = [], {}, 0

    def summary(self, flops_per_image: float, peak_flops: float) -> dict:
        seconds = statistics.median(self.seconds)
        phases = {name: statistics.median(times) for name, times in self.phases.items()}
        phases["other"] = phases["step"] - sum(phases[name] for name in PHASES)
        images = self.trainer.examples
        return {
            "seconds": seconds,
            "phases": phases,
            "images_per_second": images / seconds,
            "memory_bytes": self.peak,
            "model_flop_utilisation": images * flops_per_image / seconds / peak_flops,
            "losses": self.losses,
        }


def count_flops(trainer: Trainer) -> float:
    """Of the network's forward and backward pass, for one image."""
    data, state = trainer.config.data, trainer.state
    x = torch.zeros(1, data.num_channels, data.image_size, data.image_size, device=trainer.device)
    with FlopCounterMode(display=False) as counter:
        out = state.model(x, torch.ones(1, device=trainer.device))
        sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    state.optimizer.zero_grad()
    return counter.get_total_flops()


def measure_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product or convolution, whichever the device is faster at."""
    execution.set_float32_products(precision)
    n, images = (8192, 256) if device.type == "cuda" else (2048, 8)
    options = {"device": device, "dtype": torch.bfloat16 if precision == "bf16" else None}
    a = torch.randn(n, n, **options)
    x, weight = torch.randn(images, 256, 32, 32, **options), torch.randn(256, 256, 3, 3, **options)
    rates = []
    for flops, run in (
        (2 * n**3, lambda: a @ a),
        (2 * x.numel() * weight[0].numel(), lambda: F.conv2d(x, weight, padding=1)),
    ):
        for _ in range(20):  # the best of many, should others use the machine
            watch = Stopwatch(device, waits=True)
            with watch.phase("product"):
                run()
            rates.append(flops / watch.seconds["product"])
    return max(rates)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{name}, {torch.get_num_threads()} threads"


def table(results: dict) -> str:
    forms = results["forms"]
    rows = []
    for phase in (*PHASES, "other", "step"):
        row = f"{phase:<12}"
        for form in forms.values():
            seconds, whole = form["phases"][phase], form["phases"]["step"]
            row += f"{seconds:>11.4f}{100 * seconds / whole:>7.1f} %"
        rows.append(row)
    for label, key, scale, digits in (
        ("images/s", "images_per_second", 1, 2),
        ("memory, GiB", "memory_bytes", 2**-30, 2),
        ("MFU, %", "model_flop_utilisation", 100, 1),
    ):
        rows.append(
            f"{label:<12}"
            + "".join(f"{form[key] * scale:>11.{digits}f}{'':9}" for form in forms.values())
        )
    head = f"{'seconds':<12}" + "".join(f"{name:>11}{'share':>9}" for name in forms)
    return "\n".join([head, *rows])


def main(argv: list[str]) -> None:
    config = FLAGS.config
    trainer = Trainer(config)
    training, device = config.training, trainer.device
    records = {"ours": Record(trainer)}
    if FLAGS.plain:
        records["plain"] = Record(PlainTrainer(config))
    rounds = [False] * FLAGS.steps + ([True] if device.type == "cuda" else [])
    for record in records.values():
        record.step()  # libraries load, kernels are chosen and compiled
        record.forget()
    for waits in rounds:
        for record in records.values():
            record.step(waits)

    flops, peak = count_flops(trainer), measure_peak(device, training.precision)
    forms = {name: record.summary(flops, peak) for name, record in records.items()}
    name = Path(flags.FLAGS["config"].config_filename).stem
    results = {
        "config": name,
        "device": device_name(device),
        "torch": torch.__version__,
        "precision": training.precision,
        "compile": training.compile,
        "channels_last": training.channels_last,
        "accumulate": training.accumulate,
        "batch": [trainer.examples, training.batch_size],
        "flops_per_image": flops,
        "peak_flops": peak,
        "forms": forms,
    }
    print(
        f"{name}: {trainer.examples} of {training.batch_size} images, {results['device']}, "
        f"{training.precision}{', compiled' if training.compile else ''}"
        f"{', channels last' if training.channels_last else ''}, accumulate {training.accumulate}, "
        f"torch {torch.__version__}; medians of {FLAGS.steps}\n"
        f"{flops / 1e9:.1f} GFLOP an image, peak {peak / 1e12:.3g} TFLOP/s\n\n{table(results)}"
    )
    if FLAGS.plain:
        ratio = forms["plain"]["seconds"] / forms["ours"]["seconds"]
        differences = [
            abs(a / b - 1)
            for a, b in zip(forms["ours"]["losses"], forms["plain"]["losses"], strict=True)
        ]
        results |= {"plain_over_ours": ratio, "losses_differ": max(differences)}
        print(f"\nplain / ours {ratio:.3f}; losses differ by at most {max(differences):.1e}")
    path = Path(FLAGS.json or f"runs/train_{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(f"figures: {path}")


if __name__ == "__main__":
    app.run(main)
