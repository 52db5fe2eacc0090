"""Snapshots of the published programs EDM, EDM2 and PFGM++, read without running them.

A snapshot (`network-snapshot-*.pkl`, `training-state-*.pt`) is a pickle of whole modules, each with
the source code of its class, which the published programs execute. Here a pickle is data
(`storage.inert_pickle`): tensors are made from their bytes, modules are read for their parameters,
buffers and options, and everything else is left alone.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from torch import Tensor

from configs import parts
from storage.files import one_line, open_regular, refusing
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


# --- the config of a snapshot --------------------------------------------------------------------

# Options of the published classes and their defaults. Constants are options without a key: the
# methods and networks here have only these values.
_EDM = {"label_dim": 0, "sigma_data": 0.5, "model_type": "DhariwalUNet"}
_VP = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}
_VE = {"sigma_min": 0.02, "sigma_max": 100}
_IDDPM = {"C_1": 0.001, "C_2": 0.008, "M": 1000}
_PRECONDS = {  # class -> the method, its options, constants among them
    "EDMPrecond": ("edm", _EDM, {}),
    "VPPrecond": ("edm_vp", {"label_dim": 0, "model_type": "SongUNet"} | _VP, _VP),
    "VEPrecond": ("edm_ve", {"label_dim": 0, "model_type": "SongUNet"} | _VE, _VE),
    "iDDPMPrecond": ("iddpm", {"label_dim": 0, "model_type": "DhariwalUNet"} | _IDDPM, _IDDPM),
}
_METHODS = {
    "edm": parts.EDM,
    "pfgmpp": parts.PFGMPP,
    "edm_vp": parts.EDM_VP,
    "edm_ve": parts.EDM_VE,
    "iddpm": parts.IDDPM,
}
_UNET = {"channel_mult_emb": 4, "dropout": 0.1, "augment_dim": 0}
_SONG_UNET = _UNET | {
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_ADM = _UNET | {
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
}
_NETWORKS = {"SongUNet": ("edm_unet", _SONG_UNET), "DhariwalUNet": ("adm", _ADM)}
_EDM2_CONSTANTS = {
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
}
_EDM2 = _EDM2_CONSTANTS | {
    "img_channels": 3,
    "label_dim": 0,
    "sigma_data": 0.5,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [16, 8],
    "channels_per_head": 64,
    "dropout": 0.0,
    "logvar_channels": 128,
}
_WITHOUT_DEFAULT_OR_KEY = {
    *("img_resolution", "img_channels", "D", "pfgm", "pfgmpp", "small"),
    # without a key: the bounds of the noise level, and what holds for training only
    *("sigma_min", "sigma_max", "use_fp16", "label_dropout"),
}
_EMBEDDINGS = {"positional": "positional", "fourier": "fourier"}
_ENCODERS = {"standard": "none", "skip": "input_skip", "residual": "residual"}
_DECODERS = {"standard": "none", "skip": "output_skip"}


def config_values(snapshot: Snapshot) -> dict[str, object]:
    """Config keys ("model.nf") and their values for the network and method of `snapshot`.

    Files of PFGM++ that do not tell their D count as EDM's.

    Raises:
        ValueError: an option is missing, or says what the networks here cannot be.
    """
    options = {key: value for key, value in snapshot.options.items() if value is not None}
    if snapshot.network == "Precond":
        return _edm2_values(options)
    if snapshot.network not in _PRECONDS or options.get("pfgm") or options.get("small"):
        raise ValueError(f"no config for the preconditioning {snapshot.network!r:.100}")
    method, of_precond, constants = _PRECONDS[snapshot.network]
    model_type = options.get("model_type", of_precond["model_type"])
    if type(model_type) is not str or model_type not in _NETWORKS:
        raise ValueError(f"no config for the network {model_type!r:.100}")
    name, of_network = _NETWORKS[model_type]
    # The networks here have the widths of the published ones.
    constants = constants | {"channel_mult_emb": 4}
    if name == "edm_unet":
        constants["channel_mult_noise"] = 2 if options.get("embedding_type") == "fourier" else 1
    options = _completed(options, of_network | of_precond, constants)
    if method == "edm" and "D" in options and options.get("pfgmpp", True):
        method = "pfgmpp"
    with _damaged_options():
        values = _values(options, method, name) | {"model.augment_dim": int(options["augment_dim"])}
        if "sigma_data" in of_precond:
            values["model.sigma_data"] = float(options["sigma_data"])
        if method == "pfgmpp":
            values["model.D"] = float(options["D"])
        if name == "edm_unet":
            fir = tuple(map(int, options["resample_filter"]))
            values |= {
                "model.embedding_type": _EMBEDDINGS[options["embedding_type"]],
                "model.progressive_input": _ENCODERS[options["encoder_type"]],
                "model.progressive": _DECODERS[options["decoder_type"]],
                # Without a filter four pixels are averaged, which is what (1, 1) does too.
                "model.fir": fir != (1, 1) or options["encoder_type"] == "residual",
            }
            if values["model.fir"]:
                values["model.fir_kernel"] = fir
    return values


def _edm2_values(options: dict) -> dict[str, object]:
    """`config_values` of EDM2, from those of its options that are not None."""
    options = _completed(options, _EDM2, _EDM2_CONSTANTS)
    if options["img_channels"] not in (1, 3):
        raise ValueError(
            f"no config for images of {options['img_channels']!r:.100} channels: they are latents "
            "of an autoencoder, which this program does not have"
        )
    with _damaged_options():
        return _values(options, "edm", "edm2") | {
            "training.uncertainty_features": int(options["logvar_channels"]),
            "model.head_width": int(options["channels_per_head"]),
            "model.sigma_data": float(options["sigma_data"]),
        }


def _completed(options: dict, defaults: dict, constants: dict) -> dict:
    """`defaults` and in their place `options`; ValueError for one that the config cannot hold."""
    if unknown := options.keys() - defaults.keys() - _WITHOUT_DEFAULT_OR_KEY:
        raise ValueError(f"no config for the network's option {min(unknown)!r:.100}")
    options = defaults | options
    for key, constant in constants.items():
        if options[key] != constant:
            raise ValueError(f"no config for the network's option {key} other than {constant}")
    return options


def _values(options: dict, method: str, network: str) -> dict[str, object]:
    """Values of the keys that all networks have."""
    return {
        "training.sde": method,
        "data.image_size": int(options["img_resolution"]),
        "data.num_channels": int(options["img_channels"]),
        "data.num_classes": int(options["label_dim"]),
        "model.name": network,
        "model.nf": int(options["model_channels"]),
        "model.ch_mult": tuple(map(int, options["channel_mult"])),
        "model.num_res_blocks": int(options["num_blocks"]),
        "model.attn_resolutions": tuple(map(int, options["attn_resolutions"])),
        "model.dropout": float(options["dropout"]),
    }


@contextlib.contextmanager
def _damaged_options() -> Iterator[None]:
    """Turn errors from options of a wrong type or number into ValueErrors of one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the network's options are damaged: {one_line(error)}") from error


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


def complete_config(snapshot: Snapshot) -> ConfigDict:
    """The config of `snapshot`: its `config_values`, and EDM's recipe in everything else.

    The file does not tell the data: they are CIFAR-10 at 32 x 32, else a folder or zip. Raises as
    `config_values` does.
    """
    values = config_values(snapshot)
    if values["model.name"] == "edm2":
        config = parts.experiment(parts.EDM, parts.EDM2, parts.EDM2_TRAINING)
        config.update_from_flattened_dict(values)
        return config
    adm = values["model.name"] == "adm"
    if values["data.image_size"] == 32:
        data = parts.CIFAR10
    else:
        data = parts.EDM_IMAGENET if adm else parts.EDM_FFHQ
    config = parts.experiment(
        _METHODS[values["training.sde"]],
        parts.ADM if adm else parts.EDM_DDPMPP,
        parts.EDM_TRAINING,
        data,
    )
    config.update_from_flattened_dict(values)
    return config
