"""Trains and evaluates generative models: see README.md, or `python3 main.py --help`."""

# ruff: noqa: E402
import signal

# During the imports an interrupt ends the process at once: a traceback of them helps nobody.
INTERRUPT = signal.getsignal(signal.SIGINT)
if INTERRUPT is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import logging
import os
import shlex
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict

from configs import command_line

FLAGS = flags.FLAGS

flags.DEFINE_enum("mode", None, ["train", "eval"], "Train a model, or evaluate checkpoints of it.")
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, logs, reports.")
flags.DEFINE_string("eval_folder", "eval", "Folder within workdir for the results of evaluation.")
flags.mark_flags_as_required(["mode", "workdir"])
flags.register_validator("workdir", lambda path: path != "", "It is empty; name a folder.")


def main(argv: list[str]) -> None:
    """Runs `--mode` on `--config`; a mistake of the user ends in one line and exit status 2."""
    if FLAGS.config is None:
        command_line.fail("--config is needed, a file of configs/; --mode eval can do without")
    import run_lib  # here and not above, so that --help and typing errors answer at once

    _log_to_stdout()
    workdir, several = Path(FLAGS.workdir), "TORCHELASTIC_RUN_ID" in os.environ
    try:
        signal.signal(signal.SIGINT, INTERRUPT)
        if FLAGS.mode == "eval":
            run_lib.evaluate(FLAGS.config, workdir, FLAGS.eval_folder)
        elif not run_lib.train(FLAGS.config, workdir) and not command_line.rank():
            again = "the same torchrun command" if several else shlex.join(sys.orig_argv)
            print(f"to go on: {again}")
    except (ValueError, OSError, FloatingPointError) as error:
        command_line.fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        command_line.fail(
            f"out of memory: smaller training.batch_size or eval.batch_size need less. {error}"
        )
    if several:
        # With all done, one process of several now and then aborts while Python shuts down (seen
        # with PyTorch 2.13 and gloo), for which torchrun would call the whole job failed.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def parse(argv: list[str]) -> list[str]:
    """Parses `argv` into FLAGS, as `app.run` asks for; evaluation finds its config by itself."""

    def stored() -> ConfigDict | None:
        workdir = command_line.value_of(argv, "workdir")
        if command_line.value_of(argv, "mode") != "eval" or not workdir:
            return None
        from storage import run_config  # it reads checkpoints, which takes torch

        _log_to_stdout()
        return run_config.load(Path(workdir))

    return command_line.parse(argv, stored)


def _log_to_stdout() -> None:
    level = logging.WARNING if command_line.rank() else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
