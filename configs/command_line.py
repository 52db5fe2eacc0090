"""The flag `--config`: an experiment's file, overrides of its values, one line for a mistake."""

import contextlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.keys import explain_unknown, flatten, with_home
from processes import launch

FLAGS = flags.FLAGS
PATHS = ("config", "workdir", "eval_folder", "outdir", "checkpoint")  # flags that name one
# Words of PyTorch and its libraries where memory is short, on any device.
NO_MEMORY = r"out of memory|(can't|cannot|unable to|fail\w* to) alloc|not enough mem|bad_?alloc"
NO_MEMORY += r"|alloc_?failed|storage size calculation overflowed"
HELP = (
    "Experiment to run, a file of configs/. Its values are overridden as in "
    "--config.training.n_iters=200."
)


def parse(
    argv: list[str], stored: Callable[[list[str]], ConfigDict | None] = lambda argv: None
) -> list[str]:
    """Defines `--config`, parses `argv` into FLAGS; a mistake ends in one line, exit status 2.

    Args:
        stored: gives the config where `--config` is left out, from `argv` with whole paths; None
            where it must not be.

    Returns:
        The program's name.
    """
    try:
        argv = _with_home(argv)
        path = value_of(argv, "config")
        if path is not None:
            _check_file(path)
        asks_help = any(re.match(r"--?(help|h$|\?)", argument) for argument in argv)
        if overridden(argv) and not asks_help:
            _check_overrides(argv, flatten(_defaults()))  # with the parts that a file adds
        config = None if path is not None or asks_help else stored(argv)
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, HELP)
        else:
            config_flags.DEFINE_config_file("config", None, HELP)
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS["config"])  # --help lists it
        argv, opened = _without_none(argv)
        rest = FLAGS(argv)
        if opened:
            FLAGS.config.update_from_flattened_dict(dict.fromkeys(opened))
    except (AttributeError, KeyError) as error:
        fail(f"unknown config value: {error.args[0]}")
    except (flags.Error, ValueError, TypeError, OSError, MemoryError, OverflowError) as error:
        fail(error)
    if rest[1:]:
        fail(f"unexpected argument {rest[1]!r}; values are given as --flag=value")
    return rest


def value_of(argv: list[str], flag: str) -> str | None:
    """The last value of `--{flag}` in `argv`, before it is parsed."""
    value = None
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        name, equals, content = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            value = content if equals else following
    return value


def _with_home(argv: list[str]) -> list[str]:
    """`argv` with the home folder in place of `~` in the flags of `PATHS`, and of their values."""
    names, arguments = {f"{dash}{name}" for name in PATHS for dash in ("-", "--")}, argv[:1]
    for before, argument in zip(argv, argv[1:], strict=False):
        flag, equals, value = argument.partition("=")
        if equals and flag in names:
            argument = f"{flag}={with_home(flag, value)}"
        elif before in names:
            argument = with_home(before, argument)
        arguments.append(argument)
    return arguments


def _without_none(argv: list[str]) -> tuple[list[str], list[str]]:
    """`argv` without the flags that set numbers to None (to be measured), and their keys.

    The flags of config_flags do not know None.
    """
    matches = [re.fullmatch(r"--?config\.([^=\[]*)=None", argument) for argument in argv]
    if not any(matches):
        return argv, []
    from configs.default import all_keys  # see `_defaults`

    names = {name for name, key in all_keys().items() if key.accepts(None)}
    opened = [match is not None and match[1] in names for match in matches]
    rest = [argument for argument, is_open in zip(argv, opened, strict=True) if not is_open]
    return rest, [match[1] for match, is_open in zip(matches, opened, strict=True) if is_open]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the block mistakes of the user and limits of the machine end the program by `fail`."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        fail(error)
    except OverflowError as error:
        fail(f"a number is too large: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error), re.IGNORECASE):
            raise
        advice = "smaller training.batch_size or eval.batch_size need less"
        fail(f"out of memory: {advice}. {str(error) or type(error).__name__}")


def fail(error: Exception | str) -> NoReturn:
    """Ends the program with one line on the user's mistake and exit status 2."""
    where = f"rank {launch.rank()}: " if launch.rank() else ""
    words = " ".join(str(error).split()) or type(error).__name__
    print(f"error: {where}{words}", file=sys.stderr)
    sys.exit(2)


def overridden(argv: list[str]) -> list[str]:
    """Keys of the config that `argv` sets."""
    matches = (re.match(r"--?(?:no)?config\.([^=\[]*)", argument) for argument in argv)
    return [match[1] for match in matches if match]


def _defaults() -> ConfigDict:
    """The default config; its module imports all parts, and --help need not wait for them."""
    from configs.default import get_default_config

    return get_default_config()


def _check_overrides(argv: list[str], defaults: dict) -> None:
    allowed = defaults.keys() | {key.partition(".")[0] for key in defaults}
    for key in overridden(argv):
        if key not in allowed:
            raise ValueError(explain_unknown(key, defaults))


def _check_file(path: str) -> None:
    """Runs the config file by itself, so that its mistakes are not taken for those of overrides."""
    if not Path(path).exists():
        raise ValueError(f"config file {path} does not exist")
    if Path(path).is_dir():
        raise ValueError(f"config file {path} is a folder; name a file in it")
    config = None
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is not None:
            config = get_config()
        keys = flatten(config).keys() if isinstance(config, ConfigDict) else ()
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"config file {_where(path, error)}: {_reason(error)}") from error
    defaults = flatten(_defaults())
    if get_config is None:
        raise ValueError(f"config file {path} defines no get_config()")
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"config file {path}: its get_config() does not return an ml_collections.ConfigDict"
        )
    if more := keys - defaults.keys():
        raise ValueError(f"config file {path}: {explain_unknown(min(more), defaults)}")
    if less := defaults.keys() - keys:
        raise ValueError(f"config file {path} lacks {min(less)}; start from configs/default.py")


def _where(path: str, error: Exception) -> str:
    """File and line: of `path`, or of the defaults and methods that it takes from a `configs`."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        shared = Path(frame.filename).parent.name == "configs" and frame.filename != __file__
        if frame.filename == path or (shared and "part" not in frame.line):  # which is the caller's
            return f"{frame.filename}, line {frame.lineno}"
    return path


def _reason(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    section = frame.f_locals.get("self")  # an unknown key is refused by the section it is not in
    quoted = re.search(r"""["'](\w+)\\?["']""", str(error.args[0])) if error.args else None
    if isinstance(error, (AttributeError, KeyError)) and isinstance(section, ConfigDict) and quoted:
        default = _defaults()
        sections = [n for n, s in default.items() if isinstance(s, ConfigDict)]
        inside = [f"{n}." for n in sections if default[n].keys() == section.keys()]
        return explain_unknown("".join([*inside, quoted[1]]), flatten(default))
    return f"{type(error).__name__}: {error}"
