"""Measure a training step against that of another checkout of this program, in turn.

    python3 benchmarks/against.py CHECKOUT --config configs/pfgmpp/cifar10_ddpmpp.py
        [--config.x=y ...] [--steps 5]

Each checkout takes its steps in a process of its own, by its `benchmarks/train.py`, from its own
config of that name; one waits while the other works. The time is that of the processor, all threads
together, which other programs disturb less than that of a clock. The losses agree as far as both
draw the same noise and dropout.
"""

import statistics
import subprocess
import sys
from pathlib import Path

import common
import train

WORKER = """
import sys, time
sys.path.insert(0, "benchmarks")
import common, train, execution
train.FLAGS(sys.argv)
config = train.Experiment.build(train.FLAGS.config).config
execution.prepare_process(config.training.precision, common.CPU)
trainer = train.Trainer(config)
for _ in sys.stdin:
    start = time.process_time()
    loss = trainer.step(common.Stopwatch()).item()
    print(time.process_time() - start, loss, flush=True)
"""


class Worker:
    """The steps of a checkout, in a process of its own."""

    def __init__(self, checkout: Path, options: list[str]):
        command = [sys.executable, "-c", WORKER, *options]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=checkout, text=True, bufsize=1, **pipes)

    def step(self) -> tuple[float, float]:
        """CPU seconds and loss of the next step."""
        self.process.stdin.write("\n")
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a step failed, for the reason above")
        seconds, loss = line.split()
        return float(seconds), float(loss)


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    checkout, *options = sys.argv[1:]
    train.FLAGS([checkout, *options])
    workers = [Worker(Path(path), options) for path in (Path(__file__).parent.parent, checkout)]
    steps = [[worker.step() for worker in workers] for _ in range(1 + train.FLAGS.steps)]
    ours, other = (
        statistics.median(seconds for seconds, _ in column[1:])  # libraries load in the first
        for column in zip(*steps, strict=True)
    )
    differ = max(abs(a / b - 1) for (_, a), (_, b) in steps)
    print(
        f"{common.setting()}; medians of {train.FLAGS.steps}\n"
        f"{ours:.3f} CPU seconds, {checkout} {other:.3f}: {other / ours:.3f} times ours; "
        f"losses differ by at most {differ:.1e}"
    )
    for worker in workers:
        worker.process.communicate()


if __name__ == "__main__":
    main()
