"""Values that a config leaves open: those of the run, or measured on its data and its network."""

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
import methods
import models
import sources
from configs import machine
from configs.default import all_keys, check
from configs.effects import without_effect
from configs.keys import flatten, get, of_part
from configs.schema import REFERENCE_STD
from datasets import Data, mean_norm
from sources import latents, pairs
from sources.codec import Codec, Shape, class_of, encoded
from sources.codec import from_config as get_codec
from sources.dtypes import is_whole
from sources.identity import Identity
from sources.images import image_size_of, sides_of
from sources.measures import ImageMeasures
from storage import run_config

log = logging.getLogger(__name__)

# Measured where they are None and the method has them; the first ones by the images' norm.
NORM_KEYS = ("training.M", "sampling.z_max", "sampling.upper_norm")
MEASURED = (*NORM_KEYS, "model.sigma_data", "model.sigma_max")

# Key -> the value that leaves it open, to be measured on the images.
OPEN_IN_DATA = {"data.num_channels": 0, "data.image_size": 0, "data.num_classes": -1}

# Measured of arrays in units of their own; data.dtype says whether the data are such arrays.
OF_ARRAYS = ("data.mean", "data.std", "reports.window")
SAID_BY_DATA = (*OF_ARRAYS, "data.scale", *pairs.MEASURED, *latents.KEYS)  # in lines of their own

FEW_LEVELS = 100  # whole numbers of a variance below that many times 1/12, the rounding's, are few

PRECISION_KEYS = ("training.precision", "sampling.precision")
PRECISIONS_OF_RUN = PRECISION_KEYS[:1]  # kept in evaluation and sampling; the other is measured
MEASURED_PIXELS = 2**14  # of the images that a precision is measured with on a CPU

EARLIER_RULES = (
    "data.rules={}: the run began before the present rules on which files are data; it reads and "
    "holds out the same files as then"
)

# Keys that decide the `MEASURED` values, besides the images themselves.
DECISIVE = (
    *("data.dataset", "data.image_size", "data.centered", "data.codec", "data.layout"),
    "data.patch",
    *("model.sigma_end", "training.tau"),
)


def complete(
    config: ConfigDict,
    workdir: Path | None = None,
    identity: Identity | None = None,
    precisions: Collection[str] = PRECISION_KEYS,
) -> tuple[ConfigDict, Data, list[str]]:
    """`config` with the values that it leaves open, its data, and lines that name these values.

    They are those of the run in `workdir`, where a checkpoint has them and the `DECISIVE` values
    are the same; else they are measured on the training images. A precision 'auto' stays open where
    the run has none; see `decide_precisions`.

    Args:
        config: it stays as it is.
        identity: of the data of the run; see `datasets.Data`.
        precisions: keys whose 'auto' becomes the value of the run, if the device supports it.

    Raises:
        ValueError, OSError: the config is wrong, or the data cannot be read.
    """
    check(config)
    config = config.copy_and_resolve_references()
    machine.expand_home(config)
    if size := config.data.image_size:
        _set(config, {"data.image_size": image_size_of(sides_of(size))})  # (8, 8) is 8
    flat, data = flatten(config), Data(config.data, identity)
    open_keys = _open_keys(flat, data)
    newest = sources.NEWEST_RULES.get(config.data.dataset.lower(), 1)
    of_run = {key for key in precisions if flat[key] == "auto"}
    run_values, lines = {}, []
    if workdir and (open_keys or of_run or (newest > 1 and not config.data.rules)):
        stored = run_config.find(workdir)
        # config.json may stem from a start that saved no state
        if stored and stored[0].suffix == ".pth":
            run_values = flatten(stored[1])
    if not config.data.rules:
        of_same = str(run_values.get("data.dataset")).lower() == config.data.dataset.lower()
        config.data.rules = (of_same and run_values["data.rules"]) or newest
    if config.data.rules < newest:
        lines.append(EARLIER_RULES.format(config.data.rules))
    for key in sorted(of_run & run_values.keys()):
        if execution.has_precision(run_values[key], execution.named_device(config.device)):
            config.update_from_flattened_dict({key: run_values[key]})
            lines.append(f"{key}='auto' is {run_values[key]!r}: as the run has it")
    if not open_keys:
        return config, data, lines
    of_codec = {*of_part(class_of(config.data.codec, config.data.dtype), "keys")}
    decisive = {*DECISIVE, "data.scale", *of_codec} - open_keys
    if not (run_values and all(run_values[key] == flat[key] for key in decisive)):
        run_values = {}
    values = {key: run_values[key] for key in open_keys & run_values.keys() if run_values[key]}
    if run_values:
        open_keys.discard("data.scale")  # which is () where its images have 8 bits
    _set(config, values)
    measured, decided = _measure_data(config, data, open_keys - values.keys())
    of_method = _measured_by_method(config, data)
    _set(config, of_method)
    values |= measured | of_method
    if numbers := {key: value for key, value in values.items() if key not in SAID_BY_DATA}:
        words = ", ".join(f"{key} = {_words(value)}" for key, value in sorted(numbers.items()))
        decided.append(f"the training images decide: {words}")
    if "model.sigma_data" in of_part(methods.method_class(config.training.sde), "keys"):
        scale = config.model.sigma_data / REFERENCE_STD
        if flat["model.sigma_data"] is None and "model.sigma_data" not in of_method:
            scale = run_values["model.sigma_unit"]  # 1 where the run's sigma_data was a number
        derived = {k: value for k, value in scaled(flat, scale).items() if k not in values}
        _set(config, derived)
        new = flatten(config)
        changed = [k for k in derived if new[k] != flat[k] and not without_effect(config, [k])]
        words = ", ".join(f"{key} = {_words(derived[key])}" for key in sorted(changed))
        decided += [f"noise levels follow model.sigma_data: {words}"] * bool(words)
    return config, data, decided + lines


