"""Snapshots of the published programs EDM and PFGM++, read without running them.

A snapshot (`network-snapshot-*.pkl`, `training-state-*.pt`) is a pickle of whole modules, each with
the source code of its class, which the published programs execute. Here a pickle is data
(`storage.inert_pickle`): tensors are made from their bytes, modules are read for their parameters,
buffers and options, and everything else is left alone.
"""

import errno
import io
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor

from configs import parts
from storage.files import naming, one_line
from storage.inert_pickle import Name, Record, unpickle

MAX_OPERATIONS = 1_000_000  # of all pickles of a file; ImageNet's network takes a tenth
MAX_DEPTH = 16  # of modules in modules, and of options in options; published: 4 and 2
MAX_OPTIONS = 10_000  # values and characters of all options together
MAX_DIMENSIONS = 8  # of a tensor

_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
}
_ZIP = b"PK\x03\x04"  # begins what torch.save writes
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # and what it wrote before PyTorch 1.6


class Snapshot(NamedTuple):
    """A published network."""

    network: str  # its class: "EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"
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
    try:
        with naming(path), open(path, "rb") as file:
            return _read(file)
    except Exception as error:  # a damaged file makes zipfile fail in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to nowhere
            raise
        own = type(error) is ValueError  # Python's own errors are of other types
        reason = one_line(error) if own else f"it is damaged: {one_line(error)}"
        raise ValueError(f"{path} is no snapshot of EDM or PFGM++: {reason}") from error


def _read(file: BinaryIO) -> Snapshot:
    operations = iter(range(MAX_OPERATIONS))
    known = _KNOWN | {"torch.storage._load_from_bytes": _storage_reader(operations)}
    if file.read(4) == _ZIP:
        snapshot = _unpickle_zip(file, operations, known)
    else:
        file.seek(0)
        snapshot = _unpickle_bytes(file.read(), operations, known)
    if type(snapshot) is not dict:
        raise ValueError(f"it holds {_kind(snapshot)}, not a dictionary with a network")
    name = next((name for name in ("ema", "net") if snapshot.get(name) is not None), None)
    if name is None:
        raise ValueError("it holds neither `ema` nor `net`")
    network = snapshot[name]
    views = _views(network, name)
    return Snapshot(network.name, _options(network), _tensors(views))


