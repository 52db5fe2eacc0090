"""The objects that a config names, built together, so that a mistake shows before any work."""

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from tqdm import tqdm

import datasets
import distributed
import execution
import losses
import methods
import models
import sampling
from configs.default import check
from configs.keys import get
from solvers.base import Watch
from storage import run_config
from storage.checkpoints import fit, load_checkpoint
from training import TrainState

# Left at None these are measured, where the method has them.
MEASURED = ("training.M", "sampling.z_max", "sampling.upper_norm")

PRECISION_KEYS = ("training.precision", "sampling.precision")
MEASURED_PIXELS = 2**14  # of the images that a precision is measured with on a CPU

# What these depend on besides the images themselves.
DECISIVE = ("data.dataset", "data.image_size", "data.centered", "model.sigma_end", "training.tau")

# What a network that guides another has to share with it.
SHARED = (
    *("data.image_size", "data.num_channels", "data.num_classes", "data.centered"),
    *("training.sde", "training.continuous", "training.gamma", "model.D", "model.sigma_data"),
    *("model.sigma_min", "model.sigma_max", "model.beta_min", "model.beta_max", "model.num_scales"),
)


def complete(config: ConfigDict, workdir: Path) -> tuple[ConfigDict, str | None]:
    """`config` with the values that it leaves open, and a line that names them, if there are any.

    They are those of the run in `workdir`, where a checkpoint has them and the `DECISIVE` values
    are the same; else they are measured on the training images.

    Raises:
        ValueError, OSError: the config is wrong, or the data cannot be read.
    """
    check(config)
    config = config.copy_and_resolve_references()
    method, flat = methods.method_class(config), run_config.flatten(config)
    left_open = {key for key in MEASURED if flat[key] is None}
    if config.data.num_channels == 0:
        left_open.add("data.num_channels")
    if config.data.num_classes == -1:
        left_open.add("data.num_classes")
    if not left_open:
        return config, None
    found = {}
    stored = run_config.find(workdir)
    if stored and stored[0].suffix == ".pth":  # config.json may be of a start that saved nothing
        own = run_config.flatten(stored[1])
        if all(own[key] == flat[key] for key in DECISIVE):
            found = {key: own[key] for key in left_open if own[key]}
    config.update_from_flattened_dict(found)
    if config.data.num_channels == 0:
        found["data.num_channels"] = config.data.num_channels = datasets.measure_channels(config)
    if config.data.num_classes == -1:
        found["data.num_classes"] = config.data.num_classes = datasets.measure_classes(config)
    with torch.device("meta"):  # mistakes of these show before all images are read
        models.create_model(config)
    measured = method.measure(config, lambda: _mean_norm(config))
    config.update_from_flattened_dict(measured)
    values = ", ".join(f"{key} = {value:.6g}" for key, value in sorted((found | measured).items()))
    return config, f"the training images decide: {values}" if values else None


def _mean_norm(config) -> float:
    data = datasets.get_dataset(config, "train", labels=False)
    return datasets.mean_norm(data, datasets.get_data_scaler(config))


def decide_precisions(
    config: ConfigDict, workdir: Path | None, kept: Collection[str] = PRECISION_KEYS
) -> tuple[ConfigDict, list[str]]:
    """`config` with a precision in place of each 'auto' of `PRECISION_KEYS`, and a line on each.

    The values of the `kept` keys are those that the run in `workdir` has in a checkpoint, if the
    device has them; others are measured, on a network as it is, not compiled.

    Args:
        config: a complete one.
        workdir: None where there is no run.
    """
    left_open = [key for key in PRECISION_KEYS if get(config, key) == "auto"]
    if not left_open:
        return config, []
    stored = None if workdir is None else run_config.find(workdir)
    device, lines = _device(config.device), []
    own = run_config.flatten(stored[1]) if stored and stored[0].suffix == ".pth" else {}
    config = config.copy_and_resolve_references()
    model = models.create_model(config).to(device)
    for key in left_open:
        found, reason = own.get(key, "auto") if key in kept else "auto", "as the run has it"
        try:
            execution.check_precision(found, device, key)
        except ValueError:
            run = _training_pass if key == "training.precision" else _sampling_pass
            found, reason = execution.measured_precision(model, run(config, model))
        config.update_from_flattened_dict({key: found})
        lines.append(f"{key}='auto' is {found!r}: {reason}")
    return config, lines


