"""Random numbers that depend on a purpose and a key alone, not on earlier draws."""

import zlib

import numpy as np
import torch


def keyed_seed(purpose: str, *key: int) -> int:
    """A 64-bit seed for `purpose` and the integers `key` (each >= 0), different for each."""
    words = (zlib.crc32(purpose.encode()), len(key), *key)  # the length: (1,) is not (1, 0)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def keyed_generator(device: torch.device | str, purpose: str, *key: int) -> torch.Generator:
    """A generator on `device` that starts from `keyed_seed`."""
    return torch.Generator(device).manual_seed(keyed_seed(purpose, *key))
