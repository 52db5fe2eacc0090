"""Held-out pairs: draws from the posterior of each condition, compared with the truth."""

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from datasets import batch_at
from library.evaluated import Evaluated, Split
from library.evaluated_restorations import psnr
from library.posterior import condition_pictures, in_type
from library.rounds import Rounds
from reports.images import save_grid
from reports.progress import solver_bar
from solvers.base import TooManyEvaluations
from sources.batch import Conditions
from sources.pairs import is_alike
from storage.digests import digests_of_conditions

log = logging.getLogger(__name__)

PICTURED, DRAWS_PICTURED = 8, 4  # pairs in the picture, and draws of each
WINDOW = 7  # side of the windows of SSIM, or the largest odd number that fits


def compare_pairs(evaluated: Evaluated, split: Split, number: int, draws: int) -> dict:
    """Compare `draws` images for each of the first `number` conditions of `split` with the truth.

    A picture of the first pairs is saved. Pairs for which the solver diverges do not count. Returns
    the report's entries `pairs...` (docs/architecture.md), in the main process only.
    """
    experiment = evaluated.experiment
    codec, condition_codec = experiment.codec, experiment.condition_codec
    batch = batch_at(split.data, slice(number)).to(experiment.device)
    if not (rounds := _rounds(evaluated, batch.conditions, draws)):
        return {}
    counted = np.concatenate([each["pairs"] for each in rounds if len(each["draws"])] or [[]])
    report = {"pairs_seconds": np.sum([each["seconds"] for each in rounds])}
    if diverged := len(batch) - len(counted):
        report["pairs_nonfinite"] = diverged
        log.warning(f"{diverged} of {len(batch)} pairs do not count: their draws are not finite")
    if not len(counted):
        return report
    batch = batch[torch.from_numpy(counted).to(experiment.device)]
    images = np.concatenate([each["draws"] for each in rounds])
    images = images.reshape(len(batch), draws, *images.shape[1:])
    truth = codec.stored(codec.units(batch.images))
    condition = batch.conditions["image"]
    measured = condition_codec.stored(condition_codec.decode(condition))
    in_window, of_truth = codec.within_window(images), codec.within_window(truth)
    compared = {"": in_window[:, 0], "_mean": in_window.mean(1)}
    if is_alike(condition_codec, codec):
        compared["_condition"] = codec.within_window(measured)
    report |= {
        "pairs_images": len(batch),
        "pairs_draws": draws,
        "pairs_nfe": np.mean([each["nfe"] for each in rounds if len(each["draws"])]),
    }
    for name, each in compared.items():
        ratios = [psnr(a[None, None], b) for a, b in zip(each, of_truth, strict=True)]
        report |= _with_error(f"pairs_psnr{name}", np.array(ratios))
        if (similarity := structural_similarity(each, of_truth)) is not None:
            report |= _with_error(f"pairs_ssim{name}", similarity)
    if draws > 1:
        ranks = rank_shares(images, truth)
        report["pairs_spread"] = np.sqrt(in_window.var(1, ddof=1).mean())
        report |= {"pairs_ranks": ranks.mean(0)} | coverages(ranks)
    _save_picture(evaluated, measured, images, truth)
    return report


