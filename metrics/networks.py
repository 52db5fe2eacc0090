"""Networks that give the features of images: a file of PyTorch, and TensorFlow's Inception."""

import hashlib
import importlib.util
import os
import tempfile
import threading
import urllib.request
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics.distances import KERNEL_BLOCK, OURS, Backend, Gaussian
from storage import programs
from storage.files import one_line

Images = NDArray[np.uint8]  # (n, H, W, C)
Extractor = Callable[[Images], tuple[NDArray, NDArray | None]]  # features (n, K), logits (n, L)

INCEPTION_URL = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
INCEPTION_SIZE = 299
FETCH_SECONDS = 5  # within which the network has to answer
TENSORFLOW = ("tensorflow", "tensorflow_gan", "tensorflow_hub", "tensorflow_probability")


def network(path: str, device: torch.device) -> tuple[str, Extractor, Backend]:
    """The network in the file at `path`, run on `device`.

    It is a program of torch.export or a TorchScript module, as the content tells. It is called with
    uint8 (n, 3, H, W), resizes and scales by itself, and returns features, or features and logits
    (docs/metrics.md). Either kind of file is code: loading it can run anything.
    """
    if not Path(path).is_file():
        raise ValueError(f"eval.features='network' needs a file: eval.inception_path={path!r}")
    content = programs.read(path)
    is_exported = programs.is_exported(content)
    call = (programs.load_exported if is_exported else _torchscript)(content, path, device)

    @torch.no_grad()
    def extract(images: Images) -> tuple[NDArray, NDArray | None]:
        x = torch.from_numpy(np.ascontiguousarray(_three_channels(images))).permute(0, 3, 1, 2)
        outputs = call(x.to(device))
        features, logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        return _flat(features), None if logits is None else _flat(logits)

    kind = "pt2" if is_exported else "torchscript"
    return f"{kind}-{_digest_files(Path(path))}", extract, OURS


def _flat(outputs: Tensor) -> NDArray[np.float32]:
    return outputs.flatten(1).float().cpu().numpy()


def _torchscript(content: bytes, path: str, device: torch.device) -> Callable:
    """The TorchScript module in `content`, which was read from the file at `path`.

    One with the arguments `return_features` and `no_output_bias` is the 2015 Inception graph that
    NVIDIA published as TorchScript, which gives either features or probabilities.
    """
    module = programs.load_torchscript(content, path, device)
    arguments = {argument.name for argument in module.forward.schema.arguments}

    def published(x: Tensor) -> tuple[Tensor, Tensor]:
        # Inception Scores are published without the output's bias
        probabilities = module(x, no_output_bias=True)
        smallest = torch.finfo(probabilities.dtype).tiny
        return module(x, return_features=True), probabilities.clamp_min(smallest).log()

    is_published = arguments >= {"return_features", "no_output_bias"}
    return published if is_published else module


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
            "Python 3.11 only; eval.features='network' does without"
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
            "and name its folder in eval.inception_path, or use eval.features='network'"
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
