"""The parts that a config names, built together, so that a mistake shows before any work."""

import contextlib
import functools
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from ml_collections import ConfigDict
from torch import nn

import execution
import losses
import methods
import models
import sampling
from completion import PRECISION_KEYS, complete, decide_precisions
from configs import machine
from configs.default import all_keys, check
from configs.effects import without_effect
from configs.keys import explain_unknown, get, plain, shown, with_home
from configs.schema import Either
from datasets import Data, DataSet
from library.conditions import ConditionDrawer, check_conditions
from library.fitting import Fitting
from library.levels import LevelChoice
from library.sample_folder import KEYS as OUTPUTS
from library.trained import Trained
from likelihood import Likelihood
from models.tiles import Tiled
from models.weights import load_ema
from solvers.rk45 import limits_of
from sources import pairs
from sources.codec import Codec, check_codec, has_pixels
from sources.codec import from_config as get_codec
from sources.identity import Identity
from sources.preparation import Preparation
from storage import run_config
from storage.checkpoints import fit, open_checkpoint
from storage.checks import check_like, loaded
from storage.digests import digest
from storage.run_checkpoints import find_checkpoint, peek

log = logging.getLogger(__name__)

# Keys whose values a guide shares with the network that it guides.
GUIDE_KEYS = (
    *("data.image_size", "data.num_channels", "data.num_classes", "data.centered"),
    *("data.conditions", "data.condition_channels"),
    *("training.objective", "training.sde", "training.continuous", "training.gamma"),
    *("model.D", "model.sigma_data", "model.sigma_unit", "model.coupling"),
    *("model.sigma_min", "model.sigma_max", "model.beta_min", "model.beta_max", "model.num_scales"),
)

# Keys that results of earlier versions do not name, and the values that they were computed with.
LATER = {
    "model.sigma_unit": 1.0,
    "model.coupling": "independent",
    "model.head_width": 64,
    "model.patch": 2,
    "model.depth": 4,
    "model.heads": 4,
    "sampling.size": (),
    "sampling.levels": (),
}
OF_START = {f"sampling.{name}" for name in ("init", "init_level", "init_weight")}  # at a condition

CLASS_LABEL = "sampling.class_label"


def identity_of(workdir: Path, dataset: str | None = None) -> Identity | None:
    """The identity of the data of the run in `workdir`, from its newest checkpoint.

    None where there is no run, where an older program wrote the checkpoint without an identity, or
    where its data set is not `dataset`, that of an evaluation.

    Raises:
        ValueError: the checkpoint has something else in its place.
    """
    newest = peek(workdir)
    return None if newest is None else _identity_in(*newest, dataset)


def _identity_in(path: Path, content: dict, dataset: str | None) -> Identity | None:
    """The identity in a checkpoint; None where its data set is not `dataset`."""
    stored_config = content.get("config")
    name = stored_config.get("data.dataset") if type(stored_config) is dict else None
    same = dataset is None or str(name).lower() in ("none", dataset.lower())
    return Identity.read(path, content) if same else None


