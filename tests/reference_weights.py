"""Weights for parity tests, made from names and shapes alone, so that the tests ship none.

The published networks were measured with exactly these. An entry is drawn by the generator that
the CRC-32 of its published name seeds: matrices and convolutions are normal with variance
1 / fan_in; `weight`, `alpha` and `gamma` vectors are 1 + normal / 10; the Fourier frequencies, the
one vector named `W`, are standard normal; other vectors are normal / 10.
"""

import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def expand(document: dict, state: list) -> dict[str, tuple[int, ...]]:
    """Name to shape, in published order, of a `state`: pairs of a prefix and a part's number."""
    return {
        prefix + name: tuple(shape)
        for prefix, part in state
        for name, shape in document["parts"][part]
    }


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 value of the published entry `name`."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.split(".")[-1]
    if len(shape) > 1:
        # NIN matrices, named W, map their first axis to their second; all others the reverse.
        values /= math.sqrt(shape[0] if leaf == "W" else math.prod(shape[1:]))
    elif leaf in ("weight", "alpha", "gamma"):
        values = 1 + 0.1 * values
    elif leaf != "W":
        values *= 0.1
    return torch.from_numpy(values.astype(np.float32))


def case_arrays(name, case):
    """Arrays of a case in a golden file, as tensors; its one-hot labels as numbers, or None."""
    with np.load(GOLDEN / name) as file:
        arrays = {
            name.removeprefix(f"{case}/"): torch.from_numpy(file[name])
            for name in file
            if name.startswith(f"{case}/")
        }
    labels = arrays.get("labels")
    return arrays | {"labels": None if labels is None else labels.argmax(dim=1)}
