"""Weights of a checkpoint, checked and put into a network."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.published import DERIVED, match_names, published_weights, without_wrappers
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
    """Result of copying matching weights into a network.

    Attributes:
        names: of the network's entries that were overwritten.
        initial: names of those that keep their values.
        unused: number of the checkpoint's weights that were not copied.
    """

    names: list[str]
    initial: list[str]
    unused: int


@torch.no_grad()
def load_matching(model: nn.Module, checkpoint: Mapping) -> Copied:
    """Copy the EMA weights of a checkpoint into the entries of `model` of matching name and shape.

    Raises:
        ValueError: no weight matches, or one that matches is not a finite tensor; entries of
            `model` may have been overwritten by then.
    """
    weights, entries = checkpoint["model"], model.state_dict()
    if not isinstance(weights, dict):
        raise ValueError(f"model is no dictionary but of type {type(weights).__name__}")
    plain = without_wrappers(weights)
    weights = weights if weights.keys() & entries.keys() else plain
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    places = match_names(model, shapes) | {name: name for name in entries if name in weights}
    sources = {name: places[name] for name in entries if places.get(name) in weights}
    if "ema" in checkpoint:
        trainable_names = {name for name, p in model.named_parameters() if p.requires_grad}
        fixed_names = {source for name, source in sources.items() if name not in trainable_names}
        fixed_names |= {name for name, shape in shapes.items() if _is_fixed(name, shape)}
        trainable = {name: shape for name, shape in shapes.items() if name not in fixed_names}
        weights = weights | _averages(checkpoint["ema"], trainable)
    copied = []
    for name, source in sources.items():
        entry, value = entries[name], weights[source]
        if shapes[source] == entry.shape:
            check_tensor(value, f"weight {source!r}", entry, cast=True)
            entry.copy_(loaded(value, f"weight {source!r}", entry.dtype))
            copied.append(name)
    if not copied:
        raise ValueError(f"none of its {len(weights)} weights has a name and shape of the network")
    stored = {name for name in weights if name.rpartition(".")[2] not in DERIVED}
    return Copied(
        names=copied,
        initial=[name for name in entries if name not in copied],
        unused=len(stored - {*sources.values()}),
    )


def _is_fixed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is one that training does not move, such as Fourier frequencies."""
    last = name.rpartition(".")[2]
    return last in (*DERIVED, "freqs", "phases") or last == "W" and len(shape) == 1


def _averages(
    ema: object, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor | StoredTensor]:
    """EMA weights by name, from a checkpoint's entry `ema` and the `shapes` of what it averages."""
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    averages = averages if isinstance(averages, list) else []
    if [getattr(average, "shape", None) for average in averages] != [*shapes.values()]:
        raise ValueError("ema.shadow_params are not the averages of the weights in model")
    return dict(zip(shapes, averages, strict=True))