def _open_keys(flat: Mapping[str, Any], data: Data) -> set[str]:
    """Keys that `flat`, a config, leaves open; ValueError for a `data.scale` of another kind."""
    keys = {key for key in MEASURED if flat[key] is None}
    keys |= {name for name, key in all_keys().items() if key.opens and flat[name] is None}
    keys |= {key for key, value in OPEN_IN_DATA.items() if flat[key] == value}
    if flat[pairs.PATH]:
        keys |= {key for key in pairs.MEASURED if not flat[key]}
    if latents.is_file(flat["data.codec"]):
        keys |= {key for key in latents.KEYS if not flat[key]}
    if data.takes_scale and not flat["data.scale"]:
        keys.add("data.scale")
    if data.are_arrays and not flat["data.dtype"]:
        keys.add("data.dtype")
    if data.are_arrays or flat["data.dtype"]:
        keys |= {key for key in OF_ARRAYS if not flat[key]}
    elif isinstance(flat["data.scale"], str):
        raise ValueError(
            f"data.scale={flat['data.scale']!r} is for arrays; images take (low, high)"
        )
    return keys


def _measure_data(
    config: ConfigDict, data: Data, open_keys: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Measure those of `open_keys` that the data decide: their values, and lines for the log.

    `config`, whose section `data` is that of `data`, gets the values.
    """
    values, lines = {}, []
    if "data.dtype" in open_keys and (dtype := data.measure_dtype()):
        values["data.dtype"] = config.data.dtype = dtype
    if "data.scale" in open_keys:
        values["data.scale"], line = data.measure_scale()
        config.data.scale, lines = values["data.scale"], [line] * bool(line)
    for key, measure in (
        ("data.num_channels", data.measure_channels),
        ("data.image_size", data.measure_size),
        ("data.num_classes", data.measure_classes),
    ):
        if key in open_keys:
            values[key] = measure()
            _set(config, {key: values[key]})
    if config.data.dtype and (of_arrays := [key for key in OF_ARRAYS if key in open_keys]):
        moments = data.measure_moments()
        measured = dict(zip(OF_ARRAYS, (moments.mean, moments.std, moments.window), strict=True))
        of_arrays = {key: measured[key] for key in of_arrays}
        _set(config, of_arrays)
        values |= of_arrays
        lines.append(f"arrays of {config.data.dtype}: {moments.line}")
        few = is_whole(config.data.dtype) and min(config.data.std) ** 2 < FEW_LEVELS / 12
        if few and not config.data.uniform_dequantization:
            lines.append(
                "likelihoods add noise as wide as a unit, which is not little for numbers so close "
                "together: --config.data.uniform_dequantization trains the network with it"
            )
    if of_pairs := [key for key in pairs.MEASURED if key in open_keys]:
        measured, line = data.measure_conditions()
        of_pairs = {key: measured[key] for key in of_pairs}
        _set(config, of_pairs)
        values |= of_pairs
        lines.append(line)
    if of_latents := [key for key in latents.KEYS if key in open_keys]:
        measured = data.measure_latents(get_codec(config), execution.named_device(config.device))
        numbers = dict(zip(latents.KEYS, (measured.mean, measured.std), strict=True))
        of_latents = {key: numbers[key] for key in of_latents}
        _set(config, of_latents)
        values |= of_latents
        lines.append(f"latents: {measured.line.partition('; pictures')[0]}")
    return values, lines


def scaled(flat: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Values of keys that follow the data, whose standard deviation is 0.5 times `scale`.

    Noise levels of a config are meant for data of standard deviation 0.5. Where `flat`, the config
    as given, leaves `model.sigma_data` open, all keys with `scales` follow the data; else only open
    ones do, from their defaults. A value that would leave its range becomes the end of it.
    """
    rules = {
        "level": lambda value: value * scale,
        "inverse": lambda value: value / scale,
        "log": lambda value: value + math.log(scale),
    }
    values, follows = {}, flat["model.sigma_data"] is None
    for name, key in all_keys().items():
        if key.scales and (follows or flat[name] is None):
            value = key.default if flat[name] is None else flat[name]
            several, rule = isinstance(value, tuple | list), rules[key.scales]
            ends = key.allowed.each if several else key.allowed
            new = [ends.nearest(rule(number)) for number in (value if several else [value])]
            values[name] = tuple(new) if several else new[0]
    return values


def _set(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Put `values`, by key, in `config`; what was one number may become several."""
    with config.ignore_type():
        config.update_from_flattened_dict(
            {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        )


def _words(value: float | str | tuple[float, ...]) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_words, value))})"
    return value if isinstance(value, str) else f"{value:.6g}"


def _measured_by_method(config: ConfigDict, data: Data) -> dict[str, float]:
    """The `MEASURED` values that the method measures, by key."""
    models.check_labels(config.model, config.training.sde, config.training.continuous)
    codec = get_codec(config)

    def check_network() -> None:
        trial = config.copy_and_resolve_references()
        _set(trial, {"model.sigma_max": trial.model.sigma_max or 1.0})
        with torch.device("meta"):
            models.from_config(trial, codec.shape)

    method = methods.method_class(config.training.sde)
    images = TrainingImages(data, codec, execution.named_device(config.device), check_network)
    return method.measure(flatten(config), math.prod(codec.shape), images)


@dataclass(frozen=True)
class TrainingImages:
    """Measures (`methods.base.Measures`) of the training images of `data`, encoded by `codec`.

    Latents are made on `device`. `check` is called before images are read, so that mistakes in the
    network's config show first.
    """

    data: Data
    codec: Codec
    device: torch.device
    check: Callable[[], None]

    def mean_norm(self) -> float:
        self.check()
        return norm_of(self.data, self.codec, self.device)

    def standard_deviation(self) -> float:
        return self._sample.standard_deviation()

    def largest_distance(self) -> float:
        return self._sample.largest_distance()

    @functools.cached_property
    def _sample(self) -> ImageMeasures:
        self.check()
        images = self.data.get("train", labels=False)
        images, codec = self.data.encoded(images, self.codec, self.device)
        return ImageMeasures(images, partial(encoded, codec))


def norm_of(data: Data, codec: Codec, device: torch.device | str = "cpu") -> float:
    """Mean Euclidean norm of the training images of `data`, encoded; ValueError where it is 0.

    Latents are made on `device`.
    """
    images, codec = data.encoded(data.get("train", labels=False), codec, device)
    if mean := mean_norm(images, partial(encoded, codec)):
        return mean
    raise ValueError(
        f"all training images are black, of norm 0, so no {', '.join(NORM_KEYS)} can be measured "
        "from them: set data.centered=True, or set these keys"
    )


def decide_precisions(config: ConfigDict, network: nn.Module, shape: Shape) -> list[str]:
    """Put a measured precision in place of each 'auto' of `PRECISION_KEYS`; a line on each.

    Args:
        config: a complete one, which is changed.
        network: on the device of the run; it is measured as it is, not compiled.
        shape: (C, H, W) of its input.
    """
    lines, device = [], next(network.parameters()).device
    for key in (key for key in PRECISION_KEYS if get(config, key) == "auto"):
        of_training = key == "training.precision"
        number, training = config.eval.batch_size, config.training
        if of_training:
            shards = training.accumulate * distributed.world()
            number = (training.small_batch_size or training.batch_size) // shards
        if device.type == "cpu":
            number = min(number, max(8, MEASURED_PIXELS // (shape[1] * shape[2])))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            x = torch.randn(number, *shape, device=device)
            pass_once = _pass(x, backwards=of_training)
            network.train(of_training)
            with execution.full_float32():
                precision, reason = execution.measured_precision(network, pass_once)
        network.zero_grad()
        network.train()
        config.update_from_flattened_dict({key: precision})
        lines.append(f"{key}='auto' is {precision!r}: {reason}")
    return lines


def _pass(x: Tensor, backwards: bool) -> Callable[[nn.Module], None]:
    """A function that passes `x` through a network once, and with `backwards` back again."""
    label = torch.ones(len(x), device=x.device)

    def run(network: nn.Module) -> None:
        with torch.set_grad_enabled(backwards):
            out = network(x, label)
            if backwards:
                sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()

    return run
