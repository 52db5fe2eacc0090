"""Every key of a config: the value that holds where no experiment states another, and its range.

Keys stand beside the code that reads them: those of a module in its `KEYS`, those of an entry of a
registry in its attribute `keys`. This module has the keys of the loops, and gathers all others. The
config is locked: parts and experiments can only set keys that exist, so a misspelt one is an error.
`configs.table` makes docs/config.md from them.
"""

from ml_collections import ConfigDict, config_dict

import likelihood
import losses
import methods
import models
import optimizers
import sampling
import training
from configs.keys import get, of_part, shown
from configs.schema import LENGTH, Either, Flag, Key, Number, Numbers, OneOf, Text, whole
from library import restoration, sample_folder, training_metrics
from losses import OBJECTIVES
from methods import METHODS
from metrics import features, reference
from models import NETWORKS
from optimizers import OPTIMIZERS
from sampling import SAMPLERS
from solvers import SCHEDULES, SOLVERS
from solvers.rk45 import KEYS as LIMITS
from sources import SOURCES, codec, folder, options, pairs, patches, preparation
from sources.codec import CODECS
from storage import loggers
from storage.loggers import LOGGERS

# Keys of the loops of training, sampling and evaluation.
LOOPS = {
    "seed": Key(42, whole(0, 2**63 - 1), "of weights, noise and the order of the data"),
    "device": Key(
        "auto",
        Text(r"auto|cpu|mps|cuda(:\d{1,3})?", "'auto', 'cpu', 'cuda' or 'cuda:N'"),
        "where everything is computed; 'auto': on a GPU if there is one",
    ),
    "training.snapshot_freq": Key(50000, whole(1), "steps between numbered checkpoints"),
    "training.snapshot_freq_for_preemption": Key(
        10000, whole(1), "steps between overwritten checkpoints, for resuming"
    ),
    "training.keep_checkpoints": Key(
        0, whole(0), "newest numbered checkpoints that are kept; 0: all"
    ),
    "training.snapshot_sampling": Key(
        True, Flag(), "pictures of samples with the numbered checkpoints"
    ),
    "training.picture_freq": Key(
        100,
        whole(1),
        "at most one of these pictures in so many steps, and one of the last step",
    ),
    "training.snapshot_solver": Key(
        "heun",
        OneOf(registry="solvers.SOLVERS"),
        "of these samples where sampling.ode_solver is 'rk45', which takes any number of "
        "evaluations for a young network: 18 steps of this one, or 'rk45' itself",
    ),
    "training.hang_seconds": Key(
        1800,
        whole(0, 10**6),
        "with several processes: seconds in which no process makes progress, after which the job "
        "ends and names the rank that hangs; must exceed the time of compiling and of saving a "
        "checkpoint; 0: no limit",
    ),
    "training.log_freq": Key(50, whole(1), "steps between losses on the training data"),
    "training.eval_freq": Key(100, whole(1), "steps between losses on the test split"),
    "training.precision": Key(
        "fp32",
        OneOf(("fp32", "tf32", "bf16", "fp16", "auto")),
        "of matrix products and convolutions; 'bf16' and 'fp16' are autocast, the latter with a "
        "scaled loss; 'auto': 'bf16', or 'fp16' on a GPU without it, if the first start measures "
        "it to be at least 1.1 times as fast, "
        "else 'fp32'",
    ),
    "training.compile": Key(
        False, Flag(), "torch.compile the network of training; needs a compiler, and minutes"
    ),
    "training.channels_last": Key(False, Flag(), "memory format of the network, for tensor cores"),
    "eval.steps": Key(
        "",
        Text(r"|last|best|\d{1,15}(,\d{1,15})*", "'last', 'best', or steps with commas between"),
        "checkpoints to evaluate, by the steps in their names; 'last': the newest one; 'best': "
        "best.pth of training.metric_freq; '': those from begin_ckpt to end_ckpt",
    ),
    "eval.begin_ckpt": Key(
        1, whole(0, 10**6), "first checkpoint to evaluate, counted in training.snapshot_freq steps"
    ),
    "eval.end_ckpt": Key(26, whole(0, 10**6), "last one"),
    "eval.batch_size": Key(1024, whole(1), "images at once"),
    "eval.ema_std": Key(
        0.0,
        Number(0, 0.25),
        "evaluate the EMA of this relative width, rebuilt from the averages of model.ema_stds in "
        "the run's checkpoints; 0: the EMA weights that training kept",
    ),
    "eval.dataset": Key(
        "test", OneOf(("train", "test")), "the split that loss and likelihood are computed on"
    ),
    "eval.bpd_dataset": Key(
        "test", OneOf(("train", "test")), "published name of eval.dataset: one value, two keys"
    ),
    "eval.enable_loss": Key(True, Flag(), "the loss of the split"),
    "eval.enable_bpd": Key(False, Flag(), "bits/dim of the split"),
    "eval.enable_classification": Key(
        False, Flag(), "classify the images of the split by the likelihood given each label"
    ),
    "eval.bpd_num_repeats": Key(
        5, whole(1, 10**4), "passes over the test split, each with new noise"
    ),
    "eval.enable_sampling": Key(False, Flag(), "samples, and how far they are from the data"),
    "eval.num_samples": Key(50000, whole(4, 10**7), "samples"),
    "eval.repeats": Key(
        1,
        whole(1, 1000),
        "independent sets of eval.num_samples samples; of several, metrics are means, with minimum "
        "and maximum",
    ),
    "eval.save_images": Key(False, Flag(), "without sampling: draw the first samples only"),
    "eval.enable_pairs": Key(
        False,
        Flag(),
        "draws for the conditions of the split (data.condition_path): PSNR, SSIM, coverage",
    ),
    "eval.pairs": Key(100, whole(1, 10**6), "number of pairs, the first of the split"),
    "eval.pair_draws": Key(9, whole(1, 1000), "draws for each pair"),
    "eval.enable_interpolate": Key(
        False, Flag(), "draw rows of samples between pairs of prior samples"
    ),
    "eval.enable_rescale": Key(False, Flag(), "draw rows of samples along directions of the prior"),
    "eval.rescale_norms": Key(
        (),
        Numbers(LENGTH, (0, 2), rising=True),
        "from and to which norm; () for the method's own range",
    ),
}


