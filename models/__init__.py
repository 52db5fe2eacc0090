"""The networks, by name: tensors in, tensors out. A further one is a file and a `NETWORKS` line."""

import inspect
from collections.abc import Callable
from functools import partial

from ml_collections import ConfigDict
from torch import Tensor, nn

from configs.keys import named
from configs.schema import Key, OneOf, whole
from methods import method_class
from models.dit import DiT
from models.edm import ADM, EDMUNet
from models.edm2 import EDM2UNet
from models.mlp import MLP
from models.ncsn import RefineNet
from models.ncsnpp import DDPM, NCSNpp
from models.published import load_reference_state_dict, reference_names
from sources.codec import Shape
from sources.codec import from_config as get_codec

__all__ = [
    "NETWORKS",
    "check_labels",
    "create_model",
    "load_reference_state_dict",
    "paper_name",
    "reference_names",
]

# model.name -> its builder: (config, (C, H, W) of the input, channels of the output) -> network.
NETWORKS: dict[str, Callable[[ConfigDict, Shape, int], nn.Module]] = {
    "ncsnpp": NCSNpp.from_config,
    "ddpm": DDPM.from_config,
    "edm_unet": EDMUNet.from_config,
    "adm": ADM.from_config,
    "edm2": EDM2UNet.from_config,
    "dit": DiT.from_config,
    "ncsn": partial(RefineNet.from_config, layout="64", conditional=True),
    "ncsnv2_64": partial(RefineNet.from_config, layout="64"),
    "ncsnv2_128": partial(RefineNet.from_config, layout="128"),
    "ncsnv2_256": partial(RefineNet.from_config, layout="256"),
    "mlp": MLP.from_config,
}

# model.name -> its name in papers; of two names the second is that with the filter `model.fir`.
PAPER_NAMES = {
    "ncsnpp": ("DDPM++", "NCSN++"),
    "edm_unet": ("DDPM++", "NCSN++"),
    "ddpm": ("DDPM",),
    "adm": ("ADM",),
    "edm2": ("EDM2",),
    "dit": ("DiT",),
    "ncsn": ("NCSN",),
    **dict.fromkeys(("ncsnv2_64", "ncsnv2_128", "ncsnv2_256"), ("NCSNv2",)),
    "mlp": ("MLP",),
}

KEYS = {
    "model.name": Key("", OneOf(registry="models.NETWORKS"), "the network"),
    "model.nf": Key(128, whole(1, 4096), "channels at the highest resolution"),
    "model.nonlinearity": Key(
        "swish", OneOf(registry="models.layers.ACTIVATIONS"), "between the layers"
    ),
}


def create_model(config: ConfigDict) -> nn.Module:
    """The network of `config`, on the CPU; see `from_config`.

    Its input has the shape that the config's codec gives, which is built for it.
    """
    return from_config(config, get_codec(config).shape)


def from_config(config: ConfigDict, shape: Shape) -> nn.Module:
    """The network of `config.model.name`, its weights drawn from the global generator.

    Call it as `model(x, noise_label)`, with `x` (B, *shape) as the codec encodes it and
    `noise_label` (B,). Where the config has `data.num_classes` or `model.augment_dim`, it also
    takes `class_labels` (B,), int64, or `augment_labels` (B, augment_dim); -1, 0 or None for none;
    with `data.condition_channels` also `image` (B, condition_channels, H, W), 0 or None for none.
    It returns a tensor of the shape of `x`; where the method needs a channel more, the pair of that
    tensor and the channel's spatial mean (B,), which is the Poisson field.

    Raises:
        ValueError: an option has an unknown value, or two options do not go together.
    """
    if config.data.num_classes < 0:
        raise ValueError("data.num_classes is open: training measures it at its first start")
    extra = method_class(config.training.sde).extra_channels
    build = named(NETWORKS, "model.name", config.model.name)
    network = build(config, shape, shape[0] + extra)
    arguments = inspect.signature(network.forward).parameters
    if config.model.augment_dim and "augment_labels" not in arguments:
        raise ValueError(
            f"model.name={config.model.name!r} takes no augmentation labels: set "
            "model.augment_dim=0 and training.augment=0"
        )
    if config.data.condition_channels and "image" not in arguments:
        raise ValueError(
            f"model.name={config.model.name!r} takes no image as a condition "
            "(data.condition_path): 'ncsnpp', 'ddpm', 'edm_unet' and 'adm' do"
        )
    if extra:  # a hook, and no wrapper, which would rename the weights
        network.register_forward_hook(_field)
    return network


def check_labels(model: ConfigDict, sde: str, continuous: bool) -> None:
    """Raise ValueError unless the network can take the method's noise labels and output scale.

    `create_model` does not check this, since published weights may need such a network.
    """
    method = method_class(sde)
    if model.scale_by_sigma and not method.gives_score:
        raise ValueError(
            "model.scale_by_sigma makes the network's output a score, which "
            f"training.sde={sde!r} does not take: set model.scale_by_sigma=False"
        )
    embedding = model.embedding_type.lower()
    if model.name.lower() == "ncsnpp" and embedding == "fourier" and not method.positive_labels:
        raise ValueError(
            "model.embedding_type='fourier' takes the log of noise labels, which are negative too "
            f"with training.sde={sde!r}: set model.embedding_type='positional'"
        )
    numbered = model.name.lower() == "ddpm" or embedding == "positional"
    if model.scale_by_sigma and numbered and continuous:
        raise ValueError(
            "model.scale_by_sigma with a 'positional' embedding takes numbered noise levels: set "
            "training.continuous=False, or model.embedding_type='fourier'"
        )


def _field(network: nn.Module, inputs: tuple, output: Tensor) -> tuple[Tensor, Tensor]:
    return output[:, :-1], output[:, -1].mean(dim=(1, 2))


def paper_name(name: str, fir: bool) -> str:
    """Name in papers of the network `name`, with or without the filter `fir`; else `name`."""
    names = PAPER_NAMES.get(name, (name,))
    return names[-1 if fir else 0]