def _training_pass(config, model: nn.Module) -> Callable[[nn.Module], None]:
    training = config.training
    examples = training.small_batch_size or training.batch_size
    x, label = _inputs(config, examples // training.accumulate, model)
    model.train()

    def run(network: nn.Module) -> None:
        out = network(x, label)
        sum(o.sum() for o in (out if isinstance(out, tuple) else (out,))).backward()

    return run


def _sampling_pass(config, model: nn.Module) -> Callable[[nn.Module], None]:
    x, label = _inputs(config, config.eval.batch_size, model)
    model.eval()
    return torch.no_grad()(lambda network: network(x, label))


def _inputs(config, number: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) and noise labels (n,); at most `number`, and on a CPU not too many."""
    device, shape = next(model.parameters()).device, datasets.image_shape(config)
    if device.type == "cpu":
        number = min(number, max(8, MEASURED_PIXELS // shape[1] ** 2))
    return torch.randn(number, *shape, device=device), torch.ones(number, device=device)


@dataclass
class Experiment:
    """What training and evaluation work with.

    `state` holds the network, on `device`; `scaler` leads from images in [0, 1] to what it sees.
    `draw_labels(number, purpose, *key)` gives class labels (number,) to sample with, keyed as
    `datasets.keyed_generator`, or None where there are no classes. `guide` is the network of
    `sampling.guide`.
    """

    device: torch.device
    method: methods.Method
    state: TrainState
    loss: losses.RegressionLoss
    sample: Callable[..., tuple[Tensor, int]]
    scaler: Callable[[Tensor], Tensor]
    draw_labels: Callable[..., Tensor | None]
    guide: nn.Module | None = None

    @classmethod
    def build(cls, config) -> "Experiment":
        """Raises ValueError, in one line, for what the config gets wrong."""
        check(config)
        device = _device(config.device)
        torch.manual_seed(config.seed)
        for key in PRECISION_KEYS:
            execution.check_precision(get(config, key), device, key)
        execution.set_float32_products(config.training.precision)
        method = methods.get_method(config)
        model = models.create_model(config).to(device)
        guide = _guide(config, device) if config.sampling.guide else None
        return cls(
            device=device,
            method=method,
            state=TrainState(config, model),
            loss=losses.get_loss_fn(config, method),
            sample=sampling.get_sampling_fn(config, method, guide),
            scaler=datasets.get_data_scaler(config),
            draw_labels=_label_drawer(config, device),
            guide=guide,
        )

    def with_ema(self):
        """Within the `with` block the network holds its EMA weights and evaluates."""
        self.state.model.eval()
        return self.state.ema.swapped_into(self.state.parameters)


def _label_drawer(config, device: torch.device) -> Callable[..., Tensor | None]:
    """See `Experiment`; the labels of the training images are read when they are first needed."""
    seed, classes, fixed = config.seed, config.data.num_classes, config.sampling.class_label
    known = functools.cache(lambda: datasets.get_labels(config, "train"))

    def draw(number: int, purpose: str, *key: int) -> Tensor | None:
        if not classes:
            return None
        if fixed >= 0:
            return torch.full((number,), fixed, device=device)
        try:
            labels = known()
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; sampling.class_label can name a class instead") from error
        generator = datasets.keyed_generator("cpu", f"class labels of {purpose}", seed, *key)
        drawn = torch.randint(len(labels), (number,), generator=generator)
        return labels[drawn].to(device)

    return draw


def _guide(config, device: torch.device) -> nn.Module:
    """The network of `sampling.guide` with its EMA weights; ValueError where it is another kind."""
    path = Path(config.sampling.guide).expanduser()
    content = load_checkpoint(path)
    if "config" not in content:
        raise ValueError(f"sampling.guide={path} carries no config")
    own = run_config.restore(content["config"])
    old, new = run_config.flatten(own), run_config.flatten(config)
    if differs := [key for key in SHARED if old[key] != new[key]]:
        key = differs[0]
        raise ValueError(
            f"sampling.guide={path} is another kind of network: its {key} is {old[key]}, not "
            f"{new[key]}"
        )
    state = TrainState(own, models.create_model(own).to(device))
    fit(state.load_network, content, path)
    with torch.no_grad():
        torch._foreach_copy_(state.parameters, state.ema.shadow_params)
    return state.model.eval().requires_grad_(False)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=distributed.local_device(torch.device(name))).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used: {reason}") from error


def progress_bar(**options) -> tqdm:
    """A progress bar that redraws often on a terminal and seldom in a file."""
    interactive = sys.stderr.isatty()
    options |= {"disable": not distributed.is_main()}
    return tqdm(mininterval=0.2 if interactive else 10, dynamic_ncols=interactive, **options)


@contextlib.contextmanager
def solver_bar(method: methods.Method) -> Iterator[Watch]:
    """Within the block what the yielded `watch` is told shows in a bar, if it takes over a second.

    The bar has the evaluations so far, and the noise level between those of prior and data.
    """
    ends = torch.tensor([method.t_data, method.t_prior], dtype=torch.float64)
    low, high = method.sigma(ends).tolist()
    with progress_bar(desc="solver", unit=" evaluations", leave=False, delay=1) as progress:

        def watch(evaluations: int, sigma: float) -> None:
            progress.set_postfix_str(
                f"noise level {sigma:.3g} of {low:.3g} to {high:.3g}", refresh=False
            )
            progress.update(evaluations - progress.n)

        yield watch
