"""Loss, bits/dim and classification of a split of the data, by the weights of a checkpoint.

Each result is a file that says what it was computed from, so an evaluation that was killed
continues from its files, and several processes can share the work. Samples and restorations are in
`library.evaluated_samples` and `library.evaluated_restorations`.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from ml_collections import ConfigDict

from datasets import batch_at, in_order
from library.evaluated import Evaluated, Split
from library.rounds import Rounds
from likelihood import log_posterior, passes_of, unit_of
from methods.base import conditioned
from reports.progress import progress_bar, solver_bar
from solvers.solve import solve_ode
from sources.codec import encoded
from storage.digests import digest
from storage.files import cached

# Keys of config.eval that switch a part of an evaluation on: those of DRAWN draw samples, and of
# these ALONG_LATENTS decode latents, which needs the ODE.
ALONG_LATENTS = ("enable_interpolate", "enable_rescale")
DRAWN = ("enable_sampling", "save_images", "enable_pairs", *ALONG_LATENTS)
SPLIT_PARTS = ("enable_loss", "enable_bpd", "enable_classification", "enable_pairs")
PARTS = ("enable_loss", "enable_bpd", "enable_classification", *DRAWN)


def parts_of(options: ConfigDict, sampling: ConfigDict, classes: int) -> list[str]:
    """Names of the parts that `options`, a config's `eval`, and its `sampling` ask for.

    `classes` is the number of classes that the network is given. ValueError where there is nothing
    to do, or what is to be done needs classes or samples of another size.
    """
    parts = [part for part in PARTS if options[part]]
    parts += [f"restore {sampling.restore}"] * bool(sampling.restore)
    if not parts:
        keys = ", ".join(f"eval.{part}" for part in PARTS)
        raise ValueError(f"nothing is asked for: set one of {keys}, sampling.restore")
    if sampling.size:
        raise ValueError("sampling.size is for --mode sample; an evaluation compares with the data")
    if options.enable_classification and not classes:
        raise ValueError("eval.enable_classification needs class labels: data.num_classes is 0")
    return parts


def loss(evaluated: Evaluated, split: Split, batch_size: int) -> dict:
    """The loss over a whole split: each image is perturbed once.

    Its batch, of `batch_size` images, is the reference batch. Returns the report's entry `loss`.
    """
    experiment = evaluated.experiment

    def compute() -> dict:
        generator, total = evaluated.generator("loss"), 0.0
        objective = experiment.objective.whole().eval()
        with progress_bar(total=len(split.data), desc="loss", unit="image") as progress:
            for batch in in_order(split.data, batch_size):
                batch = batch.to(experiment.device)
                images = encoded(experiment.codec, batch.images)
                reference = replace(batch, images=images)
                reference = objective.reference(reference, generator)
                for part in reference.split(evaluated.batch_size):
                    examples = objective.draw(part, evaluated.step, generator)
                    value = objective.loss(experiment.network, examples, reference)
                    total += value.item() * len(part)
                    progress.update(len(part))
        return {"loss": total / len(split.data)}

    sizes = {"batch": batch_size, "at once": evaluated.batch_size}
    objective = experiment.objective_settings | experiment.objective.settings
    if weights := experiment.objective.state_dict():
        objective["weights"] = digest(weights)
    origin = evaluated.origin | split.origin | {"sizes": sizes, "objective": objective}
    path = evaluated.folder / f"ckpt_{evaluated.k}_loss.npz"
    results = cached(path, origin, torch.no_grad()(compute), ("loss",))
    return {"loss": results["loss"]} | split.remark_on("loss")


def bits_per_dim(evaluated: Evaluated, split: Split, repeats: int) -> dict:
    """Bits per dimension of every image of a split, averaged over passes of new noise.

    For arrays in units of their own it is nats per entry (`likelihood.unit_of`).

    The network is given the image's conditions, if there are any, and no guidance. The test split
    is passed `repeats` times.

    The latents of the first batch are integrated back to images. `encoding_error` is the root
    mean square difference from the original images, in units of [0, 1]: the effect of the
    solver's tolerance.

    Returns the report's entries `bpd...` and `encoding_error` (docs/architecture.md), in the
    main process only. Raises FloatingPointError where the ODE cannot be solved.
    """
    experiment, number = evaluated.experiment, len(split.data)
    method, codec, likelihood = experiment.method, experiment.codec, experiment.likelihood
    unit = unit_of(codec)

    @torch.no_grad()
    def compute(i: int, part: slice) -> dict:
        generator = evaluated.generator("bits/dim", i)
        batch = batch_at(split.data, part).to(experiment.device)
        images = codec.dequantized(batch.images, generator)
        with solver_bar(method) as watch:
            values, latents, nfe = likelihood(
                experiment.network, codec.encode(images), generator, batch.conditions, watch=watch
            )
        results = {unit.key: values.double().cpu().numpy(), "nfe": nfe}
        if i == 0:
            net = conditioned(experiment.network, batch.conditions)
            with solver_bar(method) as watch:
                x, _ = solve_ode(method, net, latents, watch=watch, **experiment.limits)
            change = codec.comparable(codec.unclamped(x)) - codec.comparable(images)
            results["encoding_error"] = change.square().mean().sqrt().item()
        return results

    passes = passes_of(split.name, repeats)
    files = evaluated.folder / f"{split.name}_ckpt_{evaluated.k}_{unit.key}"
    origin = evaluated.origin | split.origin | {"divergence": likelihood.divergence}
    rounds = Rounds(unit.name, number, evaluated.batch_size, passes)
    results = rounds.cached(files, origin, (unit.key, "nfe"), compute)
    if not results:
        return {}
    values = np.concatenate([each[unit.key] for each in results]).reshape(passes, number).mean(0)
    report = {
        unit.key: values.mean(),
        f"{unit.key}_nfe": np.mean([each["nfe"] for each in results]),
        f"{unit.key}_seconds": np.sum([each["seconds"] for each in results]),
        f"{unit.key}_images": values,
        "encoding_error": results[0]["encoding_error"],
        **split.remark_on(unit.key),
    }
    if number > 1:
        return report | {f"{unit.key}_error": values.std(ddof=1) / math.sqrt(number)}
    remark = f"left out: standard error of {unit.name}: it needs 2 images, not 1"
    return report | {f"{unit.key}_error_remark": remark}


def classification(evaluated: Evaluated, split: Split) -> dict:
    """log p(label | image) of every image of a split, by its likelihood given each class label.

    p(label) is the share of the class in the training images. The likelihoods of an image share
    the dequantisation noise and the probe, so that they differ by the label alone.

    Returns the report's entries `accuracy` and `class...` (docs/architecture.md), in the main
    process only. Raises FloatingPointError where the ODE cannot be solved.
    """
    experiment, number = evaluated.experiment, len(split.data)
    likelihood, codec, classes = experiment.likelihood, experiment.codec, experiment.classes
    prior = experiment.data.labels("train").bincount(minlength=classes).double()
    shares = prior.clamp(min=1e-30)  # finite logarithms also of a class without training images

    @torch.no_grad()
    def compute(i: int, part: slice) -> dict:
        batch = batch_at(split.data, part).to(experiment.device)
        generator = evaluated.generator("classification", 2 * i)
        x, values = codec.encode(codec.dequantized(batch.images, generator)), []
        for label in range(classes):
            labels = torch.full((len(batch),), label, device=experiment.device)
            conditions = batch.conditions | {"class_labels": labels}
            probe = evaluated.generator("classification", 2 * i + 1)
            with solver_bar(experiment.method) as watch:
                each, *_ = likelihood(experiment.network, x, probe, conditions, watch=watch)
            values.append(each.double().cpu())
        nats = unit_of(codec).nats * torch.stack(values, 1)
        posterior = log_posterior(nats, math.prod(codec.shape), shares)
        return {"log_p": posterior.numpy()}

    files = evaluated.folder / f"{split.name}_ckpt_{evaluated.k}_classes"
    origin = evaluated.origin | split.origin | {"divergence": likelihood.divergence}
    origin |= {"labels of the training images": prior.tolist()}
    rounds = Rounds("classification", number, evaluated.batch_size)
    results = rounds.cached(files, origin, ("log_p",), compute)
    if not results:
        return {}
    log_p = np.concatenate([each["log_p"] for each in results])
    return {
        "accuracy": np.mean(log_p.argmax(1) == split.data.labels.cpu().numpy()),
        "class_log_p": log_p,
        "class_seconds": np.sum([each["seconds"] for each in results]),
    }
