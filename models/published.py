"""Published weights (score_sde_pytorch, Poisson_flow, ncsnv2, EDM, EDM2): names, and reading them.

The published U-Nets keep their blocks in one list, `all_modules`, in the order of the diagram. The
networks here register the same blocks in the same order, under names of their own. So the number
of a block is its index among the blocks, and a table renames the pieces inside it. The RefineNets
have the published names, below the two dictionaries of their encoder and decoder. EDM and EDM2
name their blocks by the image size that they give, as `_edm_names` and `_edm2_name` have it.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TypeVar

import torch
from torch import Tensor, nn

from configs.keys import shown
from models import layers
from models.edm import ADM, EDMUNet
from models.edm2 import EDM2UNet
from models.ncsn import RefineNet
from models.ncsnpp import NCSNpp
from models.unet import InputSkip
from sources.images import sides_of
from storage.checks import check_tensor
from storage.stored_tensors import StoredTensor

T = TypeVar("T")
Pieces = dict[str, tuple[int, ...]]  # of a block: their shapes by published name

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

# Pieces of a block: name here to published name.
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

DERIVED = ("sigmas", "resample_filter")  # entries that follow from the config
OF_OBJECTIVE = ("logvar_fourier", "logvar_linear")  # EDM2's learned uncertainty
MAX_LEVELS = 16  # of a U-Net


def _blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, _BLOCKS):
            yield f"{path}{name}", child
        else:
            yield from _blocks(child, f"{path}{name}.")


def reference_names(model: nn.Module) -> dict[str, str]:
    """Published name of each parameter to its name in `model`, in published order.

    That is also the order of `model.parameters()`, but for the label embedding of ADM; `module.`,
    `model.` and what is no parameter (`sigmas`, filters) are left out.

    Raises:
        ValueError: the options of an EDM network are such that EDM has no names for it.
    """
    if isinstance(model, RefineNet):
        names = (name for name, _ in model.named_parameters())
        return {name.removeprefix("encoder.").removeprefix("decoder."): name for name in names}
    if isinstance(model, EDMUNet | ADM):
        return _edm_names(model)
    if isinstance(model, EDM2UNet):
        sizes = _level_sizes(model)
        return {_edm2_name(name, sizes): name for name, _ in model.named_parameters()}
    names = {}
    for number, (path, block) in enumerate(_blocks(model)):
        for name, _ in block.named_parameters():
            names[f"all_modules.{number}.{_renamed(name, _PIECES)}"] = f"{path}.{name}"
    return names


def _renamed(name: str, pieces: Mapping[str, str]) -> str:
    """A dotted name whose parts are renamed by `pieces`."""
    return ".".join(pieces.get(piece, piece) for piece in name.split("."))


# Pieces of EDM's blocks, where attention is a part of its residual block.
_EDM_PIECES = {
    "W": "freqs",
    "norm1": "norm0",
    "conv1": "conv0",
    "dense": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "conv_shortcut": "skip",
    "norm": "norm2",
}


def _level_sizes(model: NCSNpp | EDM2UNet) -> list[int]:
    """The longer sides of a network's levels, by which EDM and EDM2 name them."""
    longest = max(sides_of(model.image_size))
    sizes = [longest >> level for level in range(len(model.encoder))]
    if len({*sizes}) < len(sizes):
        raise ValueError(f"EDM has no names for {len(sizes)} levels of images of side {longest}")
    return sizes


def _edm_names(model: NCSNpp) -> dict[str, str]:
    """`reference_names` for EDM, which names levels by the side of a square."""
    sizes = _level_sizes(model)
    places = _edm_modules(sizes, len(model.decoder[0]["stages"]), isinstance(model, ADM))
    names = {}
    for name, _ in model.named_parameters():
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        if place is None:
            raise ValueError(f"EDM has no network with {name!r}; change the options it comes from")
        rest = _renamed(name.removeprefix(f"{place}."), _EDM_PIECES)
        names[f"{places[place]}.{rest}"] = name
    return names


