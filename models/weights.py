"""Weights of a checkpoint, checked and put into a network."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.published import DERIVED, places_of, published_weights, without_wrappers
from storage.checks import check_like, check_tensor, loaded
from storage.stored_tensors import StoredTensor


@torch.no_grad()
def load_model(
    model: nn.Module, weights: Mapping[str, Tensor | StoredTensor], skipped: Collection[str] = ()
) -> None:
    """Copy the entry `model` of a checkpoint into a network.

    The names are those of this program or of the published ones. The network changes only after all
    entries are checked, except that a `StoredTensor` is read and checked when it is copied.

    Args:
        model: the network.
        weights: parameters and buffers, on the CPU or stored.
        skipped: names of parameters of the network that are checked and not copied.

    Raises:
        ValueError: `weights` do not fit; the message names the entry.
    """
    if not isinstance(weights, dict):
        raise ValueError(f"model is no dictionary but of type {type(weights).__name__}")
    entries = model.state_dict()
    if weights.keys() != entries.keys():
        weights = without_wrappers(weights)
    if weights.keys() == entries.keys():
        check_like(weights, dict(entries), "model")
        sources = {name: (f"model.{name}", value) for name, value in weights.items()}
    else:
        sources = {
            name: (f"weight {published!r}", value)
            for name, (published, value) in published_weights(model, weights).items()
        }
    for name, (title, value) in sources.items():
        if name not in skipped:
            entries[name].copy_(loaded(value, title, entries[name].dtype))


@torch.no_grad()
def load_ema(model: nn.Module, checkpoint: Mapping) -> int:
    """Copy the EMA weights of a checkpoint into a network, tensor by tensor; return its step.

    In a checkpoint without `ema`, `model` holds the EMA weights. Otherwise `model` holds the
    weights that the optimiser moves: only their names, shapes and dtypes are checked.

    Args:
        model: the network.
        checkpoint: see `storage.checkpoints.load_checkpoint` and `open_checkpoint`.

    Raises:
        ValueError: `checkpoint` does not fit; the message names the entry. The network is then
            unchanged, unless the numbers of a `StoredTensor` are wrong.
    """
    check_like(checkpoint["step"], 0, "step")
    if "ema" not in checkpoint:
        load_model(model, checkpoint["model"])
        return checkpoint["step"]
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    expected = {"decay": 1.0, "num_updates": 0, "shadow_params": [*trained.values()]}
    check_like(checkpoint["ema"], expected, "ema")
    load_model(model, checkpoint["model"], skipped=trained)
    averages = checkpoint["ema"]["shadow_params"]
    for number, (parameter, average) in enumerate(zip(trained.values(), averages, strict=True)):
        parameter.copy_(loaded(average, f"ema.shadow_params.{number}", parameter.dtype))
    return checkpoint["step"]


@dataclass(frozen=True)
class Copied:
    """Entries of a network's state, by name, after a copy of those that fit.

    Attributes:
        names: copied.
        initial: as they were.
        placeless: number of entries of the checkpoint that the network has none for.
    """

    names: list[str]
    initial: list[str]
    placeless: int


@torch.no_grad()
def load_fitting(model: nn.Module, checkpoint: Mapping) -> Copied:
    """Copy the EMA weights of a checkpoint that have a place of the same shape in a network.

    Raises:
        ValueError: none has, or one that has is no finite tensor. The network may have changed.
    """
    weights, entries = checkpoint["model"], model.state_dict()
    if not isinstance(weights, dict):
        raise ValueError(f"model is no dictionary but of type {type(weights).__name__}")
    plain = without_wrappers(weights)
    weights = weights if weights.keys() & entries.keys() else plain
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    places = places_of(model, shapes) | {name: name for name in entries if name in weights}
    sources = {name: places[name] for name in entries if places.get(name) in weights}
    if "ema" in checkpoint:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        fixed = {source for name, source in sources.items() if name not in trained}
        fixed |= {name for name, shape in shapes.items() if _is_fixed(name, shape)}
        trained_shapes = {name: shape for name, shape in shapes.items() if name not in fixed}
        weights = weights | _averages(checkpoint["ema"], trained_shapes)
    copied = []
    for name, source in sources.items():
        entry, value = entries[name], weights[source]
        if shapes[source] == entry.shape:
            check_tensor(value, f"weight {source!r}", entry, cast=True)
            entry.copy_(loaded(value, f"weight {source!r}", entry.dtype))
            copied.append(name)
    if not copied:
        raise ValueError(f"none of its {len(weights)} weights has a name and shape of the network")
    placeless = {name for name in weights if name.rpartition(".")[2] not in DERIVED}
    return Copied(
        names=copied,
        initial=[name for name in entries if name not in copied],
        placeless=len(placeless - {*sources.values()}),
    )


def _is_fixed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is one that training does not move, such as Fourier frequencies."""
    last = name.rpartition(".")[2]
    return last in DERIVED or last == "W" and len(shape) == 1


def _averages(
    ema: object, trained: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor | StoredTensor]:
    """EMA weights by name, from a checkpoint's entry `ema` and the shapes of what was `trained`."""
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    averages = averages if isinstance(averages, list) else []
    if [getattr(average, "shape", None) for average in averages] != [*trained.values()]:
        raise ValueError("ema.shadow_params are not the averages of the weights in model")
    return dict(zip(trained, averages, strict=True))
