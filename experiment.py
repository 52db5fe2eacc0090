"""The objects that a config names, built together, so that a mistake shows before any work."""

import contextlib
import functools
import hashlib
import logging
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from tqdm import tqdm

import datasets
import distributed
import execution
import likelihood
import losses
import methods
import models
import sampling
import sources
from configs.default import KEYS, check
from configs.effects import without_effect
from configs.keys import explain_unknown, get, shown
from methods.base import conditioned
from methods.restoration import Measurement
from solvers import FITTED, Schedule, fitted
from solvers.base import Step, Watch
from solvers.fitted import Fit
from solvers.fixed_steps import Advance
from sources.identity import Identity
from storage import run_config
from storage.checkpoints import digest, find_checkpoint, fit, fitted_path, load_checkpoint, peek
from storage.files import cached
from training import TrainState

log = logging.getLogger(__name__)

# Left at None these are measured, where the method has them.
MEASURED = ("training.M", "sampling.z_max", "sampling.upper_norm")

PRECISION_KEYS = ("training.precision", "sampling.precision")
MEASURED_PIXELS = 2**14  # of the images that a precision is measured with on a CPU

EARLIER_RULES = (
    "data.rules={}: the run began before the present rules on what is data; it reads and holds "
    "out what it did then"
)

# What these depend on besides the images themselves.
DECISIVE = ("data.dataset", "data.image_size", "data.centered", "model.sigma_end", "training.tau")

# What a network that guides another has to share with it.
SHARED = (
    *("data.image_size", "data.num_channels", "data.num_classes", "data.centered"),
    *("training.sde", "training.continuous", "training.gamma", "model.D", "model.sigma_data"),
    *("model.sigma_min", "model.sigma_max", "model.beta_min", "model.beta_max", "model.num_scales"),
)


LOWEST_SHOWN = 0.03  # noise level, as the network sees it, whose noise hardly shows in a film


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
    if datasets.takes_scale(config) and not config.data.scale:
        left_open.add("data.scale")
    if config.data.num_channels == 0:
        left_open.add("data.num_channels")
    if config.data.num_classes == -1:
        left_open.add("data.num_classes")
    newest = sources.NEWEST_RULES.get(config.data.dataset.lower(), 1)
    lines, scale_lines, own, found = [], [], {}, {}
    if left_open or (newest > 1 and not config.data.rules):
        stored = run_config.find(workdir)
        if stored and stored[0].suffix == ".pth":  # config.json may be of a start without a state
            own = run_config.flatten(stored[1])
    if not config.data.rules:
        of_same = str(own.get("data.dataset")).lower() == config.data.dataset.lower()
        config.data.rules = (of_same and own["data.rules"]) or newest
    if config.data.rules < newest:
        lines.append(EARLIER_RULES.format(config.data.rules))
    if not left_open:
        return config, "; ".join(lines) or None
    decisive = {*DECISIVE, *({"data.scale"} - left_open)}
    if own and all(own[key] == flat[key] for key in decisive):
        found = {key: own[key] for key in left_open if own[key]}
        config.data.scale = tuple(own["data.scale"])  # of images of 8 bits ()
        left_open.discard("data.scale")
    found.pop("data.scale", None)
    config.update_from_flattened_dict(found)
    if "data.scale" in left_open:
        config.data.scale, line = datasets.measure_scale(config)
        scale_lines += [line] * bool(line)
    if config.data.num_channels == 0:
        found["data.num_channels"] = config.data.num_channels = datasets.measure_channels(config)
    if config.data.num_classes == -1:
        found["data.num_classes"] = config.data.num_classes = datasets.measure_classes(config)
    with torch.device("meta"):  # mistakes of these show before all images are read
        models.create_model(config)
    measured = method.measure(config, lambda: _mean_norm(config))
    config.update_from_flattened_dict(measured)
    values = ", ".join(f"{key} = {value:.6g}" for key, value in sorted((found | measured).items()))
    decided = [f"the training images decide: {values}"] * bool(values)
    return config, "; ".join(scale_lines + decided + lines) or None


def _mean_norm(config) -> float:
    data = datasets.get_dataset(config, "train", labels=False)
    if norm := datasets.mean_norm(data, datasets.get_data_scaler(config)):
        return norm
    raise ValueError(
        f"all training images are black, of norm 0, which no {', '.join(MEASURED)} can be measured "
        "from: set data.centered=True, or these"
    )


