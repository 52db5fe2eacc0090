"""Published weights (score_sde_pytorch, Poisson_flow, ncsnv2): their names, and how they are read.

The published U-Nets keep their blocks in one list, `all_modules`, in the order of the diagram. The
networks here register the same blocks in the same order, under names of their own. So the number
of a block is its index among the blocks, and a table renames the pieces inside it. The RefineNets
have the published names, below the two dictionaries of their encoder and decoder.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from models import layers
from models.ncsn import RefineNet
from models.ncsnpp import InputSkip

# What counts as an entry of `all_modules`.
_BLOCKS = (
    nn.Linear,
    nn.Conv2d,
    nn.GroupNorm,
    layers.FourierFeatures,
    layers.ResBlock,
    layers.Attention,
    layers.Resampling,
    InputSkip,
)

# Pieces of a block: own name to published name.
_PIECES = {
    "norm": "GroupNorm_0",
    "norm1": "GroupNorm_0",
    "norm2": "GroupNorm_1",
    "conv": "Conv_0",
    "fir_conv": "Conv2d_0",
    "conv1": "Conv_0",
    "conv2": "Conv_1",
    "conv_shortcut": "Conv_2",
    "nin_shortcut": "NIN_0",
    "dense": "Dense_0",
    "query": "NIN_0",
    "key": "NIN_1",
    "value": "NIN_2",
    "out": "NIN_3",
}


def _blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, _BLOCKS):
            yield f"{path}{name}", child
        else:
            yield from _blocks(child, f"{path}{name}.")


def reference_names(model: nn.Module) -> dict[str, str]:
    """Published name of each parameter to its name in `model`, in published order.

    That is also the order of `model.parameters()`; `module.` and `sigmas` are left out.
    """
    if isinstance(model, RefineNet):
        own = (name for name, _ in model.named_parameters())
        return {name.removeprefix("encoder.").removeprefix("decoder."): name for name in own}
    names = {}
    for number, (path, block) in enumerate(_blocks(model)):
        for name, _ in block.named_parameters():
            published = ".".join(_PIECES.get(piece, piece) for piece in name.split("."))
            names[f"all_modules.{number}.{published}"] = f"{path}.{name}"
    return names


def load_reference_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy published weights into `model`, all of them or, on an error, none.

    Args:
        model: network of `create_model`, for the config that the weights were trained with.
        state_dict: published name to tensor, with or without a leading `module.` or `model.`;
            `sigmas`, which follow from the config, are skipped.

    Raises:
        ValueError: a name is missing or unknown, or a shape is wrong; the message names it.
    """
    given = {
        name.removeprefix("module.").removeprefix("model."): value
        for name, value in state_dict.items()
    }
    given.pop("sigmas", None)
    names, parameters = reference_names(model), dict(model.named_parameters())
    for problem, where in (
        ("lack", [name for name in names if name not in given]),
        ("have the unknown", [name for name in given if name not in names]),
    ):
        if where:
            more = f" and {len(where) - 1} more" if len(where) > 1 else ""
            raise ValueError(
                f"the weights {problem} {where[0]!r}{more}; use the config they were trained with"
            )
    for name, own in names.items():
        if given[name].shape != parameters[own].shape:
            raise ValueError(
                f"weight {name!r} has shape {tuple(given[name].shape)}, the network's has "
                f"{tuple(parameters[own].shape)}; use the config it was trained with"
            )
    with torch.no_grad():
        for name, own in names.items():
            parameters[own].copy_(given[name])
