"""EMA weights of another length, rebuilt from the averages in a run's checkpoints."""

from pathlib import Path

import torch
from torch import nn

from models.ema import rebuilding_weights
from optimizers.stored_state import checked_averages
from storage.checkpoints import open_checkpoint
from storage.checks import loaded
from storage.files import about
from storage.run_checkpoints import written_steps
from storage.workdir import checkpoint_path

LARGEST_EMA_ERROR = 0.15  # of the profile; the error of the weights is about a tenth of it


def rebuild_ema(
    network: nn.Module, std: float, workdir: Path, checkpoint: Path, content: dict
) -> str:
    """Put the EMA of relative width `std` in place of the weights of a network.

    It is made from the power-function averages in the checkpoint and in the numbered ones before
    it (see `models.ema`).

    Args:
        network: of the run, whose weights are replaced.
        std: relative width, in (0, 0.28].
        workdir: of the run.
        checkpoint, content: path and content of the checkpoint at whose step the EMA is.

    Returns:
        One line that names the averages and their error.

    Raises:
        ValueError: there are no averages, or too few.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    step = content["step"]
    with about(f"eval.ema_std={std}: {checkpoint}"):
        stds = [*checked_averages(content, parameters)]
    paths = {s: checkpoint_path(workdir, s) for s in written_steps(content, checkpoint)}
    paths = {s: p for s, p in paths.items() if s < step and p.exists()}
    paths[step] = checkpoint
    steps_and_stds = [(s, each) for s in paths for each in stds]
    weights, error = rebuilding_weights(*zip(*steps_and_stds, strict=True), step, std)
    line = (
        f"the EMA of relative width {std:g} from {len(steps_and_stds)} averages of {len(paths)} "
        f"checkpoints: its profile errs by {100 * error:.2g} %"
    )
    if error > LARGEST_EMA_ERROR:
        raise ValueError(
            f"eval.ema_std={std}: {line}, which is too much: a width closer to "
            f"{' or '.join(f'{each:g}' for each in stds)} needs fewer checkpoints, and a smaller "
            "training.snapshot_freq makes more"
        )
    rebuilt = [torch.zeros_like(p) for p in parameters]
    for path, each in zip(paths.values(), weights.reshape(-1, len(stds)), strict=True):
        try:
            state = content if path == checkpoint else open_checkpoint(path, intact=True)
        except FileNotFoundError:  # removed by the run (training.keep_checkpoints): do without it
            return rebuild_ema(network, std, workdir, checkpoint, content)
        averages = checked_averages(state, parameters)
        for width, weight in zip(stds, each.tolist(), strict=True):
            for total, average in zip(rebuilt, averages[width], strict=True):
                average = loaded(average, f"averages of step {state['step']}", total.dtype)
                total.add_(average.to(total.device), alpha=weight)
    with torch.no_grad():
        torch._foreach_copy_(parameters, rebuilt)
    return line
