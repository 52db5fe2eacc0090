"""The parts that a config names, built together, so that a mistake shows before any work."""

import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

import distributed
import execution
import losses
import methods
import models
import sampling
import sources
from configs.default import all_keys, check
from configs.effects import without_effect
from configs.keys import explain_unknown, get, of_part, shown
from datasets import Data, mean_norm
from library.fitting import Fitting
from library.trained import Trained
from likelihood import Likelihood, get_likelihood_fn
from models.weights import load_ema
from solvers.rk45 import limits_of
from sources.batch import Conditions
from sources.codec import CODECS, Codec, Shape
from sources.codec import from_config as get_codec
from sources.identity import Identity
from sources.keyed import keyed_generator
from storage import run_config
from storage.checkpoints import fit, open_checkpoint
from storage.checks import check_like, loaded
from storage.digests import digest
from storage.run_checkpoints import find_checkpoint, peek

log = logging.getLogger(__name__)

# Left at None these are measured, where the method has them.
MEASURED = ("training.M", "sampling.z_max", "sampling.upper_norm")

PRECISION_KEYS = ("training.precision", "sampling.precision")
MEASURED_PIXELS = 2**14  # of the images that a precision is measured with on a CPU

EARLIER_RULES = (
    "data.rules={}: the run began before the present rules on which files are data; it reads and "
    "holds out the same files as then"
)

# Keys that decide the `MEASURED` values, besides the images themselves.
DECISIVE = (
    *("data.dataset", "data.image_size", "data.centered", "data.codec"),
    *("model.sigma_end", "training.tau"),
)

