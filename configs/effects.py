"""Which values have no effect beside which others: said of what the user gave, before any work.

A config sets keys of every method and solver; that most are not read is as it should be. One that
was given on the command line and is not read is a mistake, or a misunderstanding.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from configs.default import all_keys
from configs.keys import get, shown

SET = object()  # any value but None, 0, False and the empty ones

_SDES = ("vesde", "vpsde", "subvpsde")
_METHODS = ("poisson", "pfgmpp", "edm", *_SDES)
_REFINE_NETS = ("ncsn", "ncsnv2_64", "ncsnv2_128", "ncsnv2_256")
_STEPPING = ("forward_euler", "improved_euler", "heun", "multistep", "ipndm", "dpmpp", "unipc")
_TOYS = ("moons", "swiss_roll", "checkerboard", "heart", "eight_gaussians")
_FILES = ("digits", "cifar10", "svhn", "celeba", *_TOYS)
_TFRECORDS = ("celebahq", "ffhq", "celebahq_256", "ffhq_256")


def _but(*readers: str) -> tuple[str, ...]:
    """The methods other than these. One that is added to the table is in no row."""
    return tuple(name for name in _METHODS if name not in readers)


_BLOCKS = "embedding_type resblock_type skip_rescale fir fir_kernel progressive"
_BLOCKS += " progressive_input progressive_combine fourier_scale init_scale"
_U_NET = f"ch_mult attn_resolutions resamp_with_conv conditional dropout {_BLOCKS}"

# ({key: values with which others have no effect, all of these together}, the section of the others
# and their names). Names that the tables of the program do not know are left to their authors.
ROWS: tuple[tuple[dict[str, Any], str, str], ...] = (
    ({"data.dataset": (*_FILES, "lsun", *_TFRECORDS)}, "data", "path"),
    ({"data.dataset": (*_FILES, "folder", *_TFRECORDS)}, "data", "category"),
    ({"data.dataset": (*_FILES, "folder", "lsun")}, "data", "tfrecords_path"),
    ({"training.augment": SET}, "data", "random_flip"),
    ({"data.num_classes": (0,)}, "training", "label_dropout"),
    ({"training.sde": _but("poisson")}, "training", "gamma tau M restrict_M"),
    ({"training.sde": _but("poisson")}, "model", "sigma_end"),
    ({"training.sde": _but("poisson")}, "sampling", "z_max z_min z_exp upper_norm radius"),
    ({"training.sde": _but("pfgmpp")}, "model", "D"),
    ({"training.sde": _but("pfgmpp", "edm")}, "model", "sigma_data P_mean P_std"),
    ({"training.sde": _but("pfgmpp", "edm")}, "training", "target"),
    ({"training.sde": _but("pfgmpp", "edm")}, "sampling", "sigma_min sigma_max"),
    ({"training.sde": _but("vesde"), "model.scale_by_sigma": (False,)}, "model", "sigma_min"),
    ({"training.sde": _but("vesde"), "model.scale_by_sigma": (False,)}, "model", "sigma_max"),
    ({"training.sde": _but("vpsde", "subvpsde")}, "model", "beta_min beta_max"),
    ({"training.sde": _but(*_SDES)}, "training", "likelihood_weighting"),
    ({"training.snapshot_sampling": (False,)}, "training", "snapshot_solver"),
    ({"sampling.method": ("pc",)}, "training", "snapshot_solver"),
    ({"sampling.ode_solver": _STEPPING}, "training", "snapshot_solver"),
    ({"model.ema_half_life": SET}, "model", "ema_rate"),
    ({"model.name": ("mlp",)}, "model", f"{_U_NET} checkpoint_activations"),
    ({"model.name": _REFINE_NETS}, "model", f"{_U_NET} num_res_blocks"),
    ({"model.name": ("ddpm", "adm")}, "model", _BLOCKS),
    ({"model.name": ("adm",)}, "model", "conditional resamp_with_conv"),
    ({"model.fir": (False,)}, "model", "fir_kernel"),
    ({"model.embedding_type": ("positional",)}, "model", "fourier_scale"),
    ({"model.progressive_input": ("none", "residual")}, "model", "progressive_combine"),
    (
        {"model.name": ("ncsnpp", "edm_unet"), "model.resblock_type": ("biggan",)},
        "model",
        "resamp_with_conv",
    ),
    ({"sampling.method": ("pc",)}, "sampling", "ode_solver schedule order rho N S_churn"),
    ({"sampling.method": ("pc",)}, "sampling", "S_min S_max S_noise"),
    ({"sampling.method": ("ode",)}, "sampling", "predictor corrector probability_flow"),
    ({"sampling.method": ("ode",)}, "sampling", "n_steps_each snr"),
    ({"sampling.corrector": ("none",)}, "sampling", "n_steps_each snr"),
    ({"sampling.ode_solver": ("rk45",)}, "sampling", "N rho"),
    ({"sampling.schedule": ("uniform", "logsnr")}, "sampling", "rho"),
    (
        {
            "sampling.schedule": ("auto",),
            "sampling.ode_solver": ("forward_euler", "improved_euler"),
        },
        "sampling",
        "rho",
    ),
    ({"sampling.S_churn": (0,)}, "sampling", "S_min S_max S_noise"),
    ({"sampling.guidance": (1,)}, "sampling", "guidance_interval"),
    ({"sampling.restore": ("",)}, "sampling", "restore_path restore_degrade restore_mask"),
    ({"sampling.restore": ("",)}, "sampling", "restore_noise restorer restore_resample"),
    (
        {"sampling.restore": ("colour", "super2", "super4", "super8", "denoise")},
        "sampling",
        "restore_mask",
    ),
    ({"sampling.film": (False,), "sampling.between": ("",)}, "sampling", "film_format"),
    ({"eval.enable_sampling": (False,)}, "eval", "features inception_path stats_dir"),
    (
        {
            "eval.enable_sampling": (False,),
            "eval.save_images": (False,),
            "sampling.restore": ("",),
        },
        "eval",
        "num_samples",
    ),
    ({"eval.enable_sampling": (True,)}, "eval", "save_images"),
    ({"eval.enable_bpd": (False,)}, "eval", "bpd_num_repeats"),
    ({"eval.dataset": ("train",)}, "eval", "bpd_num_repeats"),
    (
        {
            "eval.enable_bpd": (False,),
            "eval.enable_classification": (False,),
            "sampling.encode": ("",),
        },
        "eval",
        "divergence",
    ),
    ({"eval.enable_rescale": (False,)}, "eval", "rescale_norms"),
)


def without_effect(config: ConfigDict, keys: Iterable[str]) -> list[str]:
    """A line on each of the `keys`, given by the user, whose value changes nothing in `config`.

    Values that switch something off (None, 0, False, empty) need no line.
    """
    lines = []
    for key in (k for k in dict.fromkeys(keys) if k in all_keys() and get(config, k)):
        section, _, name = key.rpartition(".")
        for when, where, names in ROWS:
            if where == section and name in names.split() and _holds(config, when):
                beside = " and ".join(f"{k}={shown(get(config, k))}" for k in when)
                lines.append(f"{key}={shown(get(config, key))} has no effect with {beside}")
                break
    return lines


def _holds(config: ConfigDict, when: dict[str, Any]) -> bool:
    for key, values in when.items():
        value = get(config, key)
        value = value.lower() if isinstance(value, str) else value
        if not value if values is SET else value not in values:
            return False
    return True
