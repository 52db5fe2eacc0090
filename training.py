"""The training state and the step: learning rate, clipping, EMA."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

import distributed
from configs.keys import named
from configs.schema import SHARE, Flag, Key, Number, Numbers, OneOf, Text, whole
from losses import Objective
from models.ema import ExponentialMovingAverage, rise_of_edm, rise_of_power
from models.weights import load_model
from optimizers import OPTIMIZERS, NamedParameters
from optimizers.loss_scale import LossScale
from optimizers.muon import mark_tables
from optimizers.shares import Shares, completed
from optimizers.stored_state import (
    checked_averages,
    checked_loss_scale,
    checked_moments,
    laid_out,
    template_of,
)
from sources.batch import Batch
from storage.checks import check_like

KEYS = {
    "training.n_iters": Key(1300001, whole(1), "steps"),
    "training.init_from": Key(
        "",
        Text(),
        "workdir or file whose EMA weights a new run starts from: a checkpoint, a shared file, a "
        "published snapshot; weights without a match keep their initial values; '': all do",
        of_machine="start",
    ),
    "training.accumulate": Key(1, whole(1), "micro-batches that a step's examples are split into"),
    "training.share_state": Key(
        False,
        Flag(),
        "divide EMA weights and the optimiser's moments among the processes, to save memory",
    ),
    "training.max_bad_steps": Key(
        20, whole(1, 10**6), "batches in a row without a finite gradient that end the run"
    ),
    "optim.warmup": Key(
        5000, whole(0), "steps over which the learning rate rises linearly from zero"
    ),
    "optim.decay_from": Key(
        0,
        whole(0),
        "step from which the learning rate falls as 1 / sqrt(step), as EDM2's does; 0: it does not",
    ),
    "optim.cooldown": Key(0, whole(0), "steps at the end over which it falls linearly to zero"),
    "optim.grad_clip": Key(
        1.0, Number(-1, 10**6), "largest global norm of the gradient; negative: no clipping"
    ),
    "optim.nonfinite": Key(
        "skip",
        OneOf(("skip", "replace")),
        "of a gradient: 'skip' the step, or 'replace' the entries, as EDM does: nan by 0, inf by "
        "100,000 of its sign",
    ),
    "model.ema_rate": Key(0.9999, SHARE, "decay of the EMA weights per step"),
    "model.ema_half_life": Key(
        0.0, Number(0, 10**12), "EMA half-life in images, with EDM's ramp-up; 0: ema_rate instead"
    ),
    "model.ema_stds": Key(
        (),
        Numbers(Number(0.01, 0.25), (0, 2), rising=True),
        "relative widths of two power-function averages in checkpoints, published as (0.05, 0.1), "
        "from which eval.ema_std rebuilds an EMA of any length; (): none",
    ),
}


def learning_rate_factor(
    step: int, n_iters: int, warmup: int = 0, cooldown: int = 0, decay_from: int = 0
) -> float:
    """Share of the learning rate that update `step` (from 0) of `n_iters` uses.

    It rises linearly over the first `warmup` updates and falls linearly to 0 over the last
    `cooldown` ones. From the update `decay_from` on, if that is not 0, it also falls as 1 /
    sqrt(step) (Karras et al. 2024, arXiv 2312.02696, section 2.3).
    """
    rise = min(1.0, step / warmup) if warmup else 1.0
    decay = math.sqrt(decay_from / max(step, decay_from)) if decay_from else 1.0
    fall = min(1.0, (n_iters - step) / cooldown) if cooldown else 1.0
    return rise * decay * max(0.0, fall)


class TrainState:
    """Everything that training changes: network, objective, EMA weights, optimiser, step count.

    Args:
        model: the network.
        objective: its loss is minimised; its own parameters are optimised too.
        optimizer: makes the optimiser of named parameters; see `optimizers`.
        ema: EMA of the network's parameters.
        ema_stds: relative widths of additional power-function averages.
        n_iters, warmup, cooldown, decay_from: see `learning_rate_factor`.
        grad_clip: largest global norm of the gradient; negative for no clipping.
        replaces_nonfinite: entries of a gradient that are not finite are replaced; see
            `train_step`.
        accumulate: number of micro-batches in a step.
        scales_loss: the network's products are in float16; see `optimizers.loss_scale`.
        shares: division of EMA weights and moments among processes; None: each has all.

    Attributes:
        network: `model` as a step calls it, wrapped by `execution` if necessary.
        parameters: those of the network that the optimiser updates.
        averages: the power-function averages, by relative width.
        copied: event of a GPU before which nothing here may change, or None; see
            `storage.checkpoint_writer`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: Callable[[NamedParameters], torch.optim.Optimizer],
        ema: ExponentialMovingAverage,
        *,
        ema_stds: Sequence[float] = (),
        n_iters: int = 1,
        warmup: int = 0,
        cooldown: int = 0,
        decay_from: int = 0,
        grad_clip: float = -1.0,
        replaces_nonfinite: bool = False,
        accumulate: int = 1,
        scales_loss: bool = False,
        shares: Shares | None = None,
    ):
        self.model = self.network = model
        self.objective, self.ema, self.make_optimizer = objective, ema, optimizer
        named_parameters = [*model.named_parameters(), *objective.named_parameters("objective")]
        self.named_parameters = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages = {
            std: ExponentialMovingAverage(self.parameters, 1.0, rise_of_power(std), ema.is_here)
            for std in ema_stds
        }
        for module in (model, objective):
            mark_tables(module)
        self.optimizer, self.shares = optimizer(self.named_parameters), shares
        if shares:
            shares.keep_own(self.optimizer)
        self.gathered_ema: list[Tensor] | None = None
        self.learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = {
            "n_iters": n_iters,
            "warmup": warmup,
            "cooldown": cooldown,
            "decay_from": decay_from,
        }
        self.grad_clip, self.replaces_nonfinite = grad_clip, replaces_nonfinite
        self.accumulate, self.step = accumulate, 0
        self.loss_scale = LossScale(self.parameters[0].device) if scales_loss else None
        self.copied: torch.cuda.Event | None = None

    @classmethod
    def from_config(cls, config, model: nn.Module, objective: Objective) -> Self:
        """The state of a new run; ValueError where a number of `config` is out of range."""
        optim, training = config.optim, config.training
        build = named(OPTIMIZERS, "optim.optimizer", optim.optimizer)
        options, half_life = optim.to_dict(), config.model.ema_half_life
        if half_life < 0:
            raise ValueError(f"model.ema_half_life must be at least 0, not {half_life}")
        parameters = [p for p in model.parameters() if p.requires_grad]
        shares, ema_options = None, {}
        if training.share_state and distributed.world() > 1:
            of_objective = (p for p in objective.parameters() if p.requires_grad)
            shares = Shares([*parameters, *of_objective])
            ema_options["is_here"] = shares.is_own
        if half_life:
            decay = 0.5 ** ((training.small_batch_size or training.batch_size) / half_life)
            ema = ExponentialMovingAverage(parameters, decay, rise_of_edm, **ema_options)
        else:
            ema = ExponentialMovingAverage(parameters, config.model.ema_rate, **ema_options)
        return cls(
            model,
            objective,
            lambda named_parameters: build(named_parameters, options),
            ema,
            ema_stds=config.model.ema_stds,
            n_iters=training.n_iters,
            warmup=optim.warmup,
            cooldown=optim.cooldown,
            decay_from=optim.decay_from,
            grad_clip=optim.grad_clip,
            replaces_nonfinite=optim.nonfinite == "replace",
            accumulate=training.accumulate,
            scales_loss=training.precision == "fp16",
            shares=shares,
        )

    def restart_averages(self) -> None:
        """Let the EMA weights, and the averages, begin with the weights that the network has."""
        for average in (self.ema, *self.averages.values()):
            average.restart([p.detach() for p in self.parameters])

    def gather_ema(self) -> None:
        """Bring divided EMA weights together in the host's memory, for `with_ema` in this step.

        Every process has to call it.
        """
        if self.shares and self.gathered_ema is None:
            self.gathered_ema = completed(self.ema.shadow_params, everywhere=True)

    def with_ema(self):
        """Within the `with` block the network holds its EMA weights; it and objective evaluate."""
        self.model.eval()
        self.objective.eval()
        averages, device = self.gathered_ema, self.parameters[0].device
        averages = [average.to(device) for average in averages] if self.shares else None
        return self.ema.swapped_into(self.parameters, averages)

    def check_agreement(self) -> None:
        """`distributed.check_agreement` of the step and all that is trained."""
        distributed.check_agreement(self.step, [p for _, p in self.named_parameters])

    def state_dict(self) -> dict:
        """The whole state, to be saved; where it is divided, every process has to call this.

        In the main process its form does not depend on the division.
        """
        averages = [
            {"std": std, "shadow_params": average.shadow_params}
            for std, average in self.averages.items()
        ]
        objective = self.objective.state_dict()
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self._optimizer_state(),
            "step": self.step,
            **({"averages": averages} if averages else {}),
            **({"objective": dict(objective)} if objective else {}),
            **({"loss_scale": self.loss_scale.state_dict()} if self.loss_scale else {}),
        }
        return completed(state) if self.shares else state

    def _optimizer_state(self) -> dict:
        if self.shares:
            return self.shares.state_dict(self.optimizer)
        return self.optimizer.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Load everything, to continue training; the optimiser's options stay those of the config.

        `state` is a `state_dict()` on the CPU, or a checkpoint of the published implementations,
        known by the names of its weights. Nothing is changed before all of it is checked.

        Raises:
            ValueError: `state` does not fit; the message names the entry.
        """
        expected = self._optimizer_state()
        template = expected["state"] or template_of(self.named_parameters, self.make_optimizer)
        moments = checked_moments(state["optimizer"], expected, template, state["step"])
        averages = checked_averages(state, self.parameters) if self.averages else {}
        if averages.keys() != self.averages.keys():
            widths = ", ".join(f"{std:g}" for std in averages)
            raise ValueError(f"averages are of the widths {widths}: keep model.ema_stds")
        objective = state.get("objective", {})
        check_like(objective, dict(self.objective.state_dict()), "objective")
        check_like(state["ema"], self.ema.state_dict(), "ema")
        loss_scale = checked_loss_scale(state) if self.loss_scale else None
        load_model(self.model, state["model"])
        self.objective.load_state_dict(objective)
        self.step, self.ema.num_updates = state["step"], state["ema"]["num_updates"]
        self.ema.restart(state["ema"]["shadow_params"])
        for std, average in self.averages.items():
            average.num_updates = state["step"]
            average.restart(averages[std])
        if self.shares:
            self.shares.load(self.optimizer, moments)
        else:
            moments = {n: laid_out(entry, template[n]) for n, entry in moments.items()}
            self.optimizer.load_state_dict(expected | {"state": moments})
        if loss_scale:  # a run that was not in float16 before has no scale
            self.loss_scale.load_state_dict(loss_scale)

    def set_learning_rate(self) -> None:
        """Set the learning rate of the next step."""
        factor = learning_rate_factor(self.step, **self.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * factor

    def wait_for_copy(self) -> None:
        """Let the device, but not the host, wait until the state has been copied for saving."""
        if self.copied is not None:
            # without it PyTorch takes that of the process's current GPU, which may be another
            self.copied.wait(torch.cuda.current_stream(self.parameters[0].device))
            self.copied = None

    def apply_gradient(self, finite: Tensor) -> None:
        """Update weights and EMA if `finite` (0-d bool, on their device) is true.

        Otherwise these and the optimiser stay unchanged. With a fused optimiser the host reads no
        tensor, and need not wait for the device.
        """
        if all(group.get("fused") for group in self.optimizer.param_groups):
            self.optimizer.found_inf = 1.0 - finite.float()  # read by the fused step
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        if self.shares:
            self.shares.spread()
        self.step, self.gathered_ema = self.step + 1, None
        self.ema.update(self.parameters, finite.float())
        for average in self.averages.values():  # of the weights at every step, moved or not
            average.update(self.parameters, torch.ones_like(finite, dtype=torch.float32))

    def is_finite(self) -> bool:
        """Whether every trained parameter is."""
        norms = torch.stack(torch._foreach_norm([p for _, p in self.named_parameters]))
        return bool(norms.isfinite().all())


def train_step(
    state: TrainState,
    batch: Batch,
    generator: torch.Generator | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """One update of `state` on `batch`.

    Where the loss or its gradient is not finite, the step counts but is not applied; or, with
    `optim.nonfinite='replace'`, entries of the gradient that are nan become 0 and those that are
    infinite 1e5 of their sign (Karras et al. 2022, arXiv 2206.00364, in the published program), and
    the step is applied. With a scaled loss the step is skipped in any case, and the scale is
    halved. The host does not wait for the device.

    Args:
        state: what is updated.
        batch: scaled images (B, C, H, W).
        generator: source of all random draws except dropout's.
        shard: the part of the examples that this process takes, (k, n) for the k-th of n equal
            shards; all n processes must have the same batch and the same state of the generator.

    Returns:
        The loss of this process's examples, on its device; nan where the step was not applied.
    """
    state.model.train()
    state.objective.train()
    trained = [p for _, p in state.named_parameters]
    for parameter in trained:  # the optimiser may have only a share of them
        parameter.grad = None
    value = accumulate_gradient(state, batch, generator, shard)
    state.set_learning_rate()
    if state.replaces_nonfinite and not state.loss_scale:
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
    limit = state.grad_clip if state.grad_clip >= 0 else math.inf
    finite = nn.utils.clip_grad_norm_(trained, limit).isfinite()
    state.apply_gradient(finite)
    if state.loss_scale:
        state.loss_scale.update(finite)
    return torch.where(finite, value, math.nan)


def accumulate_gradient(
    state: TrainState,
    batch: Batch,
    generator: torch.Generator | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Add the gradient of the batch's loss to the parameters'; return this process's loss.

    The examples of the whole batch are drawn once. Process k of n takes its shard of them in
    `state.accumulate` = A micro-batches, of which number i is shard k A + i of n A. So neither n
    nor A changes the gradient but by rounding; only dropout depends on them. The gradient of a loss
    that is not finite is nan. For the arguments see `train_step`.
    """
    (rank, world), accumulate = shard, state.accumulate
    objective = state.objective
    batch = objective.reference(batch, generator)
    examples = objective.draw(batch, state.step, generator)
    state.wait_for_copy()  # networks and objectives may change weights as they are called
    scale = state.loss_scale.factor if state.loss_scale else 1
    values = []
    for i in range(accumulate):
        micro_batch = examples.shard(rank * accumulate + i, world * accumulate)
        # the processes' gradients are averaged once, with the last micro-batch
        alone = i < accumulate - 1 and distributed.world() > 1
        with state.network.no_sync() if alone else contextlib.nullcontext():
            value = objective.loss(state.network, micro_batch, batch)
            value.backward((1 + 0 * value.detach()) * scale / accumulate)
        values.append(value.detach())
    for parameter in objective.parameters():  # those of the network are averaged in backward
        if parameter.grad is not None:
            parameter.grad = distributed.mean(parameter.grad)
    if state.loss_scale:
        trained = (p for _, p in state.named_parameters)
        state.loss_scale.unscale([p.grad for p in trained if p.grad is not None])
    return torch.stack(values).mean()


@torch.no_grad()
def held_out_loss(
    state: TrainState,
    batch: Batch,
    generator: torch.Generator,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """The loss of `batch` with the weights that the network holds, over all processes.

    It is computed in the micro-batches of a training step where these can be equal. For the
    arguments see `train_step`.
    """
    objective = state.objective
    batch = objective.reference(batch, generator)
    examples = objective.draw(batch, state.step, generator)
    (rank, world), accumulate = shard, state.accumulate
    if len(examples) % (accumulate * world):
        (rank, world), accumulate = (0, 1), 1  # too few to be shared equally
    values = [
        objective.loss(
            state.model, examples.shard(rank * accumulate + i, world * accumulate), batch
        )
        for i in range(accumulate)
    ]
    return distributed.mean(torch.stack(values).mean())
