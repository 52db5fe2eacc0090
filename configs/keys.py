"""The keys of a config under their dotted names, and what is said of a key that is none."""

import difflib
import os
import re
import reprlib
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


def get(config: ConfigDict, key: str) -> Any:
    """The value of a dotted `key`."""
    section, _, name = key.rpartition(".")
    return (config[section] if section else config)[name]


def plain(value: Any) -> Any:
    """`value` as Python's own: scalars and arrays of numpy or PyTorch, and paths, become those."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def with_home(title: str, name: str) -> str:
    """The path `name` with the home folder in place of `~` or `~user`, as shells write it.

    So are further paths in it that follow a comma, if they are of a user who has one.

    Raises:
        ValueError: it begins with the `~user` of nobody who has a home folder; `title` says which
            flag or key names it.
    """
    user = name.partition("/")[0].partition(",")[0]
    if user.startswith("~") and _home(user) == user:
        raise ValueError(f"{title}={name}: {user} is no home folder; ./{user} is a file called so")
    return re.sub(r"(?:^|(?<=,)|(?<=, ))~[^/,]*", lambda match: _home(match[0]), name)


def _home(user: str) -> str:
    """The home folder of `~` or `~user`; the words themselves where there is none."""
    folder = os.path.expanduser(user)
    return folder if user == "~" or os.path.isdir(folder) else user


def arguments(part: Any, config: ConfigDict) -> dict[str, Any]:
    """Arguments of the constructor of `part`, which its `options` {argument: key} name."""
    return {argument: get(config, key) for argument, key in part.options.items()}


def check_positive(part: Any, *names: str) -> None:
    """Raise ValueError unless the numbers `names` of a part, keys of `sampling`, are positive."""
    for name in names:
        if not getattr(part, name) > 0:
            raise ValueError(f"sampling.{name} must be positive, not {getattr(part, name)}")


def named(table: dict[str, Any], key: str, value: str) -> Any:
    """The entry of a registry that the `value` of a `key` names, in upper or lower case.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    if value.lower() not in table:
        raise ValueError(f"{key} must be one of {', '.join(map(repr, table))}, not {shown(value)}")
    return table[value.lower()]


def of_part(part: Any, name: str) -> dict[str, Any]:
    """The attribute `keys` or `reads` (`name`) of a registry's entry; {} where it has none.

    A method that builds a part, such as `from_config`, has the attribute of its class, and a
    partial that of its function.
    """
    builder = getattr(part, "func", part)
    return getattr(getattr(builder, "__self__", builder), name, {})


class _Shown(reprlib.Repr):
    """`repr` that looks at the first entries only; of other things it tells the type."""

    def __init__(self):
        super().__init__()
        self.maxlevel = 2  # lists in lists
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 50
        self.maxstring = self.maxlong = 500

    def repr_instance(self, value: Any, level: int) -> str:
        if value is None or type(value) in (bool, float, complex):
            return repr(value)
        return f"something of type {type(value).__name__}"


def shown(value: Any) -> str:
    """`value` in one line of about 200 letters, without control characters.

    A list that contains another many times, and so on, is a small value with a text that no memory
    holds, so no more of the text is made than is shown.
    """
    try:
        text = _Shown().repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "a huge number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def shown_key(key: str) -> str:
    """Text of a key for a message, without quotation marks."""
    return shown(key).strip("'")


def explain_unknown(key: str, keys: Iterable[str]) -> str:
    """One line on a key that is not among `keys`, with the nearest of these."""
    if key in UNREAD:
        return f"{key} is a published key that nothing reads ({UNREAD[key]}): remove it"
    keys, (section, _, name) = list(keys), key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    if not section:
        beside |= {k: k for k in (k.partition(".")[0] for k in keys)}
    elsewhere = [k for k in keys if k.rpartition(".")[2] == name]
    near = [beside[n] for n in difflib.get_close_matches(name, beside, 1)]
    near += difflib.get_close_matches(key, elsewhere, 1, 0)
    return f"unknown config value {key}" + (f'. Did you mean "{near[0]}"?' if near else "")
