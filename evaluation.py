"""The parts of an evaluation: loss, bits/dim, classification, samples against data, restoration.

Each result is a file that says what it was computed from, so an evaluation that was killed
continues from its files, and several processes can share the work.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets import DataChanged, DataSet, batch_at, in_order, keyed_generator, to_unit_interval
from experiment import Experiment
from library.restoration import RESTORATIONS, ToRestore, restoring_sampler
from library.rounds import in_batches, remove_others, shared
from likelihood import log_posterior, passes_of
from methods.base import conditioned
from methods.restoration import Measurement
from metrics.distances import TooFew
from metrics.features import FeatureSpace
from metrics.reference import ReferenceStatistics
from metrics.table import OF_HALVES, Comparison, compare, compare_halves
from reports.images import Images, channels_last, image_grid, save_grid, to_uint8
from reports.progress import progress_bar, solver_bar
from solvers.base import TooManyEvaluations
from solvers.solve import solve_ode
from storage.digests import digest, digests_of_conditions
from storage.files import cached, check_arrays, read_arrays, save_png

log = logging.getLogger(__name__)

# Keys of config.eval that switch a part of an evaluation on; those of `DRAWN` need samples.
DRAWN = ("enable_sampling", "save_images", "enable_interpolate", "enable_rescale")
PARTS = ("enable_loss", "enable_bpd", "enable_classification", *DRAWN)

GRID_SAMPLES = 100  # images of an evaluation that its picture shows
AVERAGED = 2_000  # training images whose mean is a plain restoration
RESTORED = 10  # images that the picture of restorations shows
PAIRS = 10  # samples in a row of the picture of nearest training images


def remove_results(folder: Path, k: int) -> None:
    """Remove the report and the pictures of checkpoint `k`, which are to be made anew."""
    for path in (folder / f"report_{k}.npz", *folder.glob(f"*_{k}.png")):
        path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of one checkpoint.

    Attributes:
        run: the experiment, whose network holds the weights to evaluate.
        folder, k: where results go, and the checkpoint's number in their names.
        origin: everything that the results of these weights depend on; see `Experiment.origin`.
        origin_of_data: digests of the split that likelihoods and losses are computed on.
        seed: of everything random.
        split: its name.
        batch_size: images at once.
        passes: over the split, each with new noise, for bits/dim.
        num_samples: to be drawn.
        step: of training, that the weights are of.
    """

    run: Experiment
    folder: Path
    k: int
    origin: dict
    origin_of_data: dict
    seed: int
    split: str
    batch_size: int
    passes: int
    num_samples: int
    step: int = 0

    @classmethod
    def from_config(
        cls,
        config,
        run: Experiment,
        folder: Path,
        k: int,
        origin: dict,
        origin_of_data: dict,
        step: int = 0,
    ) -> "Evaluation":
        return cls(
            run=run,
            folder=folder,
            k=k,
            origin=origin,
            origin_of_data=origin_of_data,
            seed=config.seed,
            split=config.eval.dataset,
            batch_size=config.eval.batch_size,
            passes=passes_of(config.eval.dataset, config.eval.bpd_num_repeats),
            num_samples=config.eval.num_samples,
            step=step,
        )

    def generator(self, purpose: str, *key: int) -> torch.Generator:
        return keyed_generator(self.run.device, purpose, self.seed, *key)

    def picture(self, name: str) -> Path:
        """The path of a picture."""
        return self.folder / f"{name}_{self.k}.png"

    def _encoded(self, images: Tensor) -> Tensor:
        return self.run.codec.encode(to_unit_interval(images.to(self.run.device)))

    def loss(self, data: DataSet, batch_size: int) -> dict:
        """The loss over a whole split: each image is perturbed once.

        Its batch, of `batch_size` images, is the reference batch. Returns the report's entry
        `loss`.
        """
        run = self.run

        def compute() -> dict:
            generator, total = self.generator("loss"), 0.0
            objective = run.objective.whole().eval()
            with progress_bar(total=len(data), desc="loss", unit="image") as progress:
                for batch in in_order(data, batch_size):
                    images = self._encoded(batch.images)
                    reference = replace(batch.to(run.device), images=images)
                    for part in reference.split(self.batch_size):
                        examples = objective.draw(part, self.step, generator)
                        value = objective.loss(run.network, examples, reference)
                        total += value.item() * len(part)
                        progress.update(len(part))
            return {"loss": total / len(data)}

        sizes = {"batch": batch_size, "at once": self.batch_size}
        objective = run.objective_settings | {"reduce_mean": run.objective.reduce_mean}
        if weights := run.objective.state_dict():
            objective["weights"] = digest(weights)
        origin = self.origin | self.origin_of_data | {"sizes": sizes, "objective": objective}
        path = self.folder / f"ckpt_{self.k}_loss.npz"
        results = cached(path, origin, torch.no_grad()(compute), {"loss": ("f", ())})
        return {"loss": results["loss"]}

    def bits_per_dim(self, data: DataSet) -> dict:
        """Bits per dimension of every image of a split, averaged over passes of new noise.

        The network is given the image's conditions, if there are any, and no guidance.

        The latents of the first batch are integrated back to images. `encoding_error` is the root
        mean square difference from the original images, in units of [0, 1]: the effect of the
        solver's tolerance.

        Returns the report's entries `bpd...` and `encoding_error` (docs/architecture.md), in the
        main process only. Raises FloatingPointError where the ODE cannot be solved.
        """
        run, size = self.run, self.batch_size
        likelihood = run.likelihood

        @torch.no_grad()
        def compute(i: int, start: int) -> dict:
            generator = self.generator("bits/dim", i)
            batch = batch_at(data, slice(start, start + size)).to(run.device)
            images = to_unit_interval(batch.images, generator, dequantize=True)
            with solver_bar(run.method) as watch:
                bits, latents, nfe = likelihood(
                    run.network, run.codec.encode(images), generator, batch.conditions, watch=watch
                )
            results = {"bpd": bits.double().cpu().numpy(), "nfe": nfe}
            if i == 0:
                net = conditioned(run.network, batch.conditions)
                with solver_bar(run.method) as watch:
                    x, _ = solve_ode(run.method, net, latents, watch=watch, **run.limits)
                change = run.codec.unclamped(x) - images
                results["encoding_error"] = change.square().mean().sqrt().item()
            return results

        def spec(i: int, number: int) -> dict:
            expected = {"bpd": ("f", (number,)), "nfe": ("iuf", ())}
            return expected | ({"encoding_error": ("f", ())} if i == 0 else {})

        files = self.folder / f"{self.split}_ckpt_{self.k}_bpd"
        starts = self.passes * list(range(0, len(data), size))
        origin = self.origin | self.origin_of_data | {"divergence": likelihood.divergence}
        batches = in_batches("bits/dim", files, starts, size, len(data), origin, compute, spec)
        if not batches:
            return {}
        bpd = np.concatenate([batch["bpd"] for batch in batches])
        bpd = bpd.reshape(self.passes, len(data)).mean(0)
        report = {
            "bpd": bpd.mean(),
            "bpd_nfe": np.mean([batch["nfe"] for batch in batches]),
            "bpd_seconds": np.sum([batch["seconds"] for batch in batches]),
            "bpd_images": bpd,
            "encoding_error": batches[0]["encoding_error"],
        }
        if len(bpd) > 1:
            return report | {"bpd_error": bpd.std(ddof=1) / math.sqrt(len(bpd))}
        remark = "left out: standard error of bits/dim: it needs 2 images, not 1"
        return report | {"bpd_error_remark": remark}

    def classification(self, data: DataSet) -> dict:
        """log p(label | image) of every image of a split, by its likelihood given each class label.

        p(label) is the share of the class in the training images. The likelihoods of an image share
        the dequantisation noise and the probe, so that they differ by the label alone.

        Returns the report's entries `accuracy` and `class...` (docs/architecture.md), in the main
        process only. Raises FloatingPointError where the ODE cannot be solved.
        """
        run, size = self.run, self.batch_size
        likelihood, dim = run.likelihood, math.prod(run.codec.shape)
        prior = run.data.labels("train").bincount(minlength=run.classes).double()
        shares = prior.clamp(min=1e-30)  # finite logarithms also of a class without training images

        @torch.no_grad()
        def compute(i: int, start: int) -> dict:
            batch = batch_at(data, slice(start, start + size)).to(run.device)
            images, generator = batch.images, self.generator("classification", 2 * i)
            scaled, bits = (
                run.codec.encode(to_unit_interval(images, generator, dequantize=True)),
                [],
            )
            for label in range(run.classes):
                labels = torch.full((len(images),), label, device=run.device)
                conditions, probe = (
                    batch.conditions | {"class_labels": labels},
                    self.generator("classification", 2 * i + 1),
                )
                with solver_bar(run.method) as watch:
                    each, *_ = likelihood(run.network, scaled, probe, conditions, watch=watch)
                bits.append(each.double().cpu())
            return {"log_p": log_posterior(torch.stack(bits, 1), dim, shares).numpy()}

        def spec(i: int, number: int) -> dict:
            return {"log_p": ("f", (number, run.classes))}

        files = self.folder / f"{self.split}_ckpt_{self.k}_classes"
        origin = self.origin | self.origin_of_data | {"divergence": likelihood.divergence}
        origin |= {"labels of the training images": prior.tolist()}
        starts = range(0, len(data), size)
        batches = in_batches(
            "classification", files, starts, size, len(data), origin, compute, spec
        )
        if not batches:
            return {}
        log_p = np.concatenate([batch["log_p"] for batch in batches])
        return {
            "accuracy": np.mean(log_p.argmax(1) == data.labels.cpu().numpy()),
            "class_log_p": log_p,
            "class_seconds": np.sum([batch["seconds"] for batch in batches]),
        }

    # --- samples ---

    def samples(self, statistics: Sequence[ReferenceStatistics]) -> dict:
        """Draw samples and compare their features with those of the data, in each feature space.

        Returns the report's entries on samples (docs/architecture.md), in the main process only.
        """
        rounds = self._rounds([each.space for each in statistics])
        if not rounds:
            return {}
        number = sum(len(each_round["pool_3"]) for each_round in rounds)
        report = {
            "features": ",".join(each.space.kind for each in statistics),
            "num_samples": number,
            "nonfinite": self.num_samples - number,
            "sampling_seconds": np.sum([each_round["seconds"] for each_round in rounds]),
            "sampling": json.dumps(self.origin["sampling"], sort_keys=True),
        }
        if report["nonfinite"]:
            log.warning(
                f"{report['nonfinite']} of {self.num_samples} samples are not finite and do not "
                "count"
            )
        if not number:
            log.warning("no sample is finite: there is nothing to compare with the data")
            return report
        report["nfe"] = np.mean(
            [each_round["nfe"] for each_round in rounds if len(each_round["pool_3"])]
        )
        log.info(f"comparing {number:,} samples with the data")
        labels = labels_of(rounds) if self.run.classes else None
        for i, each in enumerate(statistics):
            comparison = self._comparison(each, rounds, i, labels)
            entries = compare(comparison) | self._halves(comparison, each.space, i)
            prefix = "" if i == 0 else f"{each.space.kind}:"
            report |= {f"{prefix}{key}": value for key, value in entries.items()}
            if i == 0:
                self._draw(comparison, each.data, rounds)
        return report

    def _comparison(
        self,
        statistics: ReferenceStatistics,
        rounds: list[dict],
        i: int,
        labels: np.ndarray | None,
    ) -> Comparison:
        """The samples and the data in feature space number `i`."""
        space, on_gpu = statistics.space, self.run.device.type == "cuda"
        of_space = [each_round["spaces"][i] for each_round in rounds]
        logits = [features["logits"] for features in of_space if "logits" in features]
        return Comparison(
            np.concatenate([features["pool_3"] for features in of_space]),
            np.concatenate(logits) if logits else None,
            statistics.reference,
            space.backend,
            self.run.device if on_gpu else torch.device("cpu"),  # for float64
            labels,
            statistics.labels,
        )

    def _halves(self, comparison: Comparison, space: FeatureSpace, i: int) -> dict:
        """The entries of `compare_halves`, cached in the folder: all checkpoints share them."""
        features = comparison.reference.features
        if features is None:
            return {}
        origin = {"data": hashlib.sha256(features.tobytes()).hexdigest()}
        origin |= {"samples": len(comparison.features), "entries": OF_HALVES}
        suffix = f"_{space.kind}" if i else ""
        path, spec = self.folder / f"data_halves{suffix}.npz", dict.fromkeys(OF_HALVES, ("iuf", ()))
        try:
            results = cached(path, origin, partial(compare_halves, comparison), spec)
        except TooFew as error:
            return {"half_first_remark": f"left out: data against data: {error}"}
        return {name: results[name] for name in OF_HALVES}

    def _rounds(self, spaces: Sequence[FeatureSpace]) -> list[dict]:
        """The samples in rounds of `batch_size`: `path`, `nfe`, `seconds`, `spaces`, `pool_3`.

        `spaces` are the features in each space, `pool_3` those in the first. A round has a file of
        samples, and a file of their features in each space; a kill costs one round at most.
        """
        run, folder = self.run, self.folder / f"ckpt_{self.k}"
        numbers = numbers_of_rounds(self.num_samples, self.batch_size)
        sample_paths = [folder / f"samples_{r}.npz" for r in range(len(numbers))]
        suffixes = ["", *(f"_{space.kind}" for space in spaces[1:])]
        measured = [
            [folder / f"statistics{suffix}_{r}.npz" for suffix in suffixes]
            for r in range(len(numbers))
        ]
        remove_others(folder.glob("*.npz"), [*sample_paths, *sum(measured, [])])
        channels, *sides = run.codec.data_shape
        spec = {"samples": ("u", (None, *sides, channels)), "nfe": ("iuf", ())}
        spec |= {"labels": ("i", (None,))} if run.classes else {}

        def compute(r: int, number: int) -> dict:
            key = self.origin | {"round": r, "number": number}
            conditions = run.draw_conditions(number, "samples", r)
            key |= digests_of_conditions(conditions)
            draw = partial(self.draw_round, r, number)
            samples = cached(sample_paths[r], key, draw, spec)
            images, features = samples["samples"], []
            for space, path in zip(spaces, measured[r], strict=True):
                compute_features = partial(features_of, space, images)
                origin = key | {"features": space.name}
                features.append(cached(path, origin, compute_features, space.spec(len(images))))
            cost = {"nfe": samples["nfe"], "seconds": samples["seconds"]}
            first = {"pool_3": features[0]["pool_3"], "spaces": features}
            return cost | first | {"path": sample_paths[r]}

        tasks = [(number, partial(compute, r, number)) for r, number in enumerate(numbers)]
        return shared("sampling", tasks)

    def draw_round(self, r: int, number: int) -> dict:
        """Draw `number` samples; the finite ones, uint8, with their class labels if there are any.

        There are none where the solver diverges. Raises TooManyEvaluations where it stops at its
        limit, since with a larger one these samples could be finite.
        """
        run, generator = self.run, self.generator("samples", r)
        conditions = run.draw_conditions(number, "samples", r)
        labels = conditions.get("class_labels")
        try:
            with solver_bar(run.method) as watch:
                samples, nfe = run.sampler(
                    run.network, number, generator=generator, conditions=conditions, watch=watch
                )
        except TooManyEvaluations:
            raise
        except FloatingPointError as error:
            log.warning(f"round {r}: none of its {number} samples counts: {error}")
            samples, nfe = torch.empty(0, *run.codec.data_shape), 0
            labels = None if labels is None else labels[:0]
        finite = samples.flatten(1).isfinite().all(1)
        result = {"samples": to_uint8(samples[finite]), "nfe": nfe}
        return result if labels is None else result | {"labels": labels[finite].cpu().numpy()}

    def draw_images(self) -> None:
        """Save a picture of samples, for the eye only."""
        wanted = min(GRID_SAMPLES, self.num_samples)
        numbers = enumerate(numbers_of_rounds(wanted, self.batch_size))
        samples = np.concatenate([self.draw_round(r, n)["samples"] for r, n in numbers])
        if len(samples):
            save_grid(self.picture("ode_images"), samples)

    def _draw(self, comparison: Comparison, data: DataSet | None, rounds: list[dict]) -> None:
        """Save pictures of samples, of training images, and of samples beside their nearest."""
        first = np.arange(min(GRID_SAMPLES, len(comparison.features)))
        save_grid(self.picture("ode_images"), samples_at(rounds, first))
        if data is None:
            return
        reference = comparison.reference
        index = torch.from_numpy(reference.index[: len(first)])
        save_grid(self.picture("data_images"), channels_last(data[index]))
        # samples, and below each its nearest training image, to look for copies: first those
        # samples that are closest to the data, then the first ones drawn
        distances, rows = comparison.nearest
        number, strips = min(PAIRS, len(distances)), []
        for sample_rows in (distances.argsort()[:number], np.arange(number)):
            index = torch.from_numpy(reference.index[rows[sample_rows]])
            pairs = np.concatenate([samples_at(rounds, sample_rows), channels_last(data[index])])
            strips.append(image_grid(pairs, columns=number))
        save_png(self.picture("nearest"), np.concatenate(strips))

    # --- restoration ---

    def restoration(self, restored: ToRestore) -> dict:
        """Draw `RESTORATIONS` images for each measurement, and a picture of the first ones.

        Returns the report's entries `restore...` (docs/architecture.md), in the main process only.
        Raises FloatingPointError where the solver diverges.
        """
        run, measurement = self.run, restored.measurement
        value, operator = measurement.value, measurement.operator
        origin = self.origin | restored.origin(run.codec.shape)
        channels, *sides = run.codec.data_shape
        size = RESTORATIONS * max(1, self.batch_size // RESTORATIONS)
        rows = torch.arange(len(value), device=value.device).repeat_interleave(RESTORATIONS)

        def compute(i: int, start: int) -> dict:
            part, generator = rows[start : start + size], self.generator("restoration", i)
            sampler = restoring_sampler(run, measurement[part])
            conditions = restored.conditions.map(lambda each: each[part])
            with solver_bar(run.method) as watch:
                images, nfe = sampler(
                    run.network,
                    len(part),
                    generator=generator,
                    conditions=conditions,
                    watch=watch,
                )
            return {"restored": to_uint8(images), "nfe": nfe}

        def spec(i: int, number: int) -> dict:
            return {"restored": ("u", (number, *sides, channels)), "nfe": ("iuf", ())}

        files, starts = self.folder / f"ckpt_{self.k}_restored", range(0, len(rows), size)
        rounds = in_batches("restoration", files, starts, size, len(rows), origin, compute, spec)
        if not rounds:
            return {}
        images = np.concatenate([each_round["restored"] for each_round in rounds])
        images = images.reshape(len(value), RESTORATIONS, *sides, channels)
        measured = to_uint8(run.codec.decode(operator.adjoint(value) / operator.gram))
        report = {
            "restore_images": len(value),
            "restore_spread": np.sqrt((images / 255).var(1, ddof=1).mean()),
            "restore_nfe": np.mean([each_round["nfe"] for each_round in rounds]),
            "restore_seconds": np.sum([each_round["seconds"] for each_round in rounds]),
        }
        columns = [measured[:, None], images]
        if restored.truth is not None:
            truth = to_uint8(restored.truth)[:, None]
            columns = [truth, *columns]
            report["restore_psnr"] = psnr(images, truth)
            report["restore_psnr_mean"] = psnr(images.mean(1, keepdims=True), truth)
            plain = to_uint8(run.codec.decode(plain_restoration(run, measurement)))
            report["restore_psnr_plain"] = psnr(plain[:, None], truth)
        strips = np.concatenate(columns, axis=1)[:RESTORED]
        strips = strips.reshape(-1, *sides, channels)
        save_grid(self.picture("restoration"), strips, columns=len(columns) - 1 + RESTORATIONS)
        return report


def numbers_of_rounds(number: int, size: int) -> list[int]:
    """Number of samples of each round, at most `size`, `number` in all."""
    return [min(size, number - first) for first in range(0, number, size)]


def features_of(space: FeatureSpace, images: Images) -> dict:
    """The features of `images`, and logits where the space has any."""
    if not len(images):
        return {name: np.empty(shape, np.float32) for name, (_, shape) in space.spec(0).items()}
    pool_3, logits = space(images)
    return {"pool_3": pool_3} if logits is None else {"pool_3": pool_3, "logits": logits}


def labels_of(rounds: list[dict]) -> np.ndarray:
    """The class labels that the samples of the rounds were drawn for, from their files."""
    return np.concatenate(
        [_read_round(each_round, {"labels": "i"})["labels"] for each_round in rounds]
    )


def samples_at(rounds: list[dict], rows: np.ndarray) -> Images:
    """The samples number `rows`, from the files of the rounds, each of which is read once."""
    ends = np.cumsum([len(each_round["pool_3"]) for each_round in rounds])
    round_of = np.searchsorted(ends, rows, side="right")
    images = {}
    for r in np.unique(round_of):
        samples = _read_round(rounds[r], {"samples": "u"})["samples"]
        images |= {row: samples[row - ends[r]] for row in rows[round_of == r]}
    return np.stack([images[row] for row in rows])


def _read_round(round_: dict, kinds: dict[str, str]) -> dict:
    """The arrays `kinds` of a round's file, with one row for each sample."""
    path, n = round_["path"], len(round_["pool_3"])
    rest = {"samples": (None, None, None)}
    spec = {name: (kind, (n, *rest.get(name, ()))) for name, kind in kinds.items()}
    return check_arrays(path, read_arrays(path), spec)


def plain_restoration(run: Experiment, measurement: Measurement) -> Tensor:
    """Restorations (n, C, H, W) that need no network, to compare with.

    Small images are enlarged by cubic interpolation; else it is the mean training image, changed so
    that it agrees with the measurement.
    """
    value, (_, height, width) = measurement.value, run.codec.shape
    if value.shape[2:] != (height, width):
        return torch.nn.functional.interpolate(value, (height, width), mode="bicubic")
    try:
        data = run.data.get("train", labels=False)
    except DataChanged:
        raise
    except (OSError, ValueError) as error:  # published networks restore without their data
        log.warning(f"the plain restorations start from grey, not the mean image: {error}")
        grey = torch.full((1, *run.codec.data_shape), 0.5, device=run.device)
        mean = run.codec.encode(grey)[0]
    else:
        batch = batch_at(data, slice(AVERAGED)).to(run.device)
        mean = run.codec.encode(to_unit_interval(batch.images)).mean(0)
    return measurement.project(mean.to(value).expand(len(value), -1, -1, -1))


def psnr(images: np.ndarray, truth: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio, dB, of `images` (n, k, H, W, C) in grey levels of 255.

    The squared error counts as at least that of rounding, 1 / 12.
    """
    error = np.square(images - truth.astype(np.float64)).mean((2, 3, 4))
    return (10 * np.log10(255**2 / np.maximum(error, 1 / 12))).mean()
