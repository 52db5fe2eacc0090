"""Progress bars of long work."""

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm

import distributed
from methods.base import Method
from solvers.base import Watch


def progress_bar(**options) -> tqdm:
    """Bar of the main process, which redraws often on a terminal and seldom in a file."""
    interactive = sys.stderr is not None and sys.stderr.isatty()
    options |= {"disable": sys.stderr is None or not distributed.is_main()}
    return tqdm(mininterval=0.2 if interactive else 10, dynamic_ncols=interactive, **options)


@contextlib.contextmanager
def solver_bar(method: Method, title: str = "solver") -> Iterator[Watch]:
    """Show the progress of a solver in a bar, called `title`, if the block takes over a second.

    The solver calls the yielded `watch`. The bar has the evaluations so far, and the noise level
    with its range from data to prior.
    """
    low, high = method.level_range
    with progress_bar(desc=title, unit=" evaluations", leave=False, delay=1) as progress:

        def watch(evaluations: int, sigma: float) -> None:
            progress.set_postfix_str(
                f"{method.level_name} {sigma:.3g} of {low:.3g} to {high:.3g}", refresh=False
            )
            progress.update(evaluations - progress.n)

        yield watch