def all_keys() -> dict[str, Key]:
    """Every key with its default: those of the loops, and those that the parts declare.

    A part that is registered from outside brings its keys as its attribute `keys`; see `of_part`.
    """
    keys = {}
    for owner in (  # in the order in which docs/config.md shows the keys of a section
        *(options, *SOURCES.values(), folder, pairs, patches, codec, *CODECS.values()),
        *(methods, models, *NETWORKS.values(), sampling, *SAMPLERS.values(), LIMITS),
        *(*SOLVERS.values(), *SCHEDULES.values(), restoration, *METHODS.values()),
        *(losses, *OBJECTIVES.values(), preparation, optimizers, *OPTIMIZERS.values(), training),
        *(
            LOOPS,
            training_metrics,
            loggers,
            *LOGGERS.values(),
            sample_folder,
            features,
            reference,
            likelihood.Likelihood,
        ),
    ):
        keys |= owner if isinstance(owner, dict) else getattr(owner, "KEYS", of_part(owner, "keys"))
    return keys


def get_default_config() -> ConfigDict:
    """Return a new, locked config; the experiment sets data set, method and network."""
    config = ConfigDict()
    for name, key in all_keys().items():
        section, _, last = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        owner = config[section] if section else config
        value = key.default
        if isinstance(key.allowed, Either):  # else only values of the default's type fit
            value = config_dict.FieldReference(value, field_type=object)
        elif key.opens:  # or None
            value = config_dict.FieldReference(value)
        elif value is None:
            value = config_dict.placeholder(key.allowed.kind)
        owner[last] = value
    config.eval.bpd_dataset = config.eval.get_ref("dataset")
    return config.lock()


def check(config: ConfigDict) -> None:
    """Raises a ValueError for the first value that its key does not allow, whatever is used."""
    for name, key in all_keys().items():
        if not key.accepts(value := get(config, name)):
            raise ValueError(f"{name} must be {key}, not {shown(value)}")