@dataclass
class Experiment:
    """The parts that a config names, each built once.

    Attributes:
        config: the complete one.
        draw_conditions: conditions to sample with, of training images.
        data: read when they are first needed.
        condition_codec: codec of the conditions that are images; None where there are none.
        remarks: lines for the log on what was decided.
    """

    config: ConfigDict
    device: torch.device
    method: methods.Method
    codec: Codec
    network: nn.Module
    objective: losses.Objective
    sampler: sampling.Sampler
    draw_conditions: ConditionDrawer
    data: Data
    condition_codec: Codec | None = None
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of_run(
        cls,
        config: ConfigDict,
        workdir: Path,
        identity: Identity | None,
        precisions: Collection[str] = PRECISION_KEYS,
    ) -> Self:
        """Build the parts of `config` for the run in `workdir`; raises as `complete` does."""
        config, data, remarks = complete(config, workdir, identity, precisions)
        experiment = cls.build(config, data)
        experiment.remarks = remarks + experiment.remarks
        return experiment

    @classmethod
    def build(cls, config: ConfigDict, data: Data | None = None) -> Self:
        """Build the parts of `config`; ValueError, in one line, for a mistake in it.

        Args:
            config: a complete one, but for precisions.
            data: those of `config`, None for data without an identity.
        """
        check(config)
        config = config.copy_and_resolve_references()
        data, label = data or Data(config.data), config.sampling.class_label
        if isinstance(label, str):
            with config.ignore_type():
                config.sampling.class_label = label = data.class_number(label)
        device = execution.named_device(config.device)
        torch.manual_seed(config.seed)
        method = methods.get_method(config)
        conditions = data.condition_names  # those of data.condition_path are checked below
        conditions += ["class_labels"] * bool(config.data.num_classes)
        conditions += ["augment_labels"] * bool(config.training.augment)
        method.check_conditions(conditions)
        models.check_labels(config.model, config.training.sde, config.training.continuous)
        codec = get_codec(config, device)
        method = method.with_data(data, codec)
        condition_codec = pairs.codec_of(config.data)
        if condition_codec:
            check_conditions(method, codec)
        network = models.from_config(config, codec.shape).to(device)
        remarks = decide_precisions(config, network, codec.shape)
        execution.check_precision(config.sampling.precision, device, "sampling.precision")
        guide = _guide(config, codec, device) if config.sampling.guide else None
        names = data.class_names
        if 0 <= label < len(names) and names[label] != str(label):
            remarks.append(f"{CLASS_LABEL}={label} is the class {shown(names[label])}")
        return cls(
            config=config,
            device=device,
            method=method,
            codec=codec,
            network=network,
            objective=losses.get_loss_fn(config, method).to(device),
            sampler=sampling.from_config(config, method, codec, guide),
            draw_conditions=ConditionDrawer(data, device, config.seed, label),
            data=data,
            condition_codec=condition_codec,
            remarks=remarks,
        )

    @functools.cached_property
    def likelihood(self) -> Likelihood:
        """Bits/dim under the method's ODE; ValueError where the method has none."""
        return Likelihood.from_config(self.config, self.method, self.codec)

    @functools.cached_property
    def preparation(self) -> Preparation:
        """Changes that a step makes to a batch of images; ValueError where they do not fit."""
        return Preparation.from_config(self.config, self.codec, self.method.uses_reference_batch)

    def training_set(self, images: DataSet) -> tuple[DataSet, Preparation]:
        """Training `images` on the run's device, and the changes that a step makes to a batch.

        Where an autoencoder in a file is the codec, the images are latents; see `Data.encoded`.
        """
        examples, codec = self.data.encoded(images, self.codec, self.device)
        prepare = self.preparation if codec is self.codec else Preparation(codec)
        return examples.to(self.device), prepare

    def check_likelihood(self) -> None:
        """Raises ValueError where `likelihood` does."""
        _ = self.likelihood

    def check_ode(self, feature: str) -> None:
        """Raise ValueError unless the network gives an ODE over noise levels, for `feature`."""
        self.objective.check_ode(feature)
        self.method.check_ode(feature)

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
        of_codec = {"data.codec": self.codec.identity} if data.codec or data.dtype else {}
        of_pairs = {"condition": self.condition_codec.identity} if self.condition_codec else {}
        conditions = {"data.conditions": data.conditions} | of_pairs
        return of_codec | conditions | self.objective_settings

    @property
    def facts(self) -> dict[str, Any]:
        """Values that the page of an evaluation shows; see `reports.evaluation_page.save_page`."""
        model, optim = self.config.model, self.config.optim
        return {
            "network": models.paper_name(model.name, model.fir),
            "learning_rate": optim.lr,
            "warmup": optim.warmup,
            "cooldown": optim.cooldown,
            "settings": self.config.to_dict(),
            "unit": self.config.reports.unit,
        }

    def enlarge(self, sides: tuple[int, int]) -> None:
        """Sample images of larger `sides` (H, W), by overlapping tiles; see `models.tiles`.

        Raises ValueError where the sides are smaller, or the network has no tiles.
        """
        codec, sampler = self.codec, self.sampler
        channels, *tile = codec.data_shape
        if self.method.extra_channels:
            raise ValueError(
                f"sampling.size: the z entry of the field of {self.method.name} belongs to the "
                "whole image, so that it cannot be tiled; PFGM++ can (D = 1 is the same field)"
            )
        if not (has_pixels(codec) and is_dataclass(codec)):
            raise ValueError(
                "sampling.size is for images, and the network sees what data.codec makes of them"
            )
        if any(new < old for new, old in zip(sides, tile, strict=True)):
            raise ValueError(f"sampling.size={tuple(sides)} is smaller than {tile[0]} x {tile[1]}")
        self.codec = replace(codec, data_shape=(channels, *sides))
        if condition := self.condition_codec:
            shape = condition.data_shape[0], *sides
            self.condition_codec = replace(condition, data_shape=shape)
        self.network = Tiled(self.network, tuple(tile))
        guidance = sampler.guidance
        if guidance and guidance.guide is not None:
            guidance = replace(guidance, guide=Tiled(guidance.guide, tuple(tile)))
        self.sampler = replace(sampler, codec=self.codec, guidance=guidance)

    def load_objective(self, checkpoint: dict) -> None:
        """Copy the objective's weights of a `checkpoint`; ValueError where they do not fit."""
        weights, expected = checkpoint.get("objective", {}), dict(self.objective.state_dict())
        if expected and not weights:  # a shared file, or a snapshot of EDM
            raise ValueError(
                "it lacks the objective's weights, which the loss needs: leave the loss out, "
                "--noconfig.eval.enable_loss"
            )
        check_like(weights, expected, "objective")
        entries = {k: loaded(v, f"objective.{k}", expected[k].dtype) for k, v in weights.items()}
        self.objective.load_state_dict(entries)

    def fitted_sampler(self, checkpoint: Path) -> sampling.Sampler:
        """The sampler, fitted to the network's weights, which come from `checkpoint`.

        A sampler of which nothing is fitted is returned unchanged.
        """
        if not self.sampler.is_fitted:
            return self.sampler
        fit_to = {
            "sampler": self.sampler,
            "network": self.network,
            "device": self.device,
            "checkpoint": checkpoint,
            "origin": self.origin(),
            "seed": self.config.seed,
        }
        with execution.full_float32():
            if self.sampler.follows_ode:
                return Fitting(**fit_to, draw_conditions=self.draw_conditions).fitted()
            return LevelChoice(**fit_to, data=self.data).fitted()

    def origin(self) -> dict:
        """Everything that results of the network depend on, as text that can be compared."""
        config, guidance = self.config, self.sampler.guidance
        guide = guidance and guidance.guide
        left_out = {*OUTPUTS, *(key for key, value in LATER.items() if get(config, key) == value)}
        left_out |= set() if self.sampler.start else OF_START

        def section(name: str) -> dict:
            values = config[name].to_dict()
            return {key: v for key, v in values.items() if f"{name}.{key}" not in left_out}

        return {
            "weights": digest(self.network.state_dict()),
            **({} if guide is None else {"guide": digest(guide.state_dict())}),
            "network": section("model"),
            "method": repr(self.method),
            **self.method.origin(),
            "sampling": section("sampling"),
            "centered": config.data.centered,
            **({"codec": self.codec.identity} if config.data.codec or config.data.dtype else {}),
            **({"condition": self.condition_codec.identity} if self.condition_codec else {}),
            "seed": config.seed,
            "precision": config.training.precision,
            "device": self.device.type,
        }


