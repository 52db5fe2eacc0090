"""Denoise low-dose CT with PFGM++ of several D, in 1, 5 and 35 evaluations, beside other denoisers.

    python3 benchmarks/ct_data.py DATA
    python3 benchmarks/pairs.py DATA [--out RUNS] [--dims 16,64,128,inf] [--seeds 3] [--steps 2000]
            [--pairs 100] [--keys "model.nf=8 model.ch_mult=(1,2,4)"] [--plot docs/pairs.png]

It trains configs/pfgmpp/denoise_ddpmpp.py, with the values that `keys` sets, on DATA/x.npy and
c.npy in RUNS/{D}-{seed} (RUNS: DATA/runs by default), seed by seed. It evaluates held-out pairs
with ipndm, and in one evaluation: from the prior, and from the condition, at the level and weight
that are best on training pairs. For comparison there are the measured image, scikit-image's best of
TV, wavelets and non-local means, tuned on training pairs, and a regression network: the same U-Net
given the condition alone, trained for as many steps, which take as long. The table has PSNR and
SSIM of one draw and of the mean of nine; the plot has the PSNR by evaluations, as mean and range
over the seeds. Both are written after each seed, the table to RUNS/table.md; after a kill the same
command resumes.
"""

import json
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import common
import numpy as np
import torch
from numpy.typing import NDArray
from skimage import restoration
from torch import nn

import models
from configs.keys import named
from datasets import batch_at, shuffled_batches
from experiment import Experiment, load
from library.evaluated_pairs import structural_similarity
from library.evaluated_restorations import psnr
from optimizers import OPTIMIZERS
from optimizers.muon import mark_tables
from samplers.start import ConditionStart
from sources.codec import encoded

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/pfgmpp/denoise_ddpmpp.py"
LEVELS, WEIGHTS = (0.03, 0.06, 0.1, 0.2, 0.4), (0.7, 0.85, 1.0)  # of the start at the condition
TUNED = 64  # training pairs by which they are chosen
# of all runs; a measured precision could differ from run to run
FIXED = {
    "reports.unit": "HU",
    "training.precision": "fp32",
    "training.snapshot_sampling": False,
}
SOLVER = "--config.sampling.ode_solver=ipndm"
START, ONE = "--config.sampling.init=condition", "--config.sampling.N=1"


def program(mode: str, workdir: Path, *flags: str) -> None:
    """Run main.py; CalledProcessError where it fails."""
    subprocess.run(
        [sys.executable, ROOT / "main.py", "--mode", mode, "--workdir", workdir, *flags], check=True
    )


def train(workdir: Path, data: Path, keys: Mapping[str, object]) -> None:
    """Train with these values of keys; a run that was stopped is resumed."""
    if finished(workdir, keys["training.n_iters"]):
        return
    keys = {"data.path": data / "x.npy", "data.condition_path": data / "c.npy", **FIXED, **keys}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    program("train", workdir, "--config", CONFIG, *flags)


def finished(workdir: Path, steps: int) -> bool:
    return (workdir / f"checkpoints/checkpoint_{steps}.pth").exists()


def evaluate(workdir: Path, name: str, pairs: int, *flags: str) -> dict:
    """The report of an evaluation of `pairs` in the folder `name`; computed once."""
    if not (reports := [*(workdir / name).glob("report_*.npz")]):
        keys = f"--config.eval.pairs={pairs}", "--noconfig.eval.enable_loss"
        program("eval", workdir, "--eval_folder", name, SOLVER, *keys, *flags)
        reports = [*(workdir / name).glob("report_*.npz")]
    with np.load(reports[0]) as report:
        return dict(report)


def tuned_start(workdir: Path) -> tuple[float, float]:
    """The level and weight of one evaluation from the condition with the best PSNR in training."""
    run = load(workdir).experiment
    pairs = batch_at(run.data.get("train"), slice(TUNED))
    truth = in_window(run, run.codec.units(pairs.images))

    def quality(level: float, weight: float) -> float:
        start = ConditionStart(level, weight, run.condition_codec)
        sampler = replace(run.sampler, n=1, start=start)
        images, _ = sampler(run.network, len(pairs), conditions=pairs.conditions)
        return float(psnr(in_window(run, images)[:, None], truth[:, None]))

    level = max(LEVELS, key=lambda each: quality(each, 1.0))
    return level, max(WEIGHTS, key=lambda each: quality(level, each))


