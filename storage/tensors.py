"""Nested dictionaries and lists of tensors, as states are."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Copy `value`, of dictionaries, lists and tuples, with `function` of each tensor, in order."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, entry) for entry in value)
    return value
