"""Every key of a config: the value that holds where no experiment states another, and its range.

The config is locked: parts and experiments only set keys that stand here, so that a
misspelt one is an error. docs/config.md is made of this table.
"""

import math

from ml_collections import ConfigDict, config_dict

import likelihood
import losses
import optimizers
import training
from configs.keys import get, shown
from configs.schema import LENGTH, SHARE, Flag, Key, Number, Numbers, OneOf, Several, Text, whole
from losses import OBJECTIVES
from methods import METHODS
from models import NETWORKS
from optimizers import OPTIMIZERS
from sampling import SAMPLERS
from solvers import SCHEDULES, SOLVERS
from sources import SOURCES, codec, preparation
from sources.codec import CODECS

KEYS = {
    "seed": Key(42, whole(0, 2**63 - 1), "of weights, noise and the order of the data"),
    "device": Key(
        "auto",
        Text(r"auto|cpu|cuda(:\d{1,3})?", "'auto', 'cpu', 'cuda' or 'cuda:N'"),
        "where everything is computed; 'auto': on a GPU where there is one",
    ),
    "data.dataset": Key("", OneOf(registry="sources.SOURCES"), "where the images come from"),
    "data.category": Key(
        "", OneOf(("", "bedroom", "church_outdoor")), "of LSUN: which of its scenes"
    ),
    "data.tfrecords_path": Key("", Text(), "of CelebAHQ and FFHQ: their TFRecord file"),
    "data.path": Key("", Text(), "of 'folder': a folder or .zip of images, an .npy or .npz"),
    "data.data_dir": Key(
        "", Text(), "where other data lie; '' for the default folder of the data set"
    ),
    "data.rules": Key(
        0,
        whole(0, 2),
        "of 'folder': what counts as data, and how a tenth is held out; 1: as runs did that began "
        "before there was a choice; 2: as docs/architecture.md says; 0: the newest, which a run "
        "keeps",
        before=1,
    ),
    "data.image_size": Key(32, whole(1, 4096), "height and width; larger images are resized"),
    "data.num_channels": Key(
        3, whole(0, 1024), "1 (grey) or 3 (colour), of an .npy or .npz any; 0: as the data have"
    ),
    "data.scale": Key(
        (),
        Numbers(Number(-1e9, 1e9), (0, 2), rising=True),
        "of 16-bit image files: the values (low, high) that become black and white; (): measured, "
        "0 and the most that the bits of the largest value hold",
    ),
    "data.num_classes": Key(
        0,
        whole(-1, 10**6),
        "class labels of the images, which the network is given; 0: none; -1: "
        "as many as the data have",
    ),
    "data.centered": Key(True, Flag(), "the network sees [-1, 1], else [0, 1]"),
    "data.conditions": Key(
        "",
        Text(r"[a-z_]*( *, *[a-z_]+)*", "names with commas between them"),
        "what the source gives of each image besides its class, and the network takes, such as "
        "'vector'; '': nothing",
    ),
    "data.resident_bytes": Key(
        2**31, whole(0), "data of at most this size, decoded, stay in memory"
    ),
    "data.num_workers": Key(
        -1, whole(-1, 1024), "processes that decode larger data; -1: as many as processors, up to 8"
    ),
    "data.changed": Key(
        "refuse",
        OneOf(("refuse", "allow")),
        "where the data are not those that the run began with: 'refuse' to start, or 'allow' it, "
        "once; classes keep their numbers",
    ),
    "data.digest": Key(
        "content",
        OneOf(("content", "names")),
        "by which a run knows its data: 'content' reads each file of a folder once, 'names' only "
        "names and sizes, for network disks",
    ),
    "training.sde": Key("", OneOf(registry="methods.METHODS"), "the method"),
    "training.snapshot_freq": Key(50000, whole(1), "steps between numbered checkpoints"),
    "training.snapshot_freq_for_preemption": Key(
        10000, whole(1), "steps between overwritten checkpoints, for resuming"
    ),
    "training.keep_checkpoints": Key(
        0, whole(0), "newest numbered checkpoints that are kept; 0: all"
    ),
    "training.snapshot_sampling": Key(True, Flag(), "draw samples with every numbered checkpoint"),
    "training.snapshot_solver": Key(
        "heun",
        OneOf(registry="solvers.SOLVERS"),
        "of these samples where sampling.ode_solver is 'rk45', which takes any number of "
        "evaluations for a young network: 18 steps of this one, or 'rk45' itself",
    ),
    "training.log_freq": Key(50, whole(1), "steps between losses on the training data"),
    "training.eval_freq": Key(100, whole(1), "steps between losses on the test split"),
    "training.precision": Key(
        "fp32",
        OneOf(("fp32", "tf32", "bf16", "auto")),
        "of products; 'bf16' is autocast; 'auto': 'bf16' where the first start measures it to be "
        "faster, else 'fp32'",
    ),
    "training.compile": Key(
        False, Flag(), "torch.compile the network of training; needs a compiler, and minutes"
    ),
    "training.channels_last": Key(False, Flag(), "memory format of the network, for tensor cores"),
    "model.name": Key("", OneOf(registry="models.NETWORKS"), "the network"),
    "model.checkpoint_activations": Key(
        False, Flag(), "less memory, a third more time; for 256 px and more"
    ),
    "model.nf": Key(128, whole(1, 4096), "channels at the highest resolution"),
    "model.nonlinearity": Key(
        "swish", OneOf(registry="models.layers.ACTIVATIONS"), "between the layers"
    ),
    "model.scale_by_sigma": Key(False, Flag(), "VE SDE: divide the output by the noise level"),
    # Of the U-Nets:
    "model.ch_mult": Key(
        (1, 2, 2, 2),
        Numbers(whole(1, 64), range(1, 17)),
        "channels of each level, in units of nf; a level halves the image",
    ),
    "model.num_res_blocks": Key(4, whole(1, 256), "per level"),
    "model.attn_resolutions": Key(
        (16,), Numbers(whole(0), range(17)), "attention where the image is this wide"
    ),
    "model.resamp_with_conv": Key(True, Flag(), "a convolution before or after resampling"),
    "model.conditional": Key(True, Flag(), "the network sees its noise level or time"),
    "model.dropout": Key(0.1, SHARE, "share of the activations that is set to zero in training"),
    "model.augment_dim": Key(
        0, whole(0, 4096), "entries of the augmentation labels the network is given; 0: none"
    ),
    # Of "ncsnpp" and "edm_unet":
    "model.embedding_type": Key(
        "fourier", OneOf(("fourier", "positional")), "of the noise level or time"
    ),
    "model.fourier_scale": Key(
        16.0, Number(0, 10**4), "standard deviation of the 'fourier' embedding's frequencies"
    ),
    "model.resblock_type": Key("biggan", OneOf(("biggan", "ddpm")), "where blocks resample"),
    "model.fir": Key(True, Flag(), "resample with the filter fir_kernel"),
    "model.fir_kernel": Key(
        (1, 3, 3, 1),
        Numbers(Number(-1000, 1000), range(1, 17)),
        "its taps, up to a factor: their sum must not be 0",
    ),
    "model.skip_rescale": Key(True, Flag(), "sums of two branches are divided by sqrt(2)"),
    "model.progressive": Key(
        "none",
        OneOf(("none", "output_skip", "residual")),
        "how every level on the way up adds to the output; 'none': only the last does",
    ),
    "model.progressive_input": Key(
        "none",
        OneOf(("none", "input_skip", "residual")),
        "how every level on the way down sees the input; 'none': only the first does",
    ),
    "model.progressive_combine": Key(
        "sum", OneOf(("sum", "cat")), "how 'input_skip' joins the input to the features"
    ),
    "model.init_scale": Key(
        0.0, Number(0, 10**6), "of the weights that end a branch; 0 stands for 1e-10"
    ),
    # Of the methods:
    "sampling.method": Key(
        "ode",
        OneOf(registry="sampling.SAMPLERS"),
        "the ODE or, for SDEs, 'pc': predictor and corrector",
    ),
    "sampling.ode_solver": Key(
        "rk45",
        OneOf(("fitted",), "solvers.SOLVERS"),
        "of 'ode': 'rk45' is adaptive, the others take N steps; 'fitted': steps made for the "
        "checkpoint at hand, for 5 to 10 evaluations where many samples are drawn",
    ),
    "sampling.N": Key(
        100,
        whole(1, 10**5),
        "steps of the solvers that are not adaptive; 'pc' takes model.num_scales",
    ),
    "sampling.schedule": Key(
        "auto",
        OneOf(("auto", "fitted"), "solvers.SCHEDULES"),
        "where the steps lie: 'uniform' in the method's time, 'polynomial' in the noise level, "
        "with rho, 'logsnr' in its log; 'fitted': where trajectories of the checkpoint bend, at "
        "most 60 steps; 'auto': the schedule that belongs to the solver",
    ),
    "sampling.rho": Key(
        7.0, Number(0.1, 1000), "of 'polynomial': the larger, the more steps are close to the data"
    ),
    "sampling.order": Key(
        None,
        whole(1, 4),
        "of 'multistep', 'ipndm' and 'fitted', 1 to 4, 'dpmpp' and 'unipc', 1 to 3, at most N; "
        "None: 3",
    ),
    "sampling.S_churn": Key(
        0.0,
        Number(0, 1000),
        "'heun' and 'improved_euler', of PFGM++, EDM and SDEs: noise added on the way, with the "
        "levels raised by the share S_churn / N; 0: none, the ODE",
    ),
    "sampling.S_min": Key(0.0, Number(0, 1e6), "smallest noise level at which noise is added"),
    "sampling.S_max": Key(
        math.inf, Number(0, 1e6, or_inf=True), "largest noise level at which noise is added"
    ),
    "sampling.S_noise": Key(
        1.0, Number(0, 10), "factor of that noise, 1 in theory; published values are up to 1.007"
    ),
    "sampling.rtol": Key(
        1e-4,
        Number(1e-12, 1),
        "error of a step of 'rk45', in sampling and likelihood: rtol |x| + atol",
    ),
    "sampling.atol": Key(1e-4, Number(1e-12, 1), "see sampling.rtol"),
    "sampling.max_evaluations": Key(
        1000,
        whole(8),
        "of the network by 'rk45', in sampling and likelihood, after which it stops with an error; "
        "training goes on",
    ),
    "sampling.noise_removal": Key(True, Flag(), "end with a step of denoising"),
    "sampling.predictor": Key(
        "euler_maruyama", OneOf(registry="solvers.predictor_corrector.PREDICTORS"), "of 'pc'"
    ),
    "sampling.corrector": Key(
        "none", OneOf(registry="solvers.predictor_corrector.CORRECTORS"), "of 'pc'"
    ),
    "sampling.probability_flow": Key(
        False, Flag(), "the predictor follows the ODE instead of the SDE"
    ),
    "sampling.n_steps_each": Key(1, whole(1, 10**5), "corrector steps per noise level"),
    "sampling.snr": Key(0.16, Number(1e-6, 1000), "signal-to-noise ratio of the corrector"),
    "sampling.class_label": Key(
        -1,
        whole(-1, 10**6),
        "the class of all samples; -1: drawn as those of the training images, by --mode sample "
        "evenly",
    ),
    "sampling.guidance": Key(
        1.0,
        Number(0, 1000),
        "w of the slope u + w (c - u), c the network's and u the same without class labels or that "
        "of sampling.guide; 1: no guidance",
    ),
    "sampling.guidance_interval": Key(
        (),
        Numbers(Number(0, 1e6, or_inf=True), (0, 2)),
        "noise levels above the first and up to the second, where there is guidance; (): all",
    ),
    "sampling.guide": Key(
        "", Text(), "checkpoint of a weaker network of the same kind, which guides (autoguidance)"
    ),
    "sampling.restore": Key(
        "",
        OneOf(("",), "methods.restoration.RESTORE"),
        "restore the images of restore_path: 'inpaint' what restore_mask marks, 'colour' grey "
        "images, enlarge by 2, 4 or 8 ('super2' ..), 'denoise'; '': nothing",
    ),
    "sampling.restore_path": Key(
        "",
        Text(),
        "of restore: an image, or a folder, .zip, .npy or .npz of them; '': with restore_degrade "
        "the first of the split eval.dataset, a fifth of eval.num_samples at most",
    ),
    "sampling.restore_degrade": Key(
        False,
        Flag(),
        "the images of restore_path are whole: measure them, and compare the restorations",
    ),
    "sampling.restore_mask": Key(
        "",
        Text(),
        "of 'inpaint': what is missing, an image file, white there, a folder or .zip of one for "
        "each image, or a rectangle 'top,left,height,width'",
    ),
    "sampling.restore_noise": Key(
        0.0,
        Number(0, 100),
        "standard deviation of the measurement's noise; 1 leads from black to white",
    ),
    "sampling.restorer": Key(
        "moment_matching",
        OneOf(registry="methods.restoration.RESTORERS"),
        "how: 'moment_matching' is the most exact, 'pigdm' and 'dps' are cheaper; 'replacement' "
        "is for sampling.method='pc'",
    ),
    "sampling.restore_resample": Key(
        1,
        whole(1, 1000),
        "of 'replacement': times each step is taken, as RePaint does, "
        "while the sample is at least as noisy as the measurement",
    ),
    "sampling.seeds": Key(
        "",
        Text(r"|\d{1,15}(-\d{1,15})?(,\d{1,15}(-\d{1,15})?)*", "seeds such as 0-63 or 1,2,5-10"),
        "--mode sample: one sample each; '': 0-63, with encode or between none",
    ),
    "sampling.film": Key(
        False, Flag(), "--mode sample: a film of the first 36 seeds from the prior to the image"
    ),
    "sampling.film_format": Key(
        "webp", OneOf(("webp", "gif", "mp4")), "of films; 'mp4' needs the program ffmpeg"
    ),
    "sampling.encode": Key(
        "",
        Text(),
        "--mode sample: an image, or a folder, .zip, .npy or .npz of them: latents, bits/dim, "
        "reconstructions",
    ),
    "sampling.between": Key(
        "", Text(), "--mode sample: two images A.png,B.png: a film that leads from one to the other"
    ),
    "sampling.precision": Key(
        "fp32",
        OneOf(("fp32", "bf16", "auto")),
        "of the products of the network that samples, as training.precision; states are float32",
    ),
    "sampling.channels_last": Key(False, Flag(), "memory format of the images that it is given"),
    "sampling.compile": Key(False, Flag(), "torch.compile the network that samples"),
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
    "eval.features": Key(
        "inception",
        Several(registry="metrics.features.FEATURES"),
        "what samples are compared by: 'inception' (tensorflow-gan's), 'torchscript' (a file, no "
        "TensorFlow), 'pixels'",
    ),
    "eval.inception_path": Key(
        "",
        Text(),
        "the network: for 'inception' the folder of a SavedModel ('': fetched), for 'torchscript' "
        "its file; for both, with a comma between them in the order of eval.features",
    ),
    "eval.stats_dir": Key(
        "assets/stats",
        Text(r"[^\0\n]+", "the name of a folder"),
        "data-set statistics: published ones, and those made here",
    ),
    "eval.save_images": Key(False, Flag(), "without sampling: draw the first samples only"),
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

# What configs that were stored before there were these keys stand for, where not for the default.
BEFORE = {name: key.before for name, key in KEYS.items() if key.before is not None}


def all_keys() -> dict[str, Key]:
    """Every key with its default: those of the loops, and those that the parts declare.

    A part that is registered from outside brings its own, as its attribute `keys`; a method that
    builds one, such as `from_config`, as that of its class.
    """
    tables = [likelihood.Likelihood, *METHODS.values(), *OBJECTIVES.values(), *CODECS.values()]
    tables += [*NETWORKS.values(), *OPTIMIZERS.values(), *SAMPLERS.values()]
    tables += [*SOLVERS.values(), *SCHEDULES.values(), *SOURCES.values()]
    modules = [losses, training, optimizers, codec, preparation]
    keys = KEYS | {name: key for module in modules for name, key in module.KEYS.items()}
    for part in tables:
        builder = getattr(part, "func", part)  # of a partial
        keys |= getattr(getattr(builder, "__self__", builder), "keys", {})
    return keys


def get_default_config() -> ConfigDict:
    """Returns a new, locked config; the experiment sets data set, method and network."""
    config = ConfigDict()
    for name, key in all_keys().items():
        section, _, last = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        owner = config[section] if section else config
        owner[last] = (
            config_dict.placeholder(key.allowed.kind) if key.default is None else key.default
        )
    config.eval.bpd_dataset = config.eval.get_ref("dataset")
    return config.lock()


def check(config: ConfigDict) -> None:
    """Raises a ValueError for the first value that its key does not allow, whatever is used."""
    for name, key in all_keys().items():
        if not key.accepts(value := get(config, name)):
            raise ValueError(f"{name} must be {key.allowed}, not {shown(value)}")
