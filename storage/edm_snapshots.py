"""Snapshots of the published programs EDM, EDM2 and PFGM++, read without running them.

A snapshot (`network-snapshot-*.pkl`, `training-state-*.pt`) is a pickle of whole modules, each with
the source code of its class, which the published programs execute. Here a pickle is data
(`storage.inert_pickle`): tensors are made from their bytes, modules are read for their parameters,
buffers and options, and everything else is left alone. `storage.edm_configs` makes
a config of these options.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from storage.files import open_regular, refusing
from storage.inert_pickle import Record, kind
from storage.stored_tensors import StoredView
from storage.torch_files import read_pickles

MAX_DEPTH = 16  # of modules in modules; published: 4
MAX_OPTIONS = 10_000  # values of all options together


class Snapshot(NamedTuple):
    """A published network."""

    network: str  # its class: "EDMPrecond", "VPPrecond", ...; EDM2's is "Precond"
    options: dict  # what it was constructed with (img_resolution, ...); {} where that is not told
    weights: dict[str, Tensor]  # parameters and buffers under the names of its state dict


def read_snapshot(path: Path) -> Snapshot:
    """The EMA network of the snapshot at `path`, else the network itself, on the CPU.

    No code of the file is run and nothing is imported for it. Reading takes up to three times the
    size of the file in memory; what a hostile file takes beyond is bounded, as is its time.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged, no such snapshot, or holds what is not read here, which the
            message names.
    """
    with refusing(path, "is no snapshot of EDM or PFGM++"), open_regular(path) as file:
        content = read_pickles(file, _KNOWN)
        if type(content) is not dict:
            raise ValueError(f"it holds {kind(content)}, not a dictionary with a network")
        name = next((name for name in ("ema", "net") if content.get(name) is not None), None)
        if name is None:
            raise ValueError("it holds neither `ema` nor `net`")
        network = content[name]
        views = dict(_tensors(network, name, set()))
        weights = {place.removeprefix(f"{name}."): view.share() for place, view in views.items()}
        if network.name == "iDDPMPrecond":
            weights = _without_variance(weights)
        return Snapshot(network.name, _options(network), weights)


# --- networks ------------------------------------------------------------------------------------


def _persistent_object(meta: object) -> Record:
    """The object that EDM's `persistent_class` wrote, without its source code."""
    if type(meta) is not dict or type(meta.get("class_name")) is not str:
        raise ValueError("its pickle is damaged: an object without the name of its class")
    return Record(meta["class_name"], meta.get("state"))


def _plain(content: object) -> object:
    """The list of a set, the tuple of a size."""
    return content


def _encoded(text: object, encoding: object = None) -> object:
    """Bytes, which old pickles hold as text."""
    return text.encode("latin1") if type(text) is str and encoding == "latin1" else Record("bytes")


def _dtype(code: object, *_) -> Record:
    return Record(f"numpy.dtype {code:.10}" if type(code) is str else "numpy.dtype")


def _scalar(dtype: object, content: object) -> object:
    """The number or string of a numpy scalar; a `Record` where it is something else."""
    match dtype:
        case Record(name=name, state=(_, "<" | ">" | "|" as order, *_)):
            code = name.removeprefix("numpy.dtype ")
            if type(content) is bytes and re.fullmatch(r"b1|[fiu][1248]|U[1-9]\d{0,3}", code):
                return np.frombuffer(content, np.dtype(order + code)).item()
    return Record("numpy.scalar")


_KNOWN = {
    "_codecs.encode": _encoded,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "torch.Size": _plain,
    "builtins.set": _plain,
    "__builtin__.set": _plain,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
}


def _tensors(
    module: object, path: str, table_ids: set[int], depth: int = 0
) -> Iterator[tuple[str, StoredView]]:
    """The parameters and buffers of a module and those in it, in the order of its state dict.

    Their names begin with `path`. Raises ValueError where something else is in their place, and
    where a module is in two places, which could make their number exponential in the size of the
    file; `table_ids` are those of the modules before.
    """
    if not isinstance(module, Record) or type(module.state) is not dict:
        raise ValueError(f"{path} is {kind(module)}, not a module")
    if depth > MAX_DEPTH:
        raise ValueError(f"{path:.100} lies in more than {MAX_DEPTH} modules")
    for table in ("_parameters", "_buffers", "_modules"):
        entries = module.state.get(table)
        if type(entries) is not dict or id(entries) in table_ids:
            raise ValueError(f"{path} is {kind(module)}, no module of its own: see {table}")
        table_ids.add(id(entries))
        skipped = _transient(module.state, path) if table == "_buffers" else ()
        for name, value in entries.items():
            if type(name) is not str or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
                raise ValueError(f"{path} has an entry in {table} without a proper name")
            place = f"{path}.{name}"
            if value is None or name in skipped:
                continue
            if table == "_modules":
                yield from _tensors(value, place, table_ids, depth + 1)
            elif isinstance(value, StoredView):
                yield place, value
            else:
                raise ValueError(f"{place} is {kind(value)}, not a tensor")


def _without_variance(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `weights` of an iDDPM network without its levels `u`, and without its last outputs.

    The second half of its outputs is the variance of iDDPM's own sampler, which EDM's leaves out.
    """
    halved = ("model.out_conv.weight", "model.out_conv.bias")
    return {
        name: weight[: len(weight) // 2] if name in halved and weight.dim() else weight
        for name, weight in weights.items()
        if name != "u"
    }


def _transient(state: dict, path: str) -> set[str]:
    """Names of the buffers that are not in the state dict."""
    names = state.get("_non_persistent_buffers_set", [])
    if type(names) is not list or len(names) > len(state["_buffers"]):
        raise ValueError(f"{path} is damaged: see _non_persistent_buffers_set")
    return {name for name in names if type(name) is str}


def _options(network: Record) -> dict:
    """Constructor arguments of a network, by name: strings, numbers, and lists of these."""
    options = network.state.get("_init_kwargs") or {}
    named = type(options) is dict and all(type(key) is str for key in options)
    if not named or network.state.get("_init_args") not in (None, ()):
        raise ValueError("its network was constructed with options that have no names")
    values = {k: v if type(v) in (list, tuple) else [v] for k, v in options.items()}
    if sum(map(len, values.values())) > MAX_OPTIONS:
        raise ValueError("its network has too many options")
    for name, entries in values.items():
        for entry in entries:
            if type(entry) not in (str, int, float, bool, type(None)):
                raise ValueError(f"the option {name!r:.100} holds {kind(entry)}, which is not read")
    return options


# EDM2's names of its learned uncertainty, and those of `objectives.uncertainty`.
_UNCERTAINTY = {
    "logvar_fourier.freqs": "features.freqs",
    "logvar_fourier.phases": "features.phases",
    "logvar_linear.weight": "linear.weight",
}


def objective_weights(snapshot: Snapshot) -> dict[str, Tensor]:
    """The weights of the objective in a snapshot of EDM2, under their names here; else none."""
    weights = snapshot.weights if snapshot.network == "Precond" else {}
    return {_UNCERTAINTY[name]: weights[name].float() for name in weights if name in _UNCERTAINTY}