def in_window(run: Experiment, data: torch.Tensor) -> NDArray:
    """Data (n, C, H, W) in their units, as (n, H, W, C) with 0 for black and 1 for white."""
    return run.codec.within_window(run.codec.stored(data))


def of_run(workdir: Path, pairs: int) -> dict[str, dict]:
    """Reports of a trained run, by how its samples were drawn."""
    level, weight = tuned_start(workdir)
    start = f"--config.sampling.init_level={level}", f"--config.sampling.init_weight={weight}"
    return {
        "1, from the condition": evaluate(workdir, "start", pairs, START, ONE, *start),
        "1, from the prior": evaluate(workdir, "one", pairs, ONE),
        "5": evaluate(workdir, "five", pairs, "--config.sampling.N=5"),
        "35": evaluate(workdir, "thirtyfive", pairs, "--config.sampling.N=35"),
    }


# --- other denoisers ------------------------------------------------------------------------------


def classical(noisy: NDArray, clean: NDArray) -> tuple[str, Callable[[NDArray], NDArray]]:
    """scikit-image's best denoiser and its parameters, on pairs (n, H, W) in [0, 1].

    Wavelets are left out where PyWavelets is missing.
    """
    ways = {}
    for w in 0.02 * 1.5 ** np.arange(8):
        ways[f"TV {w:.3g}"] = restoration.denoise_tv_chambolle, {"weight": w}
    for h in 0.02 * 1.5 ** np.arange(7):
        sizes = {"h": h, "sigma": h, "patch_size": 3, "patch_distance": 5, "fast_mode": True}
        ways[f"non-local means {h:.3g}"] = restoration.denoise_nl_means, sizes
    try:
        import pywt  # noqa: F401
    except ImportError:
        print("wavelets are left out: they need pip install PyWavelets")
    else:
        for s in 0.02 * 1.5 ** np.arange(7):
            ways[f"wavelets {s:.3g}"] = restoration.denoise_wavelet, {"sigma": s}

    def apply(name: str, images: NDArray) -> NDArray:
        way, numbers = ways[name]
        return np.stack([way(image, **numbers) for image in images])

    best = min(ways, key=lambda name: np.square(apply(name, noisy) - clean).mean())
    return best, lambda images: apply(best, images)