def identity_of(workdir: Path, evaluated: ConfigDict | None = None) -> Identity | None:
    """The identity of the data of the run in `workdir`, from the newest checkpoint that it has.

    None where there is no run, or it began with a program that did not keep it; and where the
    config of an evaluation, `evaluated`, names another data set on purpose (see `_identity_in`).

    Raises:
        ValueError: the checkpoint has something else in its place.
    """
    found = peek(workdir)
    return None if found is None else _identity_in(*found, evaluated)


def _identity_in(path: Path, content: dict, evaluated: ConfigDict | None) -> Identity | None:
    """The identity in a checkpoint; None where `evaluated` has another `data.dataset` than its.

    The lines on what the config changes tell of such a data set.
    """
    own = content.get("config")
    name = own.get("data.dataset") if type(own) is dict else None
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
    `datasets.keyed_generator`, or None where there are no classes. `data` are read when they are
    first needed. `guide` is the network of `sampling.guide`.
    """

    device: torch.device
    method: methods.Method
    state: TrainState
    loss: losses.RegressionLoss
    sample: Callable[..., tuple[Tensor, int]]
    scaler: Callable[[Tensor], Tensor]
    draw_labels: Callable[..., Tensor | None]
    data: datasets.Data
    guide: nn.Module | None = None

    @classmethod
    def build(cls, config, identity: Identity | None = None) -> "Experiment":
        """Raises ValueError, in one line, for what the config gets wrong.

        `identity` is that of the data of the run, if it is known (`identity_of`).
        """
        check(config)
        device = _device(config.device)
        torch.manual_seed(config.seed)
        execution.check_precision(config.sampling.precision, device, "sampling.precision")
        execution.set_float32_products(config.training.precision)
        if device.type == "cpu":
            execution.keep_freed_memory()
        method = methods.get_method(config)
        model = models.create_model(config).to(device)
        guide = _guide(config, device) if config.sampling.guide else None
        data = datasets.Data(config, identity)
        return cls(
            device=device,
            method=method,
            state=TrainState(config, model),
            loss=losses.get_loss_fn(config, method),
            sample=sampling.get_sampling_fn(config, method, guide),
            scaler=datasets.get_data_scaler(config),
            draw_labels=_label_drawer(config, device, data),
            data=data,
            guide=guide,
        )

    def with_ema(self):
        """Within the `with` block the network holds its EMA weights and evaluates."""
        self.state.model.eval()
        return self.state.ema.swapped_into(self.state.parameters)


def load(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    config: ConfigDict | None = None,
) -> "Trained":
    """The trained network of a run, with its EMA weights.

    Args:
        path: a workdir, of which the newest intact checkpoint is taken; or a file: a checkpoint,
            what `--mode export` wrote, a snapshot of EDM or PFGM++.
        overrides: values by key as on the command line, {"sampling.ode_solver": "heun"}; the others
            are the run's own.
        config: takes the place of the run's own; a checkpoint of the published programs has none.

    Raises:
        OSError: there is no checkpoint, or it cannot be read.
        ValueError: it is damaged or does not fit, there is no config, or a value is not allowed.
    """
    path, content = find_checkpoint(Path(path).expanduser())
    config = (
        run_config.of(path, content) if config is None else config.copy_and_resolve_references()
    )
    for key, value in (overrides or {}).items():
        if key not in KEYS:
            raise ValueError(explain_unknown(key, KEYS))
        if not KEYS[key].accepts(value):
            raise ValueError(f"{key} must be {KEYS[key].allowed}, not {shown(value)}")
        config.update_from_flattened_dict({key: tuple(value) if type(value) is list else value})
    for line in without_effect(config, overrides or {}):
        log.info(line)
    config, _ = decide_precisions(config, None)
    # the weights a network starts with are drawn; the caller's generators stay as they are
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(used):
        run = Experiment.build(config, _identity_in(path, content, config))
    changes = run_config.changes(path, content, config)
    fit(run.state.load_network, content, path, changes)
    for change in changes:
        if change.partition(":")[0] not in [f"sampling.{key}" for key in sampling.OUTPUTS]:
            log.info(f"the config differs from that of the run: {change}")
    run.state.keep_ema()
    trained = Trained(config, run, path)
    run.data.close()
    return trained


class Trained:
    """A trained network and what can be done with it: what `load` gives.

    Images are float tensors (n, C, H, W) in [0, 1], and noise levels are in the same unit: at 0.1
    the noise is a tenth of the way from black to white. Latents are those of the method's prior.
    What is given may be on any device; what is returned is on that of the network. An image may be
    given a class label, or each its own (n,); -1 is none.

    Attributes:
        config: all of it.
        experiment: method and network, for what is not here.
        path: the file that it comes from.
        step: after how many steps of training.
        class_names: of the classes in the order of their numbers; empty where none are known.
    """

    def __init__(self, config: ConfigDict, run: Experiment, path: Path):
        self.config, self.experiment, self.path, self.step = config, run, path, run.state.step
        self.class_names, self.shape = run.data.class_names, datasets.image_shape(config)
        self.at_once = 1 if sampling.couples_samples(config) else config.eval.batch_size
        self._unscaled = datasets.get_data_inverse_scaler(config)
        self._sampler = run.sample
        if sampling.is_fitted(config):
            made = fit_solver(config, run, path, origin_of(config, run))
            self._sampler = partial(run.sample, fit=made)

    def sample(
        self,
        seeds: Iterable[int],
        class_label: int | Sequence[int] | Tensor | None = None,
        *,
        measurement: Measurement | None = None,
    ) -> Tensor:
        """An image (n, C, H, W) in [0, 1] for each of n `seeds`, which it depends on alone.

        It does not depend, but for rounding, on what is drawn with it, so samples are drawn
        `eval.batch_size` at once, or one by one where the sampler would make one step size for all
        (`sampling.couples_samples`).

        Args:
            seeds: whole numbers from 0 to 2^63 - 1.
            class_label: None for `sampling.class_label`; where that is -1, each class is as likely.
            measurement: what is known of each image, (n, ...); `sampling.restorer` draws images
                that agree with it.

        Raises:
            ValueError: a seed or class label is none.
            FloatingPointError: the solution is not finite, or takes more evaluations than
                `sampling.max_evaluations`.
        """
        none = torch.empty(0, *self.shape, device=self.experiment.device)
        drawn = [images for images, _ in self._draw(seeds, class_label, measurement)]
        return torch.cat([none, *drawn])

    def film(
        self,
        seeds: Iterable[int],
        class_label: int | Sequence[int] | Tensor | None = None,
        *,
        measurement: Measurement | None = None,
        frames: int = 48,
    ) -> Tensor:
        """The way of `sample` from the prior to the image: uint8 (frames, n, C, H, W), on the CPU.

        The noise levels of the frames fall geometrically, and the last frame is the image. A state
        whose root mean square is beyond that of black and white is divided by it, to be seen.
        """
        method = self.experiment.method
        ends = torch.tensor([method.t_prior, method.t_data], dtype=torch.float64)
        high, low = method.sigma(ends).tolist()
        ratio = torch.linspace(0, 1, frames - 1, dtype=torch.float64)
        levels = high * (max(low, LOWEST_SHOWN) / high) ** ratio
        timed, parts = sampling.tells_times(self.config), []
        states = partial(sampling.States, method, levels, timed, self._shown)
        for images, passed in self._draw(seeds, class_label, measurement, states):
            parts.append(passed.end(self.experiment.scaler(images)))
        return torch.cat(parts, 1)

    def encode(self, x: Tensor, class_label: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """Latents (n, C, H, W) of images `x` (n, C, H, W) in [0, 1]; `decode` leads back.

        A tenth of `sampling.rtol` and `atol` bounds a step's error, since latents can be hundreds
        of times as large as images; the images of a call share their steps. A `class_label` of
        None is `sampling.class_label`, which is -1 for none. There is no guidance.

        Raises:
            ValueError: the images have another shape or lie outside [0, 1], or as of `sample`.
            FloatingPointError: as of `sample`.
        """
        x, options = self._scaled(x), self._fine_options()
        return self._in_batches(
            lambda net, part, watch: sampling.encode(
                self.experiment.method, net, part, watch=watch, **options
            )[0],
            x,
            class_label,
        )

    def decode(self, z: Tensor, class_label: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """The images (n, C, H, W) in [0, 1] of latents `z` (n, C, H, W); see `encode`."""
        self._check_shape(z, "latents")
        options = self._fine_options()
        x = self._in_batches(
            lambda net, part, watch: sampling.solve_ode(
                self.experiment.method, net, part, watch=watch, **options
            )[0],
            z.to(self.experiment.device, torch.float32),
            class_label,
        )
        return self._unscaled(x).clamp(0, 1)

    def log_likelihood(
        self,
        x: Tensor,
        class_label: int | Sequence[int] | Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Log density (n,), in nats, of images `x` (n, C, H, W) under the flow, over [0, 1]^D.

        The bits/dim of 8-bit images u are -log p / (D ln 2) + 8 at x = (u + noise) / 256, the noise
        uniform in [0, 1] (Theis et al. 2016). The divergence is that of `eval.divergence`, its
        probe drawn by `seed`.

        Raises as `encode`, and ValueError for a network trained at discrete noise levels.
        """
        bits_per_dim = likelihood.get_likelihood_fn(self.config, self.experiment.method)
        probes = datasets.keyed_generator(self.experiment.device, "probe", *_checked([seed]))
        bits = self._in_batches(
            lambda net, part, watch: bits_per_dim(net, part, probes, watch=watch)[0],
            self._scaled(x),
            class_label,
        )
        return (8 - bits) * math.prod(self.shape) * math.log(2)

    def denoise(
        self,
        x: Tensor,
        sigma: float,
        class_label: int | Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """E[image | x] (n, C, H, W) for `x` (n, C, H, W), images with noise of the level `sigma`.

        The noise has the standard deviation sigma where it is Gaussian; where it is a Student t, of
        PFGM++ and Poisson flow, sigma is its scale. There is no guidance, and nothing is clamped.

        Raises:
            ValueError: another shape, or `sigma` is not one of the method's noise levels.
        """
        self._check_shape(x, "noisy images")
        method, unit = self.experiment.method, self._unit
        ends = torch.tensor([method.t_data, method.t_prior], dtype=torch.float64)
        low, high = (method.sigma(ends) / unit).tolist()
        if not 0.999999 * low <= sigma <= 1.000001 * high:
            raise ValueError(
                f"sigma must be a noise level from {low:.6g} to {high:.6g}, not {sigma}"
            )
        level = torch.tensor(sigma * unit, dtype=torch.float64)
        denoised = self._in_batches(
            lambda net, part, watch: method.denoise(net, part, level),
            self.experiment.scaler(x.to(self.experiment.device, torch.float32)),
            class_label,
        )
        return self._unscaled(denoised)

    # --- parts ---

    def _fine_options(self) -> dict[str, float]:
        options = sampling.get_rk45_options(self.config)
        return options | {key: options[key] / 10 for key in ("rtol", "atol")}

    @property
    def _unit(self) -> float:
        """What black and white are apart as the network sees them."""
        black, white = self.experiment.scaler(torch.tensor([0.0, 1.0])).tolist()
        return white - black

    @torch.no_grad()
    def _draw(self, seeds, class_label, measurement, states=None) -> Iterator[tuple[Tensor, Any]]:
        """Images of the seeds in batches, each with the `states()` that the solver passed."""
        seeds, run = _checked(seeds), self.experiment
        labels = self.labels(class_label, len(seeds), seeds)
        for start in range(0, len(seeds), self.at_once):
            part = slice(start, start + self.at_once)
            generators = [datasets.keyed_generator(run.device, "sample", s) for s in seeds[part]]
            x = [run.method.prior_sampling((1, *self.shape), g, run.device) for g in generators]
            sample, passed = self._sampler, states and states()
            if measurement is not None:
                own = sampling.without_fit(self.config)
                sample = sampling.get_sampling_fn(own, run.method, run.guide, measurement[part])
            try:
                with solver_bar(run.method) as watch:
                    images, _ = sample(
                        run.state.model,
                        x=torch.cat(x),
                        generator=generators,
                        labels=None if labels is None else labels[part],
                        callback=passed,
                        watch=watch,
                    )
            except FloatingPointError as error:
                which = f"seed {seeds[part][0]}" + " and others" * (len(x) > 1)
                raise type(error)(f"{which}: {error}") from error
            yield images, passed

    @torch.no_grad()
    def _in_batches(self, compute, x: Tensor, class_label) -> Tensor:
        """`compute(network, part, watch)` of the parts of `x`, one tensor."""
        labels, parts = self.labels(class_label, len(x)), []
        for start in range(0, len(x), self.config.eval.batch_size):
            part = slice(start, start + self.config.eval.batch_size)
            given = None if labels is None else labels[part]
            net = conditioned(self.experiment.state.model, {"class_labels": given})
            with solver_bar(self.experiment.method) as watch:
                parts.append(compute(net, x[part], watch))
        if not parts:
            raise ValueError("there are no images")
        return torch.cat(parts)

    def _shown(self, y: Tensor) -> Tensor:
        """A state as an image to look at, uint8."""
        contrast = 2 * self._unscaled(y) - 1
        rms = contrast.flatten(1).square().mean(1).sqrt().clamp(min=1)
        image = (contrast / rms.view(-1, 1, 1, 1) + 1) / 2
        return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def _scaled(self, x: Tensor) -> Tensor:
        self._check_shape(x, "images")
        if not (x.is_floating_point() and ((x >= 0) & (x <= 1)).all()):
            raise ValueError("images must be floats in [0, 1]; divide those of 8 bits by 255")
        return self.experiment.scaler(x.to(self.experiment.device, torch.float32))

    def _check_shape(self, x: Tensor, what: str) -> None:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1:] != self.shape:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{what} must be a tensor (n, {str(self.shape)[1:]}, not {given}")

    def labels(self, given, n: int, seeds: Sequence[int] | None = None) -> Tensor | None:
        """Class labels (n,) of n images; those not `given` are the config's or, by `seeds`, drawn.

        None where the network has no classes. Raises ValueError for a label that is none of them.
        """
        classes, asked = self.config.data.num_classes, self.config.sampling.class_label
        if given is None and not classes:
            return None
        if given is None:
            given = asked
            if asked < 0 and seeds is not None:
                draws = (datasets.keyed_generator("cpu", "class", seed) for seed in seeds)
                given = [torch.randint(classes, (), generator=g).item() for g in draws]
        labels = torch.as_tensor(given, device=self.experiment.device)
        if labels.dtype != torch.int64 or labels.shape not in ((), (n,)):
            raise ValueError(f"class_label must be a whole number or {n} of them")
        least = -1 if classes and self.config.training.label_dropout else 0
        if ((labels < least) | (labels >= classes)).any():
            has = f"those from {least} to {classes - 1}" if classes else "none (data.num_classes=0)"
            raise ValueError(f"class_label={shown(given)} is no class of the network: it has {has}")
        return labels.expand(n)


def _checked(seeds: Iterable[int]) -> list[int]:
    seeds = [*seeds]
    for seed in seeds:
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
            raise ValueError(f"a seed must be a whole number from 0 to 2^63 - 1, not {shown(seed)}")
    return [int(seed) for seed in seeds]


def _label_drawer(
    config, device: torch.device, data: datasets.Data | None = None
) -> Callable[..., Tensor | None]:
    """See `Experiment`; the labels of the training images are read when they are first needed."""
    data = data or datasets.Data(config)
    seed, classes, fixed = config.seed, config.data.num_classes, config.sampling.class_label
    known = functools.cache(lambda: data.labels("train"))

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
    return state.keep_ema()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=distributed.local_device(torch.device(name))).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used: {reason}") from error


