"""Ranges of the values of keys: checked before any work, and described in text."""

import importlib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

EXACT = 2**53  # up to here whole numbers are exact in float64 too


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, with `or_inf` infinity too."""

    low: float
    high: float
    kind: type = float  # int: whole numbers only
    or_inf: bool = False

    def accepts(self, value: Any) -> bool:
        return type(value) in {int, self.kind} and (
            self.low <= value <= self.high or self.or_inf and value == math.inf
        )

    def nearest(self, value: float) -> float:
        """`value`, or the nearer end of the range where it is outside."""
        return value if self.accepts(value) else min(max(value, self.low), self.high)

    def __str__(self) -> str:
        words = "a whole number" if self.kind is int else "a number"
        if self.high == EXACT:
            return f"{words} of at least {self.low:,}"
        return f"{words} from {self.low:,} to {self.high:,}" + (", or inf" if self.or_inf else "")


def whole(low: int, high: int = EXACT) -> Number:
    return Number(low, high, kind=int)


# Numbers are bounded so that everything computed from them, including squares summed over an image,
# stays finite in float32 or float64, whichever it is computed in.
SHARE = Number(0, 1)
NOISE_LEVEL = Number(1e-6, 10**6)
REFERENCE_STD = 0.5  # of data that a config's noise levels are meant for (arXiv 2206.00364)
LENGTH = Number(1e-9, 10**9)  # of a Poisson flow: heights and norms


@dataclass(frozen=True)
class Numbers:
    """Several numbers, as many as one of `lengths`; `rising`: each larger than the one before."""

    each: Number
    lengths: Collection[int]
    rising: bool = False

    def accepts(self, value: Any) -> bool:
        return (
            type(value) in (tuple, list)
            and len(value) in self.lengths
            and all(map(self.each.accepts, value))
            and not (self.rising and sorted(set(value)) != list(value))
        )

    def __str__(self) -> str:
        ends = dict.fromkeys(map(str, (self.lengths[0], self.lengths[-1])))
        lengths = f" {'to' if self.lengths[2:] else 'or'} ".join(ends)
        order = "rising " if self.rising else ""
        return f"a tuple of {lengths} {order}numbers, each {self.each}"


@dataclass(frozen=True)
class OneOf:
    """One of several words, or a name in a registry such as "methods.METHODS" in any case.

    The registry's module is imported only when a value is checked, so that a key declared beside a
    part can name the registry that will hold the part.
    """

    choices: tuple[str, ...] = ()
    registry: str | None = None

    def words(self) -> list[str]:
        if self.registry is None:
            return list(self.choices)
        module, _, table = self.registry.rpartition(".")
        return [*self.choices, *getattr(importlib.import_module(module), table)]

    def accepts(self, value: Any) -> bool:
        if type(value) is not str:
            return False
        any_case = self.registry is not None and value not in self.choices
        return (value.lower() if any_case else value) in self.words()

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self.words()))


@dataclass(frozen=True)
class Several(OneOf):
    """One or more words of `OneOf` with commas between them, each once.

    A `labelled` word may have a label of letters, digits and underscores behind a colon; words of
    different labels differ.
    """

    labelled: bool = False

    def accepts(self, value: Any) -> bool:
        if type(value) is not str:
            return False
        entries = [entry.strip() for entry in value.split(",")]
        label = r"(:[A-Za-z]\w{0,30})?" if self.labelled else ""
        words = [re.sub(rf"{label}\Z", "", entry, flags=re.ASCII) for entry in entries]
        return all(map(super().accepts, words)) and len({*entries}) == len(entries)

    def __str__(self) -> str:
        label = ", each with a label of its own after a colon if need be" * self.labelled
        return f"{super().__str__()}, or several with commas between them{label}"


@dataclass(frozen=True)
class Text:
    """A line of text that `pattern` matches, which `words` say."""

    pattern: str = r"[^\0\n]*"
    words: str = "a line of text"

    def accepts(self, value: Any) -> bool:
        return type(value) is str and re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Pattern:
    """A regular expression of Python, in one line."""

    def accepts(self, value: Any) -> bool:
        if type(value) is not str or len(value) > 1000:
            return False
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError):
            return False
        return "\n" not in value

    def __str__(self) -> str:
        return "a regular expression"


@dataclass(frozen=True)
class ShareOrCount:
    """A share from 0 to below 1, or a count, a whole number."""

    def accepts(self, value: Any) -> bool:
        return type(value) in (int, float) and 0 <= value < EXACT and (value < 1 or value % 1 == 0)

    def __str__(self) -> str:
        return "a number from 0 to below 1, or a whole number"


@dataclass(frozen=True)
class Either:
    """A value of either of two kinds."""

    one: Number | Numbers | OneOf
    other: Text | OneOf | Numbers

    def accepts(self, value: Any) -> bool:
        return self.one.accepts(value) or self.other.accepts(value)

    def __str__(self) -> str:
        return f"{self.one}, or {self.other}"


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def accepts(self, value: Any) -> bool:
        return type(value) is bool

    def __str__(self) -> str:
        return "True or False"


@dataclass(frozen=True)
class Key:
    """A key of a config: its default (None: to be measured), allowed values and meaning.

    A config stored before the key existed has its value `before`, or the default if that is None.
    A key that `opens` may be None too: measured. One that `scales` is a noise level ("level"), the
    inverse of one, or the log of one, given for data of standard deviation 0.5; see
    `completion.scaled`.
    The value of a key `of_machine` is not taken from the config of a workdir ("always"), or not
    from that of a single file ("file"); see `configs.machine`. One of "start" is read by the first
    start of a run alone, and never taken from a workdir.
    """

    default: Any
    allowed: Number | Numbers | OneOf | Text | Either | Flag | Pattern | ShareOrCount
    meaning: str
    before: Any = None
    of_machine: Literal["", "file", "always", "start"] = ""
    opens: bool = False
    scales: Literal["", "level", "inverse", "log"] = ""

    def accepts(self, value: Any) -> bool:
        may_be_none = self.opens or self.default is None
        return value is None and may_be_none or self.allowed.accepts(value)

    def __str__(self) -> str:
        return f"{self.allowed}{', or None' if self.opens else ''}"