# --- tensors -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Storage:
    """The memory of tensors; `load` gives its bytes, None until the file is read that far."""

    dtype: torch.dtype
    numel: int
    load: Callable[[], bytes | memoryview] | None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class _Tensor:
    """A tensor: its place in a storage, checked to lie within."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError(f"the memory of a tensor is {_kind(storage)}, which is not read here")
    if metadata:  # of a tensor whose elements are to be negated or conjugated
        raise ValueError("a tensor has metadata, which are not read here")
    for numbers in (size, stride):
        if type(numbers) is not tuple or len(numbers) > MAX_DIMENSIONS:
            raise ValueError("the shape of a tensor is damaged")
    whole = all(type(n) is int and 0 <= n < 2**40 for n in (offset, *size, *stride))
    if not whole or len(size) != len(stride):
        raise ValueError("the shape of a tensor is damaged")
    numel = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if numel else offset
    # An expanded tensor (stride 0) has more elements than memory; no published weights have.
    if numel > storage.numel or last >= storage.numel + (numel == 0):
        raise ValueError("a tensor reaches beyond its memory")
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(data, requires_grad, hooks) -> object:
    return data


def _tensors(views: dict[str, _Tensor]) -> dict[str, Tensor]:
    """The tensors by name; those of one storage share its memory, as they did.

    Together they are no larger than the file, since a storage has its bytes for itself: a record
    of a zip file, a section of a legacy file, or an object of a pickle that is read once.
    """
    storages = {id(view.storage): view.storage for view in views.values()}
    flat = {key: _flat(storage) for key, storage in storages.items()}
    return {
        name: flat[id(view.storage)].as_strided(view.size, view.stride, view.offset)
        for name, view in views.items()
    }


def _flat(storage: _Storage) -> Tensor:
    if storage.load is None:
        raise ValueError("it is cut short: the memory of a tensor is missing")
    if storage.numel == 0:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(storage.load()), dtype=storage.dtype)


# --- the formats of torch.save -------------------------------------------------------------------


def _unpickle_zip(file: BinaryIO, operations: Iterator, known: dict) -> object:
    """What torch.save wrote since PyTorch 1.6: a zip file of a pickle and of each storage."""
    archive = zipfile.ZipFile(file)  # not closed: storages are read from it later
    records = {record.filename: record for record in archive.infolist()}
    for record in records.values():
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ValueError(f"its record {record.filename!r:.100} is compressed")
    if sum(record.file_size for record in records.values()) > file.seek(0, os.SEEK_END):
        raise ValueError("its records are larger than the file")
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip file, but not from torch.save: it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    storages: dict[str, _Storage] = {}

    def persistent(identity: object) -> object:
        dtype, numel, key = _storage_identity(identity)
        name = f"{folder}data/{key}"
        found = storages.setdefault(key, _Storage(dtype, numel, None))
        if (found.dtype, found.numel) != (dtype, numel) or name not in records:
            raise ValueError(f"it is damaged: no memory {key!r:.100} of this type")
        if records[name].file_size != found.nbytes:
            raise ValueError(f"it is damaged: memory {key!r:.100} has another size")
        found.load = partial(archive.read, name)
        return found

    return unpickle(io.BytesIO(archive.read(pickles[0])), operations, known, persistent)


def _unpickle_bytes(content: bytes, operations: Iterator, known: dict) -> object:
    """A plain pickle, or what torch.save wrote before PyTorch 1.6.

    The latter is a magic number, a version, and the sizes of types, each a pickle; the pickle of
    the object; a pickled list of the keys of its storages; and each of these, 8 bytes that give
    the number of its elements and then the elements.
    """
    file = io.BytesIO(content)
    result = unpickle(file, operations, known)
    if type(result) is not int or result != _LEGACY_MAGIC:
        return result
    _, system = unpickle(file, operations, {}), unpickle(file, operations, {})
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    storages: dict[str, _Storage] = {}

    def persistent(identity: object) -> object:
        if type(identity) is tuple and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # the class of a module; the others are its source code
        dtype, numel, key = _storage_identity(identity)
        found = storages.setdefault(key, _Storage(dtype, numel, None))
        if (found.dtype, found.numel) != (dtype, numel):
            raise ValueError(f"it is damaged: memory {key!r:.100} has two types")
        return found

    result = unpickle(file, operations, known, persistent)
    keys = unpickle(file, operations, {})
    if type(keys) is not list or any(type(k) is not str or k not in storages for k in keys):
        raise ValueError("it is damaged: the list of its tensors' memory")
    position = file.tell()
    for storage in map(storages.get, keys):
        start, position = position + 8, position + 8 + storage.nbytes
        if int.from_bytes(content[start - 8 : start], "little") != storage.numel:
            raise ValueError("it is damaged: the memory of a tensor has another size")
        if position > len(content):
            raise ValueError("it is cut short: the memory of a tensor is missing")
        storage.load = partial(memoryview(content).__getitem__, slice(start, position))
    return result


def _storage_reader(operations: Iterator) -> Callable[[object], object]:
    """Reads a storage within a plain pickle: the bytes of a file of torch.save of its own."""
    read: dict[int, tuple[bytes, object]] = {}  # a pickle can name the same bytes many times

    def load_from_bytes(content: object) -> object:
        if not isinstance(content, bytes):
            raise ValueError(f"the memory of a tensor is {_kind(content)}, not bytes")
        if id(content) not in read:
            if content.startswith(_ZIP):
                storage = _unpickle_zip(io.BytesIO(content), operations, _KNOWN)
            else:
                storage = _unpickle_bytes(content, operations, _KNOWN)
            read[id(content)] = content, storage
        return read[id(content)][1]

    return load_from_bytes


def _storage_identity(identity: object) -> tuple[torch.dtype, int, str]:
    """dtype, number of elements and key of what torch.save calls a storage."""
    match identity:
        case ("storage", Name(name=name), str(key), _, int(numel)):
            pass
        case ("storage", Name(name=name), str(key), _, int(numel), None):
            pass
        case _:
            raise ValueError("it is damaged: it refers to memory in another way than torch.save")
    if name not in _DTYPES:
        raise ValueError(f"it has a tensor of {name!r:.100}, which is not read here")
    if not 0 <= numel < 2**40 or len(key) > 100:
        raise ValueError("it is damaged: the size or key of a tensor's memory")
    return _DTYPES[name], numel, key


# --- networks ------------------------------------------------------------------------------------


def _persistent_object(meta: object) -> Record:
    """What EDM's `persistent_class` wrote; its source code is left out."""
    if type(meta) is not dict or type(meta.get("class_name")) is not str:
        raise ValueError("its pickle is damaged: an object without the name of its class")
    return Record(meta["class_name"], state=meta.get("state"))


