"""Weights of a checkpoint, checked and put into a network."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from models.published import published_weights, without_wrappers
from storage.checks import check_like, loaded
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