def origin_of(config, run: Experiment) -> dict:
    """What all that is computed by `run` depends on, in words that can be compared."""
    return {
        "weights": digest(run.state.model.state_dict()),
        **({} if run.guide is None else {"guide": digest(run.guide.state_dict())}),
        "network": config.model.to_dict(),
        "method": repr(run.method),
        "sampling": _sampler_of(config),
        "centered": config.data.centered,
        "seed": config.seed,
        "precision": config.training.precision,
        "device": run.device.type,
    }


def _sampler_of(config) -> dict:
    asked = config.sampling.to_dict()
    return {key: value for key, value in asked.items() if key not in sampling.OUTPUTS}


def origin_of_tensors(**tensors: Tensor | None) -> dict:
    """The same of `tensors`, of which those that are None are left out."""
    return {
        name: hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
        if tensor is not None
    }


def fit_solver(config, run: Experiment, checkpoint: Path, origin: dict) -> Fit:
    """Schedule and, for the solver 'fitted', steps fitted to the weights that `run` holds.

    See `solvers.fitted`. What is measured is kept beside the `checkpoint`, in files that count for
    these weights and this ODE. One serves every number of steps; the steps themselves have one for
    each.

    Raises:
        FloatingPointError: a trajectory is not finite.
    """
    fine, dim = sampling.for_trajectories(config), math.prod(datasets.image_shape(config))
    number = fitted.number_of_trajectories(dim, fitted.MOST_FOR_LEVELS)
    labels = run.draw_labels(number, "fitted")

    def compute() -> dict:
        parts = _trajectories(fine, run, number, labels)
        return {"relative_errors": sum(map(fitted.euler_errors, parts)).numpy()}

    k = fitted.FINE_STEPS + 1
    spec = {"relative_errors": ("f", (k, k))}
    key = _fit_key(origin, fine, number, labels)
    cost = fitted.step_costs(*_kept(fitted_path(checkpoint), key, compute, spec))
    levels = fitted.fine_levels(run.method, k, config.sampling.rho)[:k]
    schedule = partial(fitted.schedule, levels, cost)
    if config.sampling.ode_solver != FITTED:
        return Fit(schedule)
    return Fit(schedule, _fit_steps(config, run, checkpoint, origin, schedule))


