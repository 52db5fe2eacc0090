"""Samplers: whole recipes from a method's prior to data, by its ODE or its SDE."""

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

import execution
from configs.keys import get
from configs.schema import Flag, Key, Number, Numbers, OneOf, Text, whole
from methods.base import Method, Network, conditioned
from methods.guidance import Guided
from methods.restoration import RESTORERS, Measurement, Replacement, Restoring
from solvers import FITTED, SCHEDULES, SOLVERS, solver_named
from solvers.base import Callback, Watch
from solvers.fitted import FINE_STEPS, Fit
from solvers.fixed_steps import Churn
from solvers.rk45 import limits_of
from solvers.solve import encode, solve_ode, solve_sde
from sources.codec import Codec
from sources.codec import from_config as get_codec

__all__ = [
    "Guidance",
    "ODESampler",
    "PCSampler",
    "Sampler",
    "encode",
    "get_sampling_fn",
    "solve_ode",
]

SNAPSHOT_STEPS = 18  # as many as EDM's sampler takes: 35 evaluations of heun
OUTPUTS = ("seeds", "film", "film_format", "encode", "between")  # keys that change no sample
MAX_SEEDS = 10**6  # of one command

KEYS = {
    "sampling.method": Key(
        "ode",
        OneOf(registry="sampling.SAMPLERS"),
        "the ODE or, for SDEs, 'pc': predictor and corrector",
    ),
}