# Keys whose values a guide shares with the network that it guides.
SHARED = (
    *("data.image_size", "data.num_channels", "data.num_classes", "data.centered"),
    *("data.codec", "data.conditions"),
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
    method, flat = methods.method_class(config.training.sde), run_config.flatten(config)
    left_open = {key for key in MEASURED if flat[key] is None}
    data = Data(config.data)
    if data.takes_scale and not config.data.scale:
        left_open.add("data.scale")
    if config.data.num_channels == 0:
        left_open.add("data.num_channels")
    if config.data.num_classes == -1:
        left_open.add("data.num_classes")
    newest = sources.NEWEST_RULES.get(config.data.dataset.lower(), 1)
    lines, scale_lines, run_values, values = [], [], {}, {}
    if left_open or (newest > 1 and not config.data.rules):
        stored = run_config.find(workdir)
        # config.json may stem from a start that saved no state
        if stored and stored[0].suffix == ".pth":
            run_values = run_config.flatten(stored[1])
    if not config.data.rules:
        of_same = str(run_values.get("data.dataset")).lower() == config.data.dataset.lower()
        config.data.rules = (of_same and run_values["data.rules"]) or newest
    if config.data.rules < newest:
        lines.append(EARLIER_RULES.format(config.data.rules))
    if not left_open:
        return config, "; ".join(lines) or None
    of_codec = {*of_part(CODECS[config.data.codec.lower()], "keys")}
    decisive = {*DECISIVE, *(({"data.scale"} | of_codec) - left_open)}
    if run_values and all(run_values[key] == flat[key] for key in decisive):
        values = {key: run_values[key] for key in left_open if run_values[key]}
        config.data.scale = tuple(run_values["data.scale"])  # of images of 8 bits ()
        left_open.discard("data.scale")
    values.pop("data.scale", None)
    config.update_from_flattened_dict(values)
    if "data.scale" in left_open:
        config.data.scale, line = data.measure_scale()
        scale_lines += [line] * bool(line)
    if config.data.num_channels == 0:
        values["data.num_channels"] = config.data.num_channels = data.measure_channels()
    if config.data.num_classes == -1:
        values["data.num_classes"] = config.data.num_classes = data.measure_classes()
    models.check_labels(config.model, config.training.sde, config.training.continuous)
    codec = get_codec(config)
    dim = math.prod(codec.shape)
    measured = method.measure(run_config.flatten(config), dim, lambda: _mean_norm(config, codec))
    config.update_from_flattened_dict(measured)
    values |= measured
    decided = ", ".join(f"{key} = {value:.6g}" for key, value in sorted(values.items()))
    decided = [f"the training images decide: {decided}"] * bool(decided)
    return config, "; ".join(scale_lines + decided + lines) or None


def _mean_norm(config, codec: Codec) -> float:
    with torch.device("meta"):  # mistakes in the network's config show before images are read
        models.create_model(config, codec.shape)
    data = Data(config.data).get("train", labels=False)
    if norm := mean_norm(data, codec.encode):
        return norm
    raise ValueError(
        f"all training images are black, of norm 0, so no {', '.join(MEASURED)} can be measured "
        "from them: set data.centered=True, or set these keys"
    )


def identity_of(workdir: Path, evaluated: ConfigDict | None = None) -> Identity | None:
    """The identity of the data of the run in `workdir`, from its newest checkpoint.

    None where there is no run, where an older program wrote the checkpoint without an identity, or
    where `evaluated`, the config of an evaluation, names another data set (see `_identity_in`).

    Raises:
        ValueError: the checkpoint has something else in its place.
    """
    newest = peek(workdir)
    return None if newest is None else _identity_in(*newest, evaluated)


def _identity_in(path: Path, content: dict, evaluated: ConfigDict | None) -> Identity | None:
    """The identity in a checkpoint; None where `evaluated` has another `data.dataset`.

    The log's lines on what the config changes name such a data set.
    """
    stored_config = content.get("config")
    name = stored_config.get("data.dataset") if type(stored_config) is dict else None
    same = evaluated is None or str(name).lower() in ("none", evaluated.data.dataset.lower())
    return Identity.read(path, content) if same else None


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
    stored_values = run_config.flatten(stored[1]) if stored and stored[0].suffix == ".pth" else {}
    config = config.copy_and_resolve_references()
    shape = get_codec(config).shape
    model = models.create_model(config, shape).to(device)
    for key in left_open:
        precision, reason = (
            stored_values.get(key, "auto") if key in kept else "auto",
            "as the run has it",
        )
        try:
            execution.check_precision(precision, device, key)
        except ValueError:
            run = _training_pass if key == "training.precision" else _sampling_pass
            precision, reason = execution.measured_precision(model, run(config, shape, model))
        config.update_from_flattened_dict({key: precision})
        lines.append(f"{key}='auto' is {precision!r}: {reason}")
    return config, lines


def _training_pass(config, shape: Shape, model: nn.Module) -> Callable[[nn.Module], None]:
    training = config.training
    examples = training.small_batch_size or training.batch_size
    x, label = _inputs(shape, examples // training.accumulate, model)
    model.train()

    def run(network: nn.Module) -> None:
        out = network(x, label)
        sum(o.sum() for o in (out if isinstance(out, tuple) else (out,))).backward()

    return run


def _sampling_pass(config, shape: Shape, model: nn.Module) -> Callable[[nn.Module], None]:
    x, label = _inputs(shape, config.eval.batch_size, model)
    model.eval()
    return torch.no_grad()(lambda network: network(x, label))


def _inputs(shape: Shape, number: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) and noise labels (n,); at most `number`, and on a CPU not too many."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        number = min(number, max(8, MEASURED_PIXELS // shape[1] ** 2))
    return torch.randn(number, *shape, device=device), torch.ones(number, device=device)


@dataclass
class Experiment:
    """The parts that a config names, each built once.

    `draw_conditions(number, purpose, *key)` draws rows of conditions to sample with; `purpose` and
    `key` are those of `keyed_generator`. `data` are read when they are first needed.
    """

    config: ConfigDict
    device: torch.device
    method: methods.Method
    codec: Codec
    network: nn.Module
    objective: losses.Regression
    sampler: sampling.Sampler
    draw_conditions: Callable[..., Conditions]
    data: Data

    @classmethod
    def build(cls, config, identity: Identity | None = None) -> "Experiment":
        """Build the parts of `config`; ValueError, in one line, for a mistake in it.

        `identity` is that of the data of the run, if there is one (`identity_of`).
        """
        check(config)
        device = _device(config.device)
        torch.manual_seed(config.seed)
        execution.check_precision(config.sampling.precision, device, "sampling.precision")
        method = methods.get_method(config)
        models.check_labels(config.model, config.training.sde, config.training.continuous)
        codec = get_codec(config, device)
        network = models.create_model(config, codec.shape).to(device)
        guide = _guide(config, codec, device) if config.sampling.guide else None
        data = Data(config.data, identity)
        return cls(
            config=config,
            device=device,
            method=method,
            codec=codec,
            network=network,
            objective=losses.get_loss_fn(config, method).to(device),
            sampler=sampling.get_sampling_fn(config, method, guide, codec),
            draw_conditions=_condition_drawer(config, device, data),
            data=data,
        )

    @functools.cached_property
    def likelihood(self) -> Likelihood:
        """Bits/dim under the method's ODE; ValueError where the method has none."""
        return get_likelihood_fn(self.config, self.method, self.codec)

    def check_likelihood(self) -> None:
        """Raises ValueError where `likelihood` does."""
        _ = self.likelihood

    @property
    def limits(self) -> dict[str, float]:
        """The options of `rk45`."""
        return limits_of(self.config.sampling)

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config.seed

    @property
    def classes(self) -> int:
        """Number of classes that the network is given; 0: none."""
        return self.config.data.num_classes

    @property
    def objective_settings(self) -> dict[str, Any]:
        """The objective and its own options, these by their names under its key."""
        key = "training.objective"
        name = get(self.config, key).lower()
        values = {k: get(self.config, k) for k in losses.own_keys(losses.OBJECTIVES[name])}
        return {key: name} | {f"{key}.{k.rpartition('.')[2]}": v for k, v in values.items()}

    @property
    def parts(self) -> dict[str, Any]:
        """The settings of codec (where one is named), conditions and objective."""
        data = self.config.data
        of_codec = {"data.codec": self.codec.identity} if data.codec else {}
        return of_codec | {"data.conditions": data.conditions} | self.objective_settings

    def load_objective(self, checkpoint: dict) -> None:
        """Copy the objective's weights of a `checkpoint`; ValueError where they do not fit."""
        weights = checkpoint.get("objective", {})
        expected = dict(self.objective.state_dict())
        check_like(weights, expected, "objective")
        entries = {k: loaded(v, f"objective.{k}", expected[k].dtype) for k, v in weights.items()}
        self.objective.load_state_dict(entries)

    def fitted_sampler(self, checkpoint: Path) -> sampling.Sampler:
        """The sampler, fitted to the network's weights, which come from `checkpoint`.

        A sampler without a fitted schedule or solver is returned unchanged.
        """
        if not self.sampler.is_fitted:
            return self.sampler
        fitting = Fitting(
            sampler=self.sampler,
            network=self.network,
            device=self.device,
            checkpoint=checkpoint,
            origin=self.origin(),
            seed=self.config.seed,
            draw_conditions=self.draw_conditions,
        )
        return fitting.fitted()

    def origin(self) -> dict:
        """Everything that results of the network depend on, as text that can be compared."""
        config, guidance = self.config, self.sampler.guidance
        guide = guidance and guidance.guide
        sampler = config.sampling.to_dict()
        return {
            "weights": digest(self.network.state_dict()),
            **({} if guide is None else {"guide": digest(guide.state_dict())}),
            "network": config.model.to_dict(),
            "method": repr(self.method),
            "sampling": {k: v for k, v in sampler.items() if k not in sampling.OUTPUTS},
            "centered": config.data.centered,
            **({"codec": self.codec.identity} if config.data.codec else {}),
            "seed": config.seed,
            "precision": config.training.precision,
            "device": self.device.type,
        }


def load(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    config: ConfigDict | None = None,
    fits: bool = True,
) -> Trained:
    """The trained network of a run, with its EMA weights.

    Args:
        path: a workdir, of which the newest intact checkpoint is taken; or a file: a checkpoint,
            what `--mode export` wrote, a snapshot of EDM or PFGM++.
        overrides: values by key as on the command line, {"sampling.ode_solver": "heun"}; the others
            are the run's own.
        config: takes the place of the run's own; a checkpoint of the published programs has none.
        fits: fit a schedule or solver 'fitted' to the weights; else see `Sampler.without_fit`.

    Raises:
        OSError: there is no checkpoint, or it cannot be read.
        ValueError: it is damaged or does not fit, there is no config, or a value is not allowed.
    """
    path, content = find_checkpoint(Path(path).expanduser())
    config = (
        run_config.of(path, content) if config is None else config.copy_and_resolve_references()
    )
    keys = all_keys()
    for key, value in (overrides or {}).items():
        if key not in keys:
            raise ValueError(explain_unknown(key, keys))
        if not keys[key].accepts(value):
            raise ValueError(f"{key} must be {keys[key].allowed}, not {shown(value)}")
        config.update_from_flattened_dict({key: tuple(value) if type(value) is list else value})
    for line in without_effect(config, overrides or {}):
        log.info(line)
    # the weights a network starts with are drawn; the caller's generators stay as they are
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(used):
        config, _ = decide_precisions(config, None)
        run = Experiment.build(config, _identity_in(path, content, config))
    changes = run_config.changes(path, content, config)
    step = fit(partial(load_ema, run.network), content, path, changes)
    for change in changes:
        if change.partition(":")[0] not in [f"sampling.{key}" for key in sampling.OUTPUTS]:
            log.info(f"the config differs from that of the run: {change}")
    run.network.eval().requires_grad_(False)
    run.sampler = run.fitted_sampler(path) if fits else run.sampler.without_fit()
    run.data.close()
    return Trained(run, path, step)


def _condition_drawer(config, device: torch.device, data: Data) -> Callable[..., Conditions]:
    """A function that draws conditions of training images, which are read at its first call.

    A `sampling.class_label` other than -1 is the class label of every row; other conditions are
    drawn beside it.
    """
    seed, classes, label = config.seed, config.data.num_classes, config.sampling.class_label
    named = bool(classes) and label >= 0
    of_training = functools.cache(lambda: data.conditions("train", labels=not named))

    def draw(number: int, purpose: str, *key: int) -> Conditions:
        labels = torch.full((number,), label, device=device) if named else None
        if not data.condition_names and (named or not classes):
            return Conditions(class_labels=labels)
        try:
            conditions = of_training()
        except (ValueError, OSError) as error:
            if named or not classes:
                raise
            raise ValueError(f"{error}; sampling.class_label can name a class instead") from error
        generator = keyed_generator("cpu", f"class labels of {purpose}", seed, *key)
        rows = torch.arange(len(next(iter(conditions.values()))))
        if (classes_of := conditions.get("class_labels")) is not None:
            rows = rows[classes_of >= 0]  # -1 labels an image that cannot be read
        rows = rows[torch.randint(len(rows), (number,), generator=generator)]
        drawn = conditions.map(lambda condition: condition[rows].to(device))
        return drawn | {"class_labels": labels} if named else drawn

    return draw


def _guide(config, codec: Codec, device: torch.device) -> nn.Module:
    """The network of `sampling.guide` with its EMA weights; ValueError where it is another kind."""
    path = Path(config.sampling.guide).expanduser()
    content = open_checkpoint(path, intact=True)
    if "config" not in content:
        raise ValueError(f"sampling.guide={path} carries no config")
    guide_config = run_config.restore(content["config"])
    old, new = run_config.flatten(guide_config), run_config.flatten(config)
    if differs := [key for key in SHARED if old[key] != new[key]]:
        key = differs[0]
        raise ValueError(
            f"sampling.guide={path} is another kind of network: its {key} is {old[key]}, not "
            f"{new[key]}"
        )
    theirs = get_codec(guide_config).identity
    if theirs != codec.identity:
        raise ValueError(
            f"sampling.guide={path} is another kind of network: its codec is {theirs}, not "
            f"{codec.identity}"
        )
    network = models.create_model(guide_config, codec.shape).to(device)
    fit(partial(load_ema, network), content, path)
    return network.eval().requires_grad_(False)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=distributed.local_device(torch.device(name))).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used: {reason}") from error
