"""Restorations by the weights of a checkpoint, and how near they come to the truth."""

import logging
import math

import numpy as np
import torch
from torch import Tensor

from datasets import DataChanged, batch_at
from experiment_parts import Parts
from library.evaluated import Evaluated
from library.restoration import RESTORATIONS, ToRestore, restoring_sampler
from library.rounds import Rounds
from methods.restoration import Measurement
from reports.images import save_grid
from reports.progress import solver_bar
from sources.codec import encoded

log = logging.getLogger(__name__)

AVERAGED = 2_000  # training images whose mean is a plain restoration
RESTORED = 10  # images that the picture of restorations shows


def restore_images(evaluated: Evaluated, restored: ToRestore) -> dict:
    """Draw `RESTORATIONS` images for each measurement, and a picture of the first ones.

    Returns the report's entries `restore...` (docs/architecture.md), in the main process only.
    Raises FloatingPointError where the solver diverges.
    """
    experiment, measurement = evaluated.experiment, restored.measurement
    codec, value = experiment.codec, measurement.value
    channels, *sides = codec.data_shape
    rows = torch.arange(len(value), device=value.device).repeat_interleave(RESTORATIONS)

    def compute(i: int, part: slice) -> dict:
        part, generator = rows[part], evaluated.generator("restoration", i)
        sampler = restoring_sampler(experiment, measurement[part])
        conditions = restored.conditions.map(lambda each: each[part])
        with solver_bar(experiment.method) as watch:
            images, nfe = sampler(
                experiment.network,
                len(part),
                generator=generator,
                conditions=conditions,
                watch=watch,
            )
        return {"restored": codec.stored(images), "nfe": nfe}

    # the restorations of an image in one round
    size = RESTORATIONS * max(1, evaluated.batch_size // RESTORATIONS)
    origin = evaluated.origin | restored.origin(codec.shape)
    files = evaluated.folder / f"ckpt_{evaluated.k}_restored"
    names = ("restored", "nfe")
    rounds = Rounds("restoration", len(rows), size).cached(files, origin, names, compute)
    if not rounds:
        return {}
    images = np.concatenate([each["restored"] for each in rounds])
    images = images.reshape(len(value), RESTORATIONS, *sides, channels)
    measured = codec.stored(codec.decode(measurement.picture()))
    within = codec.within_window
    report = {
        "restore_images": len(value),
        "restore_spread": np.sqrt(within(images).var(1, ddof=1).mean()),
        "restore_nfe": np.mean([each["nfe"] for each in rounds]),
        "restore_seconds": np.sum([each["seconds"] for each in rounds]),
    }
    columns = [measured[:, None], images]
    if restored.truth is not None:
        truth = codec.stored(restored.truth)[:, None]
        columns = [truth, *columns]
        plain, remark = plain_restoration(experiment, measurement)
        plain = codec.stored(codec.decode(plain))
        if remark:
            report["restore_psnr_plain_remark"] = remark
        report["restore_psnr"] = psnr(within(images), within(truth))
        report["restore_psnr_mean"] = psnr(within(images.mean(1, keepdims=True)), within(truth))
        report["restore_psnr_plain"] = psnr(within(plain[:, None]), within(truth))
    strips = np.concatenate(columns, axis=1)[:RESTORED]
    strips = strips.reshape(-1, *sides, channels)
    width = len(columns) - 1 + RESTORATIONS
    save_grid(evaluated.picture("restoration"), codec.pictures(strips), columns=width)
    return report


def plain_restoration(experiment: Parts, measurement: Measurement) -> tuple[Tensor, str]:
    """Restorations (n, C, H, W) that need no network, to compare with, and a remark or "".

    Small images are enlarged by cubic interpolation; else it is the mean training image, changed so
    that it agrees with the measurement.
    """
    value, (_, height, width) = measurement.value, experiment.codec.shape
    if value.shape[2:] != (height, width):
        return torch.nn.functional.interpolate(value, (height, width), mode="bicubic"), ""
    remark = ""
    try:
        data = experiment.data.get("train", labels=False)
    except DataChanged:
        raise
    except (OSError, ValueError) as error:  # published networks restore without their data
        remark = f"the plain restorations start from grey, not the mean image: {error}"
        log.warning(remark)
        low, high = experiment.codec.bounds
        grey = (low + high) / 2 if math.isfinite(low) else 0.0
        mean = torch.full(experiment.codec.shape, grey, device=experiment.device)
    else:
        batch = batch_at(data, slice(AVERAGED)).to(experiment.device)
        mean = encoded(experiment.codec, batch.images).mean(0)
    return measurement.project(mean.to(value).expand(len(value), -1, -1, -1)), remark


def psnr(images: np.ndarray, truth: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio, dB, of `images` (n, k, H, W, C); 1 is black to white.

    The squared error counts as at least that of rounding to 255 grey levels, 1 / 12 of one.
    """
    error = np.square(255 * (images - truth.astype(np.float64))).mean((2, 3, 4))
    return (10 * np.log10(255**2 / np.maximum(error, 1 / 12))).mean()
