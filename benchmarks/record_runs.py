"""The runs that record.py trains, the samplers that it tries, and main.py in a fork."""

import contextlib
import math
import multiprocessing
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  (the forks find it imported)
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parent.parent
STEPS, MORE = 20, 5  # of training, and after it was stopped

SMALL = {
    "device": "cpu",
    "model.nf": 8,
    "training.n_iters": STEPS,
    "training.batch_size": 16,
    "training.precision": "fp32",
    "training.log_freq": 1,
    "training.eval_freq": 10,
    "training.snapshot_freq": 10,
    "optim.lr": 1e-2,  # so that labels and depth count for something after 20 steps
    "model.ema_rate": 0.8,
    "sampling.N": 6,
    "sampling.rtol": 1e-2,
    "sampling.atol": 1e-2,
    "sampling.max_evaluations": 1000,
    "eval.batch_size": 64,
    "eval.num_samples": 64,
    "eval.bpd_num_repeats": 1,
}
REFERENCE = {"training.batch_size": 64, "training.small_batch_size": 16}
POISSON = REFERENCE | {"optim.lr": 3e-3}
CLASSES = {"data.num_classes": 10, "training.label_dropout": 0.3}
LEVELS = {"model.num_scales": 40}  # steps of the predictor-corrector, too
NEAR = {"model.beta_max": 8.0}  # a prior from which samples of a young network stay in [0, 1]
DISCRETE = LEVELS | {"training.continuous": False, "model.embedding_type": "positional"}

# Name of a run -> its file in configs/, and what differs from it.
RUNS: dict[str, tuple[str, dict]] = {
    "poisson": ("poisson/digits_ddpmpp", POISSON),
    "poisson-ncsnpp": ("poisson/digits_ncsnpp", POISSON),
    "pfgmpp": ("pfgmpp/digits_ddpmpp", {}),
    "pfgmpp-D=inf": ("pfgmpp/digits_ddpmpp", {"model.D": math.inf}),
    "pfgmpp-D=3": ("pfgmpp/digits_ddpmpp", {"model.D": 3.0}),
    "posterior-mean": ("pfgmpp/digits_ddpmpp", REFERENCE | {"training.target": "posterior_mean"}),
    "demo-Muon": ("pfgmpp/digits_demo", REFERENCE),
    "edm": ("edm/digits_ddpmpp", {}),
    "ve": ("ve/digits_ncsnpp", LEVELS),
    "vp": ("vp/digits_ddpmpp", LEVELS | NEAR),
    "subvp": ("subvp/digits_ddpmpp", LEVELS | NEAR),
    "ve-discrete": ("ve/digits_ncsnpp", DISCRETE),
    "vp-discrete": ("vp/digits_ddpmpp", DISCRETE),
    "classes": ("pfgmpp/digits_ddpmpp", CLASSES),
    "poisson-classes": ("poisson/digits_ddpmpp", POISSON | CLASSES),
    "augmented": ("edm/digits_ddpmpp", {"training.augment": 0.5, "model.augment_dim": 9}),
    "bf16": ("edm/digits_ddpmpp", {"training.precision": "bf16", "sampling.precision": "bf16"}),
    "options": (
        "pfgmpp/digits_ddpmpp",
        {
            "training.accumulate": 2,
            "model.dropout": 0.2,
            "model.ema_half_life": 100.0,
            "model.ema_stds": (0.05, 0.1),
            "optim.nonfinite": "replace",
            "optim.weight_decay": 0.01,
            "optim.grad_clip": 0.5,
        },
    ),
    "folder": (
        "pfgmpp/images16_ddpmpp",
        REFERENCE
        | {"data.image_size": 8, "data.num_classes": -1, "model.ch_mult": (1, 2)}
        # fixed in earlier versions of the config, where they are measured now
        | {"model.sigma_data": 0.5, "model.P_mean": -1.2, "sampling.sigma_max": 80.0},
    ),
}
FITTED = ("poisson", "pfgmpp", "vp")
RESTORED = ("poisson", "pfgmpp", "vp", "classes")
RESUMED = ("poisson", "demo-Muon", "options", "folder")