@execution.own_numerics()
def load(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    config: ConfigDict | None = None,
    fits: bool = True,
    trust: bool = False,
) -> Trained:
    """The trained network of a run, with its EMA weights.

    Args:
        path: a workdir, of which the newest intact checkpoint is taken; or a file: a checkpoint,
            what `--mode export` wrote, a snapshot of EDM or PFGM++.
        overrides: values by key as on the command line, {"sampling.ode_solver": "heun"}; the others
            are the run's own.
        config: takes the place of the run's own; a checkpoint of the published programs has none.
        trust: take values of the run's config too that run code, or name files to read: its codec
            and guide, and of a file the path of its data (`configs.machine`).
        fits: fit a schedule or solver 'fitted' to the weights; else see `Sampler.without_fit`.

    Raises:
        OSError: there is no checkpoint, or it cannot be read.
        ValueError: it is damaged or does not fit, there is no config, or a value is not allowed.
    """
    place = Path(with_home("path", str(path)))
    path, content = find_checkpoint(place)
    keys, values = all_keys(), {}
    if config is not None:
        config = config.copy_and_resolve_references()
    else:
        config = run_config.of(path, content)
        values = {} if trust else machine.reset(config, single_file=place.is_file())
    for key, value in (overrides or {}).items():
        if key not in keys:
            raise ValueError(explain_unknown(key, keys))
        value = plain(value)
        if not keys[key].accepts(value):
            raise ValueError(f"{key} must be {keys[key]}, not {shown(value)}")
        # the previous value's type does not matter: a class, for example, is a number or a name
        of_two_types = isinstance(keys[key].allowed, Either) or keys[key].opens
        with config.ignore_type() if of_two_types else contextlib.nullcontext():
            config.update_from_flattened_dict({key: tuple(value) if type(value) is list else value})
    machine.expand_home(config)
    if missing := machine.missing(config, values, overrides or {}, "sample"):
        raise ValueError(
            f"{path} names {missing}, which may run code or read files: pass these as overrides, "
            "or trust=True"
        )
    for line in without_effect(config, overrides or {}):
        log.info(line)
    # the weights a network starts with are drawn; the caller's generators stay as they are
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(used):
        identity = _identity_in(path, content, config.data.dataset)
        experiment = Experiment.build(config, Data(config.data, identity))
    check_codec(experiment.codec, content, path)
    changes = run_config.changes(path, content, run_config.flatten(experiment.config))
    step = fit(partial(load_ema, experiment.network), content, path, changes)
    for change in changes:
        if change.partition(":")[0] not in OUTPUTS:
            log.info(f"the config differs from that of the run: {change}")
    experiment.network.eval().requires_grad_(False)
    sampler = experiment.sampler
    experiment.sampler = experiment.fitted_sampler(path) if fits else sampler.without_fit()
    if config.sampling.size:
        experiment.enlarge(config.sampling.size)
    experiment.data.close()
    return Trained(experiment, path, step)


