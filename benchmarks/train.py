"""Measure a training step of a config, phase by phase, against its plain form.

    python3 benchmarks/train.py --config configs/poisson/cifar10_ddpmpp.py [--config.x=y ...]
        [--steps 3] [--noplain] [--json FILE]

With --config.training.precision=auto the precision is measured first, as in a run.

The plain form is the step of published programs: the same network, weight for weight, with
attention and 1x1 maps as einsums and resampling by reshapes (benchmarks/networks.py), the field by
broadcasting, Adam and the EMA weights tensor by tensor, the loss read at every step; float32 and
not compiled. Both run in turn in one process, from the same weights and with the same noise, so
that their losses agree. Images are random, which does not change the time.
"""

import functools
import json
import statistics
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from absl import app, flags
from field import broadcast_field
from ml_collections import config_flags
from networks import plain
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import datasets
import execution
from experiment import Experiment
from methods import poisson
from sources.preparation import Preparation
from training import TrainState, train_step

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Experiment to measure, a file of configs/.")
flags.DEFINE_integer("steps", 3, "Steps of each form, after one that is not counted.", 1)
flags.DEFINE_bool("plain", True, "Measure the plain form too.")
flags.DEFINE_string("json", None, "Where the figures go; by default runs/train_{config}.json.")
flags.mark_flag_as_required("config")

PHASES = ("data", "field", "forward", "backward", "optimiser", "EMA")
PLAIN_POINTS = 8  # points whose broadcast field is computed at once, so that it fits the memory
IMAGES = 2**26  # bytes of random images, or a batch where that is more


class Trainer:
    """Steps of `run_lib.train` on random images, and the time of each."""

    def __init__(self, config):
        self.config, self.run = config, Experiment.build(config)
        run, training = self.run, config.training
        self.state = TrainState.from_config(config, run.network, run.objective)
        self.device = run.device
        self.state.network = execution.for_training(
            run.network,
            training.precision,
            training.channels_last,
            training.compile,
            some_unused=not config.model.conditional,
        )
        self.prepare = Preparation.from_config(config, run.codec, run.method.uses_reference_batch)
        size, shape = run.objective.batch_size, run.codec.data_shape
        number = max(size, IMAGES // torch.Size(shape).numel())
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (number, *shape), generator=generator, dtype=torch.uint8)
        self.batches = datasets.shuffled_batches(images, size, config.seed)
        self.steps = []

    def step(self, watch: common.Stopwatch) -> Tensor:
        config, state = self.config, self.state
        execution.set_float32_products(config.training.precision)
        with watch.phase("data"):
            generator = datasets.keyed_generator(self.device, "training", config.seed, state.step)
            torch.manual_seed(datasets.keyed_seed("dropout", config.seed, state.step))
            batch = next(self.batches).to(self.device, non_blocking=True)
            batch = self.prepare(batch, generator)
        watched = (
            (poisson, "poisson_field", "field"),
            (state, "network", "forward"),
            (Tensor, "backward", "backward"),
            (nn.utils, "clip_grad_norm_", "optimiser"),
            (state.optimizer, "step", "optimiser"),
            (state.ema, "update", "EMA"),
        )
        timed = ((owner, name, watch.phase(p)(getattr(owner, name))) for owner, name, p in watched)
        with common.patched(*timed):
            return train_step(state, batch, generator)

    def measure(self, waits: bool = False) -> None:
        """Take a step; with `waits` phases on a GPU are timed apart, which slows it down."""
        watch = common.Stopwatch(self.device if waits else common.CPU)
        whole = common.Stopwatch(self.device)
        step = whole.phase("step")(lambda: self.step(watch))
        loss, peak = common.with_peak_memory(step, self.device)
        seconds = dict.fromkeys(PHASES, 0.0) | watch.seconds | whole.seconds
        self.steps.append({"waits": waits, "loss": loss.item(), "peak": peak, **seconds})

    def summary(self, flops_per_image: float, peak_flops: float) -> dict:
        steps = self.steps[1:]  # in the first, libraries load and kernels are chosen and compiled
        seconds = statistics.median(step["step"] for step in steps if not step["waits"])
        split = [step for step in steps if step["waits"] or self.device.type != "cuda"]
        phases = {k: statistics.median(step[k] for step in split) for k in (*PHASES, "step")}
        phases["other"] = phases["step"] - sum(phases[name] for name in PHASES)
        rate = self.run.objective.examples / seconds
        return {
            "seconds": seconds,
            "phases": phases,
            "images_per_second": rate,
            "memory_bytes": max(step["peak"] for step in steps),
            "model_flop_utilisation": rate * flops_per_image / peak_flops,
            "losses": [step["loss"] for step in self.steps],
        }


class PlainTrainer(Trainer):
    """A `Trainer` of the plain form; see the module."""

    def __init__(self, config):
        config = config.copy_and_resolve_references()
        config.training.update(precision="fp32", compile=False, channels_last=False)
        config.model.checkpoint_activations = False
        super().__init__(config)
        hyper = self.state.optimizer.defaults | {"fused": False, "foreach": False}
        self.state.optimizer = torch.optim.Adam(self.state.parameters, **hyper)
        self.state.ema.update = functools.partial(plain_ema, self.state.ema)
        self.state.apply_gradient = functools.partial(plain_update, self.state)

    def step(self, watch: common.Stopwatch) -> Tensor:
        with plain(), common.patched((poisson, "poisson_field", plain_field)):
            loss = super().step(watch)
        loss.item()
        return loss


