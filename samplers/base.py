"""Base of the samplers of ODE and SDE: a prior draw, guidance, restoration, the codec."""

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

import execution
from configs.keys import arguments
from configs.schema import Either, Flag, Key, Number, Numbers, OneOf, Text, whole
from methods.base import Method, Network, conditioned, scaled
from methods.guidance import Guided
from methods.restoration import RESTORERS, Measurement, Restoring
from methods.start import StartingAt
from samplers.start import ConditionStart
from solvers.base import Callback, Watch
from sources.base import MOST_CLASSES
from sources.codec import Codec

KEYS = {
    "sampling.noise_removal": Key(True, Flag(), "end with a step of denoising"),
    "sampling.class_label": Key(
        -1,
        Either(whole(-1, MOST_CLASSES), Text(r"[^\0\n]+", "the name of a class of the run")),
        "class of all samples, by number or name; -1: drawn from the training images, by --mode "
        "sample evenly",
    ),
    "sampling.guidance": Key(
        1.0,
        Number(0, 1000),
        "w of the slope u + w (c - u), c by the network, u by it without class labels or by "
        "sampling.guide; 1: no guidance",
    ),
    "sampling.guidance_interval": Key(
        (),
        Numbers(Number(0, 1e6, or_inf=True), (0, 2)),
        "(low, high): guidance at noise levels above low, up to high; (): at all",
        scales="level",
    ),
    "sampling.guide": Key(
        "",
        Text(),
        "checkpoint of a weaker network of the same kind, which guides (autoguidance)",
        of_machine="always",
    ),
    "sampling.precision": Key(
        "fp32",
        OneOf(("fp32", "bf16", "fp16", "auto")),
        "precision of the network in sampling, as training.precision; states are float32",
    ),
    "sampling.size": Key(
        (),
        Numbers(whole(1, 2**16), (0, 2)),
        "--mode sample and the library: (height, width) of samples larger than what the network is "
        "trained on, by overlapping tiles; (): the sides of the data, or of data.patch",
    ),
    "sampling.channels_last": Key(False, Flag(), "memory format of images in sampling"),
    "sampling.compile": Key(False, Flag(), "torch.compile the network in sampling"),
}


@dataclass(frozen=True)
class Guidance:
    """Options of guidance, a mixture of two slopes; see `methods.guidance.Guided`.

    Attributes:
        weight: of the network's slope c in u + weight (c - u).
        interval: noise levels above the first and up to the second, where there is guidance.
        guide: the network of the slope u; None for the network itself without class labels.
    """

    weight: float
    interval: tuple[float, float] = (0.0, math.inf)
    guide: Network | None = None

    def __post_init__(self):
        low, high = self.interval
        if low > high:
            raise ValueError(f"sampling.guidance_interval must rise: {low} and {high} do not")

    @classmethod
    def from_config(cls, config, guide: Network | None) -> Self | None:
        """The guidance that `config.sampling` names; None where it names none.

        Raises ValueError where the network is not trained for it.
        """
        sampling = config.sampling
        guidance = cls(sampling.guidance, sampling.guidance_interval or (0.0, math.inf), guide)
        if sampling.guidance == 1:
            if sampling.guide:
                raise ValueError("sampling.guide changes nothing where sampling.guidance is 1")
            return None
        if sampling.guide and guide is None:
            raise ValueError("the network of sampling.guide has to be given as `guide`")
        data, training = config.data, config.training
        dropouts = [training.label_dropout] * bool(data.num_classes or data.conditions)
        dropouts += [training.condition_dropout] * bool(data.condition_channels)
        if not sampling.guide and data.condition_channels and not training.condition_dropout:
            raise ValueError(
                f"sampling.guidance={sampling.guidance} needs a network trained with its condition "
                "and without (training.condition_dropout above 0), or another network as "
                "sampling.guide"
            )
        if not sampling.guide and not (dropouts and all(dropouts)):
            raise ValueError(
                f"sampling.guidance={sampling.guidance} needs a network trained with class labels "
                "and without (data.num_classes and training.label_dropout above 0), or another "
                "network as sampling.guide"
            )
        return guidance