def _fit_steps(
    config, run: Experiment, checkpoint: Path, origin: dict, schedule: Schedule
) -> Advance:
    fine, asked = sampling.for_trajectories(config), sampling.for_fitting(config)
    options, shape = asked.sampling, datasets.image_shape(config)
    levels = sampling.solver_levels(
        run.method, schedule, options.N, options.rho, options.noise_removal
    )
    number = fitted.number_of_trajectories(math.prod(shape), fitted.MOST_FOR_STEPS)
    labels = run.draw_labels(number, "fitted")

    def compute() -> dict:
        parts = [
            fitted.states_at(levels[1:], steps)
            for steps in _trajectories(fine, run, number, labels)
        ]
        steps = fitted.Fitting([torch.cat(states) for states in zip(*parts, strict=True)])
        prior = _fit_prior(config, run, number)
        _follow(asked, run, prior, labels, Fit(schedule, steps))
        weights = [nn.functional.pad(w, (0, 1 + options.order - len(w))) for w in steps.weights]
        offsets = torch.stack(steps.offsets).cpu()
        return {"weights": torch.stack(weights).numpy(), "offsets": offsets.numpy()}

    spec = {
        "weights": ("f", (options.N, 1 + options.order)),
        "offsets": ("f", (options.N, *shape)),
    }
    key = _fit_key(origin, asked, number, labels)
    key |= {"levels": levels.tolist(), "trajectory sampler": _sampler_of(fine)}
    weights, offsets = _kept(fitted_path(checkpoint, options.N), key, compute, spec)
    return fitted.steps_as_kept(levels, weights, offsets.to(run.device))