def _edm_modules(sizes: Sequence[int], blocks: int, is_adm: bool) -> dict[str, str]:
    """{name of a module here: EDM's name}; EDM's names in `enc` and `dec` contain the image size.

    It covers every network with these levels, so that no single network has all of them.

    Args:
        sizes: image sizes of the levels, falling.
        blocks: largest number of blocks of a level.
        is_adm: EDM's ADM, not DDPM++.
    """
    at = [f"{size}x{size}_" for size in sizes]  # prefix of the names of a level
    out = "out_" if is_adm else f"dec.{at[0]}aux_"
    places = {
        "features": "map_noise",
        "label_embedding": "map_label",
        "augment_embedding": "map_augment",
        "dense1": "map_layer0",
        "dense2": "map_layer1",
        "stem": f"enc.{at[0]}conv",
        "middle1": f"dec.{at[-1]}in0",
        "middle_attention": f"dec.{at[-1]}in0",
        "middle2": f"dec.{at[-1]}in1",
        "head.norm": f"{out}norm",
        "head.conv": f"{out}conv",
    }
    for i, size in enumerate(at):
        encoder, decoder = f"encoder.{i}", f"decoder.{len(at) - 1 - i}"
        for level, side in ((encoder, "enc"), (decoder, "dec")):
            for j in range(blocks):
                for part in ("block", "attention"):
                    places[f"{level}.stages.{j}.{part}"] = f"{side}.{size}block{j}"
        for part in ("norm", "conv"):
            places[f"{decoder}.progressive.head.{part}"] = f"dec.{size}aux_{part}"
        if i > 0:
            finer = f"encoder.{i - 1}"
            places[f"{finer}.down"] = f"enc.{size}down"
            places[f"{finer}.progressive_input.conv"] = f"enc.{size}aux_skip"
            places[f"{finer}.progressive_input.down.fir_conv"] = f"enc.{size}aux_residual"
            places[f"{decoder}.up"] = f"dec.{at[i - 1]}up"
    return places


def _edm2_name(name: str, sizes: Sequence[int]) -> str:
    """EDM2's name of a parameter: levels by the `sizes` of square images, from the finest on."""
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return f"unet.{name}"
    level, _, rest = rest.partition(".")  # of the decoder from the coarsest on
    size = sizes[int(level) if side == "encoder" else -1 - int(level)]
    return f"unet.{side[:3]}.{size}x{size}_{rest}"


# --- networks of other sizes --------------------------------------------------------------------


