"""Record what the program computes, and compare it with the record of another commit.

    python3 benchmarks/record.py OUT.npz [--against OTHER.npz]
    python3 benchmarks/record.py --resume FOLDER

A change of the structure changes no number. The first form trains small networks of every method
for 20 steps, samples them with every solver, guides, restores, measures likelihoods and evaluates,
and writes all results to OUT.npz; their workdirs stay in the folder OUT beside it. It takes five
minutes on one thread of a CPU. With `--against` it then compares OUT with OTHER, entry by entry; an
OUT that exists is not recorded again. The exit status is 1 where an entry is missing or beyond its
tolerance:

    floats      max |new - old| <= 1e-4 max |old|, and NaN and infinities in the same places
    pictures    one grey level, in a hundredth of the pixels at most
    configs     the keys that OTHER has are there, with the same values
    all else    equal

The second form takes the FOLDER of an earlier commit and its FOLDER.npz. It loads and samples the
checkpoints and shared files, repeats the evaluations and trains some runs for five more steps; what
these give has to be that of the earlier commit bit for bit, all else as above. FOLDER stays as it
is.

Only the contract is used (main.py's modes and files, the functions that take a config, and
`experiment.load`), so the same script runs before and after a change of what is behind it.
"""

# ruff: noqa: E402
import os

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
os.environ |= {"CUDA_VISIBLE_DEVICES": ""} | dict.fromkeys(THREADS, "1")  # before the imports

import argparse
import contextlib
import math
import multiprocessing
import re
import runpy
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import matplotlib.pyplot  # noqa: F401  (the forks that run main.py find it imported)
import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_digits
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor

import datasets
import likelihood
import losses
import methods
import models
import run_lib  # noqa: F401
import sampling
from experiment import load

Record = dict[str, np.ndarray]
Results = Iterator[tuple[str, object]]  # entries by name

ROOT = Path(__file__).parent.parent
STEPS, MORE = 20, 5  # of training, and after it was stopped
TOLERANCE = 1e-4

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
        REFERENCE | {"data.image_size": 8, "data.num_classes": -1, "model.ch_mult": (1, 2)},
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


# --- what is recorded -----------------------------------------------------------------------------


def attempt(name: str, compute: Callable[[], object]) -> Results:
    """The entry `name`, what `compute` gives; or {name}/error, the kind of its error.

    A young network may have no flow that a solver can follow, and some options exclude each other.
    """
    try:
        yield name, compute()
    except (ValueError, FloatingPointError) as error:
        yield f"{name}/error", type(error).__name__


def configs() -> Results:
    """Lines "key=value" of every file in configs/ that makes a config."""
    for path in sorted(ROOT.glob("configs/*/**/*.py")):
        config = runpy.run_path(str(path))["get_config"]()
        lines = [f"{key}={value!r}" for key, value in flattened(config.to_dict()).items()]
        yield str(path.relative_to(ROOT)), sorted(lines)