def _dictionary() -> dict:
    return {}


def _set(items: object) -> object:
    return items


_KNOWN = {
    "collections.OrderedDict": _dictionary,
    "dnnlib.util.EasyDict": _dictionary,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
}


def _views(network: object, name: str) -> dict[str, _Tensor]:
    """Parameters and buffers of a module, named as in its state dict, in the same order.

    Raises ValueError where something else is in their place, and where a module is in two places,
    which could make their number exponential in the size of the file.
    """
    found: dict[str, _Tensor] = {}
    seen: set[int] = set()

    def visit(module: object, path: str, prefix: str, depth: int) -> None:
        if not isinstance(module, Record) or type(module.state) is not dict:
            raise ValueError(f"{path} is {_kind(module)}, not a module")
        if depth > MAX_DEPTH:
            raise ValueError(f"{path:.100} lies in more than {MAX_DEPTH} modules")
        for table in ("_parameters", "_buffers", "_modules"):
            entries = module.state.get(table)
            if type(entries) is not dict or id(entries) in seen:
                raise ValueError(f"{path} is {_kind(module)}, no module of its own: see {table}")
            seen.add(id(entries))
            skipped = transient(module.state, path) if table == "_buffers" else ()
            for key, value in entries.items():
                if type(key) is not str or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", key):
                    raise ValueError(f"{path} has an entry in {table} without a proper name")
                if value is None or key in skipped:
                    continue
                if table == "_modules":
                    visit(value, f"{path}.{key}", f"{prefix}{key}.", depth + 1)
                elif isinstance(value, _Tensor):
                    found[f"{prefix}{key}"] = value
                else:
                    raise ValueError(f"{path}.{key} is {_kind(value)}, not a tensor")

    def transient(state: dict, path: str) -> set[str]:
        """Names of the buffers that are not in the state dict."""
        names = state.get("_non_persistent_buffers_set", [])
        if type(names) is not list or len(names) > len(state["_buffers"]):
            raise ValueError(f"{path} is damaged: see _non_persistent_buffers_set")
        return {name for name in names if type(name) is str}

    visit(network, name, "", 0)
    return found


def _options(network: Record) -> dict:
    """What `network` was constructed with: strings, numbers, lists and dictionaries."""
    state, left = network.state, MAX_OPTIONS
    if state.get("_init_args") not in (None, ()):
        raise ValueError("its network was constructed with options that have no names")

    def plain(value: object, path: str, depth: int) -> object:
        nonlocal left
        left -= len(value) + 1 if type(value) is str else 1
        if left < 0 or depth > MAX_DEPTH:
            raise ValueError(f"{path:.100}: its network has too many options")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (list, tuple):
            return type(value)(plain(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value))
        if type(value) is not dict:
            raise ValueError(f"the option {path:.100} is {_kind(value)}, which is not read here")
        left -= sum(len(str(key)) for key in value)
        return {key: plain(v, f"{path:.100}.{key!s:.100}", depth + 1) for key, v in value.items()}

    options = plain(state.get("_init_kwargs") or {}, "_init_kwargs", 0)
    if type(options) is not dict or not all(type(key) is str for key in options):
        raise ValueError("the options of its network have no names")
    return options