def _fit_key(origin: dict, config, number: int, labels: Tensor | None) -> dict:
    key = origin | {"sampling": _sampler_of(config), "trajectories": number}
    return key | origin_of_tensors(labels=labels)


def _fit_prior(config, run: Experiment, number: int) -> Tensor:
    generator = datasets.keyed_generator(run.device, "fitted", config.seed)
    shape = (number, *datasets.image_shape(config))
    return run.method.prior_sampling(shape, generator, run.device)


def _trajectories(
    config, run: Experiment, number: int, labels: Tensor | None
) -> Iterator[list[Step]]:
    """The fine trajectories of `number` samples, as many at a time as fit in memory."""
    log.info(f"fitting the sampler: solving {number} trajectories in fine steps")
    parts = math.ceil(number / fitted.at_once(math.prod(datasets.image_shape(config))))
    # In even parts: of a single trajectory no distances would be known.
    priors = _fit_prior(config, run, number).tensor_split(parts)
    some_labels = [None] * parts if labels is None else labels.tensor_split(parts)
    for prior, some in zip(priors, some_labels, strict=True):
        steps = []
        _follow(config, run, prior, some, Fit(fitted.fine_levels), steps.append)
        yield steps


def _follow(config, run: Experiment, x: Tensor, labels, made: Fit, callback=None) -> None:
    sample = sampling.get_sampling_fn(config, run.method, run.guide)
    with solver_bar(run.method) as watch:
        try:
            sample(run.state.model, x=x, labels=labels, fit=made, callback=callback, watch=watch)
        except FloatingPointError as error:
            raise FloatingPointError(f"fitting the sampler: {error}") from error


def _kept(path: Path, key: dict, compute: Callable[[], dict], spec: dict) -> list[Tensor]:
    """The arrays that `spec` names, from `path` or computed by the main process."""
    if distributed.is_main():
        cached(path, key, compute, spec)
    distributed.barrier()
    found = cached(path, key, compute, spec)
    return [torch.from_numpy(found[name]) for name in spec]


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