@dataclass(frozen=True, kw_only=True)
class Sampler(abc.ABC):
    """A recipe from prior draws to data; `dataclasses.replace` makes another.

    Attributes:
        follows_ode: false for a sampler of networks that have no ODE (`Objective.check_ode`).
        follows_lines: true for a sampler of methods without noise levels (`Method.check_ode`).
        method: whose ODE or SDE is followed.
        codec: between the method's x and the data.
        noise_removal: end with a step of denoising.
        guidance: None for the network's own slope.
        class_label: label of samples that are drawn without the argument `labels`; -1: none.
        measurement: samples agree with it, exactly if it has no noise, up to the clamping to the
            range of the data. It has one row for each sample.
        restorer: name in `RESTORERS` of the way to make samples agree.
        resample: times that each step is taken by the restorer "replacement".
        start: of samples at their conditions; None for draws of the prior.
        batch_size: samples of a call that names neither their number nor prior draws.
        precision, channels_last, compiles: see `execution.for_sampling`.
    """

    method: Method
    codec: Codec
    noise_removal: bool = True
    guidance: Guidance | None = None
    class_label: int = -1
    measurement: Measurement | None = None
    restorer: str = "moment_matching"
    resample: int = 1
    start: ConditionStart | None = None
    batch_size: int = 1024
    precision: str = "fp32"
    channels_last: bool = False
    compiles: bool = False

    follows_ode: ClassVar[bool] = True
    follows_lines: ClassVar[bool] = False
    keys: ClassVar[Mapping[str, Key]] = KEYS
    options: ClassVar[Mapping[str, str]] = {
        "noise_removal": "sampling.noise_removal",
        "class_label": "sampling.class_label",
        "restorer": "sampling.restorer",
        "resample": "sampling.restore_resample",
        "batch_size": "eval.batch_size",
        "precision": "sampling.precision",
        "channels_last": "sampling.channels_last",
        "compiles": "sampling.compile",
    }

    def __post_init__(self):
        if self.precision == "auto":
            raise ValueError(
                "sampling.precision='auto' is open: training and evaluation measure it at their "
                "start"
            )
        choose("restorer", self.restorer, RESTORERS, self.method)
        if self.measurement is not None:
            self.method.check_kernel("a restorer")
        self.check()

    def check(self) -> None:
        """Raise ValueError, in one line, for values out of range or that contradict each other."""
        return

    @property
    @abc.abstractmethod
    def integrate(self) -> Callable[..., tuple[Tensor, int]]:
        """(method, net, x, *, generator, callback, watch) -> the sample, and the evaluations."""

    @property
    def is_fitted(self) -> bool:
        """True if the schedule or the solver has to be fitted to a network."""
        return False

    def without_fit(self) -> Self:
        """The sampler with nothing that is fitted to a network."""
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Values that distinguish this sampler from others of the same method, codec and guide."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = (str, int, float, bool, tuple, type(None))
        values = {name: value for name, value in values.items() if isinstance(value, plain)}
        guidance = self.guidance and (self.guidance.weight, self.guidance.interval)
        start = self.start and (self.start.level, self.start.weight)
        return values | {"kind": type(self).__name__, "guidance": guidance, "start": start}

    @property
    @abc.abstractmethod
    def couples_samples(self) -> bool:
        """True if samples that are drawn together depend on each other.

        An adaptive solver has one step size for all of them, and so may a corrector.
        """

    @property
    @abc.abstractmethod
    def tells_times(self) -> bool:
        """True if a callback gets x and the time, instead of y = x / alpha and the noise level."""

    @classmethod
    def words(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The sampler's name, and the settings of it that count, for a report.

        Args:
            values: settings by the names of their keys in `sampling`, with the levels that were
                chosen for a network; an older report lacks some.
        """
        return (str(values.get("method")),)

    @classmethod
    def from_config(cls, config, method: Method, codec: Codec, guide: Network | None) -> Self:
        """The sampler of `config`, whose `sampling.guide` is the network `guide`.

        Raises:
            ValueError: a sampler that the method does not have, a number out of range, or guidance
                that the network is not trained for.
        """
        classes, label = config.data.num_classes, config.sampling.class_label
        if isinstance(label, str):
            raise ValueError(f"sampling.class_label={label!r}: only a run has names of classes")
        if 0 <= label >= classes:
            has = f"those from 0 to {classes - 1}" if classes else "none (data.num_classes=0)"
            raise ValueError(
                f"sampling.class_label={label} is no class of the network: it has {has}"
            )
        guidance = Guidance.from_config(config, guide)
        start = ConditionStart.from_config(config, method, codec)
        parts = {"method": method, "codec": codec, "guidance": guidance, "start": start}
        return cls(**parts, **arguments(cls, config))

    @torch.no_grad()
    @execution.full_float32()
    def __call__(
        self,
        net: Network,
        num: int | None = None,
        x: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: Callback | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, int]:
        """Samples (num, C, H, W), and the number of network evaluations.

        An evaluation with guidance counts once.

        Args:
            net: the network.
            num: number of samples from a fresh prior draw; by default `batch_size`.
            x: prior draws (B, C, H, W) to start from instead; `start` takes their number alone.
            generator: source of all noise, on the device of the samples; or, with `x`, one for each
                sample. Without any, samples are on the device of `x`, else on the network's.
            callback: called before each step (`solvers.base.Step`).
            conditions: what the network is given, rows (num, ...) by name; class labels of -1 are
                none, and by default all are `class_label`.
            watch: called before each network evaluation (`solvers.base.Watch`).

        Raises:
            FloatingPointError: the solution is not finite, or takes too many evaluations.
            ValueError: schedule or solver is "fitted", but there is no fit (see `ODESampler`).
        """
        method = self.method
        if x is None:
            device = generator.device if generator else next(net.parameters()).device
            shape = (num or self.batch_size, *self.codec.shape)
            x = method.prior_sampling(shape, generator, device)
        conditions = dict(conditions or {})
        if conditions.get("class_labels") is None and self.class_label >= 0:
            conditions["class_labels"] = torch.full((len(x),), self.class_label, device=x.device)
        network = self._prepared(net, x.device)
        if self.guidance:
            guide, other = self.guidance.guide, network
            if guide is not None:
                other = conditioned(self._prepared(guide, x.device), conditions)
            method = Guided(method, other, self.guidance.weight, self.guidance.interval)
        restorer = RESTORERS[self.restorer]
        if self.measurement is not None and restorer is not None:
            method = Restoring(method, self.measurement, restorer, self.codec.bounds)
        condition = None
        if self.start:
            condition = self.start.image(conditions, self.codec)
            method = StartingAt(method, self.start.level)
            x = scaled(method.alpha(torch.tensor(method.t_prior, dtype=torch.float64)), condition)
        network = conditioned(network, conditions)
        options = {"generator": generator, "callback": callback, "watch": watch}
        x, evaluations = self.integrate(method, network, x, **options)
        if self.measurement is not None and self.measurement.noise == 0:
            x = self.measurement.project(x)
        if self.start:
            x = self.start.weight * x + (1 - self.start.weight) * condition
        return self.codec.decode(x), evaluations

    def _prepared(self, net: Network, device: torch.device) -> Network:
        how = {"precision": self.precision, "channels_last": self.channels_last}
        return execution.for_sampling(net, device, **how, compiles=self.compiles)


def choose(name: str, value: str, choices: Iterable[str], method: Method) -> None:
    """Raise ValueError unless `value`, of the key `sampling.{name}`, is one of the `choices`."""
    if value not in choices:
        names = ", ".join(choices)
        raise ValueError(f"{method.name} has no sampling.{name}={value!r}; it has: {names}")
