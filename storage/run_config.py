"""The config that a run stores, in its checkpoints and as config.json of its workdir.

It is a flat dictionary, {"training.n_iters": 2000, "model.ch_mult": [1, 2], ...}. Checkpoints may
be untrusted files, so nothing in it is believed before it is looked at.
"""

import json
import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.default import get_default_config
from configs.keys import explain_unknown, flatten
from configs.published import UNREAD
from storage.checkpoints import load_checkpoint, numbered_checkpoints
from storage.files import atomic_write
from storage.workdir import resume_paths

__all__ = ["changes", "differences", "find", "flatten", "load", "restore", "store"]

log = logging.getLogger(__name__)

PRIMITIVES = (str, int, float, bool, type(None))
REMOVED = UNREAD.keys()  # which configs of older programs have


def store(workdir: Path, config: ConfigDict) -> None:
    """Stores `config` as config.json of the workdir."""
    with atomic_write(workdir / "config.json") as file:
        file.write(json.dumps(flatten(config), indent=1).encode())


def find(workdir: Path) -> tuple[Path, ConfigDict] | None:
    """The config of the run in `workdir` and the file that carries it; None without one.

    It is that of the newest intact checkpoint, else config.json.

    Raises:
        ValueError: what the file carries is not a valid config; the message names it.
    """
    newest, _ = resume_paths(workdir)
    for path in (newest, *reversed(numbered_checkpoints(workdir).values())):
        try:
            content = load_checkpoint(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            log.warning(f"{error}; looking for the config elsewhere")
            continue
        if "config" in content:
            return path, _restored(path, content["config"])
    path = workdir / "config.json"
    try:
        flat = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no config: {error}") from None
    return path, _restored(path, flat)


def _restored(path: Path, flat: Any) -> ConfigDict:
    try:
        return restore(flat)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
        ValueError: no file there carries a config, or the one that does is not a valid one.
    """
    try:
        found = find(workdir)
        if found is None:
            raise ValueError(f"nothing in {workdir} carries a config")
        return found[1]
    except ValueError as error:
        raise ValueError(f"{error}: --config is needed") from None


def restore(flat: Any) -> ConfigDict:
    """The complete, locked config with the values of `flat`; keys it lacks keep their defaults.

    Keys that are removed from the configs are left out, and the log says so.

    Raises:
        ValueError: `flat` is no dictionary of numbers, strings, None and lists of these, it has
            unknown keys, or a value has another type than the config's.
    """
    config = get_default_config()
    known = flatten(config)
    _check_content(flat)
    removed = sorted(flat.keys() & REMOVED)
    if removed:
        log.info(f"values of the stored config that nothing reads: {', '.join(removed)}")
    unknown = sorted(flat.keys() - known.keys() - REMOVED)
    if unknown:
        others = f"; also unknown: {_shown(', '.join(unknown[1:]))}" if unknown[1:] else ""
        raise ValueError(explain_unknown(_shown(unknown[0]), known) + others)
    for key in (k for k in known if k in flat):
        section, _, name = key.rpartition(".")
        owner = config[section] if section else config
        owner[name] = _typed(key, flat[key], owner.get_type(name), known[key] is None)
    return config


def changes(path: Path, checkpoint: dict, config: ConfigDict) -> list[str]:
    """What `config` changes of the one that `checkpoint`, from `path`, carries; see `differences`.

    A checkpoint of the published programs carries none, and nothing is changed.

    Raises:
        ValueError: it carries something that is no config.
    """
    own = checkpoint.get("config")
    try:
        return [] if own is None else differences(own, flatten(config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def differences(old: Any, new: dict[str, Any]) -> list[str]:
    """What the flat config `new` changes of the stored one, as "key: old -> new" each.

    A key that `old` lacks counts as the default, and one that is removed does not count.

    Raises:
        ValueError: `old` is no dictionary of numbers, strings, None and lists of these.
    """
    _check_content(old)
    old = flatten(get_default_config()) | {k: v for k, v in old.items() if k not in REMOVED}
    keys = (k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))
    return [f"{_shown(k)}: {_shown(old.get(k))} -> {_shown(new.get(k))}" for k in keys]


def _check_content(flat: Any) -> None:
    if type(flat) is not dict:
        raise ValueError(f"the stored config is no dictionary but {type(flat).__name__}")
    for key, value in flat.items():
        if type(key) is not str:
            raise ValueError(f"the stored config has a key of type {type(key).__name__}")
        for entry in value if type(value) is list else [value]:
            if type(entry) not in PRIMITIVES:
                raise ValueError(
                    f"the stored value of {_shown(key)} holds something of type "
                    f"{type(entry).__name__}"
                )


def _typed(key: str, value: Any, expected: type, optional: bool) -> Any:
    """`value` as `expected`: an int for a float and a list for a tuple are the only changes."""
    if expected is tuple and type(value) is list:
        return tuple(value)
    if expected is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is expected or (optional and value is None):
        return value
    raise ValueError(
        f"the stored value of {key} must be of type {expected.__name__}, not {_shown(value)}"
    )


def _shown(value: Any) -> str:
    """`value` on a line, without the control characters that an untrusted text may hold."""
    try:
        text = str(value)
    except ValueError:  # an int of more digits than Python prints
        return "a huge number"
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:200]}..."
