"""Trains, evaluates and samples generative models: README.md, or `python3 main.py --help`."""

# ruff: noqa: E402
import signal

# During the imports an interrupt ends the process at once: a traceback of them helps nobody.
INTERRUPT = signal.getsignal(signal.SIGINT)
if INTERRUPT is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if __name__ == "__main__":  # before absl takes them
    from reports import streams

    streams.make_lenient()

import logging
import os
import shlex
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict

from configs import command_line
from processes import launch

FLAGS = flags.FLAGS
VERSION = "2.0.0"  # as in CITATION.cff; docs/changes.md says what it changed
STORED = ("data", "eval", "sample", "export")  # without --config they take the run's own config

STOPPED = os.EX_TEMPFAIL  # 75, exit status of a training that a signal ended before its last step

flags.DEFINE_enum(
    "mode",
    None,
    ["train", *STORED],
    "Look at the data, train a model, evaluate checkpoints, draw samples, or write one file "
    "to share.",
)
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, logs, reports.")
flags.DEFINE_string(
    "eval_folder",
    "eval",
    "Folder of an evaluation's results, in workdir unless absolute; of restorations: restored.",
)
flags.DEFINE_string(
    "outdir",
    None,
    "Where sample, export and data write; default: below workdir/samples; else workdir.",
)
flags.DEFINE_string(
    "checkpoint", None, "What sample and export take, a file; default: the newest of workdir."
)
flags.DEFINE_boolean("dry_run", False, "Say what would be done, and stop.")
flags.DEFINE_boolean(
    "trust_workdir",
    False,
    "Take all values of the workdir's config, those too that run code, write or read files.",
)
flags.DEFINE_boolean("version", False, "Print the version of the program, and stop.")
flags.mark_flags_as_required(["mode", "workdir"])
flags.register_validator("workdir", lambda path: path != "", "It is empty; name a folder.")


def main(argv: list[str]) -> int:
    """Run `--mode` on `--config`, and return the exit status; a mistake ends in one line and 2."""
    if FLAGS.config is None:
        command_line.fail(
            "--config is needed, a file of configs/; only --mode train does not find it"
        )
    for flag in ("outdir", "checkpoint"):
        modes = ["sample", "export"] + ["data"] * (flag == "outdir")
        if FLAGS[flag].value is not None and FLAGS.mode not in modes:
            command_line.fail(f"--{flag} is for --mode {' and '.join(modes)}, not {FLAGS.mode}")
    import run_lib  # imported here, so that --help answers at once
    from configs.effects import without_effect

    _log_to_stdout()
    workdir = Path(FLAGS.workdir)
    overrides = command_line.overridden(sys.argv[1:])
    if FLAGS.mode in ("train", "data"):  # how the run will be evaluated is not decided yet
        overrides = [key for key in overrides if not key.startswith("eval.")]
    if FLAGS.mode == "eval":
        _restore_alone(overrides)
    for line in without_effect(FLAGS.config, overrides):
        logging.info(line)
    status = 0
    try:
        with command_line.one_line_errors():
            signal.signal(signal.SIGINT, INTERRUPT)
            if FLAGS.mode == "eval":
                run_lib.evaluate(FLAGS.config, workdir, FLAGS.eval_folder, FLAGS.dry_run)
            elif FLAGS.mode == "data":
                run_lib.look_at_data(FLAGS.config, workdir, _path(FLAGS.outdir), FLAGS.dry_run)
            elif FLAGS.mode != "train":
                run = {"sample": run_lib.sample, "export": run_lib.export}[FLAGS.mode]
                outdir, checkpoint = _path(FLAGS.outdir), _path(FLAGS.checkpoint)
                run(FLAGS.config, workdir, outdir, checkpoint, FLAGS.dry_run)
            elif not run_lib.train(FLAGS.config, workdir, FLAGS.dry_run):
                status = _say_how_to_go_on()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if launch.read(os.environ).launcher:
        # With all done, one process of several now and then aborts while Python shuts down (seen
        # with PyTorch 2.13 and gloo), for which torchrun would call the whole job failed. By now
        # loggers, the writer of checkpoints and the group are closed, and stderr has all its lines.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    return status


def _say_how_to_go_on() -> int:
    """Print the command that resumes a stopped training, and return the exit status.

    Under torchrun the status is 0, since torchrun restarts processes that end with another one.
    """
    started = launch.read(os.environ)
    if started.rank == 0:
        same = f"the same {started.launcher} command"
        print(f"to go on: {same if started.launcher else shlex.join(sys.orig_argv)}")
    return 0 if started.launcher == "torchrun" else STOPPED


def _restore_alone(overrides: list[str]) -> None:
    """Switch the parts of an evaluation off where the command line sets `sampling.restore` alone.

    The results are then in a folder of their own, so that a report of the other parts stays.
    """
    from evaluation import PARTS

    options, restores = FLAGS.config.eval, FLAGS.config.sampling.restore
    parts = [part for part in PARTS if options[part]]
    named = any(f"eval.{part}" in overrides for part in parts)
    if not (restores and parts and "sampling.restore" in overrides) or named:
        return
    options.update(dict.fromkeys(parts, False))
    if FLAGS["eval_folder"].using_default_value:
        FLAGS.eval_folder = "restored"
    logging.info(
        f"only the restorations are evaluated, into {FLAGS.eval_folder}/; "
        f"{' '.join(f'--config.eval.{part}' for part in parts)} would add the rest of the config"
    )


def parse(argv: list[str]) -> list[str]:
    """Parse `argv` into FLAGS, as `app.run` asks for; the modes `STORED` find their config.

    Values of it that belong to the machine of the run are taken with `--trust_workdir` only
    (`configs.machine`): where one is needed, a line has the command with the flags that set it.
    """
    if "--version" in argv:
        print(VERSION)
        sys.exit()

    def stored(argv: list[str]) -> ConfigDict | None:
        workdir = command_line.value_of(argv, "workdir")
        if command_line.value_of(argv, "mode") not in STORED or not workdir:
            return None
        from configs import machine  # which takes torch
        from storage import run_config

        _log_to_stdout()
        checkpoint = _path(command_line.value_of(argv, "checkpoint"))
        config = run_config.load(Path(workdir), checkpoint)
        values.update(machine.reset(config, single_file=checkpoint is not None))
        return config

    values = {}  # of the machine of the run
    rest, overridden = command_line.parse(argv, stored), command_line.overridden(argv)
    if FLAGS.trust_workdir:
        trusted = {key: value for key, value in values.items() if key not in overridden}
        FLAGS.config.update_from_flattened_dict(trusted)
    elif values:
        _refuse_missing(values, overridden)
    return rest


def _refuse_missing(values: dict, overridden: list[str]) -> None:
    from configs import machine

    if missing := machine.missing(FLAGS.config, values, overridden, FLAGS.mode):
        keys = [f"--config.{key}={value}" for key, value in missing.items()]
        command_line.fail(
            f"{' and '.join(missing)} may run code or write files, so the workdir's own value is "
            "not taken; if you trust whoever made the workdir, add --trust_workdir, or start: "
            f"{shlex.join([*sys.orig_argv, *keys])}"
        )


def _path(name: str | None) -> Path | None:
    return Path(name) if name else None


def _log_to_stdout() -> None:
    level = logging.WARNING if launch.rank() else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
