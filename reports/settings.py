"""Settings that a report was computed with: written, read, compared, and checked for ranking.

A report has them in its entry `settings`, JSON of a flat dictionary. Reports of older programs lack
it: a few settings follow from their other entries, and the rest is not known.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metrics.table import METRICS, split_key
from sampling import SAMPLERS, Sampler
from solvers import FITTED, SOLVERS, solver_named

UNKNOWN = "not known"
ABSENT = "–"  # value of settings of a part that was not evaluated
REST = "other settings"  # stands for settings that an older report lacks
ORDER = 3  # of a solver where sampling.order is None
MOST_LETTERS = 2**20  # of JSON that is read
DIGITS = 12  # of a digest in settings
CHOSEN_LEVELS = "chosen.levels"  # of sampling.levels=(), chosen for the weights
# settings in which the checkpoints of a run may differ though they are evaluated alike
OF_CHECKPOINT = ("step", "weights", CHOSEN_LEVELS, "loss.phase")

# Settings, or prefixes of their names, that must be equal where values are ranked: for metrics of
# samples, and for metrics over a split.
OF_SAMPLES = ("eval.num_samples", "eval.features", "reference.", "sampling.class_label")
OF_SPLIT = ("eval.dataset", "split.", "data.codec")
OF_SPLIT_TOO = {
    "loss": ("loss.", "method", "data.centered", "data.conditions", "training.objective"),
    "accuracy": ("classes.",),
}

# Values of reports that lack these settings: older programs had no others.
BEFORE = {"data.codec": "pixels", "data.conditions": "", "training.objective": "regression"}


@dataclass(frozen=True)
class Settings:
    """Settings by name; if not `complete`, missing ones are unknown instead of absent."""

    values: Mapping[str, Any]
    complete: bool = True

    def text(self, name: str) -> str:
        """The value of a setting, or the word for a missing one."""
        return str(self.values.get(name, ABSENT if self.complete else UNKNOWN))

    def without(self, *names: str) -> "Settings":
        """All settings but those called `names`."""
        rest = {name: value for name, value in self.values.items() if name not in names}
        return dataclasses.replace(self, values=rest)


def to_json(settings: Mapping[str, Any]) -> str:
    """`settings` as the entry of a report: infinities become words, tuples lists."""
    return json.dumps({name: _plain(v) for name, v in settings.items()}, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def of_method(method) -> dict[str, Any]:
    """Settings of a method: its numbers, one by one where it is a dataclass."""
    if not dataclasses.is_dataclass(method):
        return {"method": repr(method)}
    names = [field.name for field in dataclasses.fields(method) if field.repr]
    numbers = {f"method.{name}": getattr(method, name) for name in names}
    return {"method": type(method).__name__, **numbers}


def of_sampler(sampling: Mapping[str, Any], guide: str = UNKNOWN) -> dict[str, Any]:
    """Settings of a sampler by their keys in a config; 'auto' and None are replaced by values.

    Args:
        sampling: config.sampling.
        guide: digest of the network of `sampling.guide`, in place of its path.
    """
    decided, name = dict(sampling), sampling.get("ode_solver")
    if name in (*SOLVERS, FITTED):
        solver = solver_named(name)
        if decided.get("schedule") == "auto":
            decided["schedule"] = solver.schedule or "its own"
        if decided.get("order", ORDER) is None:
            decided["order"] = ORDER if solver.orders else None
    if decided.get("guide"):
        decided["guide"] = guide
    # the restored images are among the settings of restoration
    unread = ("restore_path", "restore_mask") if decided.get("restore") else ("restore",)
    return {
        f"sampling.{key}": _plain(value)
        for key, value in decided.items()
        if not key.startswith(unread)
    }


def of_report(report: Mapping) -> Settings:
    """Settings that a report (arrays of report_{k}.npz) was computed with.

    Raises:
        ValueError: its entry `settings` is not the JSON of a flat dictionary.
    """
    if "settings" in report:
        return Settings(BEFORE | _flat("settings", str(report["settings"])))
    values: dict[str, Any] = {"eval.ema_std": float(report.get("ema_std", 0))}
    if "step" in report:
        values["step"] = _whole(report["step"])
    if "sampling" in report:
        values |= of_sampler(_flat("sampling", str(report["sampling"])))
    if "num_samples" in report:
        values["eval.num_samples"] = _whole(report["num_samples"] + report.get("nonfinite", 0))
    if "features" in report:
        space = str(report["features"])
        values["eval.features"] = space if space == "pixels" else f"{space}, weights {UNKNOWN}"
    return Settings(values, complete=False)


def _whole(number) -> int | str:
    """A number that should be whole, as text if it is not: files may be untrusted."""
    return int(number) if float(number).is_integer() else str(number)


def _flat(name: str, text: str) -> dict[str, Any]:
    try:
        flat = json.loads(text if len(text) <= MOST_LETTERS else "")
        lists = [value if isinstance(value, list) else [value] for value in flat.values()]
    except (ValueError, RecursionError, AttributeError):  # the last where it is no dictionary
        lists = [[{}]]
    if any(isinstance(entry, list | dict) for entries in lists for entry in entries):
        raise ValueError(f"the report's {name} are no JSON of a flat dictionary; evaluate it again")
    return flat


def differing(settings: Sequence[Settings]) -> dict[str, list[str]]:
    """{name: its text in each of `settings`}, for names whose values are not all the same.

    Names whose known values agree, while others are not known, are merged under `REST`.
    """
    names = dict.fromkeys(name for one in settings for name in one.values)
    rows = {name: [one.text(name) for one in settings] for name in names}
    differ = {name: row for name, row in rows.items() if len({*row} - {UNKNOWN}) > 1}
    if any(not one.complete for one in settings):
        differ[REST] = ["known" if one.complete else UNKNOWN for one in settings]
    return differ


def _in_space(report: Mapping, space: str) -> Settings:
    """Settings of a report in one of its feature spaces, the first where `space` is ""."""
    settings, kinds = of_report(report), str(report.get("features", "")).split(",")
    names = str(settings.values.get("eval.features", "")).split(",")
    if not settings.complete or len(names) != len(kinds) or len(kinds) == 1:
        return settings  # older programs had one space only
    i = kinds.index(space) if space in kinds else 0
    values, prefix = {**settings.values, "eval.features": names[i]}, f"{kinds[i]}:reference."
    if of_space := {k.partition(":")[2]: v for k, v in values.items() if k.startswith(prefix)}:
        values = {k: v for k, v in values.items() if not k.startswith("reference.")} | of_space
    return dataclasses.replace(settings, values=values)


def obstacle(key: str, reports: Sequence[Mapping]) -> str:
    """Line that says why values under a metric's key are not ranked in `reports`; "" if they are.

    For a metric of samples only its own feature space counts, whatever others were evaluated.
    """
    space, metric = split_key(key)
    of_samples = METRICS[metric].compute is not None
    equal = OF_SAMPLES if of_samples else OF_SPLIT + OF_SPLIT_TOO.get(metric, ())
    settings, reasons = [_in_space(report, space) for report in reports], []
    differ = {name: texts for name, texts in differing(settings).items() if name.startswith(equal)}
    numbers = [_whole(report.get("num_samples", 0)) for report in reports]
    if of_samples and len({*numbers}) > 1:
        differ.setdefault("eval.num_samples", [f"{number} finite" for number in numbers])
    if not all(one.complete for one in settings):
        reasons.append(f"the data that an older report compares with are {UNKNOWN}")
    for name, texts in differ.items():
        reasons.append(f"{name} differs ({'; '.join(dict.fromkeys(texts))})")
    return ", ".join(reasons)


def sampler_words(settings: Settings, *cost: str) -> str:
    """Short description of a sampler: solver, its `cost`, steps, noise, class and guidance."""
    return ", ".join(filter(None, (solver_words(settings, *cost), guidance_words(settings))))


def _of_sampling(settings: Settings) -> dict[str, Any]:
    return {key.removeprefix("sampling."): value for key, value in settings.values.items()}


def solver_words(settings: Settings, *cost: str) -> str:
    """Name of the sampler, its `cost`, and its settings, as `Sampler.words` has them."""
    at = _of_sampling(settings)
    at["levels"] = at.get("levels") or settings.values.get(CHOSEN_LEVELS)
    name, *words = SAMPLERS.get(str(at.get("method", "ode")), Sampler).words(at)
    if at.get("init") == "condition":
        words.append(f"from the condition at {at['init_level']}, weight {at['init_weight']}")
    return ", ".join([name, *cost, *words])


def guidance_words(settings: Settings) -> str:
    """The class of all samples, and guidance; "" without either."""
    at, words = _of_sampling(settings), []
    if at.get("class_label", -1) != -1:
        words.append(f"class {at['class_label']}")
    if at.get("guidance", 1) != 1:
        by = f" by the network {at['guide']}" if at.get("guide") else ""
        interval = at.get("guidance_interval")
        within = " at noise levels {} to {}".format(*interval) if interval else ""
        words.append(f"guidance {at['guidance']}{by}{within}")
    return ", ".join(words)
