"""The settings that a report is computed with, gathered from what is evaluated."""

from collections.abc import Sequence
from typing import Any

from library.evaluated import Evaluated, Split
from library.restoration import ToRestore
from likelihood import passes_of
from metrics.reference import ReferenceStatistics
from reports.settings import BEFORE, CHOSEN_LEVELS, DIGITS, of_method, of_sampler
from storage.digests import digests, digests_of_conditions


def from_config(
    config,
    evaluated: Evaluated,
    split: Split | None,
    statistics: Sequence[ReferenceStatistics],
    restored: ToRestore | None,
) -> dict[str, Any]:
    """Settings of a report, flat; those of a part are there only if it is evaluated.

    Args:
        split: of loss and likelihood; None without these.
        statistics: reference statistics of samples; () without samples.
        restored: the images to restore; None without restoration.
    """
    options, origin, experiment = config.eval, evaluated.origin, evaluated.experiment
    made_by = {"step": evaluated.step, "weights": origin["weights"][:DIGITS]}
    made_by |= {"seed": origin["seed"], "eval.ema_std": options.ema_std}
    made_by |= {"data.centered": origin["centered"], "training.precision": origin["precision"]}
    made_by |= BEFORE | experiment.parts
    made_by |= {"eval.batch_size": options.batch_size, **of_method(experiment.method)}
    of_prior = experiment.method.origin()  # another prior is another task
    made_by |= {f"method.{name}": digest[:DIGITS] for name, digest in of_prior.items()}
    made_by |= {f"model.{name}": value for name, value in origin["network"].items()}
    levels = experiment.sampler.settings.get("levels")
    if levels and not config.sampling.levels:
        made_by[CHOSEN_LEVELS] = [*levels]
    made_by["sampling.levels"] = [*config.sampling.levels]
    made_by |= of_sampler(origin["sampling"], origin.get("guide", "")[:DIGITS])
    if split is not None:
        made_by |= {"eval.dataset": split.name, "split.data": experiment.data.name}
        made_by |= {"split.images": len(split.data), "split.digest": split.origin["data"]}
    if options.enable_loss:
        made_by["loss.phase"] = experiment.objective.phase(evaluated.step)
        made_by |= {f"loss.{name}": value for name, value in experiment.objective.settings.items()}
        if experiment.method.uses_reference_batch:
            made_by["loss.reference_batch"] = config.training.batch_size
    if options.enable_bpd or options.enable_classification:
        made_by["eval.divergence"] = options.divergence
    if options.enable_bpd:
        made_by["eval.bpd_num_repeats"] = passes_of(options.dataset, options.bpd_num_repeats)
    if options.enable_classification:
        digest = digests(labels=split.data.labels)["labels"]
        made_by |= {"classes.number": experiment.classes, "classes.labels": digest[:DIGITS]}
    if options.enable_pairs:
        made_by |= {"pairs.number": options.pairs, "pairs.draws": options.pair_draws}
    if statistics:
        spaces = ",".join(each.space.name for each in statistics)
        made_by |= {"eval.num_samples": options.num_samples, "eval.features": spaces}
        if options.repeats > 1:
            made_by["eval.repeats"] = options.repeats
        for i, each in enumerate(statistics):
            prefix = f"{each.space.label}:reference." if i else "reference."
            made_by |= {f"{prefix}{name}": value for name, value in each.origin.items()}
    if restored is not None:
        measured = digests(measurements=restored.measurement.value)
        measured |= digests_of_conditions(restored.conditions)
        made_by |= {f"restoration.{name}": digest[:DIGITS] for name, digest in measured.items()}
    return made_by
