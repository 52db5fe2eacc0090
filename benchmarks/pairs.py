"""Denoise low-dose CT with PFGM++ of several D, in 1, 5 and 35 evaluations, beside other denoisers.

    python3 benchmarks/ct_data.py DATA
    python3 benchmarks/pairs.py DATA [--out RUNS] [--dims 16,64,128,inf] [--seeds 3] [--steps 4000]
            [--pairs 100] [--plot docs/pairs.png]

It trains configs/pfgmpp/denoise_ddpmpp.py on DATA/x.npy and c.npy in RUNS/{D}-{seed} (DATA/runs),
goes on with runs that were interrupted, and evaluates held-out pairs: with heun, and in one
evaluation from the condition, at the level and weight that are best on training pairs, and from the
prior. Beside them stand the measured image, scikit-image's best of TV, wavelets and non-local
means, tuned on training pairs, and a regression network, the same U-Net given the condition alone,
trained for as long as the first run. The table has PSNR and SSIM of one draw and of the mean of
nine; the plot has the PSNR by evaluations, the mean and range over the seeds.
"""

import json
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch
from numpy.typing import NDArray
from skimage import restoration
from torch import nn

import models
from datasets import batch_at, shuffled_batches
from experiment import Experiment, load
from library.evaluated_pairs import structural_similarity
from library.evaluated_restorations import psnr
from reports.paired import OF
from sources.codec import encoded
from storage.tensorboard import seconds_of_training

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/pfgmpp/denoise_ddpmpp.py"
LEVELS, WEIGHTS = (0.1, 0.15, 0.25, 0.4, 0.6), (0.7, 0.85, 1.0)  # of the start at the condition
TUNED = 64  # training pairs by which they are chosen
START, ONE = "--config.sampling.init=condition", "--config.sampling.N=1"


def program(mode: str, workdir: Path, *flags: str) -> None:
    """Run main.py; CalledProcessError where it fails."""
    subprocess.run(
        [sys.executable, ROOT / "main.py", "--mode", mode, "--workdir", workdir, *flags], check=True
    )


def train(workdir: Path, data: Path, D: str, seed: int, steps: int) -> None:
    """Train to `steps`, from where the run stopped."""
    paths = f"--config.data.path={data / 'x.npy'}", f"--config.data.condition_path={data / 'c.npy'}"
    keys = {"model.D": D, "seed": seed, "training.n_iters": steps, "reports.unit": "HU"}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    program("train", workdir, "--config", CONFIG, *paths, *flags)


def evaluate(workdir: Path, name: str, pairs: int, *flags: str) -> dict:
    """The report of an evaluation of `pairs` in the folder `name`; computed once."""
    if not (reports := [*(workdir / name).glob("report_*.npz")]):
        keys = f"--config.eval.pairs={pairs}", "--noconfig.eval.enable_loss"
        program("eval", workdir, "--eval_folder", name, *keys, *flags)
        reports = [*(workdir / name).glob("report_*.npz")]
    with np.load(reports[0]) as report:
        return dict(report)


def tuned_start(workdir: Path) -> tuple[float, float]:
    """The level and weight of one evaluation from the condition with the best PSNR in training."""
    split = "--config.eval.dataset=train", "--config.eval.pair_draws=1"

    def quality(level: float, weight: float) -> float:
        flags = f"--config.sampling.init_level={level}", f"--config.sampling.init_weight={weight}"
        name = f"tuning-{level}-{weight}"
        return evaluate(workdir, name, TUNED, START, ONE, *flags, *split)["pairs_psnr"]

    level = max(LEVELS, key=lambda each: quality(each, 1.0))
    return level, max(WEIGHTS, key=lambda each: quality(level, each))