def _rounds(evaluated: Evaluated, conditions: Conditions, draws: int) -> list[dict]:
    """Images drawn for each of the `conditions`, by round, with `pairs`, `nfe` and `seconds`.

    The draws are of the stored type, (pairs * draws, H, W, C); there are none where the solver
    diverges. Raises TooManyEvaluations where the solver stops at its limit, since with a larger
    limit the draws could be finite.
    """
    experiment, codec = evaluated.experiment, evaluated.experiment.codec
    number = len(conditions["image"])
    rows = np.arange(number).repeat(draws)

    def compute(i: int, part: slice) -> dict:
        of_rows = conditions.map(lambda each: each[rows[part]])
        try:
            with solver_bar(experiment.method) as watch:
                images, nfe = experiment.sampler(
                    experiment.network,
                    part.stop - part.start,
                    generator=evaluated.generator("pairs", i),
                    conditions=of_rows,
                    watch=watch,
                )
        except TooManyEvaluations:
            raise
        except FloatingPointError as error:
            log.warning(f"round {i}: none of its {len(rows[part]) // draws} pairs counts: {error}")
            images, nfe = torch.empty(0, *codec.data_shape), 0
        return {"draws": codec.stored(images), "nfe": nfe}

    # all draws of a condition are in one round
    size = draws * max(1, evaluated.batch_size // draws)
    origin = evaluated.origin | digests_of_conditions(conditions) | {"draws of each": draws}
    files = evaluated.folder / f"ckpt_{evaluated.k}_pairs"
    rounds = Rounds("pairs", len(rows), size)
    results = rounds.cached(files, origin, ("draws", "nfe"), compute)
    parts = rounds.parts[: len(results)]
    return [
        result | {"pairs": rows[part][::draws]} for result, part in zip(results, parts, strict=True)
    ]


def _with_error(name: str, values: NDArray) -> dict[str, float]:
    """The mean of `values` of several images and its standard error, if there are two or more."""
    error = {f"{name}_error": values.std(ddof=1) / len(values) ** 0.5} if len(values) > 1 else {}
    return {name: values.mean()} | error


def structural_similarity(images: NDArray, truth: NDArray) -> NDArray | None:
    """Mean SSIM (n,) of `images` (n, H, W, C) where 0 is black and 1 white (Wang et al. 2004).

    It is scikit-image's; None, and a line in the log, where that is missing or sides are below 3.
    """
    side = min(WINDOW, *images.shape[1:3])
    side -= side % 2 == 0
    try:
        from skimage.metrics import structural_similarity as of_image
    except ImportError:
        log.info("SSIM is left out: it needs pip install scikit-image")
        return None
    if side < 3:
        return None
    options = {"win_size": side, "data_range": 1.0, "channel_axis": -1}
    return np.array([of_image(a, b, **options) for a, b in zip(images, truth, strict=True)])


def rank_shares(draws: NDArray, truth: NDArray) -> NDArray:
    """Shares (n, K + 1) of an image's pixels whose truth is above 0, 1, ... K of its K draws.

    Where draws equal the truth, as whole numbers may, a pixel counts in equal parts for each rank
    that the ties allow.

    Args:
        draws: (n, K, H, W, C).
        truth: (n, H, W, C).
    """
    n, number = draws.shape[:2]
    truth = truth[:, None]
    below = (draws < truth).sum(1).reshape(n, -1)
    equal = (draws == truth).sum(1).reshape(n, -1)
    ranks = np.arange(number + 1)
    shares = np.zeros((n, number + 1))
    for rank in ranks:
        within = (below <= rank) & (rank <= below + equal)
        shares[:, rank] = (within / (equal + 1)).mean(1)
    return shares


def coverages(ranks: NDArray) -> dict[str, float]:
    """Coverage: how often the truth lies between two sorted draws, and how often it should.

    `ranks` (n, K + 1) are `rank_shares`. Between draws i and j of K a share of (j - i) / (K + 1) is
    expected. Entries without a suffix are for the outermost draws; those ending in "_inner" are for
    two draws that leave out about a quarter of the K + 1 places on either side, where K is at
    least 7.
    """
    number = ranks.shape[1] - 1
    report, outermost, inner = {}, ("", 1), ("_inner", (number + 1) // 4)
    for name, i in (outermost, inner) if inner[1] > 1 else (outermost,):
        j = number + 1 - i
        report |= _with_error(f"pairs_coverage{name}", ranks[:, i:j].sum(1))
        report[f"pairs_coverage{name}_expected"] = (j - i) / (number + 1)
    return report


def _save_picture(evaluated: Evaluated, measured: NDArray, images: NDArray, truth: NDArray) -> None:
    """Save a row for each of the first pairs: condition, draws, their mean, the truth."""
    experiment = evaluated.experiment
    codec, first = experiment.codec, images[:PICTURED]
    shape = images.shape[2:]
    conditions = condition_pictures(measured[:PICTURED], experiment.condition_codec, codec)
    draws = codec.pictures(first[:, :DRAWS_PICTURED].reshape(-1, *shape))
    mean = codec.pictures(in_type(first.astype(np.float64).mean(1), images.dtype))
    columns = [conditions[:, None], draws.reshape(len(first), -1, *draws.shape[1:])]
    columns += [mean[:, None], codec.pictures(truth[:PICTURED])[:, None]]
    rows = np.concatenate(columns, 1)
    save_grid(evaluated.picture("pairs"), rows.reshape(-1, *rows.shape[2:]), rows.shape[1])
