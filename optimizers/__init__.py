"""Optimisers, by name. A further one is a function and a line of `OPTIMIZERS`.

A function takes the named parameters and the options of `config.optim`, by name, and may put the
parameters into groups. It returns an optimiser, which is saved and loaded by its `state_dict`. A
function with further options declares them in its attribute `keys`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from configs.schema import Flag, Key, Number, OneOf
from optimizers.muon import Muon, is_matrix

NamedParameters = Sequence[tuple[str, nn.Parameter]]
Build = Callable[[NamedParameters, Mapping[str, Any]], torch.optim.Optimizer]

KEYS = {
    "optim.optimizer": Key(
        "Adam",
        OneOf(registry="optimizers.OPTIMIZERS"),
        "'RAdam': Adam with rectified early steps; 'Muon': weight matrices and convolutions are "
        "updated along their orthogonalised momentum, all else by Adam",
    ),
    "optim.lr": Key(2e-4, Number(0, 10), "learning rate"),
    "optim.beta1": Key(0.9, Number(0, 0.999999), "Adam's decay of the first moment"),
    "optim.beta2": Key(0.999, Number(0, 0.999999), "Adam's decay of the second moment"),
    "optim.eps": Key(
        1e-8, Number(1e-16, 1), "added to the root of Adam's second moment before it divides"
    ),
    "optim.weight_decay": Key(
        0.0, Number(0, 1000), "added to the gradient as a multiple of the weights"
    ),
    "optim.amsgrad": Key(False, Flag(), "Adam's variant of this name"),
}


def adam(
    parameters: NamedParameters, options: Mapping[str, Any], matrices: Sequence[nn.Parameter] = ()
) -> torch.optim.Adam:
    """Adam whose moments exist from the start, also of parameters that never get a gradient.

    With `matrices` it is Muon, which updates these.
    """
    kind = Muon if matrices else torch.optim.Adam
    optimizer = kind(
        [p for _, p in parameters],
        lr=options["lr"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        amsgrad=options["amsgrad"],
        fused=True,
    )
    of_muon = {id(matrix) for matrix in matrices}
    for _, p in parameters:
        names = ["exp_avg"]
        if id(p) not in of_muon:
            names += ["exp_avg_sq"] + ["max_exp_avg_sq"] * options["amsgrad"]
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            **{name: torch.zeros_like(p) for name in names},
        }
    return optimizer


def muon(parameters: NamedParameters, options: Mapping[str, Any]) -> torch.optim.Adam:
    """Muon for matrices, Adam for the rest; see `optimizers.muon`."""
    return adam(parameters, options, [p for _, p in parameters if is_matrix(p)])


def radam(parameters: NamedParameters, options: Mapping[str, Any]) -> torch.optim.RAdam:
    """Rectified Adam: early steps are damped while its second moment is uncertain.

    PyTorch has no fused form of it, so that the host waits for a GPU in each step. Source: Liu et
    al. 2020 (arXiv 1908.03265).
    """
    return torch.optim.RAdam(
        [p for _, p in parameters],
        lr=options["lr"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
    )


# optim.optimizer -> its builder.
OPTIMIZERS: dict[str, Build] = {"adam": adam, "muon": muon, "radam": radam}