def of_run(workdir: Path, pairs: int) -> dict[str, dict]:
    """Reports of a trained run, by how its samples were drawn."""
    level, weight = tuned_start(workdir)
    start = f"--config.sampling.init_level={level}", f"--config.sampling.init_weight={weight}"
    return {
        "1, from the condition": evaluate(workdir, "start", pairs, START, ONE, *start),
        "1, from the prior": evaluate(workdir, "one", pairs, ONE),
        "5": evaluate(workdir, "five", pairs, "--config.sampling.N=3"),
        "35": evaluate(workdir, "thirtyfive", pairs, "--config.sampling.N=18"),
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


def regression(run: Experiment, seconds: float) -> nn.Module:
    """The U-Net of `run`, given the condition alone, trained on the squared error for `seconds`."""
    torch.manual_seed(run.seed)
    net = models.from_config(run.config, run.codec.shape)
    optimizer = torch.optim.Adam(net.parameters(), lr=run.config.optim.lr)
    data, end, start = run.data.get("train"), time.monotonic() + seconds, time.monotonic()
    for batch in shuffled_batches(data, run.config.training.batch_size, run.seed):
        share = (end - time.monotonic()) / (end - start)  # of the time that remains
        if share <= 0:
            break
        for group in optimizer.param_groups:
            group["lr"] = run.config.optim.lr * min(1, 2 * share)
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


def others(workdir: Path, pairs: int, steps_seconds: float) -> dict[str, dict]:
    """PSNR and SSIM of the measured images and of other denoisers, on the pairs of the run."""
    run = load(workdir).experiment
    codec, train_pairs = run.codec, batch_at(run.data.get("train"), slice(TUNED))
    test = batch_at(run.data.get("test"), slice(pairs))

    def in_window(data: torch.Tensor) -> NDArray:
        return codec.within_window(codec.stored(data))

    def measured(batch) -> NDArray:
        return in_window(run.condition_codec.decode(batch.conditions["image"]))

    truth, noisy = in_window(codec.units(test.images)), measured(test)
    clean = in_window(codec.units(train_pairs.images))
    name, way = classical(measured(train_pairs)[..., 0], clean[..., 0])
    net = regression(run, steps_seconds)
    with torch.no_grad():
        of_net = in_window(codec.decode(predicted(net, test.conditions["image"])))
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

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, suffix in zip(panels, ("", "_mean"), strict=True):
        for D, samplers in runs.items():
            points = [
                (float(reports[0]["pairs_nfe"]), [float(r[f"pairs_psnr{suffix}"]) for r in reports])
                for name, reports in samplers.items()
                if name != "1, from the prior"
            ]
            n, values = zip(*points, strict=True)
            mean = np.array([np.mean(each) for each in values])
            ends = np.array([[min(each), max(each)] for each in values]).T
            axes.errorbar(n, mean, abs(ends - mean), marker="o", capsize=3, label=f"D = {D}")
        for k, (name, report) in enumerate(lines.items()):
            style = {"color": "0.4", "linestyle": ("-", "--", ":")[k % 3], "linewidth": 1}
            axes.axhline(report["pairs_psnr"], label=name, **style)
        axes.set(xscale="log", xlabel="evaluations (1: from the condition)")
        axes.set_title(f"PSNR of {OF[suffix]}, dB")
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
        steps=4000,
        pairs=100,
        plot=None,
    )
    data = options.data[0].resolve()
    out, runs = Path(options.out or data / "runs"), defaultdict(lambda: defaultdict(list))
    rows: dict[str, list[dict]] = {}
    for seed in range(options.seeds):
        for D in options.dims.split(","):
            train(out / f"{D}-{seed}", data, D, seed, options.steps)
            for name, report in of_run(out / f"{D}-{seed}", options.pairs).items():
                runs[D][name].append(report)
                rows.setdefault(f"D = {D}, {name}", []).append(report)
        first = out / f"{options.dims.split(',')[0]}-0"
        cached = out / "others.json"
        if not cached.exists():
            seconds = seconds_of_training(first / "tensorboard", options.steps)
            cached.write_text(json.dumps(others(first, options.pairs, seconds)))
        lines = json.loads(cached.read_text())
        beside = {name: [report] for name, report in lines.items()}
        print(f"\nafter {seed + 1} of {options.seeds} seeds:\n{table(rows | beside)}")
        plot(Path(options.plot or out / "pairs.png"), runs, lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
