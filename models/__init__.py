"""The networks: tensors in, tensors out. `create_model` is the one place that reads a config."""

from collections.abc import Sequence

from ml_collections import ConfigDict
from torch import nn

from models.ddpm import DDPM
from models.layers import geometric_sigmas, one_of
from models.ncsn import RefineNet
from models.ncsnpp import NCSNpp
from models.published import load_reference_state_dict, reference_names

__all__ = [
    "create_model",
    "load_reference_state_dict",
    "reference_names",
]

# model.name to the values of model.scale_by_sigma that it can have.
NAMES = {
    "ddpm": (False, True),
    "ncsn": (False,),
    "ncsnpp": (False, True),
    "ncsnv2_64": (True,),
    "ncsnv2_128": (True,),
    "ncsnv2_256": (True,),
}


def create_model(config: ConfigDict) -> nn.Module:
    """The network of `config.model.name`, on the CPU, its weights drawn from the global generator.

    Call it as `model(x, cond)`, with `x` (B, C, H, W) as the data scaler leaves it and `cond` (B,).
    It returns a tensor of the shape of `x`; where `config.training.sde` is 'poisson', the pair of
    that tensor and the field's z entry (B,).

    Raises:
        ValueError: an option has an unknown value, two options do not go together, or the levels
            do not divide the image size.
    """
    data, model, training = config.data, config.model, config.training
    name = one_of("name", model.name, NAMES)
    one_of("scale_by_sigma", model.scale_by_sigma, NAMES[name])
    _check_whole("nf", (model.nf,))
    _check_whole("num_scales", (model.num_scales,))
    field_output = training.sde.lower() == "poisson"
    options = {
        "image_size": data.image_size,
        "channels": data.num_channels,
        "centered": data.centered,
        "nf": model.nf,
        "nonlinearity": model.nonlinearity.lower(),
        "sigmas": geometric_sigmas(model.sigma_max, model.sigma_min, model.num_scales),
    }

    if name.startswith("ncsn") and name != "ncsnpp":
        if field_output:
            raise ValueError(
                f"model.name = {name!r} numbers its noise levels and has no Poisson field; "
                "use 'ncsnpp' or 'ddpm' with training.sde = 'poisson'"
            )
        if model.checkpoint_activations:
            raise ValueError(
                "model.checkpoint_activations is for the networks 'ncsnpp' and 'ddpm', "
                f"not {model.name!r}"
            )
        layout = "64" if name == "ncsn" else name.removeprefix("ncsnv2_")
        return RefineNet(layout=layout, conditional=name == "ncsn", **options)

    _check_whole("ch_mult", model.ch_mult)
    _check_whole("num_res_blocks", (model.num_res_blocks,))
    options |= {
        "field_output": field_output,
        "ch_mult": tuple(model.ch_mult),
        "num_res_blocks": model.num_res_blocks,
        "attn_resolutions": tuple(model.attn_resolutions),
        "conditional": model.conditional,
        "resamp_with_conv": model.resamp_with_conv,
        "dropout": model.dropout,
        "scale_by_sigma": model.scale_by_sigma,
        "checkpoint_activations": model.checkpoint_activations,
    }
    if name == "ddpm":
        return DDPM(**options)

    embedding_type = model.embedding_type.lower()
    if embedding_type == "fourier" and not training.continuous:
        raise ValueError(
            "model.embedding_type = 'fourier' takes the log of a noise level, but with "
            "training.continuous = False the levels are numbered from 0; use 'positional'"
        )
    return NCSNpp(
        **options,
        embedding_type=embedding_type,
        fourier_scale=model.fourier_scale,
        resblock_type=model.resblock_type.lower(),
        fir_kernel=tuple(model.fir_kernel) if model.fir else None,
        progressive=model.progressive.lower(),
        progressive_input=model.progressive_input.lower(),
        progressive_combine=model.progressive_combine.lower(),
        init_scale=model.init_scale,
        skip_rescale=model.skip_rescale,
    )


def _check_whole(option: str, values: Sequence[int]) -> None:
    """Command lines can put anything into a tuple, and a network of no levels is no network."""
    if not values or not all(isinstance(value, int) and value >= 1 for value in values):
        raise ValueError(
            f"model.{option} must be whole numbers of at least 1, not "
            f"{', '.join(map(repr, values)) or 'nothing'}"
        )
