"""Moments, averages and the loss scale from a checkpoint, checked before they are loaded."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from optimizers import NamedParameters
from optimizers.loss_scale import LossScale
from storage.checks import check_keys, check_like


def checked_moments(
    stored: dict, expected: dict, template: dict[int, dict], steps: int
) -> dict[int, dict]:
    """Checked states of the parameters in `stored`, by the parameters' numbers.

    Args:
        stored: a `state_dict()` of an optimiser; it may come from any file.
        expected: the `state_dict()` of the optimiser to be loaded, which may have no state yet.
        template: states of that optimiser's parameters, for shapes and dtypes; see `template_of`.
        steps: number of steps that had been taken when `stored` was saved.

    Raises:
        ValueError: `stored` does not fit; the message names the entry.
    """
    groups = expected["param_groups"]
    check_keys(stored, ("state", "param_groups"), "optimizer")
    stored_groups, state = stored["param_groups"], stored["state"]
    dictionaries = type(stored_groups) is list and all(type(g) is dict for g in stored_groups)
    if not dictionaries or len(stored_groups) != len(groups):
        number = "one group" if len(groups) == 1 else f"{len(groups)} groups"
        raise ValueError(f"optimizer.param_groups is not a list of {number}")
    for group, like in zip(stored_groups, groups, strict=True):
        order = group.get("params")  # a file may hold anything; only numbers can be compared
        numbers = type(order) is list and all(type(n) is int for n in order)
        if not numbers or order != like["params"]:
            raise ValueError("optimizer.param_groups has the parameters in another order")
    if expected["state"] or type(state) is not dict:
        check_keys(state, template, "optimizer.state")
    else:  # a parameter that never gets a gradient has none
        check_keys(state, [n for n in template if n in state], "optimizer.state")
    moments = {}
    for number in (n for n in template if n in state):
        entry, name = state[number], f"optimizer.state.{number}"
        if type(entry) is dict and type(entry.get("step")) is int:  # before PyTorch 1.12
            entry = entry | {"step": torch.tensor(float(entry["step"]))}
        check_like(entry, template[number], name)
        if "step" in entry and not (0 <= entry["step"] <= steps and entry["step"] % 1 == 0):
            raise ValueError(f"{name}.step is not a number of steps: {entry['step']}")
        if any((entry[key] < 0).any() for key in entry if key.endswith("_sq")):
            raise ValueError(f"{name} has a negative mean of squares")
        moments[number] = entry
    return moments


def template_of(
    named_parameters: NamedParameters,
    build: Callable[[NamedParameters], torch.optim.Optimizer],
) -> dict[int, dict]:
    """State, by parameter, of an optimiser that makes it only in its first step.

    It is that of copies after a step with zero gradients.
    """
    copies = [(name, nn.Parameter(torch.zeros_like(p))) for name, p in named_parameters]
    for (_, p), (_, original) in zip(copies, named_parameters, strict=True):
        p.grad, p.is_table = torch.zeros_like(p), getattr(original, "is_table", False)
    with torch.enable_grad():
        trial = build(copies)
        trial.step()
    return trial.state_dict()["state"]


def laid_out(entry: dict, like: dict) -> dict:
    """Copies of the moments in `entry`, with the memory formats and devices of those in `like`.

    Fused optimisers pair weights and moments by their place in memory, not by index.
    """
    return {
        key: torch.empty_like(like[key]).copy_(value) if isinstance(value, Tensor) else value
        for key, value in entry.items()
    }


def checked_averages(state: dict, parameters: Sequence[Tensor]) -> dict[float, list[Tensor]]:
    """The power-function averages of `parameters` in the `state` of a run, by relative width.

    Raises:
        ValueError: the state has no averages, or they do not fit `parameters`.
    """
    averages = state.get("averages", [])
    if type(averages) is not list or not averages:
        raise ValueError("it has no power-function averages (model.ema_stds)")
    expected = [{"std": 0.1, "shadow_params": [p.detach() for p in parameters]}] * len(averages)
    check_like(averages, expected, "averages")
    if any(not 0 < average["std"] <= 0.25 for average in averages):
        raise ValueError("averages have widths outside 0 to 0.25")
    return {average["std"]: average["shadow_params"] for average in averages}


def checked_loss_scale(state: dict) -> dict[str, Tensor] | None:
    """The loss scale in the `state` of a run; None where it has none, ValueError if invalid."""
    stored = state.get("loss_scale")
    if stored is not None:
        check_like(stored, LossScale().state_dict(), "loss_scale")
        if stored["factor"] <= 0:
            raise ValueError(f"loss_scale.factor is not above 0: {stored['factor']}")
    return stored
