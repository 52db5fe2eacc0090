"""Spaces in which samples are compared with data.

A feature space turns images into features (n, K) and, where its network classifies, logits (n, L).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from configs import keys
from configs.schema import Key, Several, Text
from metrics.distances import OURS, Backend
from metrics.networks import Extractor, inception, network
from sources.codec import Codec
from sources.dtypes import tensor_of
from storage.files import one_line

EXTRACTED_AT_ONCE = 100  # images that a feature network sees at a time
WIDEST = 12_288  # features whose covariance is still worth computing: 1.1 GiB, 64 x 64 x 3 pixels

KEYS = {
    "eval.features": Key(
        "inception",
        Several(registry="metrics.features.FEATURES", labelled=True),
        "spaces in which samples are compared: 'network' (a file), 'network:dinov2' (its name in "
        "reports), 'inception' (tensorflow-gan's), 'pixels'; docs/metrics.md",
    ),
    "eval.inception_path": Key(
        "",
        Text(),
        "the file of the network, a program of torch.export or TorchScript; for 'inception' the "
        "folder of a SavedModel ('': fetched); several with commas between them, in the order of "
        "eval.features",
        of_machine="always",
    ),
}


@dataclass(frozen=True)
class FeatureSpace:
    """A space of `eval.features`: called with images as stored, (n, H, W, C), it gives features.

    They are float32 (n, K), with logits or None. `label` is its name in reports, that in `FEATURES`
    or the user's; `name` tells weights and codecs apart. `width` is K, and logits are
    (n, `classes`); 0: none. `prepare` makes what `extract` takes of stored images.
    """

    label: str
    name: str
    width: int
    classes: int
    extract: Extractor
    backend: Backend
    prepare: Callable[[NDArray], NDArray]

    def __call__(self, images: NDArray) -> tuple[NDArray, NDArray | None]:
        starts = range(0, len(images), EXTRACTED_AT_ONCE)
        blocks = [self.extract(self.prepare(images[i : i + EXTRACTED_AT_ONCE])) for i in starts]
        features, logits = zip(*blocks, strict=True)
        return np.concatenate(features), None if logits[0] is None else np.concatenate(logits)


def pixels(path: str, device: torch.device) -> tuple[str, Extractor, Backend]:
    """Flattened pixels in [0, 1], or scaled arrays; there is no network to load."""

    def extract(numbers: NDArray) -> tuple[NDArray, None]:
        return numbers.reshape(len(numbers), -1).astype(np.float32), None

    return "pixels", extract, OURS


# Loaders of the spaces of eval.features: (path of the network, device) -> name, extractor, backend.
# One with the attribute `needs_path` gets a path of eval.inception_path, any other "". An extractor
# gets pictures, uint8, or numbers on one scale where its loader has `takes_numbers`.
inception.needs_path = network.needs_path = pixels.takes_numbers = True
FEATURES = {
    "inception": inception,
    "network": network,
    "torchscript": network,  # its name in older configs
    "pixels": pixels,
}


def get_spaces(text: str, paths: str, codec: Codec, device: torch.device) -> list[FeatureSpace]:
    """The feature spaces of `eval.features`, the value `text`, of data of `codec`.

    `paths` is the path of the network of the space that needs one; for several such spaces the
    paths of all, in their order, with commas between them.

    Raises ValueError, in one line, where a space is named twice, where the number of paths is not
    that of such spaces, and where `get_space` does.
    """
    kinds = dict(_labelled(entry) for entry in text.split(","))
    if len(kinds) <= text.count(","):
        raise ValueError(f"eval.features={text!r} names a space twice: label them, network:dinov2")
    loaders = {label: keys.named(FEATURES, "eval.features", kind) for label, kind in kinds.items()}
    networks = [label for label, load in loaders.items() if getattr(load, "needs_path", False)]
    separate_paths = [path.strip() for path in paths.split(",")] if len(networks) > 1 else [paths]
    if len(separate_paths) != max(1, len(networks)):
        raise ValueError(
            f"eval.inception_path={paths!r} does not fit: eval.features={text!r} "
            f"needs {len(networks)} paths with commas between them, of {', '.join(networks)}"
        )
    path_of = dict(zip(networks, separate_paths, strict=False))  # no network reads no path
    return [
        get_space(kind, path_of.get(label, ""), codec, device, label)
        for label, kind in kinds.items()
    ]


def _labelled(entry: str) -> tuple[str, str]:
    """Label and kind of an entry of `eval.features`, "network:dinov2" or "pixels"."""
    kind, _, label = entry.strip().lower().partition(":")
    return label or kind, kind


def get_space(
    kind: str, path: str, codec: Codec, device: torch.device, label: str = ""
) -> FeatureSpace:
    """The feature space `kind` of `FEATURES`, tried on two blank images that `codec` stores.

    `path` is that of its network, `label` its name in reports. Raises ValueError, in one line,
    where the network cannot be loaded or used, or has more than `WIDEST` features.
    """
    channels, *sides = codec.data_shape
    load = keys.named(FEATURES, "eval.features", kind)
    name, extract, backend = load(path, device)
    prepare, depends_on = codec.pictures, f"{codec.identity} {codec.windows}"
    if getattr(load, "takes_numbers", False):
        prepare, depends_on = partial(_numbers, codec), codec.identity
    if codec.dtype != "uint8":
        name += f"-{hashlib.sha256(depends_on.encode()).hexdigest()[:8]}"
    blank = np.zeros((2, *sides, channels), codec.dtype)
    try:
        pool_3, logits = extract(prepare(blank))
        width, classes = pool_3.shape[1], 0 if logits is None else logits.shape[1]
    except Exception as error:  # an untrusted network fails in any way
        raise ValueError(
            f"eval.features={kind!r}: the network at {path or name} does not take images of shape "
            f"{blank.shape[1:]}: {one_line(error)}"
        ) from error
    if width > WIDEST:
        raise ValueError(
            f"eval.features={kind!r} gives {width:,} features of each image, a covariance of "
            f"{width**2 / 2**27:,.0f} GiB; at most {WIDEST:,} are compared: use 'network'"
        )
    return FeatureSpace(label or kind, name, width, classes, extract, backend, prepare)


def _numbers(codec: Codec, images: NDArray) -> NDArray:
    """Images as stored (n, H, W, C) as numbers whose distances are meaningful."""
    return codec.comparable(codec.units(tensor_of(images))).permute(0, 2, 3, 1).numpy()
