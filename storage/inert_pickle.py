"""Pickles read as data: no class is imported, nothing that they name is called.

A pickle is a program for a small stack machine (`pickletools` documents its operations). This is
such a machine, for what protocols 2 to 5 write. Whatever is no number, string or container becomes
a record of its name and attributes.
"""

import pickletools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

MAX_OPERATIONS = 1_000_000  # of all pickles of a file; ImageNet's network takes a tenth


@dataclass(slots=True, eq=False)
class Record:
    """A class or function that a pickle names, or an object that a call of it would have made."""

    name: str
    state: object = None  # mostly the dictionary of an object's attributes


def kind(value: object) -> str:
    """A name for the kind of `value`, for messages."""
    if isinstance(value, Record):
        return f"{value.name!r:.100}"
    return type(value).__name__


_VALUES = {  # operations that push their argument
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("SHORT_BINSTRING", "BINSTRING"),  # of Python 2: a str whose characters are its bytes
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Unpickler:
    """A reader of the pickles of one file.

    Args:
        makers: "module.name" to the function that makes an object from the pickle's arguments.
        names: all that a pickle may refer to, as "module.name"; None: anything.
        operations: one item is taken for each operation, and running out of them is an error. A
            byte of a pickle can cost a hundred bytes of memory; a limit on operations limits both.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable],
        names: Collection[str] | None = None,
        operations: Iterator | None = None,
    ):
        self.makers, self.names = makers, names
        self.operations = iter(range(MAX_OPERATIONS)) if operations is None else operations

    def load(self, file: BinaryIO, persistent: Callable[[object], object] | None = None) -> object:
        """The object of the pickle at the position of `file`, which moves to the pickle's end.

        `persistent` makes an object from its persistent id; without it there may be none.

        Returns:
            None, numbers, strings, bytes, lists (sets are read as lists), tuples, dictionaries with
            keys of type str or int, what `makers` and `persistent` make, and `Record`s. Parts may
            be shared, or contain themselves.

        Raises:
            ValueError: the pickle is damaged, too long, or uses an operation or a name that is not
                read here.
        """
        self.stack, self.below, self.memo, self.persistent = [], [], {}, persistent
        for operation, argument, position in pickletools.genops(file):
            if next(self.operations, None) is None:
                raise ValueError("its pickle has too many operations for a network")
            try:
                self._run(operation.name, argument)
            except (IndexError, KeyError, TypeError) as error:  # what it needs is not on the stack
                raise ValueError(
                    f"its pickle is damaged: {operation.name} at byte {position} cannot be done"
                ) from error
        return self.result

    def _run(self, name: str, argument) -> None:
        push, pop = self.stack.append, self.stack.pop
        match name:
            case _ if name in _VALUES:
                push(argument)
            case _ if name in _CONSTANTS:
                push(_CONSTANTS[name])
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST" | "EMPTY_SET":
                push([])
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE" | "FROZENSET":
                items = self._pop_to_mark()
                self.stack.append(tuple(items) if name == "TUPLE" else items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(name[-1]))][::-1]))
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "POP":
                pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "SETITEM":
                value, key = pop(), pop()
                _set_items(self.stack[-1], [key, value])
            case "SETITEMS":
                items = self._pop_to_mark()
                _set_items(self.stack[-1], items)
            case "APPEND":
                item = pop()
                _extend(self.stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = self._pop_to_mark()
                _extend(self.stack[-1], items)
            case "GLOBAL":
                push(self._named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = pop(), pop()
                # Two long strings, joined many times, would fill the memory.
                if any(type(s) is not str or len(s) > 1000 for s in (module, attribute)):
                    raise ValueError("its pickle is damaged: a name is no string, or too long")
                push(self._named(f"{module}.{attribute}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = pop(), pop()
                push(self._call(function, arguments))
            case "NEWOBJ_EX":
                _, _, function = pop(), pop(), pop()
                push(Record(_name(function)))
            case "BUILD":
                state = pop()
                _set_state(self.stack[-1], state)
            case "BINPERSID":
                if self.persistent is None:
                    raise ValueError("its pickle refers to data outside of it")
                push(self.persistent(pop()))
            case "STOP":
                self.result = pop()
            case "PROTO" | "FRAME":
                pass  # they say nothing that is needed
            case _:
                raise ValueError(f"its pickle uses the operation {name}, which is not read here")

    def _pop_to_mark(self) -> list:
        """Everything above the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _named(self, name: str) -> Record:
        if self.names is not None and name not in self.names:
            raise ValueError(f"its pickle refers to {name!r:.100}, which is not read here")
        return Record(name)

    def _call(self, function: object, arguments: object) -> object:
        name = _name(function)
        if type(arguments) is not tuple:
            raise TypeError
        return self.makers[name](*arguments) if name in self.makers else Record(name)


def _name(function: object) -> str:
    if not isinstance(function, Record):
        raise TypeError
    return function.name


def _set_items(target: object, items: list) -> None:
    if isinstance(target, Record):
        return  # of a class that is not known here, only attributes are kept
    if type(target) is not dict or len(items) % 2:
        raise TypeError
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Large numbers can be chosen so that their hashes collide, which takes quadratic time.
        if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
            raise ValueError("its pickle has a key that is no string and no small number")
        target[key] = value


def _extend(target: object, items: list) -> None:
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Record):
        raise TypeError


def _set_state(target: object, state: object) -> None:
    if isinstance(target, Record):
        target.state = state
    elif type(target) is not dict:  # attributes of an OrderedDict are left out
        raise TypeError
