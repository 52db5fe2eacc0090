"""The config that a run stores, in its checkpoints and as config.json of its workdir.

It is a flat dictionary, {"training.n_iters": 2000, "model.ch_mult": [1, 2], ...}. Checkpoints may
be untrusted files, so nothing in it is believed before it is looked at.
"""

import json
import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.default import all_keys, get_default_config
from configs.keys import explain_unknown, flatten, shown, shown_key
from configs.published import UNREAD
from storage.checkpoints import open_checkpoint
from storage.files import about, atomic_write, read_json
from storage.run_checkpoints import snapshots, states

log = logging.getLogger(__name__)

PRIMITIVES = (str, int, float, bool, type(None))
REMOVED = UNREAD.keys()  # which configs of older programs have


def store(workdir: Path, values: dict[str, Any]) -> None:
    """Store the flat config `values` as config.json of the workdir."""
    with atomic_write(workdir / "config.json") as file:
        file.write(json.dumps(values, indent=1).encode())


def find(workdir: Path) -> tuple[Path, ConfigDict] | None:
    """The config of the run in `workdir` and the file that carries it; None without one.

    It is from the newest checkpoint that can be read, else from config.json; no tensor is read.

    Raises:
        ValueError: the file's config is not valid; the message names the file.
    """
    for path in states(workdir):
        try:
            content = open_checkpoint(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            log.warning(f"{error}; looking for the config elsewhere")
            continue
        if "config" in content:
            return path, of(path, content)
    path = workdir / "config.json"
    try:
        flat = read_json(path, "is no config")
    except FileNotFoundError:
        return None
    return path, of(path, {"config": flat})


def of(path: Path, checkpoint: dict) -> ConfigDict:
    """The config in `checkpoint`, from `path`; ValueError without a valid one."""
    if "config" not in checkpoint:
        raise ValueError(f"{path} carries no config: it has to be given")
    with about(path):
        return restore(checkpoint["config"])


def load(workdir: Path, checkpoint: Path | None = None) -> ConfigDict:
    """The config of the run in `workdir`, else of the last of the `snapshots` placed there.

    A `checkpoint` of any place comes first, where it carries one.

    Raises:
        OSError: a checkpoint cannot be read.
        ValueError: no file there carries a config, or the one that does is not a valid one.
    """
    try:
        if checkpoint and "config" in (content := open_checkpoint(checkpoint)):
            return of(checkpoint, content)
        stored = find(workdir)
    except ValueError as error:
        raise ValueError(f"{error}: --config is needed") from None
    if stored:
        return stored[1]
    if published := list(snapshots(workdir).values()):
        return of(published[-1], open_checkpoint(published[-1]))
    raise ValueError(f"nothing in {workdir} carries a config: --config is needed")


def restore(flat: Any) -> ConfigDict:
    """The complete, locked config with the values of `flat`.

    A key that `flat` lacks gets the value that describes the program before that key (`_before`),
    else its default. Keys that no longer exist are left out, and the log says so.

    Raises:
        ValueError: `flat` is no dictionary of numbers, strings, None and lists of these, it has
            unknown keys, or a value that its key does not allow.
    """
    config = get_default_config()
    defaults, keys = flatten(config), all_keys()
    _check_content(flat)
    flat = _before(flat) | flat
    if removed := sorted(flat.keys() & REMOVED):
        log.info(f"values of the stored config that nothing reads: {', '.join(removed)}")
    if unknown := [*map(shown_key, sorted(flat.keys() - defaults.keys() - REMOVED))]:
        more = f"; also unknown: {', '.join(unknown[1:])}" if unknown[1:] else ""
        raise ValueError(f"{explain_unknown(unknown[0], defaults)}{more:.200}")
    for key in (k for k in defaults if k in flat):
        section, _, name = key.rpartition(".")
        value = tuple(flat[key]) if type(flat[key]) is list else flat[key]
        if not keys[key].accepts(value):
            raise ValueError(f"the stored value of {key} must be {keys[key]}, not {shown(value)}")
        (config[section] if section else config)[name] = value
    return config


def changes(path: Path, checkpoint: dict, values: dict[str, Any]) -> list[str]:
    """`differences` of the flat config `values` from that in `checkpoint`, from `path`.

    A checkpoint of the published programs, at `path`, carries none, and nothing is changed.

    Raises:
        ValueError: it carries something that is no config.
    """
    if checkpoint.get("config") is None:
        return []
    with about(path):
        return differences(checkpoint["config"], values)


def differences(old: Any, new: dict[str, Any]) -> list[str]:
    """Changes from the stored flat config `old` to `new`, each as "key: old -> new".

    A key that `old` lacks has its value of `restore`. Keys that no longer exist, and keys that only
    a run's first start reads, are ignored.

    Raises:
        ValueError: `old` is no dictionary of numbers, strings, None and lists of these.
    """
    _check_content(old)
    old = _before(old) | {k: v for k, v in old.items() if k not in REMOVED}
    old = flatten(get_default_config()) | old
    at_start = {name for name, key in all_keys().items() if key.of_machine == "start"}
    keys = sorted((old.keys() | new.keys()) - at_start)
    changed = (k for k in keys if old.get(k) != new.get(k))
    return [f"{shown_key(k)}: {shown(old.get(k))} -> {shown(new.get(k))}" for k in changed]


def _before(flat: dict[str, Any]) -> dict[str, Any]:
    """Values of keys that `flat` lacks, for an older run, where these are not the defaults."""
    dataset, path = (str(flat.get(f"data.{key}", "")).lower() for key in ("dataset", "path"))
    files = dataset == "folder" and path and not path.endswith((".npy", ".npz"))
    before = {name: key.before for name, key in all_keys().items() if key.before is not None}
    return before | ({"data.scale": [0, 65535]} if files else {})  # 16 bits, divided by 256


def _check_content(flat: Any) -> None:
    if type(flat) is not dict:
        raise ValueError(f"the stored config is no dictionary but {type(flat).__name__}")
    for key, value in flat.items():
        if type(key) is not str:
            raise ValueError(f"the stored config has a key of type {type(key).__name__}")
        for entry in value if type(value) is list else [value]:
            if type(entry) not in PRIMITIVES:
                raise ValueError(
                    f"the stored value of {shown_key(key)} holds something of type "
                    f"{type(entry).__name__}"
                )