def plain_field(points: Tensor, charges: Tensor, gamma: float, among: None) -> Tensor:
    """The field by broadcasting; all charges count for each point, as images have no labels."""
    return torch.cat([broadcast_field(p, charges, gamma) for p in points.split(PLAIN_POINTS)])


def plain_update(state, finite: Tensor) -> None:
    state.optimizer.step()
    state.step += 1
    state.ema.update(state.parameters, finite)


@torch.no_grad()
def plain_ema(ema, parameters, applied: Tensor) -> None:
    ema.num_updates += 1
    decay = min(ema.decay, (1 + ema.num_updates) / (10 + ema.num_updates))
    for shadow, parameter in zip(ema.shadow_params, parameters, strict=True):
        shadow.sub_((1 - decay) * (shadow - parameter))


def count_flops(trainer: Trainer) -> float:
    """Operations of the network's forward and backward pass for one image."""
    x = torch.zeros(1, *trainer.run.codec.shape, device=trainer.device)
    with FlopCounterMode(display=False) as counter:
        out = trainer.state.model(x, torch.ones(1, device=trainer.device))
        sum(o.sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
    trainer.state.optimizer.zero_grad()
    return counter.get_total_flops()


def measure_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product or convolution, whichever has more on the device."""
    execution.set_float32_products(precision)
    n, images = (8192, 256) if device.type == "cuda" else (1024, 2)
    options = {"device": device, "dtype": execution.HALVES.get(precision)}
    a = torch.randn(n, n, **options)
    x, weight = torch.randn(images, 256, 32, 32, **options), torch.randn(256, 256, 3, 3, **options)
    return max(  # the best of many, should others use the machine
        flops / min(common.seconds(run, device) for _ in range(20))
        for flops, run in (
            (2 * n**3, lambda: a @ a),
            (2 * x.numel() * weight[0].numel(), lambda: F.conv2d(x, weight, padding=1)),
        )
    )


def print_table(forms: dict[str, dict]) -> None:
    columns = (("share", ">8.1%") if i else (name, ">11.4f") for name in forms for i in range(2))
    table = common.Table(("seconds", "<12"), *columns)
    for phase in (*PHASES, "other", "step"):
        times = [(form["phases"][phase], form["phases"]["step"]) for form in forms.values()]
        table.row(phase, *(value for t, whole in times for value in (t, t / whole)))
    for label, key, scale in (
        ("images/s", "images_per_second", 1),
        ("memory, GiB", "memory_bytes", 2**-30),
        ("MFU, %", "model_flop_utilisation", 100),
    ):
        values = [f"{form[key] * scale:.2f}" for form in forms.values()]
        table.row(label, *(cell for value in values for cell in (value, "")))


def main(argv: list[str]) -> None:
    experiment = Experiment.build(FLAGS.config)
    config = experiment.config  # with its precisions decided
    for line in experiment.remarks:
        print(line)
    trainers = {"ours": Trainer(config)}
    if FLAGS.plain:
        trainers["plain"] = PlainTrainer(config)
    training, device = config.training, trainers["ours"].device
    loss = trainers["ours"].run.objective
    for waits in [False] * (1 + FLAGS.steps) + [True] * (device.type == "cuda"):
        for trainer in trainers.values():
            trainer.measure(waits)

    flops, peak = count_flops(trainers["ours"]), measure_peak(device, training.precision)
    forms = {name: trainer.summary(flops, peak) for name, trainer in trainers.items()}
    name = Path(flags.FLAGS["config"].config_filename).stem
    results = {
        "config": name,
        "device": common.setting(device),
        **{key: training[key] for key in ("precision", "compile", "channels_last", "accumulate")},
        "batch": [loss.examples, training.batch_size],
        "flops_per_image": flops,
        "peak_flops": peak,
        "forms": forms,
    }
    settings = [training.precision, "compiled" * training.compile]
    settings += ["channels last" * training.channels_last, f"accumulate {training.accumulate}"]
    print(
        f"{name}: {loss.examples} of {training.batch_size} images, {results['device']}, "
        f"{', '.join(filter(None, settings))}; medians of {FLAGS.steps}\n"
        f"{flops / 1e9:.1f} GFLOP an image, peak {peak / 1e12:.3g} TFLOP/s\n"
    )
    print_table(forms)
    if FLAGS.plain:
        ratio = forms["plain"]["seconds"] / forms["ours"]["seconds"]
        pairs = zip(forms["ours"]["losses"], forms["plain"]["losses"], strict=True)
        differ = max(abs(a / b - 1) for a, b in pairs)
        results |= {"plain_over_ours": ratio, "losses_differ": differ}
        print(f"\nplain / ours {ratio:.3f}; losses differ by at most {differ:.1e}")
    path = Path(FLAGS.json or f"runs/train_{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(f"figures: {path}")


if __name__ == "__main__":
    app.run(main)