# Keys of all samplers, of samplers of the ODE, and of those of the SDE.
ALL_KEYS = {
    "sampling.noise_removal": Key(True, Flag(), "end with a step of denoising"),
    "sampling.class_label": Key(
        -1,
        whole(-1, 10**6),
        "class of all samples; -1: drawn from the training images, by --mode sample evenly",
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
    ),
    "sampling.guide": Key(
        "", Text(), "checkpoint of a weaker network of the same kind, which guides (autoguidance)"
    ),
    "sampling.precision": Key(
        "fp32",
        OneOf(("fp32", "bf16", "auto")),
        "precision of the network in sampling, as training.precision; states are float32",
    ),
    "sampling.channels_last": Key(False, Flag(), "memory format of images in sampling"),
    "sampling.compile": Key(False, Flag(), "torch.compile the network in sampling"),
}
ODE_KEYS = {
    "sampling.ode_solver": Key(
        "rk45",
        OneOf(("fitted",), "solvers.SOLVERS"),
        "of 'ode': 'rk45' is adaptive, the others take N steps; 'fitted': steps made for the "
        "checkpoint at hand, for 5 to 10 evaluations where many samples are drawn",
    ),
    "sampling.N": Key(
        100,
        whole(1, 10**5),
        "steps of the solvers that are not adaptive; 'pc' takes model.num_scales",
    ),
    "sampling.schedule": Key(
        "auto",
        OneOf(("auto", "fitted"), "solvers.SCHEDULES"),
        "where the steps lie: 'uniform' in the method's time, 'polynomial' in the noise level, "
        "with rho, 'logsnr' in its log; 'fitted': where trajectories of the checkpoint bend, at "
        "most 60 steps; 'auto': the schedule that belongs to the solver",
    ),
    "sampling.rho": Key(
        7.0, Number(0.1, 1000), "of 'polynomial': the larger, the more steps are close to the data"
    ),
    "sampling.order": Key(
        None,
        whole(1, 4),
        "of 'multistep', 'ipndm' and 'fitted', 1 to 4, 'dpmpp' and 'unipc', 1 to 3, at most N; "
        "None: 3",
    ),
    "sampling.S_churn": Key(
        0.0,
        Number(0, 1000),
        "'heun' and 'improved_euler', of PFGM++, EDM and SDEs: noise added on the way, with the "
        "levels raised by the share S_churn / N; 0: none, the ODE",
    ),
    "sampling.S_min": Key(0.0, Number(0, 1e6), "smallest noise level at which noise is added"),
    "sampling.S_max": Key(
        math.inf, Number(0, 1e6, or_inf=True), "largest noise level at which noise is added"
    ),
    "sampling.S_noise": Key(
        1.0, Number(0, 10), "factor of that noise, 1 in theory; published values are up to 1.007"
    ),
}
PC_KEYS = {
    "sampling.predictor": Key(
        "euler_maruyama", OneOf(registry="solvers.predictor_corrector.PREDICTORS"), "of 'pc'"
    ),
    "sampling.corrector": Key(
        "none", OneOf(registry="solvers.predictor_corrector.CORRECTORS"), "of 'pc'"
    ),
    "sampling.probability_flow": Key(
        False, Flag(), "the predictor follows the ODE instead of the SDE"
    ),
    "sampling.n_steps_each": Key(1, whole(1, 10**5), "corrector steps per noise level"),
    "sampling.snr": Key(0.16, Number(1e-6, 1000), "signal-to-noise ratio of the corrector"),
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
        conditional = config.data.num_classes or config.data.conditions
        if not sampling.guide and not (conditional and config.training.label_dropout):
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
        method: whose ODE or SDE is followed.
        codec: between the method's x and the data.
        noise_removal: end with a step of denoising.
        guidance: None for the network's own slope.
        class_label: of samples that are drawn without labels as an argument; -1: none.
        measurement: samples agree with it, exactly if it has no noise, up to the clamping to the
            range of the data. It has one row for each sample.
        restorer: name in `RESTORERS` of the way to make samples agree.
        resample: times that each step is taken by the restorer "replacement".
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
    batch_size: int = 1024
    precision: str = "fp32"
    channels_last: bool = False
    compiles: bool = False

    keys: ClassVar[Mapping[str, Key]] = ALL_KEYS
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
        choose("restorer", self.restorer, RESTORERS, self.method)
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

    @property
    def settings(self) -> dict[str, Any]:
        """Values that distinguish this sampler from others of the same method, codec and guide."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = (str, int, float, bool, tuple, type(None))
        values = {name: value for name, value in values.items() if isinstance(value, plain)}
        guidance = self.guidance and (self.guidance.weight, self.guidance.interval)
        return values | {"kind": type(self).__name__, "guidance": guidance}

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
    def from_config(cls, config, method: Method, codec: Codec, guide: Network | None) -> Self:
        """The sampler of `config`, whose `sampling.guide` is the network `guide`.

        Raises:
            ValueError: a sampler that the method does not have, a number out of range, or guidance
                that the network is not trained for.
        """
        numbers = {field: get(config, key) for field, key in cls.options.items()}
        _check_classes(config.data.num_classes, numbers["class_label"])
        guidance = Guidance.from_config(config, guide)
        return cls(method=method, codec=codec, guidance=guidance, **numbers)

    @torch.no_grad()
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
            x: prior draws (B, C, H, W) to start from instead.
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
        if self.measurement is not None and RESTORERS[self.restorer] is not None:
            restorer = RESTORERS[self.restorer]
            method = Restoring(method, self.measurement, restorer, self.codec.bounds)
        network = conditioned(network, conditions)
        seen = {"generator": generator, "callback": callback, "watch": watch}
        x, evaluations = self.integrate(method, network, x, **seen)
        if self.measurement is not None and self.measurement.noise == 0:
            x = self.measurement.project(x)
        return self.codec.decode(x), evaluations

    def _prepared(self, net: Network, device: torch.device) -> Network:
        how = {"precision": self.precision, "channels_last": self.channels_last}
        return execution.for_sampling(net, device, **how, compiles=self.compiles)


@dataclass(frozen=True, kw_only=True)
class ODESampler(Sampler):
    """The sampling ODE, by a solver with fixed or adaptive steps.

    Attributes:
        solver, n, schedule, rho, order, churn, rtol, atol, max_evaluations: see `solve_ode`; `n` is
            `sampling.N`.
        fit: schedule and steps fitted to a network, where schedule or solver is "fitted".
    """

    solver: str = "rk45"
    n: int = 100
    schedule: str = "auto"
    rho: float = 7.0
    order: int | None = None
    churn: Churn = Churn(0.0)
    rtol: float = 1e-4
    atol: float = 1e-4
    max_evaluations: int = 10_000
    fit: Fit | None = None

    keys = ODE_KEYS | ALL_KEYS
    options = Sampler.options | {
        "solver": "sampling.ode_solver",
        "n": "sampling.N",
        **{
            name: f"sampling.{name}"
            for name in ("schedule", "rho", "order", "rtol", "atol", "max_evaluations")
        },
    }

    @classmethod
    def from_config(cls, config, method, codec, guide):
        churn = Churn(*(get(config, f"sampling.{name}") for name in Churn._fields))
        return replace(super().from_config(config, method, codec, guide), churn=churn)

    def check(self):
        if self.measurement is not None and RESTORERS[self.restorer] is None:
            raise ValueError(
                f"sampling.restorer={self.restorer!r} needs an SDE's sampling.method='pc'; the "
                "others take 'ode' too"
            )
        if self.measurement is not None and self.resample > 1:
            raise ValueError(
                "sampling.restore_resample above 1 needs sampling.restorer='replacement'"
            )
        if self.n < 1:
            raise ValueError(f"sampling.N must be at least 1, not {self.n}")
        choose("ode_solver", self.solver, (*SOLVERS, FITTED), self.method)
        choose("schedule", self.schedule, ("auto", *SCHEDULES, FITTED), self.method)
        check_positive(self, "rho", "rtol", "atol", "max_evaluations")
        self._check_schedule()
        self._check_order()
        self._check_churn()

    def _check_schedule(self) -> None:
        if self.schedule != "auto" and solver_named(self.solver).schedule is None:
            raise ValueError(
                f"sampling.ode_solver={self.solver!r} chooses its own steps: sampling.schedule "
                f"must be 'auto', not {self.schedule!r}"
            )
        if self.solver == FITTED and self.schedule not in ("auto", FITTED):
            raise ValueError(
                "sampling.ode_solver='fitted' needs sampling.schedule='fitted' or 'auto', not "
                f"{self.schedule!r}"
            )
        if self.is_fitted and self.n > FINE_STEPS:
            raise ValueError(
                f"sampling.schedule='fitted' chooses among {FINE_STEPS} steps: sampling.N can be "
                f"no more, not {self.n}"
            )

    def _check_order(self) -> None:
        order, orders = self.order, solver_named(self.solver).orders
        if order is None:
            return
        if order not in orders:
            has = (
                f"has the orders {', '.join(map(str, orders))}" if orders else "has one order only"
            )
            raise ValueError(f"sampling.order={order}: sampling.ode_solver={self.solver!r} {has}")
        if order > self.n:
            raise ValueError(
                f"sampling.order={order} needs as many steps at least, not sampling.N={self.n}"
            )

    def _check_churn(self) -> None:
        churn = self.churn
        if churn.S_churn == 0:
            return
        must = f"sampling.S_churn must be 0, not {churn.S_churn:g}"
        if not solver_named(self.solver).churns:
            names = " and ".join(repr(name) for name, solver in SOLVERS.items() if solver.churns)
            raise ValueError(
                f"{must}: sampling.ode_solver={self.solver!r} adds no noise, only {names} do"
            )
        if not self.method.gaussian:
            raise ValueError(
                f"{must}: {self.method.name} has no Gaussian noise that a sampler could add"
            )
        if not churn.S_min <= churn.S_max:
            raise ValueError(
                f"sampling.S_min must be at most sampling.S_max: {churn.S_min:g} and "
                f"{churn.S_max:g} are not"
            )

    @property
    def is_fitted(self) -> bool:
        return FITTED in (self.schedule, self.solver)

    @property
    def couples_samples(self) -> bool:
        return solver_named(self.solver).schedule is None

    @property
    def tells_times(self) -> bool:
        return solver_named(self.solver).schedule is None

    @property
    def integrate(self):
        if self.is_fitted and self.fit is None:
            raise ValueError(
                "sampling.schedule and sampling.ode_solver 'fitted' are made for a network, by "
                "Experiment.fitted_sampler"
            )
        schedule, advance = self.fit or Fit(self.schedule)
        return partial(
            solve_ode,
            solver=self.solver,
            n=self.n,
            schedule=schedule,
            rho=self.rho,
            order=self.order,
            advance=advance,
            churn=self.churn if self.churn.S_churn else None,
            noise_removal=self.noise_removal,
            **limits_of(self),
        )

    def without_fit(self) -> Self:
        """The sampler with the schedule 'auto' and the solver 'ipndm' in place of fitted ones."""
        schedule = "auto" if self.schedule == FITTED else self.schedule
        solver = "ipndm" if self.solver == FITTED else self.solver
        return replace(self, schedule=schedule, solver=solver, fit=None)


@dataclass(frozen=True, kw_only=True)
class PCSampler(Sampler):
    """The reverse SDE, by a predictor and a corrector.

    Attributes:
        predictor, corrector, n_steps_each, snr, probability_flow: see `predictor_corrector`.
    """

    predictor: str = "euler_maruyama"
    corrector: str = "none"
    n_steps_each: int = 1
    snr: float = 0.16
    probability_flow: bool = False

    keys = PC_KEYS | ALL_KEYS
    options = Sampler.options | {
        name: f"sampling.{name}"
        for name in ("predictor", "corrector", "n_steps_each", "snr", "probability_flow")
    }

    def check(self):
        choose("method", "pc", SAMPLERS if self.method.predictors else ("ode",), self.method)
        choose("predictor", self.predictor, self.method.predictors, self.method)
        choose("corrector", self.corrector, self.method.correctors, self.method)
        self.method.check_chain()
        if self.corrector != "none":
            check_positive(self, "n_steps_each", "snr")
        elif self.predictor == "none":
            raise ValueError("sampling.predictor and sampling.corrector are both 'none'")
        if self.predictor == "ancestral_sampling" and self.probability_flow:
            raise ValueError("sampling.predictor='ancestral_sampling' has no probability_flow")
        if self.measurement is not None:
            self._check_restorer()

    def _check_restorer(self) -> None:
        if RESTORERS[self.restorer] is not None:
            if self.resample > 1:
                raise ValueError(
                    "sampling.restore_resample above 1 needs sampling.restorer='replacement'"
                )
            return
        if self.predictor == "none" and self.resample > 1:
            raise ValueError("sampling.restore_resample above 1 needs a sampling.predictor")
        draws = self.predictor != "none" and not self.probability_flow
        if self.measurement.noise > 0 and not draws:
            raise ValueError(
                "sampling.restorer='replacement' with sampling.restore_noise needs a predictor "
                "(not sampling.predictor='none') and no sampling.probability_flow"
            )

    @property
    def couples_samples(self) -> bool:
        return self.corrector != "none"

    @property
    def tells_times(self) -> bool:
        return True

    @property
    def integrate(self):
        replaces = self.measurement is not None and RESTORERS[self.restorer] is None
        return partial(
            solve_sde,
            self.method,
            predictor=self.predictor,
            corrector=self.corrector,
            n_steps_each=self.n_steps_each,
            snr=self.snr,
            probability_flow=self.probability_flow,
            noise_removal=self.noise_removal,
            constrain=Replacement(self.method, self.measurement) if replaces else None,
            resample=self.resample if replaces else 1,
        )

    def without_fit(self) -> Self:
        """The sampler itself, since nothing in it is fitted."""
        return self


# sampling.method -> the class of the sampler.
SAMPLERS: dict[str, type[Sampler]] = {"ode": ODESampler, "pc": PCSampler}


def choose(name: str, value: str, choices: Iterable[str], method: Method) -> None:
    """Raise ValueError unless `value`, of the key `sampling.{name}`, is one of the `choices`."""
    if value not in choices:
        names = ", ".join(choices)
        raise ValueError(f"{method.name} has no sampling.{name}={value!r}; it has: {names}")


def check_positive(sampler: Sampler, *names: str) -> None:
    """Raise ValueError unless the numbers `names` of a sampler are positive."""
    for name in names:
        if not getattr(sampler, name) > 0:
            raise ValueError(f"sampling.{name} must be positive, not {getattr(sampler, name)}")


def _check_classes(classes: int, label: int) -> None:
    if label >= classes and label >= 0:
        has = f"those from 0 to {classes - 1}" if classes else "none (data.num_classes=0)"
        raise ValueError(f"sampling.class_label={label} is no class of the network: it has {has}")


def for_snapshots(sampler: Sampler, solver: str) -> Sampler:
    """The sampler of the pictures that training draws, of few evaluations.

    `solver`, from `training.snapshot_solver`, replaces an adaptive one, which can take any number
    of steps with a network early in training. There is no fit, since the weights still change.
    """
    sampler = sampler.without_fit()
    if not isinstance(sampler, ODESampler) or solver_named(sampler.solver).schedule:
        return sampler
    return replace(sampler, solver=solver, n=SNAPSHOT_STEPS, order=None, churn=Churn(0.0))


def for_trajectories(sampler: ODESampler) -> ODESampler:
    """The sampler of the trajectories to which schedule and solver are fitted.

    Its schedule has to be set to `solvers.fitted.fine_levels`. With it, for Gaussian data, the
    relative error of the samples is 2e-4 with `unipc` and 2e-3 with `multistep`.
    """
    return replace(
        sampler,
        solver="unipc",
        n=FINE_STEPS + 1,
        order=None,
        churn=Churn(0.0),
        schedule="auto",
        noise_removal=False,
        precision="fp32",
        fit=None,
    )


def for_fitting(sampler: ODESampler) -> ODESampler:
    """The sampler for fitted steps, which the caller has to add."""
    return replace(
        sampler,
        solver=FITTED,
        churn=Churn(0.0),
        schedule="auto",
        precision="fp32",
        order=min(sampler.order or 3, sampler.n),
        fit=None,
    )


def get_sampling_fn(
    config, method: Method, guide: Network | None = None, codec: Codec | None = None
) -> Sampler:
    """The sampler of `config.sampling`, to be called as `Sampler.__call__` says.

    `guide` is the network of `sampling.guide`, `codec` that of the config if there is one already.
    Raises ValueError as `Sampler.from_config` does.
    """
    codec = get_codec(config) if codec is None else codec
    name = config.sampling.method
    choose("method", name, SAMPLERS if method.predictors else ("ode",), method)
    return SAMPLERS[name].from_config(config, method, codec, guide)


def spherical_interpolation(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Points on the arcs from `start` to `end`, each (n, C, H, W): (n, k, C, H, W).

    `shares` (k,) are shares of the arc's angle, from 0 at `start` to 1 at `end`; between vectors of
    one length all points have that length (Shoemake 1985).
    """
    a, b = start.flatten(1), end.flatten(1)
    angle = torch.nn.functional.cosine_similarity(a, b).clamp(-1, 1).acos()[:, None] / math.pi
    # sin(s angle) / sin(angle), without 0 / 0 between vectors of one direction
    weight_a = (1 - shares) * torch.sinc((1 - shares) * angle) / torch.sinc(angle)
    weight_b = shares * torch.sinc(shares * angle) / torch.sinc(angle)
    points = weight_a[..., None] * a[:, None] + weight_b[..., None] * b[:, None]
    return points.unflatten(2, start.shape[1:])


def seeds_of(text: str) -> list[int]:
    """The seeds that `sampling.seeds` names, such as "0-63" or "1,2,5-10", each once.

    Raises:
        ValueError: a range falls, or there are more than `MAX_SEEDS`.
    """
    seeds: dict[int, None] = {}
    for piece in text.split(",") if text else ():
        first, _, last = piece.partition("-")
        first, last = int(first), int(last or first)
        if first > last:
            raise ValueError(f"sampling.seeds={text:.100}: the range {piece} falls")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise ValueError(f"sampling.seeds={text:.100} are more than {MAX_SEEDS:,}")
        seeds |= dict.fromkeys(range(first, last + 1))
    return [*seeds]
