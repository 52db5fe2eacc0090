"""Weights of a checkpoint, checked and put into a network."""

import torch
from torch import nn

from models.published import load_reference_state_dict
from storage.checks import check_like


@torch.no_grad()
def load_model(model: nn.Module, weights: dict) -> None:
    """Copy the entry `model` of a checkpoint into a network.

    The names are those of this program or of the published ones. Nothing is changed before all of
    it is checked.

    Raises:
        ValueError: `weights` do not fit; the message names the entry.
    """
    if not isinstance(weights, dict):
        raise ValueError(f"model is no dictionary but of type {type(weights).__name__}")
    expected = model.state_dict()
    if weights.keys() == expected.keys():
        check_like(weights, dict(expected), "model")
        model.load_state_dict(weights)
    else:  # published EMA weights have no names, but the same order
        load_reference_state_dict(model, weights)


@torch.no_grad()
def load_ema(model: nn.Module, checkpoint: dict) -> int:
    """Copy the EMA weights of a `checkpoint`, on the CPU, into a network; its step.

    One without `ema` has EMA weights only.

    Raises:
        ValueError: `checkpoint` does not fit; the message names the entry.
    """
    check_like(checkpoint["step"], 0, "step")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if "ema" in checkpoint:
        expected = {
            "decay": 1.0,
            "num_updates": 0,
            "shadow_params": [p.detach() for p in parameters],
        }
        check_like(checkpoint["ema"], expected, "ema")
    load_model(model, checkpoint["model"])
    if "ema" in checkpoint:
        torch._foreach_copy_(parameters, checkpoint["ema"]["shadow_params"])
    return checkpoint["step"]
