"""The training state and the step: optimiser, learning rate, clipping, EMA."""

import contextlib
import math
from functools import cached_property

import torch
from torch import Tensor, nn

import distributed
from losses import RegressionLoss
from models import load_reference_state_dict
from models.ema import ExponentialMovingAverage, rise_of_edm, rise_of_power
from models.muon import Muon, matrices_of
from sources.batch import Batch
from storage.checkpoints import check_keys, check_like

OPTIMIZERS = {"Adam": torch.optim.Adam, "Muon": Muon}


def learning_rate_factor(step: int, n_iters: int, warmup: int = 0, cooldown: int = 0) -> float:
    """Share of the learning rate that update `step` (from 0) of `n_iters` uses.

    It rises linearly over the first `warmup` updates and falls linearly to 0 over the last
    `cooldown` ones.
    """
    rise = min(1.0, step / warmup) if warmup else 1.0
    fall = min(1.0, (n_iters - step) / cooldown) if cooldown else 1.0
    return rise * max(0.0, fall)


class TrainState:
    """Everything that training changes: network, EMA weights, optimiser, step count.

    `averages` are the power-function averages of `model.ema_stds`, by relative width.
    """

    def __init__(self, config, model: nn.Module):
        """Builds the optimiser and the EMA that `config.optim` and `config.model` ask for."""
        optim, training = config.optim, config.training
        if optim.optimizer not in OPTIMIZERS:
            known = ", ".join(map(repr, OPTIMIZERS))
            raise ValueError(f"optim.optimizer must be one of {known}, not {optim.optimizer!r}")
        hyper = {
            "betas": (optim.beta1, 0.999),
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
            "amsgrad": optim.amsgrad,
            "fused": True,
        }
        self.model = model
        self.network = model  # what a step calls: `model`, or what `execution` makes of it
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if (half_life := config.model.ema_half_life) < 0:
            raise ValueError(f"model.ema_half_life must be at least 0, not {half_life}")
        if half_life:
            decay = 0.5 ** ((training.small_batch_size or training.batch_size) / half_life)
            self.ema = ExponentialMovingAverage(self.parameters, decay, rise_of_edm)
        else:
            self.ema = ExponentialMovingAverage(self.parameters, config.model.ema_rate)
        self.averages = {
            std: ExponentialMovingAverage(self.parameters, 1.0, rise_of_power(std))
            for std in config.model.ema_stds
        }
        self.make_optimizer, self.hyper_parameters = OPTIMIZERS[optim.optimizer], hyper
        self.step = 0
        self.learning_rate = optim.lr
        self.schedule = {
            "n_iters": training.n_iters,
            "warmup": optim.warmup,
            "cooldown": optim.cooldown,
        }
        self.grad_clip = optim.grad_clip
        self.replaces_nonfinite = optim.nonfinite == "replace"
        self.accumulate = training.accumulate

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made when it is first asked for: evaluation does without, and it imports for a second.

        Its moments are there from the start, also of parameters that never get a gradient.
        """
        options = {"lr": self.learning_rate, **self.hyper_parameters}
        optimizer = self.make_optimizer(self.parameters, **options)
        moments = ["exp_avg", "exp_avg_sq"]
        moments += ["max_exp_avg_sq"] if options["amsgrad"] else []
        matrices = matrices_of(self.model) if isinstance(optimizer, Muon) else []
        alone = {id(matrix) for matrix in matrices}
        for parameter in self.parameters:
            names = moments[:1] if id(parameter) in alone else moments
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{name: torch.zeros_like(parameter) for name in names},
            }
        return optimizer

    def state_dict(self) -> dict:
        averages = [
            {"std": std, "shadow_params": average.shadow_params}
            for std, average in self.averages.items()
        ]
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            **({"averages": averages} if averages else {}),
        }

    @torch.no_grad()
    def load_network(self, state: dict) -> None:
        """What evaluation needs: the network, its EMA weights and the step count.

        `state` is a `state_dict()` on the CPU, or a checkpoint of the published implementations,
        known by the names of its weights. One without `ema` has EMA weights only. Nothing is
        changed before all of it is checked.

        Raises:
            ValueError: `state` does not fit; the message names the entry.
        """
        if "ema" in state:
            check_like(state["ema"], self.ema.state_dict(), "ema")
        check_like(state["step"], self.step, "step")
        if not isinstance(state["model"], dict):
            raise ValueError(f"model is no dictionary but of type {type(state['model']).__name__}")
        own = self.model.state_dict()
        if state["model"].keys() == own.keys():
            check_like(state["model"], own, "model")
            self.model.load_state_dict(state["model"])
        else:  # published EMA weights have no names, but the same order
            load_reference_state_dict(self.model, state["model"])
        self.step = state["step"]
        if "ema" in state:
            self.ema.num_updates = state["ema"]["num_updates"]  # the decay is the config's
            torch._foreach_copy_(self.ema.shadow_params, state["ema"]["shadow_params"])
        else:
            torch._foreach_copy_(self.ema.shadow_params, self.parameters)

    @torch.no_grad()
    def keep_ema(self) -> nn.Module:
        """From here on the network, which is returned, has its EMA weights and only evaluates."""
        torch._foreach_copy_(self.parameters, self.ema.shadow_params)
        return self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Everything, to go on training; the optimiser's options stay those of the config.

        Raises as `load_network` does.
        """
        moments = self._checked_moments(state["optimizer"], state["step"])
        averages = self.checked_averages(state) if self.averages else {}
        if averages.keys() != self.averages.keys():
            widths = ", ".join(f"{std:g}" for std in averages)
            raise ValueError(f"averages are of the widths {widths}: keep model.ema_stds")
        self.load_network(state)
        for std, average in self.averages.items():
            average.num_updates = state["step"]
            torch._foreach_copy_(average.shadow_params, averages[std])
        for parameter, loaded in zip(self.parameters, moments, strict=True):
            own = self.optimizer.state[parameter]
            torch._foreach_copy_([*own.values()], [loaded[name] for name in own])

    def checked_averages(self, state: dict) -> dict[float, list[Tensor]]:
        """The power-function averages in the `state` of a run of this network, by relative width.

        Raises:
            ValueError: it has none, or those of other weights.
        """
        found = state.get("averages", [])
        if type(found) is not list or not found:
            raise ValueError("it has no power-function averages (model.ema_stds)")
        check_like(
            found, [{"std": 0.1, "shadow_params": self.ema.shadow_params}] * len(found), "averages"
        )
        if any(not 0 < average["std"] <= 0.25 for average in found):
            raise ValueError("averages have widths outside 0 to 0.25")
        return {average["std"]: average["shadow_params"] for average in found}

    def _checked_moments(self, optimizer: dict, steps: int) -> list[dict[str, Tensor]]:
        """The moments of each parameter in the state of an `optimizer` after so many `steps`."""
        ours = self.optimizer.state_dict()["state"]
        check_keys(optimizer, ("state", "param_groups"), "optimizer")
        groups, found = optimizer["param_groups"], optimizer["state"]
        if type(groups) is not list or len(groups) != 1 or type(groups[0]) is not dict:
            raise ValueError("optimizer.param_groups is not a list of one group")
        order = groups[0].get("params")  # of what a file may hold, only numbers can be compared
        if type(order) is not list or any(type(n) is not int for n in order) or order != [*ours]:
            raise ValueError("optimizer.param_groups has the parameters in another order")
        check_keys(found, ours, "optimizer.state")
        moments = []
        for number, own in ours.items():
            given, name = found[number], f"optimizer.state.{number}"
            if type(given) is dict and type(given.get("step")) is int:  # before PyTorch 1.12
                given = given | {"step": torch.tensor(float(given["step"]))}
            check_like(given, own, name)
            if not (0 <= given["step"] <= steps and given["step"] % 1 == 0):
                raise ValueError(f"{name}.step is not a number of steps: {given['step']}")
            if any((given[key] < 0).any() for key in own if key.endswith("_sq")):
                raise ValueError(f"{name} has a negative mean of squares")
            moments.append(given)
        return moments

    def apply_gradient(self, finite: Tensor) -> None:
        """Moves weights and EMA where `finite` (0-d bool, on their device) holds.

        Elsewhere they stay as they are, and the optimiser too. No tensor is read by the host, so
        that it need not wait for the device.
        """
        self.optimizer.found_inf = 1.0 - finite.float()  # the fused step heeds it
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.parameters, finite.float())
        for average in self.averages.values():  # of the weights at every step, moved or not
            average.update(self.parameters, torch.ones_like(finite, dtype=torch.float32))

    def is_finite(self) -> bool:
        """Whether every trained parameter is."""
        norms = torch.stack(torch._foreach_norm(self.parameters))
        return bool(norms.isfinite().all())


