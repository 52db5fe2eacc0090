"""Values that have no effect beside others: a warning before any work, on what the user set.

A config has keys of every method and solver, so most of them are not read, and that is no fault.
A key that is set on the command line and not read is a mistake, or a misunderstanding.

Each part says which keys it reads: it declares its `keys`, and lists in `reads` those that others
declare (`configs.keys.of_part`). `rows` lists effects that depend on the values of other keys.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.default import all_keys
from configs.keys import get, of_part, shown
from losses import OBJECTIVES
from methods import METHODS
from methods.restoration import RESTORE
from models import NETWORKS
from optimizers import OPTIMIZERS
from sampling import SAMPLERS
from solvers import SCHEDULES, SOLVERS
from sources import SOURCES
from sources.codec import CODECS

SET = object()  # any value but None, 0, False and the empty ones

# {key that names the active part: the parts by name}
PARTS: dict[str, Mapping[str, Any]] = {
    "data.dataset": SOURCES,
    "data.codec": CODECS,
    "training.sde": METHODS,
    "training.objective": OBJECTIVES,
    "model.name": NETWORKS,
    "optim.optimizer": OPTIMIZERS,
    "sampling.method": SAMPLERS,
    "sampling.ode_solver": SOLVERS,
    "sampling.schedule": SCHEDULES,
}

# (conditions, section, names): where every key in `conditions` has one of its values, the keys
# {section}.{name} have no effect. It holds where the active parts read the keys of `conditions`.
Row = tuple[dict[str, Any], str, str]


def rows() -> list[Row]:
    """Rows for the parts that are registered at the time of the call."""
    adaptive = _names(SOLVERS, lambda solver: solver.schedule is None)
    stepping = _names(SOLVERS, lambda solver: solver.schedule is not None)
    without_rho = ("uniform", "logsnr")  # schedules
    uniform = _names(SOLVERS, lambda solver: solver.schedule in without_rho)
    of_sde = _names(SAMPLERS, lambda sampler: "sampling.ode_solver" not in of_part(sampler, "keys"))
    no_ode = _names(SAMPLERS, lambda sampler: not sampler.follows_ode)
    no_targets = _names(OBJECTIVES, lambda objective: not objective.predicts_mean)
    flows = _names(METHODS, lambda method: "flow.times" in of_part(method, "keys"))
    whole_images = tuple(name for name in RESTORE if name != "inpaint")
    no_sampling = {"eval.enable_sampling": (False,)}
    no_bits = {"eval.enable_bpd": (False,), "eval.enable_classification": (False,)}
    return [
        ({"training.augment": SET}, "data", "random_flip"),
        ({"training.objective": no_targets}, "training", "reduce_mean"),
        ({"training.objective": no_targets}, "model", "P_mean P_std"),
        ({"training.sde": flows, "training.objective": no_targets}, "flow", "times"),
        (
            {"training.sde": flows, "flow.times": ("uniform", "logit_normal")},
            "model",
            "P_mean P_std",
        ),
        ({"sampling.method": no_ode}, "sampling", "noise_removal restore restorer"),
        ({"data.num_classes": (0,), "data.conditions": ("",)}, "training", "label_dropout"),
        (
            {"data.condition_channels": (0,), "data.condition_path": ("",)}
            | {"data.conditions": ("",)},
            "training",
            "condition_dropout",
        ),
        (
            {"training.snapshot_sampling": (False,), "training.metric_freq": (0,)},
            "training",
            "snapshot_solver",
        ),
        ({"sampling.method": of_sde}, "training", "snapshot_solver"),
        ({"sampling.ode_solver": stepping}, "training", "snapshot_solver"),
        ({"model.ema_half_life": SET}, "model", "ema_rate"),
        ({"model.fir": (False,)}, "model", "fir_kernel"),
        ({"model.embedding_type": ("positional",)}, "model", "fourier_scale"),
        ({"model.progressive_input": ("none", "residual")}, "model", "progressive_combine"),
        ({"model.resblock_type": ("biggan",)}, "model", "resamp_with_conv"),
        ({"sampling.corrector": ("none",)}, "sampling", "n_steps_each snr"),
        ({"sampling.ode_solver": adaptive}, "sampling", "N rho"),
        ({"sampling.schedule": without_rho}, "sampling", "rho"),
        ({"sampling.schedule": ("auto",), "sampling.ode_solver": uniform}, "sampling", "rho"),
        ({"sampling.S_churn": (0,)}, "sampling", "S_min S_max S_noise"),
        ({"sampling.init": ("prior",)}, "sampling", "init_level init_weight"),
        ({"sampling.guidance": (1,)}, "sampling", "guidance_interval"),
        ({"sampling.restore": ("",)}, "sampling", "restore_path restore_degrade restore_mask"),
        ({"sampling.restore": ("",)}, "sampling", "restore_noise restorer restore_resample"),
        ({"sampling.restore": whole_images}, "sampling", "restore_mask"),
        ({"sampling.film": (False,), "sampling.between": ("",)}, "sampling", "film_format"),
        (no_sampling, "eval", "features inception_path stats_dir repeats"),
        (
            no_sampling | {"eval.save_images": (False,), "sampling.restore": ("",)},
            "eval",
            "num_samples",
        ),
        ({"training.metric_freq": (0,)}, "training", "metric_samples"),
        ({"eval.enable_pairs": (False,)}, "eval", "pairs pair_draws"),
        ({"eval.steps": SET}, "eval", "begin_ckpt end_ckpt"),
        ({"eval.enable_sampling": (True,)}, "eval", "save_images"),
        ({"eval.enable_bpd": (False,)}, "eval", "bpd_num_repeats"),
        ({"eval.dataset": ("train",)}, "eval", "bpd_num_repeats"),
        (no_bits | {"sampling.encode": ("",)}, "eval", "divergence"),
        ({"eval.enable_rescale": (False,)}, "eval", "rescale_norms"),
    ]


def without_effect(config: ConfigDict, keys: Iterable[str]) -> list[str]:
    """One line for each of `keys`, set by the user, whose value changes nothing in `config`.

    Values that switch something off (None, 0, False, empty) need no line.
    """
    lines, declared = [], all_keys()
    for key in (k for k in dict.fromkeys(keys) if k in declared and get(config, k)):
        if reasons := _of_inactive_parts(config, key) or _beside_values(config, key):
            beside = " and ".join(f"{k}={shown(get(config, k))}" for k in reasons)
            lines.append(f"{key}={shown(get(config, key))} has no effect with {beside}")
    return lines


def _of_inactive_parts(config: ConfigDict, key: str) -> list[str]:
    """Keys that name the active parts, if `key` belongs to other parts and no active one reads it.

    A key whose other value would make an active part read `key` is among them. A part whose name is
    in no registry counts as one that reads every key.
    """
    reasons = [
        k for k, parts in PARTS.items() if any(key in of_part(p, "keys") for p in parts.values())
    ]
    for name, parts in PARTS.items() if reasons else ():
        part = parts.get(get(config, name).lower())
        if key in of_part(part, "keys") or part is None and name in reasons:
            return []
        if key in (reads := of_part(part, "reads")):
            if reads[key] is None or get(config, reads[key]):
                return []
            reasons.append(reads[key])
    return reasons


def _beside_values(config: ConfigDict, key: str) -> list[str]:
    section, _, name = key.rpartition(".")
    for when, where, names in rows():
        if where == section and name in names.split() and _holds(config, when):
            return [*when]
    return []


def _holds(config: ConfigDict, when: dict[str, Any]) -> bool:
    for key, values in when.items():
        value = get(config, key)
        value = value.lower() if isinstance(value, str) else value
        if (not value if values is SET else value not in values) or _of_inactive_parts(config, key):
            return False
    return True


def _names(parts: Mapping[str, Any], applies: Callable[[Any], bool]) -> tuple[str, ...]:
    return tuple(name for name, part in parts.items() if applies(part))
