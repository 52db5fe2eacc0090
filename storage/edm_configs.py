"""Configs of snapshots of EDM, EDM2 and PFGM++, from the options of their networks."""

import contextlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import parts
from storage.edm_snapshots import Snapshot
from storage.files import one_line

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