def train_step(
    state: TrainState,
    loss: RegressionLoss,
    batch: Batch,
    generator: torch.Generator | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """One update of `state` on `batch`.

    Where the loss or its gradient is not finite, the step counts but is not applied; or, with
    `optim.nonfinite='replace'`, entries of the gradient that are nan become 0 and those that are
    infinite 1e5 of their sign (Karras et al. 2022, arXiv 2206.00364, in the published program), and
    the step is applied. The host waits for nothing.

    Args:
        state: what is updated.
        loss: what is minimised.
        batch: scaled images (B, C, H, W).
        generator: source of every random draw but dropout's.
        shard: what this process takes of the examples, (k, n) for the k-th of n equal shards; each
            of the n is given the same batch and the same state of the generator.

    Returns:
        The loss of this process's examples, left on its device; nan where the step was not applied.
    """
    state.model.train()
    state.optimizer.zero_grad()
    value = accumulate_gradient(state, loss, batch, generator, shard)
    for group in state.optimizer.param_groups:
        group["lr"] = state.learning_rate * learning_rate_factor(state.step, **state.schedule)
    if state.replaces_nonfinite:
        for parameter in state.parameters:
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
    limit = state.grad_clip if state.grad_clip >= 0 else math.inf
    finite = nn.utils.clip_grad_norm_(state.parameters, limit).isfinite()
    state.apply_gradient(finite)
    return torch.where(finite, value, math.nan)


def accumulate_gradient(
    state: TrainState,
    loss: RegressionLoss,
    batch: Batch,
    generator: torch.Generator | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Adds the gradient of the batch's loss to the parameters'; returns this process's loss.

    The examples of the whole batch are drawn once. Process k of n takes its shard of them in
    `state.accumulate` = A micro-batches, of which number i is shard k A + i of n A. So neither n
    nor A changes the gradient but by rounding; only dropout depends on them. The gradient of a loss
    that is not finite is nan. For the arguments see `train_step`.
    """
    (rank, world), accumulate = shard, state.accumulate
    examples = loss.draw(batch, generator)
    values = []
    for i in range(accumulate):
        micro_batch = examples.shard(rank * accumulate + i, world * accumulate)
        # the processes' gradients are averaged once, with the last micro-batch
        alone = i < accumulate - 1 and distributed.world() > 1
        with state.network.no_sync() if alone else contextlib.nullcontext():
            value = loss.error(state.network, micro_batch, batch)
            value.backward((1 + 0 * value.detach()) / accumulate)
        values.append(value.detach())
    return torch.stack(values).mean()


@torch.no_grad()
def held_out_loss(
    state: TrainState,
    loss: RegressionLoss,
    batch: Batch,
    generator: torch.Generator,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """The loss of `batch` with the weights that the network holds, over all processes.

    It is computed in the micro-batches of a training step where these can be equal. For the
    arguments see `train_step`.
    """
    examples = loss.draw(batch, generator)
    (rank, world), accumulate = shard, state.accumulate
    if len(examples) % (accumulate * world):
        (rank, world), accumulate = (0, 1), 1  # too few to be shared equally
    values = [
        loss.error(state.model, examples.shard(rank * accumulate + i, world * accumulate), batch)
        for i in range(accumulate)
    ]
    return distributed.mean(torch.stack(values).mean())
