"""The keys of a config under their dotted names, and what is said of a key that is none."""

import difflib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from configs.published import UNREAD


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{"training.n_iters": 2000, "model.ch_mult": [1, 2], ...}`: tuples become lists."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{name}": entry for name, entry in flatten(value).items()}
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def explain_unknown(key: str, known: Iterable[str]) -> str:
    """One line on a key that is not among the `known` ones, with the nearest of these."""
    if key in UNREAD:
        return f"{key} is a published key that nothing reads ({UNREAD[key]}): remove it"
    known, (section, _, name) = list(known), key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    if not section:
        beside |= {k: k for k in (k.partition(".")[0] for k in known)}
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    near = [beside[n] for n in difflib.get_close_matches(name, beside, 1)]
    near += difflib.get_close_matches(key, elsewhere, 1, 0)
    return f"unknown config value {key}" + (f'. Did you mean "{near[0]}"?' if near else "")