def _kind(value: object) -> str:
    """How a message names `value`."""
    if isinstance(value, (Name, Record)):
        return f"{value.name!r:.100}"
    return type(value).__name__.removeprefix("_")


# --- the config of a snapshot --------------------------------------------------------------------

# What the published classes take where an option is not given.
_PRECOND = {"label_dim": 0, "sigma_data": 0.5, "model_type": "DhariwalUNet"}
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
_WITHOUT_DEFAULT = {"img_resolution", "img_channels", "D", "pfgm", "pfgmpp", "small"}
# Without a key: the bounds of the noise level, and what holds for training only.
_WITHOUT_KEY = {"sigma_min", "sigma_max", "use_fp16", "label_dropout"}
_EMBEDDINGS = {"positional": "positional", "fourier": "fourier"}
_ENCODERS = {"standard": "none", "skip": "input_skip", "residual": "residual"}
_DECODERS = {"standard": "none", "skip": "output_skip"}


def config_values(snapshot: Snapshot) -> dict[str, object]:
    """Config keys ("model.nf") and their values for the network and method of `snapshot`.

    Files of PFGM++ that do not tell their D count as EDM's.

    Raises:
        ValueError: an option is missing, or says what the networks here cannot be.
    """
    given = {key: value for key, value in snapshot.options.items() if value is not None}
    if snapshot.network != "EDMPrecond" or given.get("pfgm") or given.get("small"):
        raise ValueError(f"no config for the preconditioning {snapshot.network!r:.100}")
    options = _PRECOND | given
    model_type = options["model_type"]
    if type(model_type) is not str or model_type not in _NETWORKS:
        raise ValueError(f"no config for the network {model_type!r:.100}")
    name, defaults = _NETWORKS[model_type]
    options = defaults | options
    unknown = options.keys() - _PRECOND.keys() - defaults.keys() - _WITHOUT_DEFAULT - _WITHOUT_KEY
    if unknown:
        raise ValueError(f"no config for the network's option {min(unknown)!r:.100}")
    # The networks here have the widths of the published ones.
    widths = {"channel_mult_emb": 4}
    if name == "edm_unet":
        widths["channel_mult_noise"] = 2 if options["embedding_type"] == "fourier" else 1
    for key, width in widths.items():
        if options[key] != width:
            raise ValueError(f"no config for the network's option {key} other than {width}")
    try:
        values = {
            "training.sde": "pfgmpp" if "D" in options and options.get("pfgmpp", True) else "edm",
            "data.image_size": int(options["img_resolution"]),
            "data.num_channels": int(options["img_channels"]),
            "data.num_classes": int(options["label_dim"]),
            "model.name": name,
            "model.nf": int(options["model_channels"]),
            "model.ch_mult": tuple(map(int, options["channel_mult"])),
            "model.num_res_blocks": int(options["num_blocks"]),
            "model.attn_resolutions": tuple(map(int, options["attn_resolutions"])),
            "model.dropout": float(options["dropout"]),
            "model.augment_dim": int(options["augment_dim"]),
            "model.sigma_data": float(options["sigma_data"]),
        }
        if values["training.sde"] == "pfgmpp":
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
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the network's options are damaged: {one_line(error)}") from error
    return values


def complete_config(snapshot: Snapshot) -> ConfigDict:
    """The config of `snapshot`: its `config_values`, and EDM's recipe in everything else.

    The file does not tell the data: they are CIFAR-10 at 32 x 32, else a folder or zip. Raises as
    `config_values` does.
    """
    values = config_values(snapshot)
    adm = values["model.name"] == "adm"
    if values["data.image_size"] == 32:
        data = parts.CIFAR10
    else:
        data = parts.EDM_IMAGENET if adm else parts.EDM_FFHQ
    config = parts.experiment(
        parts.EDM if values["training.sde"] == "edm" else parts.PFGMPP,
        parts.ADM if adm else parts.EDM_DDPMPP,
        parts.EDM_TRAINING,
        data,
    )
    config.update_from_flattened_dict(values)
    return config