def regression(run: Experiment, steps: int) -> nn.Module:
    """The U-Net of `run`, given the condition alone, trained on the squared error."""
    torch.manual_seed(run.seed)
    net, optim = models.from_config(run.config, run.codec.shape), run.config.optim
    mark_tables(net)
    build = named(OPTIMIZERS, "optim.optimizer", optim.optimizer)
    optimizer = build([*net.named_parameters()], optim)
    batches = shuffled_batches(run.data.get("train"), run.config.training.batch_size, run.seed)
    for step, batch in enumerate(islice(batches, steps)):
        share = min((step + 1) / max(1, optim.warmup), (steps - step) / max(1, optim.cooldown), 1)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * share
        y = encoded(run.codec, batch.images)
        loss = (predicted(net, batch.conditions["image"]) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def predicted(net: nn.Module, condition: torch.Tensor) -> torch.Tensor:
    """The output of a regression network, whose input x is 0."""
    x = condition.new_zeros(len(condition), 1, *condition.shape[2:])
    return net(x, torch.ones(len(x)), image=condition)


def others(workdir: Path, pairs: int, steps: int) -> dict[str, dict]:
    """PSNR and SSIM of the measured images and of other denoisers, on the pairs of the run."""
    run = load(workdir).experiment
    codec, train_pairs = run.codec, batch_at(run.data.get("train"), slice(TUNED))
    test = batch_at(run.data.get("test"), slice(pairs))

    def measured(batch) -> NDArray:
        return in_window(run, run.condition_codec.decode(batch.conditions["image"]))

    truth, noisy = in_window(run, codec.units(test.images)), measured(test)
    clean = in_window(run, codec.units(train_pairs.images))
    name, way = classical(measured(train_pairs)[..., 0], clean[..., 0])
    net = regression(run, steps)
    with torch.no_grad():
        of_net = in_window(run, codec.decode(predicted(net, test.conditions["image"])))
    images = {"measured": noisy, name: way(noisy[..., 0])[..., None], "regression network": of_net}
    return {
        name: {
            "pairs_psnr": float(psnr(each[:, None], truth[:, None])),
            "pairs_ssim": float(structural_similarity(each, truth).mean()),
        }
        for name, each in images.items()
    }


# --- results --------------------------------------------------------------------------------------


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown of PSNR and SSIM, mean and standard deviation over the reports of each row."""
    keys = [f"pairs_{kind}{suffix}" for suffix in ("", "_mean") for kind in ("psnr", "ssim")]
    lines = [
        "| | PSNR of one | SSIM of one | PSNR of the mean | SSIM of the mean | coverage of 80 % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, reports in rows.items():
        cells = []
        for key in (*keys, "pairs_coverage"):
            values = [float(report[key]) for report in reports if key in report]
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4g}{spread}" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, runs: dict[str, dict[str, list[dict]]], lines: dict[str, dict]) -> None:
    """Plot the PSNR of one draw and of the mean of the draws by evaluations, in two panels."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    titles = {"": "one draw", "_mean": "the mean of the draws"}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, (suffix, title) in zip(panels, titles.items(), strict=True):
        for i, (D, samplers) in enumerate(runs.items()):
            values = {
                name: [float(report[f"pairs_psnr{suffix}"]) for report in reports]
                for name, reports in samplers.items()
            }
            prior = np.mean(values.pop("1, from the prior"))
            n = [float(samplers[name][0]["pairs_nfe"]) for name in values]
            mean = np.mean([*values.values()], 1)
            ends = np.array([[min(each), max(each)] for each in values.values()]).T
            style = {"marker": "o", "color": f"C{i}"}
            axes.errorbar(n, mean, abs(ends - mean), capsize=3, label=f"D = {D}", **style)
            axes.plot(1, prior, fillstyle="none", **style)
        for k, (name, report) in enumerate(lines.items()):
            style = {"color": "0.4", "linestyle": ("-", "--", ":")[k % 3], "linewidth": 1}
            axes.axhline(report["pairs_psnr"], label=name, **style)
        axes.set(xscale="log", xlabel="evaluations (1: from the condition; hollow: the prior)")
        axes.set_title(f"PSNR of {title}, dB")
        axes.set_xticks([1, 5, 35], ["1", "5", "35"])
        axes.minorticks_off()
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    options = common.options(
        *(__doc__, "data"),
        out=None,
        dims="16,64,128,inf",
        seeds=3,
        steps=2000,
        pairs=100,
        keys="",
        plot=None,
    )
    data, steps = options.data[0].resolve(), options.steps
    more = dict(each.split("=", 1) for each in options.keys.split())
    out, runs = Path(options.out or data / "runs"), defaultdict(lambda: defaultdict(list))
    rows: dict[str, list[dict]] = {}
    for seed in range(options.seeds):
        for D in options.dims.split(","):
            workdir = out / f"{D}-{seed}"
            train(workdir, data, {"model.D": D, "seed": seed, "training.n_iters": steps, **more})
            for name, report in of_run(workdir, options.pairs).items():
                runs[D][name].append(report)
                rows.setdefault(f"D = {D}, {name}", []).append(report)
        first, cached = out / f"{options.dims.split(',')[0]}-0", out / "others.json"
        if not cached.exists():
            cached.write_text(json.dumps(others(first, options.pairs, steps)))
        lines = json.loads(cached.read_text())
        text = table(rows | {name: [report] for name, report in lines.items()})
        (out / "table.md").write_text(f"{text}\n")
        print(f"\nafter {seed + 1} of {options.seeds} seeds:\n{text}", flush=True)
        plot(Path(options.plot or out / "pairs.png"), runs, lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
