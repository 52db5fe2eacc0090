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
import numpy as np
import torch
from ml_collections import ConfigDict
from record_compare import Record, compare
from record_runs import (
    FITTED,
    MORE,
    RESTORATIONS,
    RESTORED,
    RESUMED,
    ROOT,
    RUNS,
    SAMPLERS,
    STEPS,
    below_sampling,
    digits,
    get_config,
    places,
    program,
    train,
    write_images,
)
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor

import datasets
import likelihood
import losses
import methods
import models
import run_lib  # noqa: F401  (forks find it imported)
import sampling
from experiment import load

Results = Iterator[tuple[str, object]]  # entries by name


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
    """Results of the library on the network loaded from the checkpoint or shared file `path`."""
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
