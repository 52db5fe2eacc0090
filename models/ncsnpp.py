"""NCSN++, DDPM++ and DDPM: the U-Net of score SDEs as configs name it, with its keys.

Sources: Song et al. (arXiv 2011.13456), appendix H; Ho et al. (arXiv 2006.11239).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self

from configs.keys import get
from configs.schema import SHARE, Flag, Key, Number, Numbers, OneOf, whole
from models.layers import check_whole, geometric_sigmas, group_norm
from models.unet import CHOICES, UNet
from sources.codec import Shape

# Keys of all U-Nets; keys that DDPM reads too; keys of NCSN++ and DDPM++ only.
UNET = {
    "model.ch_mult": Key(
        (1, 2, 2, 2),
        Numbers(whole(1, 64), range(1, 17)),
        "channels of each level, in units of nf; a level halves the image",
    ),
    "model.num_res_blocks": Key(4, whole(1, 256), "per level"),
    "model.attn_resolutions": Key(
        (16,),
        Numbers(whole(0), range(17)),
        "attention where the longer side of the image is one of these",
    ),
    "model.dropout": Key(0.1, SHARE, "share of the activations that is set to zero in training"),
    "model.augment_dim": Key(
        0, whole(0, 4096), "entries of the augmentation labels the network is given; 0: none"
    ),
    "model.checkpoint_activations": Key(
        False, Flag(), "less memory, a third more time; for 256 px and more"
    ),
    "model.scale_by_sigma": Key(False, Flag(), "VE SDE: divide the output by the noise level"),
}
CONV = {
    "model.resamp_with_conv": Key(True, Flag(), "a convolution before or after resampling"),
    "model.conditional": Key(True, Flag(), "the network sees its noise level or time"),
}
OPTIONS = {
    "model.embedding_type": Key(
        "fourier", OneOf(CHOICES["embedding_type"]), "of the noise level or time"
    ),
    "model.fourier_scale": Key(
        16.0, Number(0, 10**4), "standard deviation of the 'fourier' embedding's frequencies"
    ),
    "model.resblock_type": Key("biggan", OneOf(CHOICES["resblock_type"]), "where blocks resample"),
    "model.fir": Key(True, Flag(), "resample with the filter fir_kernel"),
    "model.fir_kernel": Key(
        (1, 3, 3, 1),
        Numbers(Number(-1000, 1000), range(1, 17)),
        "its taps, up to a factor: their sum must not be 0",
    ),
    "model.skip_rescale": Key(True, Flag(), "sums of two branches are divided by sqrt(2)"),
    "model.progressive": Key(
        "none",
        OneOf(CHOICES["progressive"]),
        "how every level on the way up adds to the output; 'none': only the last does",
    ),
    "model.progressive_input": Key(
        "none",
        OneOf(CHOICES["progressive_input"]),
        "how every level on the way down sees the input; 'none': only the first does",
    ),
    "model.progressive_combine": Key(
        "sum",
        OneOf(CHOICES["progressive_combine"]),
        "how 'input_skip' joins the input to the features",
    ),
    "model.init_scale": Key(
        0.0, Number(0, 10**6), "of the weights that end a branch; 0 stands for 1e-10"
    ),
}
# Keys of a method that a network with numbered noise levels reads.
LEVELS = ("model.sigma_min", "model.sigma_max", "model.num_scales")


def _argument(value: Any) -> Any:
    """Argument of a network for a config's value: words in lower case, sequences as tuples."""
    if isinstance(value, str):
        return value.lower()
    return tuple(value) if isinstance(value, list) else value


class NCSNpp(UNet):
    """NCSN++, and DDPM++ where no filter resamples; see `UNet`.

    Attributes:
        keys: the keys that the network declares, for `configs.default`.
        reads: keys that others declare and it reads too: always, or where another key is set.
        options: {argument: the key that it is read from}.
        fixed: arguments that the config does not decide.
    """

    keys: ClassVar[Mapping[str, Key]] = UNET | CONV | OPTIONS
    reads: ClassVar[Mapping[str, str | None]] = {
        "data.centered": None,
        "training.continuous": None,
        **dict.fromkeys(LEVELS, "model.scale_by_sigma"),
    }
    options: ClassVar[Mapping[str, str]] = {
        key.partition(".")[2]: key
        for key in (
            *("data.num_classes", "data.condition_channels", "data.centered"),
            *("model.nf", "model.nonlinearity", *keys),
        )
        if key not in ("model.fir", "model.fir_kernel")
    }
    fixed: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_config(cls, config, shape: Shape, out_channels: int) -> Self:
        """The network that the config describes, with the arguments in `fixed`.

        ValueError as `UNet`, and where the embedding cannot take the method's noise labels.
        """
        model = config.model
        check_whole(model, "nf", "num_scales", "ch_mult", "num_res_blocks")
        sigmas = None  # sigma_max may be open where it is not read
        if model.scale_by_sigma:
            sigmas = geometric_sigmas(model.sigma_max, model.sigma_min, model.num_scales)
        options = {
            **{name: _argument(get(config, key)) for name, key in cls.options.items()},
            "image_size": shape[1:],
            "channels": shape[0],
            "out_channels": out_channels,
            "sigmas": sigmas,
            "fir_kernel": tuple(model.fir_kernel) if model.fir else None,
            **cls.fixed,
        }
        if options["embedding_type"] == "fourier" and not config.training.continuous:
            raise ValueError(
                "model.embedding_type = 'fourier' takes noise levels, but with "
                "training.continuous = False the levels are numbered from 0; use 'positional'"
            )
        return cls(**options)


class DDPM(NCSNpp):
    """The U-Net of Ho et al. (arXiv 2006.11239): plain residual blocks, 32 groups in a norm."""

    keys = UNET | CONV
    fixed = {
        "embedding_type": "positional",
        "resblock_type": "ddpm",
        "norm": partial(group_norm, group_width=1),
        "skip_rescale": False,
        "init_scale": 0.0,
        "fir_kernel": None,
        "progressive": "none",
        "progressive_input": "none",
    }