# Name of a sampler -> its keys below `sampling`.
SAMPLERS = {
    **{
        solver: {"ode_solver": solver}
        for solver in ("rk45", "forward_euler", "improved_euler", "heun")
        + ("multistep", "ipndm", "dpmpp", "unipc")
    },
    "heun uniform": {"ode_solver": "heun", "schedule": "uniform"},
    "unipc logsnr": {"ode_solver": "unipc", "schedule": "logsnr", "order": 2},
    "heun churn": {"ode_solver": "heun", "S_churn": 3.0},
    "heun denoised": {"ode_solver": "heun", "noise_removal": True},
    "pc": {"method": "pc"},
    "pc langevin": {"method": "pc", "predictor": "euler_maruyama", "corrector": "langevin"},
    "pc ancestral": {"method": "pc", "predictor": "ancestral_sampling", "corrector": "none"},
    "guided": {"guidance": 2.0, "guidance_interval": (0.1, 3.0), "class_label": 3},
}
RESTORATIONS = {
    f"{what} {restorer}": {"restore": what, "restorer": restorer, **keys}
    for what, keys in {
        "inpaint": {"restore_mask": "2,2,4,4"},
        "super2": {},
        "denoise": {"restore_noise": 0.3},
    }.items()
    for restorer in ("moment_matching", "pigdm", "dps")
} | {
    "inpaint replacement": {
        "method": "pc",
        "restore": "inpaint",
        "restore_mask": "2,2,4,4",
        "restorer": "replacement",
        "restore_resample": 2,
    }
}


# --- the program ----------------------------------------------------------------------------------


def program(workdir: Path, mode: str, values: dict, *flags: str) -> None:
    """Run main.py on `workdir` with config `values` by key; its output goes to {workdir}.log.

    It is a fork of this process, which has all imports done.

    Raises:
        ValueError: it refuses what it is told.
        RuntimeError: it fails in another way.
    """
    values = [f"--config.{key}={value}" for key, value in values.items()]
    arguments = ["main.py", f"--mode={mode}", f"--workdir={workdir}", *flags, *values]
    log = workdir.with_name(f"{workdir.name}.log")
    child = multiprocessing.get_context("fork").Process(target=_main, args=(arguments, log))
    child.start()
    child.join()
    if child.exitcode:
        error = ValueError if child.exitcode == 2 else RuntimeError
        line = (log.read_text().splitlines() or [""])[-1]
        raise error(f"main.py ended with status {child.exitcode}: {line} ({log})")


def _main(arguments: list[str], log: Path) -> None:
    with (
        open(log, "a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        sys.argv = sys.orig_argv = arguments
        print(*arguments)
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")


def places(name: str, folder: Path) -> dict:
    """Values of keys that name places of this machine, which no checkpoint decides."""
    data = {"data.path": str(folder / "images")} if name == "folder" else {}
    return {"eval.stats_dir": str(folder / "stats"), **data}


def config_values(name: str, folder: Path) -> dict:
    """Values of the run `name`, by key, that differ from its config file."""
    return SMALL | places(name, folder) | RUNS[name][1]


def get_config(name: str, folder: Path, sampler: dict | None = None) -> ConfigDict:
    """The config of the run `name` with a `sampler` of its own."""
    config = runpy.run_path(str(ROOT / f"configs/{RUNS[name][0]}.py"))["get_config"]()
    config.update_from_flattened_dict(config_values(name, folder) | below_sampling(sampler or {}))
    return config


def below_sampling(keys: dict) -> dict:
    return {f"sampling.{key}": value for key, value in keys.items()}


def train(workdir: Path, steps: int = STEPS) -> None:
    name = workdir.name
    values = config_values(name, workdir.parent) | {"training.n_iters": steps}
    program(workdir, "train", values, f"--config={ROOT}/configs/{RUNS[name][0]}.py")


def digits(numbers: range) -> np.ndarray:
    """Handwritten digits, uint8 (n, 8, 8)."""
    return (load_digits().images[numbers] * 15.9375).astype(np.uint8)


def write_images(folder: Path) -> None:
    """{split}/{class}/{number}.png of handwritten digits: 128 to train on, 16 to test."""
    classes = load_digits().target
    for i, image in enumerate(digits(range(144))):
        path = folder / ("train" if i < 128 else "test") / str(classes[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
