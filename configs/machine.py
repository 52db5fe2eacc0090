"""Keys whose values belong to a machine: code to run, places to write, folders to read.

They are taken from the command line, a config file or the defaults. A workdir or a checkpoint may
be a stranger's, so its own values of these keys are not used unless the user trusts it.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.default import all_keys
from configs.effects import without_effect
from configs.keys import get, with_home
from configs.schema import Text

# Sections that a mode of the program does not read.
UNREAD = {"eval": (), "sample": ("eval",)}
UNREAD |= dict.fromkeys(("data", "export"), ("eval", "sampling"))


def reset(config: ConfigDict, single_file: bool = False) -> dict[str, Any]:
    """Set the keys of a machine to their defaults; the other values that they had, by key.

    Args:
        config: it is changed.
        single_file: it is that of a checkpoint or shared file, not of a workdir.
    """
    values = {}
    for name, key in all_keys().items():
        belongs = key.of_machine in ("always", "start", "file" if single_file else "always")
        if belongs and (value := get(config, name)) != key.default:
            values[name] = value
            config.update_from_flattened_dict({name: key.default})
    return values


def expand_home(config: ConfigDict) -> None:
    """Put home folders in place of `~` in all paths of `config`, which is changed.

    Paths are the keys of a machine whose values are text. Raises ValueError as `with_home`.
    """
    for name, key in all_keys().items():
        if key.of_machine and type(key.allowed) is Text:
            path = with_home(name, value := get(config, name))
            if path != value:
                config.update_from_flattened_dict({name: path})


def missing(
    config: ConfigDict, values: Mapping[str, Any], overridden: Collection[str], mode: str
) -> dict[str, Any]:
    """The `values` put away by `reset` that would change what `mode` does.

    Data and images of a single file are not among them: most uses of a network need none, and the
    others say what they lack.

    Args:
        config: the config with the user's own values, named by `overridden`.
        mode: "data", "eval", "sample" or "export".
    """
    keys, complete = all_keys(), config.copy_and_resolve_references()
    complete.update_from_flattened_dict(dict(values))
    return {
        name: value
        for name, value in values.items()
        if keys[name].of_machine == "always"
        and name not in overridden
        and name.partition(".")[0] not in UNREAD[mode]
        and not without_effect(complete, [name])
    }
