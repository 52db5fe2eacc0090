"""Two sets of images, or their statistics, compared by all metrics.

    python3 -m metrics.compare A B --features pixels,network:dinov2 --networks dinov2.pt2

A takes the place of samples and B that of the data. Each is a folder or zip of images, an .npy or
.npz of them (also ADM's arr_0, our samples.npz, the folder of rounds ckpt_K of an evaluation), or a
file of statistics (of EDM, ADM, clean-fid, or ours), recognised by content. docs/metrics.md says
what the numbers mean. The table is printed, and the numbers are written to metrics.json.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

from configs.default import get_default_config
from configs.keys import with_home
from execution import named_device
from metrics.distances import OURS, Gaussian, TooFew, frechet_distance
from metrics.features import FeatureSpace, get_spaces
from metrics.image_sets import ImageSet, in_words
from metrics.table import Comparison, compare, compare_halves, remarks
from reports import streams
from reports.table import format_table, metric_rows
from sources.codec import EightBitImages
from storage.files import atomic_write

# Names in the errors of an evaluation, and what this program calls them.
ARGUMENTS = {"data.path=": "", "eval.features": "--features", "eval.inception_path": "--networks"}


def compare_sets(
    a: ImageSet, b: ImageSet, spaces: list[FeatureSpace], device: torch.device
) -> dict[str, Any]:
    """The metrics of `a` against `b` in each space, by their keys in the report of an evaluation.

    `spaces` are () where both are statistics. Raises ValueError, in one line, where the sides do
    not fit together.
    """
    labels = [space.label for space in spaces]
    report: dict[str, Any] = {"features": ",".join(labels)} if spaces else {}
    for i, space in enumerate(spaces or [None]):
        entries = _in_space(a, b, space, device)
        prefix = f"{space.label}:" if i else ""
        report |= {f"{prefix}{key}": value for key, value in entries.items()}
    return report


def _in_space(a: ImageSet, b: ImageSet, space: FeatureSpace | None, device: torch.device) -> dict:
    shapes = [side.images.shape for side in (a, b) if side.images]
    names = [str(side.statistics["space"]) for side in (a, b) if "space" in side.statistics]
    names = [space.name] if space else names
    identity = {"space": names[0]} if names else {}
    identity |= {"shape": "{}x{}x{}".format(*shapes[0])} if shapes else {}
    reference = b.reference(space, identity)
    if a.images:
        features, logits = a.features(space)
    else:
        samples, logits = a.reference(space, identity), None
        if not samples.complete:
            return {"fid": _of_moments(a, samples.gaussian, b, reference.gaussian)}
        features = samples.features
    backend = space.backend if space else OURS
    device = device if device.type == "cuda" else torch.device("cpu")  # which has float64
    comparison = Comparison(features, logits, reference, backend, device)
    of_a, of_b = (side.images and side.images.classes() for side in (a, b))
    if of_a and of_b and of_a.names == of_b.names and reference.index is not None:
        comparison.labels, comparison.reference_labels = of_a.labels, of_b.labels[reference.index]
    return compare(comparison) | _floor(comparison)


def _of_moments(a: ImageSet, of_a: Gaussian, b: ImageSet, of_b: Gaussian | None) -> float:
    if of_b is None:
        raise ValueError(f"{b.path} has a single image, which has no covariance")
    if len(of_a.mean) != len(of_b.mean):
        raise ValueError(
            f"{a.path} holds statistics of {len(of_a.mean)} features, {b.path} of "
            f"{len(of_b.mean)}: they are of different networks"
        )
    return frechet_distance(of_a, of_b)


def _floor(comparison: Comparison) -> dict[str, float | str]:
    """The metrics of two halves of B; see `compare_halves`."""
    if comparison.reference.features is None:
        return {}
    try:
        return compare_halves(comparison)
    except TooFew as error:
        return {"half_first_remark": f"left out: data against data: {error}"}


def spaces_of(
    a: ImageSet, b: ImageSet, features: str, networks: str, device: torch.device
) -> list[FeatureSpace]:
    """The spaces that `features` names, "" being that of the `networks` or, without any, pixels.

    None for two statistics files, whose spaces are their own. Raises ValueError where the images
    differ in size, and where `get_spaces` does.
    """
    shapes = {side.path: side.images.shape for side in (a, b) if side.images}
    if len({*shapes.values()}) > 1:
        sizes = " and ".join(f"{path} of {in_words(shape)}" for path, shape in shapes.items())
        raise ValueError(f"the images have different sizes: {sizes} (height, width, channels)")
    if not features and not shapes:
        return []
    features = features or ("network" if networks else "pixels")
    height, width, channels = next(iter(shapes.values()), (32, 32, 3))
    return get_spaces(features, networks, EightBitImages((channels, height, width)), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, help="samples: a folder, zip, .npy, .npz, or statistics")
    parser.add_argument("b", type=Path, help="data: as a")
    parser.add_argument(
        "--features", default="", help="spaces, as eval.features; default: network, else pixels"
    )
    parser.add_argument("--networks", default="", help="their files, as eval.inception_path")
    parser.add_argument("--out", type=Path, default=Path("metrics.json"), help="the numbers, JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device, data = named_device(options.device), get_default_config().data
        a, b = (ImageSet.open(path, data) for path in (options.a, options.b))
        networks = with_home("--networks", options.networks)
        spaces = spaces_of(a, b, options.features, networks, device)
        report = compare_sets(a, b, spaces, device)
        content = {"a": str(options.a), "b": str(options.b), "a_images": len(a), "b_images": len(b)}
        content |= {"spaces": {space.label: space.name for space in spaces}} | report
        out = Path(with_home("--out", str(options.out)))
        with atomic_write(out) as file:
            file.write(json.dumps(content, indent=1, default=float).encode())
    except (ValueError, OSError) as error:
        message = str(error)
        for key, argument in ARGUMENTS.items():
            message = message.replace(key, argument)
        parser.error(message)
    rows = [("images", f"{len(a):,} and {len(b):,}"), *metric_rows(report)]
    print("\n  ".join([format_table(rows, f"{a.path} against {b.path}"), *remarks(report)]))
    print(f"numbers: {out}")


if __name__ == "__main__":
    streams.make_lenient()
    main()