def _guide(config, codec: Codec, device: torch.device) -> nn.Module:
    """The network of `sampling.guide` with its EMA weights; ValueError where it is another kind."""
    path = Path(config.sampling.guide)
    content = open_checkpoint(path, intact=True)
    guide_config = run_config.of(path, content)
    old, new = run_config.flatten(guide_config), run_config.flatten(config)
    if differs := [key for key in GUIDE_KEYS if old[key] != new[key]]:
        key = differs[0]
        raise ValueError(
            f"sampling.guide={path} is another kind of network: its {key} is {old[key]}, not "
            f"{new[key]}"
        )
    identity = content.get("codec") or get_codec(guide_config).identity  # of files it has a digest
    if identity != codec.identity:
        raise ValueError(
            f"sampling.guide={path} is another kind of network: it has the codec {shown(identity)},"
            f" not {codec.identity}"
        )
    of_conditions, expected = (pairs.codec_of(each.data) for each in (guide_config, config))
    if expected and of_conditions.identity != expected.identity:
        raise ValueError(
            f"sampling.guide={path} is another kind of network: the codec of its conditions is "
            f"{of_conditions.identity}, not {expected.identity}"
        )
    network = models.from_config(guide_config, codec.shape).to(device)
    fit(partial(load_ema, network), content, path)
    return network.eval().requires_grad_(False)