def match_names(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Map names of this program to the published names of weights: {name here: published name}.

    The weights may come from a network of other sizes. Each is named as its own network would be
    named here. Several names can be possible; a network has at most one of them. Blocks of
    `all_modules` are matched with those of `model`.

    Args:
        model: the network that is to have the weights.
        shapes: of the weights, by published name without wrappers.
    """
    if any(name.startswith("all_modules.") for name in shapes):
        return _paired_by_number(model, shapes)
    if isinstance(model, NCSNpp):
        return _paired_by_size(shapes)
    if isinstance(model, EDM2UNet):
        return _edm2_pairs(shapes)
    return {name: published for published, name in reference_names(model).items()}


def _paired_by_size(names: Collection[str]) -> dict[str, str]:
    """`match_names` weights of EDM."""
    of_levels = (re.match(r"enc\.(\d{1,5})x\1_(?:block(\d\d?)\.)?", name) for name in names)
    levels = [match.groups(default="0") for match in of_levels if match]
    sizes = sorted({int(size) for size, _ in levels}, reverse=True)
    if not 0 < len(sizes) <= MAX_LEVELS:
        return {}
    blocks = 2 + max(int(block) for _, block in levels)  # of the decoder, which has one more
    modules: dict[str, list[str]] = {}
    for place, published in _edm_modules(sizes, blocks, "out_norm.weight" in names).items():
        modules.setdefault(published, []).append(place)
    pieces = {published: piece for piece, published in _EDM_PIECES.items()}
    places = {}
    for name in names:
        length = 2 if name.startswith(("enc.", "dec.")) else 1
        module, rest = ".".join(name.split(".")[:length]), ".".join(name.split(".")[length:])
        for place in modules.get(module, ()):
            places[f"{place}.{_renamed(rest, pieces)}"] = name
    return places


def _edm2_pairs(names: Collection[str]) -> dict[str, str]:
    """`match_names` weights of EDM2."""
    levels = {name: re.match(r"unet\.(enc|dec)\.(\d{1,5})x\2_", name) for name in names}
    sizes = sorted({int(match[2]) for match in levels.values() if match}, reverse=True)
    pairs = {}
    for name, match in levels.items():
        if match:
            level = sizes.index(int(match[2]))
            place = f"encoder.{level}" if match[1] == "enc" else f"decoder.{len(sizes) - 1 - level}"
            pairs[f"{place}.{name[match.end() :]}"] = name
        elif name.startswith("unet."):
            pairs[name.removeprefix("unet.")] = name
    return pairs


def _paired_by_number(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """`match_names` weights in `all_modules`: the two lists of blocks are compared, as in a diff.

    A block that only one of them has shifts the numbers after it. Attention goes with the block
    before it, since a larger image has the same blocks and attention in other places.
    """
    published: dict[int, Pieces] = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"all_modules\.(\d{1,6})\.(.+)", name):
            published.setdefault(int(match[1]), {})[match[2]] = tuple(shape)
    published, blocks = dict(sorted(published.items())), dict(_blocks(model))
    here: dict[str, Pieces] = {
        path: {_renamed(name, _PIECES): tuple(p.shape) for name, p in block.named_parameters()}
        for path, block in blocks.items()
    }
    published_attention, model_attention = _attention_after(published), _attention_after(here)
    numbers, paths = [*published_attention], [*model_attention]
    diff = SequenceMatcher(
        None,
        [frozenset(published[number].items()) for number in numbers],
        [frozenset(here[path].items()) for path in paths],
        autojunk=False,
    )
    pairs: list[tuple[int | None, str | None]] = []
    for _, i, i_stop, j, j_stop in diff.get_opcodes():
        if i_stop - i == j_stop - j:
            pairs += zip(numbers[i:i_stop], paths[j:j_stop], strict=True)
    pairs += [(published_attention[number], model_attention[path]) for number, path in pairs]
    return {
        f"{path}.{name}": f"all_modules.{number}.{_renamed(name, _PIECES)}"
        for number, path in pairs
        if None not in (number, path) and _kind(published[number]) == _kind(here[path])
        for name, _ in blocks[path].named_parameters()
    }


def _attention_after(blocks: Mapping[T, Pieces]) -> dict[T, T | None]:
    """{block: the attention that follows it, or None}, in their order."""
    followed: dict[T, T | None] = {}
    for block, pieces in blocks.items():
        if "NIN_3.W" in pieces and followed:
            followed[next(reversed(followed))] = block
        else:
            followed[block] = None
    return followed


def _kind(pieces: Pieces) -> dict[str, int]:
    """Number of dimensions of each piece: equal for blocks that differ only in width."""
    return {name: len(shape) for name, shape in pieces.items()}


# --- reading -------------------------------------------------------------------------------------


@torch.no_grad()
def load_reference_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy published weights into `model`, all of them or, on an error, none.

    Args:
        model: network of `create_model`, for the config that the weights were trained with.
        state_dict: published name to tensor, with or without leading `module.`, `model.` and
            `_orig_mod.` in any order; `sigmas` and resampling filters, which follow from the
            config, are skipped.

    Raises:
        ValueError: a name is missing or unknown, a shape is wrong, a value is not finite, or it is
            no tensor of numbers; the message names it.
    """
    parameters = dict(model.named_parameters())
    for name, (_, value) in published_weights(model, state_dict).items():
        parameters[name].copy_(value)


def without_wrappers(weights: Mapping[str, T]) -> dict[str, T]:
    """Weights under their names without those of wrappers, DataParallel and `torch.compile`.

    Raises:
        ValueError: a name is no string, or two become one.
    """
    plain: dict[str, T] = {}
    for name, value in weights.items():
        if type(name) is not str:
            raise ValueError(f"the weights have the name {shown(name)}, which is no string")
        short = re.sub(r"^((module|model|_orig_mod)\.)+|\b_orig_mod\.", "", name)
        if short in plain:
            raise ValueError(f"the weights have {shown(short)} twice, once as {shown(name)}")
        plain[short] = value
    return plain


def published_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor | StoredTensor]
) -> dict[str, tuple[str, Tensor | StoredTensor]]:
    """{name of each parameter in `model`: its published name and value}.

    Raises as `load_reference_state_dict`; the numbers of a `StoredTensor` are not checked.
    """
    weights = {
        name: value
        for name, value in without_wrappers(state_dict).items()
        if name.rsplit(".", 1)[-1] not in DERIVED and not name.startswith(OF_OBJECTIVE)
    }
    names, parameters = reference_names(model), dict(model.named_parameters())
    for problem, others in (
        ("lack", [name for name in names if name not in weights]),
        ("have the unknown", [name for name in weights if name not in names]),
    ):
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise ValueError(
                f"the weights {problem} {shown(others[0])}{more}; use the config they were trained "
                "with"
            )
    for name, own_name in names.items():
        try:
            check_tensor(weights[name], f"weight {name!r}", parameters[own_name], cast=True)
        except ValueError as error:
            raise ValueError(f"{error}; use the config it was trained with") from error
    return {own_name: (name, weights[name]) for name, own_name in names.items()}
