"""Spaces in which samples are compared with data.

A feature space turns images into features (n, K) and, where its network classifies, logits (n, L).
"""

import hashlib
import importlib.util
import os
import tempfile
import threading
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import keys
from configs.schema import Key, Several, Text
from metrics.distances import KERNEL_BLOCK, OURS, Backend, Gaussian
from storage.files import Spec, one_line

Images = NDArray[np.uint8]  # (n, H, W, C)
Extractor = Callable[[Images], tuple[NDArray, NDArray | None]]

EXTRACTED_AT_ONCE = 100  # images that a feature network sees at a time
WIDEST = 12_288  # features whose covariance is still worth computing: 1.1 GiB, 64 x 64 x 3 pixels
FETCH_SECONDS = 5  # within which the network has to answer

INCEPTION_URL = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
INCEPTION_SIZE = 299
KEYS = {
    "eval.features": Key(
        "inception",
        Several(registry="metrics.features.FEATURES"),
        "features by which samples are compared: 'inception' (tensorflow-gan's), 'torchscript' (a "
        "file, no TensorFlow), 'pixels'",
    ),
    "eval.inception_path": Key(
        "",
        Text(),
        "the network: for 'inception' the folder of a SavedModel ('': fetched), for 'torchscript' "
        "its file; for both, with a comma between them in the order of eval.features",
    ),
}

TENSORFLOW = ("tensorflow", "tensorflow_gan", "tensorflow_hub", "tensorflow_probability")


@dataclass(frozen=True)
class FeatureSpace:
    """A space of `eval.features`: called, it gives float32 features (n, K), and logits or None.

    `kind` is its name in `FEATURES`; `name` also tells the weights apart. `width` is K, and logits
    are (n, `classes`); 0: none.
    """

    kind: str
    name: str
    width: int
    classes: int
    extract: Extractor
    backend: Backend

    def __call__(self, images: Images) -> tuple[NDArray, NDArray | None]:
        starts = range(0, len(images), EXTRACTED_AT_ONCE)
        blocks = [self.extract(images[i : i + EXTRACTED_AT_ONCE]) for i in starts]
        features, logits = zip(*blocks, strict=True)
        return np.concatenate(features), None if logits[0] is None else np.concatenate(logits)

    def spec(self, n: int) -> Spec:
        """Spec of a file with the features of `n` images."""
        logits = {"logits": ("f", (n, self.classes))} if self.classes else {}
        return {"pool_3": ("f", (n, self.width))} | logits


def pixels(path: str, device: torch.device) -> tuple[str, Extractor, Backend]:
    """Pixels in [0, 1], flattened; there is no network to load."""

    def extract(images: Images) -> tuple[NDArray, None]:
        return (images.reshape(len(images), -1) / 255).astype(np.float32), None

    return "pixels", extract, OURS


def torchscript(path: str, device: torch.device) -> tuple[str, Extractor, Backend]:
    """The TorchScript module at `path`, run on `device`.

    It is called with uint8 (n, 3, H, W) and resizes and scales by itself. It returns features, or
    features and logits; or, with the arguments `return_features` and `no_output_bias` of the 2015
    Inception graph that NVIDIA published as TorchScript, either features or probabilities.
    """
    if not Path(path).is_file():
        raise ValueError(f"eval.features='torchscript' needs a file: eval.inception_path={path!r}")
    try:
        module = torch.jit.load(path, map_location=device).eval()
        arguments = {argument.name for argument in module.forward.schema.arguments}
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(f"{path} is not a TorchScript module: {one_line(error)}") from error

    def call(x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not arguments >= {"return_features", "no_output_bias"}:
            outputs = module(x)
            return outputs if isinstance(outputs, tuple) else (outputs, None)
        # Inception Scores are published without the output's bias
        probabilities = module(x, no_output_bias=True)
        smallest = torch.finfo(probabilities.dtype).tiny
        return module(x, return_features=True), probabilities.clamp_min(smallest).log()

    @torch.no_grad()
    def extract(images: Images) -> tuple[NDArray, NDArray | None]:
        x = torch.from_numpy(np.ascontiguousarray(_three_channels(images))).permute(0, 3, 1, 2)
        outputs = call(x.to(device))
        return tuple(y if y is None else y.flatten(1).float().cpu().numpy() for y in outputs)

    return f"torchscript-{_digest_files(Path(path))}", extract, OURS


def inception(path: str, device: torch.device) -> tuple[str, Extractor, Backend]:
    """The 2015 Inception graph of tensorflow-gan, with its metrics.

    The SavedModel lies in the folder `path`, or where TF-Hub keeps it (TFHUB_CACHE_DIR), or is
    fetched. Images are resized to 299 x 299 bilinearly without half pixels, like TensorFlow 1 and
    the graph itself.
    """
    missing = [name for name in TENSORFLOW if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"eval.features='inception' needs {', '.join(missing)}, which requirements.txt has for "
            "Python 3.11 only; eval.features='torchscript' does without"
        )
    source = _find_saved_model(path)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # tensorflow-gan is older than TensorFlow and calls what ages
    with warnings.catch_warnings(action="ignore"):  # of what TF-Hub imports
        import tensorflow_hub

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)  # the sampler needs the rest
    try:
        folder = tensorflow_hub.resolve(source)
        network = tensorflow_hub.load(folder)
    except Exception as error:  # TensorFlow's errors have no common type
        raise ValueError(f"no network can be loaded from {source}: {one_line(error)}") from error
    if not callable(network):
        raise ValueError(f"the SavedModel in {folder} cannot be called with images")

    def extract(images: Images) -> tuple[NDArray, NDArray]:
        x = (tf.cast(_three_channels(images), tf.float32) - 127.5) / 127.5
        x = tf.compat.v1.image.resize_bilinear(x, [INCEPTION_SIZE, INCEPTION_SIZE])
        outputs = network(x)
        pool_3, logits = outputs["pool_3"].numpy(), outputs["logits"].numpy()
        return pool_3.reshape(len(images), -1), logits.reshape(len(images), -1)

    return f"inception-{_digest_files(Path(folder))}", extract, tensorflow_gan()