def flattened(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= flattened(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def training(workdir: Path, step: int = STEPS) -> Results:
    """The losses of all steps, the picture of the last one, and its weights."""
    curves = scalars(workdir / "tensorboard")
    for tag in ("loss/train", "loss/test"):
        yield tag, [curves[tag][step] for step in sorted(curves[tag])]
    picture = workdir / f"samples/iter_{step}/sample.npz"
    if picture.exists():
        yield "picture", read(picture)["samples"]
    state = torch.load(workdir / f"checkpoints/checkpoint_{step}.pth", weights_only=True)
    weights = [t for t in state["model"].values() if t.is_floating_point()]
    yield "weights", torch.cat([t.flatten() for t in weights])
    yield "norms of weights", [t.norm() for t in weights]
    yield "EMA weights", torch.cat([t.flatten() for t in state["ema"]["shadow_params"]])
    for part in ("optimizer", "averages"):  # whatever their order in the file is
        norms = [t.norm().item() for t in tensors_in(state.get(part)) if t.dim()]
        yield f"norms of {part}", sorted(norms)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of TensorBoard's files; a later start replaces what it computes again.

    They are TFRecords: a length of 8 bytes, its checksum of 4, the event and a checksum of 4.
    """
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.*")):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + length])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    curves.setdefault(value.tag, {})[event.step] = value.simple_value
            start += length + 16
    return curves


def tensors_in(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for branch in branches for tensor in tensors_in(branch)]


def read(path: Path) -> Record:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def scaled_images(config: ConfigDict, split: str, numbers: slice) -> Tensor:
    """Images (n, C, H, W) of a split as the network sees them."""
    images = datasets.get_dataset(config, split)[numbers].float() / 255
    return 2 * images - 1 if config.data.centered else images


def objective(config: ConfigDict) -> Results:
    """Losses and gradient norms of as many steps of a plain loop."""
    torch.manual_seed(config.seed)
    method, net = methods.get_method(config), models.create_model(config)
    loss_fn, size = losses.get_loss_fn(config, method), config.training.batch_size
    data = scaled_images(config, "train", slice(STEPS * size))
    optimizer, history = torch.optim.Adam(net.parameters(), lr=1e-3), []
    for step in range(STEPS):
        images = data[torch.arange(step * size, (step + 1) * size) % len(data)]
        optimizer.zero_grad()
        loss = loss_fn(net, images, torch.Generator().manual_seed(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    yield "loss", [loss for loss, _ in history]
    yield "norms of gradients", [norm for _, norm in history]


def trained_network(config: ConfigDict, workdir: Path) -> torch.nn.Module:
    """The network of the last checkpoint with its EMA weights."""
    state = torch.load(workdir / f"checkpoints/checkpoint_{STEPS}.pth", weights_only=True)
    net = models.create_model(config)
    net.load_state_dict(state["model"])
    learned = [p for p in net.parameters() if p.requires_grad]
    for parameter, average in zip(learned, state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    return net.eval().requires_grad_(False)


def samples(name: str, folder: Path) -> Results:
    """Samples of each sampler from one prior draw, and bits/dim of 16 images with their latents."""
    config = get_config(name, folder)
    method, net = methods.get_method(config), trained_network(config, folder / name)
    shape = (8, config.data.num_channels, config.data.image_size, config.data.image_size)
    prior = method.prior_sampling(shape, torch.Generator().manual_seed(0))
    yield "prior", prior
    yield "log p of the prior", method.prior_logp(prior)

    def sample(keys: dict) -> Tensor:
        draw = sampling.get_sampling_fn(get_config(name, folder, keys), method)
        return draw(net, x=prior, generator=torch.Generator().manual_seed(1))[0]

    for sampler, keys in SAMPLERS.items():
        yield from attempt(sampler, lambda keys=keys: sample(keys))

    def bits_per_dim() -> tuple[Tensor, Tensor, int]:
        images, generator = scaled_images(config, "test", slice(16)), torch.Generator()
        return likelihood.get_likelihood_fn(config, method)(net, images, generator.manual_seed(2))

    for entry, result in attempt("bits per dim", bits_per_dim):
        if isinstance(result, str):
            yield entry, result
        else:
            yield from zip(("bits per dim", "latents", "evaluations"), result, strict=True)


def library(path: Path) -> Results:
    """What `load` gives for the checkpoint or shared file at `path`."""
    images = torch.from_numpy(digits(range(200, 208)))[:, None].float() / 255
    trained, seeds = load(path, {"sampling.ode_solver": "heun"}), range(8)
    yield from attempt("sample", lambda: trained.sample(seeds))
    yield from attempt("sample of a class", lambda: trained.sample(seeds, class_label=3))
    yield from attempt("film", lambda: trained.film(seeds[:2], frames=6))
    yield from attempt("latents", lambda: trained.encode(images))
    yield from attempt("decoded", lambda: trained.decode(trained.encode(images)))
    yield from attempt("log likelihood", lambda: trained.log_likelihood(images, seed=1))
    yield from attempt("denoised", lambda: trained.denoise(images, 0.4))


def variants(name: str, workdir: Path) -> Results:
    """Samples of `load` with guidance, autoguidance, and samplers made for the network."""
    guide = str(workdir / f"checkpoints/checkpoint_{STEPS // 2}.pth")
    changes = {
        "guided": SAMPLERS["guided"],
        "autoguided": {"guidance": 2.0, "guide": guide},
    }
    if name in FITTED:
        changes |= {"fitted schedule": {"schedule": "fitted"}, "fitted": {"ode_solver": "fitted"}}
    for entry, keys in changes.items():
        keys = below_sampling({"ode_solver": "heun"} | keys)
        yield from attempt(entry, lambda keys=keys: load(workdir, keys).sample(range(8)))


def evaluation(workdir: Path) -> Results:
    """The numbers of an evaluation in the space of pixels."""
    name = workdir.name
    flags = {"features": "pixels", "enable_loss": True, "enable_bpd": True}
    flags |= {"enable_sampling": True, "enable_classification": name == "folder"}
    flags |= {"ema_std": 0.1} if name == "options" else {}
    if "discrete" in name:
        flags["enable_bpd"] = False
    values = places(name, workdir.parent) | {f"eval.{key}": flag for key, flag in flags.items()}
    program(workdir, "eval", values)
    for entry, value in read(workdir / f"eval/report_{STEPS // 10}.npz").items():
        if value.dtype.kind != "U":
            yield entry, value


def restorations(workdir: Path) -> Results:
    """Restored images of the test split, by each restorer."""
    for entry, keys in RESTORATIONS.items():
        keys = keys | {"seeds": "0-7", "restore_degrade": True}
        values = places(workdir.name, workdir.parent) | below_sampling(keys)
        outdir = workdir / f"restored-{entry.replace(' ', '-')}"

        def restore(values=values, outdir=outdir) -> np.ndarray:
            program(workdir, "sample", values, f"--outdir={outdir}")
            return read(outdir / "samples.npz")["samples"]

        yield from attempt(entry, restore)


def sample_mode(workdir: Path) -> Results:
    """The files of `--mode sample` with a film, encoded images and the way between two of them."""
    images = workdir.with_name("images") / "test"
    first, second, *_ = sorted(map(str, images.glob("*/*.png")))
    keys = {"seeds": "0-7", "film": True, "between": f"{first},{second}", "encode": images}
    values = places(workdir.name, workdir.parent) | below_sampling(keys)
    program(workdir, "sample", values)
    for path in sorted(workdir.glob(f"samples/step_{STEPS}/*.npz")):
        for entry, value in read(path).items():
            if value.dtype.kind != "U":
                yield f"{path.stem}/{entry}", value


def continued(workdir: Path) -> Results:
    """Training that goes on, in a copy of the `workdir`."""
    with tempfile.TemporaryDirectory(dir=workdir.parent) as folder:
        copy = shutil.copytree(workdir, Path(folder) / workdir.name)
        (Path(folder) / "images").symlink_to(workdir.parent / "images")
        train(copy, STEPS + MORE)
        yield from training(copy, STEPS + MORE)


def shared(workdir: Path) -> Results:
    """Samples of the file that `--mode export` wrote."""
    path = workdir / "model.safetensors"
    if not path.exists():
        program(workdir, "export", places(workdir.name, workdir.parent))
    yield "sample", load(path, {"sampling.ode_solver": "heun"}).sample(range(8))


def record(folder: Path, started: bool = False) -> Record:
    """All entries, of runs in `folder`; with `started` the runs are there, and trained on."""
    if not started:
        write_images(folder / "images")
    entries = {f"configs: {name}": lines for name, lines in configs()}
    for name in RUNS:
        start, workdir = time.perf_counter(), folder / name
        parts: dict[str, Results] = {}
        if not started:
            train(workdir)
            parts["training"] = training(workdir)
        if name != "folder":  # whose config is complete in its checkpoints only
            parts |= {} if started else {"objective": objective(get_config(name, folder))}
            parts["samples"] = samples(name, folder)
        parts |= {"library": library(workdir), "shared": shared(workdir)}
        parts |= {"variants": variants(name, workdir), "evaluation": evaluation(workdir)}
        if name in RESTORED:
            parts["restored"] = restorations(workdir)
            parts["sample mode"] = sample_mode(workdir)
        if name in RESUMED:
            parts["continued"] = continued(workdir)
        seconds = {}
        for part, results in parts.items():
            since = time.perf_counter()
            try:
                for entry, value in results:
                    entries[f"{name}: {part}: {entry}"] = value
            except (ValueError, OSError, RuntimeError) as error:  # the others can be compared
                print(f"FAILED: {name}: {part}: {error}", flush=True)
            seconds[part] = time.perf_counter() - since
        slow = ", ".join(f"{part} {s:.1f}" for part, s in seconds.items())
        print(f"{name}: {time.perf_counter() - start:.1f} s ({slow})", flush=True)
    return {name: np.asarray(value) for name, value in entries.items()}


# --- comparison -----------------------------------------------------------------------------------


def difference(new: np.ndarray, old: np.ndarray) -> tuple[float, str]:
    """Share of the tolerance that the change takes (0 for none), and a word on it."""
    if new.dtype.kind == old.dtype.kind == "U":
        lost = sorted({*old.ravel()} - {*new.ravel()})
        return (math.inf, f"lost: {', '.join(lost[:3])}") if lost else (0.0, "equal")
    if new.shape != old.shape or new.dtype.kind != old.dtype.kind:
        return math.inf, f"{new.dtype}{new.shape} instead of {old.dtype}{old.shape}"
    if new.tobytes() == old.tobytes():
        return 0.0, "equal"
    if old.dtype == np.uint8:
        levels = np.abs(new.astype(int) - old)
        share = (levels > 0).mean()
        within = levels.max() <= 1 and share <= 0.01
        words = f"{levels.max()} grey levels, in {share:.2%} of the pixels"
        return share / 0.01 if within else math.inf, words
    if old.dtype.kind != "f":
        return math.inf, "differs"
    finite = np.isfinite(old)
    if not np.array_equal(new[~finite], old[~finite], equal_nan=True) or (
        not np.isfinite(new[finite]).all()
    ):
        return math.inf, "other entries are not finite"
    old, new = old[finite].astype(np.float64), new[finite].astype(np.float64)
    largest = np.abs(old).max(initial=0)
    relative = np.abs(new - old).max(initial=0) / largest if largest else math.inf
    return relative / TOLERANCE, f"{relative:.1e} relative"


def compare(new: Record, old: Record, bitwise: str = "") -> bool:
    """Print a table of the entries of `old` in `new`; whether all are within their tolerance.

    Those with `bitwise` in their names have none.
    """
    table = common.Table(("part", "<34"), ("entries", ">7"), ("equal", ">7"), ("largest", "<60"))
    groups: dict[str, list[str]] = {}
    for name in old:
        groups.setdefault(name.rpartition(": ")[0], []).append(name)
    beyond = 0
    for group, names in groups.items():
        changed = {}
        for name in names:
            if name.endswith("seconds"):
                continue
            share, words = math.inf, "missing"
            if name in new:
                share, words = difference(new[name], old[name])
            if share:
                tolerated = share <= 1 and not (bitwise and bitwise in name)
                changed[name] = (share, words if tolerated else f"{words}: BEYOND TOLERANCE")
                beyond += not tolerated
        worst = max(changed.values(), default=(0, "bitwise equal"))[1]
        table.row(group, f"{len(names)}", f"{len(names) - len(changed)}", worst)
        for name, (_, words) in changed.items():
            table.row(f"    {name.rpartition(': ')[2]}", "", "", words)
    if others := sorted(new.keys() - old.keys()):
        print(f"{len(others)} entries are new, among them: {', '.join(others[:3])}")
    print(f"{beyond} of {len(old)} entries are beyond their tolerance")
    return not beyond


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.npz")
    parser.add_argument("--against", type=Path, metavar="OTHER.npz")
    parser.add_argument("--resume", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if (options.out is None) == (options.resume is None):
        parser.error("either OUT.npz or --resume FOLDER")
    torch.set_num_threads(1)
    start = time.perf_counter()
    if options.resume:
        old = read(options.resume.with_suffix(".npz"))
        skipped = "configs: ", ": training: ", ": objective: "
        old = {name: a for name, a in old.items() if not any(part in name for part in skipped)}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / options.resume.name
            shutil.copytree(options.resume, folder)
            new = record(folder, started=True)
        new = {name: new[name] for name in new if not name.startswith("configs: ")}
    elif options.against and options.out.exists():
        print(f"{options.out} is there and is not recorded again")
        new = read(options.out)
    else:
        folder = options.out.absolute().with_suffix("")
        if folder.exists() or options.out.exists():
            parser.error(f"{options.out} or {folder} is there: remove it, or take another name")
        new = record(folder)
        save(options.out, new)
    print(f"{len(new)} entries in {time.perf_counter() - start:.0f} s, {common.setting()}\n")
    if options.resume:
        alike = compare(new, old, bitwise=": continued: ")
        cached = [name for name in old if re.search("[_/]seconds$", name)]
        reused = [name for name in cached if name in new and new[name] == old[name]]
        print(f"{len(reused)} of {len(cached)} cached results were taken from the old files")
        sys.exit(not alike)
    if options.against:
        sys.exit(not compare(new, read(options.against)))


def save(path: Path, entries: Record) -> None:
    """Write `entries` to `path`, an .npz that is whole or absent."""
    beside = path.with_name(f".{path.name}")
    np.savez_compressed(beside, **entries)
    os.replace(beside, path)


if __name__ == "__main__":
    main()
