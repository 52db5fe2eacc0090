"""Trains and evaluates generative models: see README.md, or `python3 main.py --help`."""

import logging
import os
import runpy
import shlex
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import ml_collections
from absl import app, flags
from ml_collections import config_flags

FLAGS = flags.FLAGS

config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment to run, a file of configs/. Its values are overridden as in "
    "--config.training.n_iters=200.",
)
flags.DEFINE_enum("mode", None, ["train", "eval"], "Train a model, or evaluate checkpoints of it.")
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, logs, reports.")
flags.DEFINE_string("eval_folder", "eval", "Folder within workdir for the results of evaluation.")
flags.mark_flags_as_required(["config", "mode", "workdir"])


def main(argv: list[str]) -> None:
    """Runs `--mode` on `--config`; a mistake of the user ends in one line and exit status 2."""
    import run_lib  # here and not above, so that --help and typing errors answer at once

    level = logging.WARNING if _rank() else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    workdir, several = Path(FLAGS.workdir), "TORCHELASTIC_RUN_ID" in os.environ
    try:
        if FLAGS.mode == "eval":
            run_lib.evaluate(FLAGS.config, workdir, FLAGS.eval_folder)
        elif not run_lib.train(FLAGS.config, workdir) and not _rank():
            again = "the same torchrun command" if several else shlex.join(sys.orig_argv)
            print(f"to go on: {again}")
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        _fail(f"out of memory: smaller training.batch_size or eval.batch_size need less. {error}")
    if several:
        # With all done, one process of several now and then aborts while Python shuts down (seen
        # with PyTorch 2.13 and gloo), for which torchrun would call the whole job failed.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def parse(argv: list[str]) -> list[str]:
    """Parses `argv` into FLAGS, as `app.run` asks for."""
    try:
        _check_config_file(argv)
        rest = FLAGS(argv)
    except (AttributeError, KeyError) as error:
        message = (
            str(error.args[0])
            .replace("\\n", " ")
            .replace("\\'", "'")
            .replace("''", "'")
            .removesuffix("'")
        )
        _fail(f"unknown config value: {message}")
    except (flags.Error, ValueError, TypeError, OSError) as error:
        _fail(error)
    if rest[1:]:
        _fail(f"unexpected argument {rest[1]!r}; values are given as --flag=value")
    return rest


def _check_config_file(argv: list[str]) -> None:
    """Runs the config file by itself, so that its mistakes are not taken for those of overrides."""
    path = _config_path(argv)
    if path is None:
        return
    if not Path(path).exists():
        raise ValueError(f"config file {path} does not exist")
    if Path(path).is_dir():
        raise ValueError(f"config file {path} is a folder; name a file in it")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ValueError("it defines no get_config()")
        if not isinstance(get_config(), ml_collections.ConfigDict):
            raise ValueError("its get_config() does not return an ml_collections.ConfigDict")
    except Exception as error:  # whatever the user's code raises
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = path if line is None else f"{path}, line {line}"
        message = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"config file {where}: {type(error).__name__}: {message}") from error


def _config_path(argv: list[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument in ("--config", "-config"):
            return following
        if argument.startswith(("--config=", "-config=")):
            return argument.partition("=")[2]
    return None


def _rank() -> int:
    """`distributed.rank`, for before the flags are parsed: that module imports torch."""
    return int(os.environ.get("RANK", "0"))


def _fail(error: Exception | str) -> NoReturn:
    where = f"rank {_rank()}: " if _rank() else ""
    print(f"error: {where}{' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