def tensorflow_gan() -> Backend:
    """tensorflow-gan's own metrics, on float64 activations."""
    import tensorflow as tf
    from tensorflow_gan.python.eval import classifier_metrics as theirs

    def call(metric: Callable, *arrays: NDArray, **options) -> float:
        return float(metric(*(tf.convert_to_tensor(x, tf.float64) for x in arrays), **options))

    def frechet(fake: NDArray, gaussian: Gaussian, real: NDArray | None) -> float:
        if real is None:  # theirs takes activations only
            return OURS.frechet_distance(fake, gaussian, real)
        return call(theirs.frechet_classifier_distance_from_activations, real, fake)

    kernel = theirs.kernel_classifier_distance_from_activations
    return Backend(
        inception_score=partial(call, theirs.classifier_score_from_logits),
        frechet_distance=frechet,
        kernel_distance=partial(call, kernel, max_block_size=KERNEL_BLOCK),
    )


def _find_saved_model(path: str) -> str:
    """A folder with the Inception graph, or its address where that answers; else ValueError."""
    if path:
        if not (Path(path) / "saved_model.pb").is_file():
            raise ValueError(f"eval.inception_path={path!r} is no SavedModel: no saved_model.pb")
        return path
    cache = os.environ.get("TFHUB_CACHE_DIR") or Path(tempfile.gettempdir()) / "tfhub_modules"
    cached = Path(cache) / hashlib.sha1(INCEPTION_URL.encode()).hexdigest()
    if not (cached / "saved_model.pb").is_file():
        _check_reachable(f"{INCEPTION_URL}?tf-hub-format=compressed")
    return INCEPTION_URL


def _check_reachable(url: str) -> None:
    """ValueError where `url` does not answer; TF-Hub itself would try for minutes.

    A thread, since a name server that does not answer cannot be given a time limit.
    """
    failure: list[str] = [f"no answer within {FETCH_SECONDS} s"]

    def fetch() -> None:
        try:
            with urllib.request.urlopen(url, timeout=FETCH_SECONDS):
                failure.clear()
        except OSError as error:
            failure[:] = [str(error)]

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    if failure:
        raise ValueError(
            f"the Inception graph cannot be fetched from {url} ({failure[0]}): unpack it elsewhere "
            "and name its folder in eval.inception_path, or use eval.features='torchscript'"
        )


def _three_channels(images: Images) -> Images:
    return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images


def _digest_files(path: Path) -> str:
    """Digest, eight hexadecimal digits, of the content of a file, or of all files in a folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:8]


# Loaders of the spaces of eval.features: (path of the network, device) -> name, extractor, backend.
# One with the attribute `needs_path` gets a path of eval.inception_path, any other "".
inception.needs_path = torchscript.needs_path = True
FEATURES = {"inception": inception, "torchscript": torchscript, "pixels": pixels}


def get_spaces(
    kinds: str, paths: str, shape: tuple[int, int, int], device: torch.device
) -> list[FeatureSpace]:
    """The feature spaces `kinds`, names of `FEATURES` with commas between them.

    `paths` is the path of the network of the kind that needs one; for several such kinds the paths
    of all, in the order of `kinds`, with commas between them.

    Raises ValueError, in one line, where a space is named twice, where the number of paths is not
    that of such kinds, and where `get_space` does.
    """
    names = [name.strip().lower() for name in kinds.split(",")]
    if len({*names}) < len(names):
        raise ValueError(f"eval.features={kinds!r} names a space twice")
    loaders = {name: keys.named(FEATURES, "eval.features", name) for name in names}
    networks = [name for name, load in loaders.items() if getattr(load, "needs_path", False)]
    separate_paths = [path.strip() for path in paths.split(",")] if len(networks) > 1 else [paths]
    if len(separate_paths) != max(1, len(networks)):
        raise ValueError(
            f"eval.inception_path={paths!r} has another number of commas: eval.features={kinds!r} "
            f"needs {len(networks)} paths with commas between them, of {', '.join(networks)}"
        )
    path_of = dict(zip(networks, separate_paths, strict=False))  # no network reads no path
    return [get_space(name, path_of.get(name, ""), shape, device) for name in names]


def get_space(
    kind: str, path: str, shape: tuple[int, int, int], device: torch.device
) -> FeatureSpace:
    """The feature space `kind` of `FEATURES`, tried on two blank images of `shape` (C, H, W).

    `path` is that of its network. Raises ValueError, in one line, where the network cannot be
    loaded or used, or has more than `WIDEST` features.
    """
    channels, *sides = shape
    name, extract, backend = keys.named(FEATURES, "eval.features", kind)(path, device)
    blank = np.zeros((2, *sides, channels), dtype=np.uint8)
    try:
        pool_3, logits = extract(blank)
        width, classes = pool_3.shape[1], 0 if logits is None else logits.shape[1]
    except Exception as error:  # an untrusted network fails in any way
        raise ValueError(
            f"eval.features={kind!r}: the network at {path or name} does not take images of shape "
            f"{blank.shape[1:]}: {one_line(error)}"
        ) from error
    if width > WIDEST:
        raise ValueError(
            f"eval.features={kind!r} gives {width:,} features of each image, a covariance of "
            f"{width**2 / 2**27:,.0f} GiB; at most {WIDEST:,} are compared: use 'inception' or "
            "'torchscript'"
        )
    return FeatureSpace(kind, name, width, classes, extract, backend)
