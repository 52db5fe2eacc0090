"""Compare how fast training on images and on latents of a small autoencoder lowers the distance.

    python3 benchmarks/latents.py OUT [--autoencoder 1000] [--images 600] [--latents 2000]
            [--metrics 6] [--samples 1000] [--seed 0]

It writes scikit-learn's digits, enlarged to 28 x 28, to OUT, trains the convolutional autoencoder
on the training images, and then the same network on images and on latents; the options are the
numbers of steps, of 64 images each. The Frechet distance of pixels is measured during each
training; seconds are processor seconds of the training steps alone, whatever else the machine does.
Above the table stand the seconds of the autoencoder's training, and the distance of images that it
has encoded and decoded, the best that latents can reach.
"""

import time
from pathlib import Path

import common
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import run_lib
from configs.pfgmpp import images16_ddpmpp
from datasets import get_dataset
from experiment import load
from metrics.distances import frechet_distance_of_samples
from storage.tensorboard import read_scalars

SIDE = 28


class Autoencoder(nn.Module):
    """Map images (B, 1, 28, 28) in [-1, 1] to latents (B, 4, 7, 7), and back."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, width, 4, 2, 1), nn.SiLU()),
            *(nn.Conv2d(width, width, 4, 2, 1), nn.SiLU()),
            nn.Conv2d(width, 4, 3, 1, 1),
        )
        self.decoder = nn.Sequential(
            *(nn.Conv2d(4, width, 3, 1, 1), nn.SiLU()),
            *(nn.ConvTranspose2d(width, width, 4, 2, 1), nn.SiLU()),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    @torch.jit.export
    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def write_digits(path: Path) -> Tensor:
    """Write the enlarged digits, uint8 (n, 28, 28, 1); return training images (n, 1, 28, 28)."""
    images = torch.from_numpy(load_digits().images)[:, None] / 16
    images = nn.functional.interpolate(images, (SIDE, SIDE), mode="bilinear").clamp(0, 1)
    np.save(path, (images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    config = images16_ddpmpp.get_config()
    config.data.update(path=str(path), image_size=SIDE, num_channels=1)
    return get_dataset(config, "train")


def train_autoencoder(images: Tensor, steps: int, path: Path, seed: int) -> tuple[float, Tensor]:
    """Train an autoencoder, write it to `path`; return the seconds and decoded `images` (n, D)."""
    torch.manual_seed(seed)
    module, x, start = Autoencoder(), images.float() / 127.5 - 1, time.process_time()
    optimizer = torch.optim.Adam(module.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (64,))]
        z = module.encode(batch)
        decoded = module.decode(z + 0.05 * torch.randn_like(z))  # so that small errors are harmless
        loss = (decoded - batch).square().mean() + 1e-3 * z.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    seconds = time.process_time() - start
    torch.jit.script(module.eval()).save(path)
    with torch.no_grad():
        decoded = module.decode(module.encode(x))
    return seconds, (decoded.clamp(-1, 1) + 1).flatten(1) / 2


def train(workdir: Path, steps: int, values: dict) -> list[tuple[int, float, float]]:
    """Train; return steps, their seconds, and the distance at each measurement."""
    config, seconds, train_step = images16_ddpmpp.get_config(), [], run_lib.train_step
    config.update_from_flattened_dict(values | {"training.n_iters": steps})

    def timed(*arguments) -> Tensor:
        start = time.process_time()
        loss = train_step(*arguments)
        seconds.append(time.process_time() - start)
        return loss

    with common.patched((run_lib, "train_step", timed)):
        run_lib.train(config, workdir)
    distances = read_scalars(workdir / "tensorboard")["metrics/fid"]
    return [(step, sum(seconds[:step]), distance) for step, distance in distances]


def main() -> None:
    options = common.options(
        *(__doc__, "out"),
        autoencoder=1000,
        images=600,
        latents=2000,
        metrics=6,
        samples=1000,
        seed=0,
    )
    out = options.out[0].resolve()
    out.mkdir(parents=True, exist_ok=True)
    program, images = out / "autoencoder.pt", write_digits(out / "digits.npy")
    seconds, decoded = train_autoencoder(images, options.autoencoder, program, options.seed)
    best = frechet_distance_of_samples((images / 255).flatten(1).numpy(), decoded.numpy())
    print(f"{common.setting()}; seed {options.seed}, {options.samples} samples")
    print(f"autoencoder: {seconds:.1f} s; decoded training images have the distance {best:.4g}")
    values = {
        "data.path": str(out / "digits.npy"),
        "data.image_size": SIDE,
        "model.ch_mult": (1, 2, 2),
        "model.attn_resolutions": (),
        "training.precision": "fp32",
        "training.snapshot_sampling": False,
        "training.metric_samples": options.samples,
        "training.snapshot_solver": "heun",
        "sampling.ode_solver": "heun",
        "sampling.N": 6,
        "eval.batch_size": 250,
        "eval.stats_dir": str(out / "stats"),
        "seed": options.seed,
    }
    columns = ("on", "<8"), ("step", ">8d"), ("seconds", ">8.1f"), ("distance", ">10.4g")
    table = common.Table(*columns)
    for name, steps in (("images", options.images), ("latents", options.latents)):
        codec = {"data.codec": str(program)} if name == "latents" else {}
        metric_freq = {"training.metric_freq": max(1, steps // options.metrics)}
        for row in train(out / name, steps, values | codec | metric_freq):
            table.row(name, *row)
        trained, start = load(out / name, codec), time.process_time()
        trained.sample(range(64))
        print(f"{name}: 64 samples take {time.process_time() - start:.1f} s")


if __name__ == "__main__":
    main()
