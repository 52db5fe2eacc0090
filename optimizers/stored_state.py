"""The state of an optimiser from a checkpoint, checked before it is loaded."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optimizers import NamedParameters
from storage.checks import check_keys, check_like


def checked_moments(
    stored: dict,
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters,
    build: Callable[[NamedParameters], torch.optim.Optimizer],
    steps: int,
) -> dict[int, dict]:
    """Each parameter's state in `stored`, by its number: checked copies, for `optimizer` to load.

    Args:
        stored: a `state_dict()` of such an optimiser, of any origin.
        optimizer, named_parameters: what it is for.
        build: makes an optimiser like `optimizer` of other parameters.
        steps: those that were done when it was stored.

    Raises:
        ValueError: it does not fit; the message names the entry.
    """
    template, complete = _template(optimizer, named_parameters, build)
    groups = optimizer.state_dict()["param_groups"]
    check_keys(stored, ("state", "param_groups"), "optimizer")
    stored_groups, state = stored["param_groups"], stored["state"]
    dictionaries = type(stored_groups) is list and all(type(g) is dict for g in stored_groups)
    if not dictionaries or len(stored_groups) != len(groups):
        number = "one group" if len(groups) == 1 else f"{len(groups)} groups"
        raise ValueError(f"optimizer.param_groups is not a list of {number}")
    for group, expected in zip(stored_groups, groups, strict=True):
        order = group.get("params")  # a file may hold anything; only numbers can be compared
        numbers = type(order) is list and all(type(n) is int for n in order)
        if not numbers or order != expected["params"]:
            raise ValueError("optimizer.param_groups has the parameters in another order")
    if complete or type(state) is not dict:
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
        moments[number] = {key: _laid_out(entry[key], template[number][key]) for key in entry}
    return moments


def _template(
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters,
    build: Callable[[NamedParameters], torch.optim.Optimizer],
) -> tuple[dict[int, dict], bool]:
    """A state like the optimiser's, by parameter, and True if the optimiser already has one.

    If it is made only in the first step, the state is that of copies after a step with zero
    gradients.
    """
    if state := optimizer.state_dict()["state"]:
        return state, True
    copies = [(name, nn.Parameter(torch.zeros_like(p))) for name, p in named_parameters]
    for (_, p), (_, original) in zip(copies, named_parameters, strict=True):
        p.grad, p.is_table = torch.zeros_like(p), getattr(original, "is_table", False)
    with torch.enable_grad():
        trial = build(copies)
        trial.step()
    return trial.state_dict()["state"], False


def _laid_out(stored: object, like: object) -> object:
    """A copy of a `stored` tensor with the memory format and device of `like`.

    The fused optimisers pair the memory of weights and moments, not their indices.
    """
    return torch.empty_like(like).copy_(stored) if isinstance(stored, Tensor) else stored
