"""Pickles read as data: no class is imported, nothing that they name is called.

A pickle is a program for a small stack machine (`pickletools` documents its operations). This is
such a machine, for what protocols 2 to 5 write. Whatever is no number, string or container becomes
a record of what the pickle says about it.
"""

import pickletools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO


@dataclass(slots=True, eq=False)
class Name:
    """A class or function that the pickle refers to."""

    name: str


@dataclass(slots=True, eq=False)
class Record:
    """An object of a class, or the result of a function, that is not known here."""

    name: str  # of the class or function
    args: tuple = ()
    state: object = None  # mostly the dictionary of its attributes
    entries: list = field(default_factory=list)  # values appended; pairs of key and value


def kind(value: object) -> str:
    """How a message names `value`."""
    if isinstance(value, (Name, Record)):
        return f"{value.name!r:.100}"
    return type(value).__name__.removeprefix("_")


_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_VALUES = {  # operations that push their argument
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_WITH_ARGUMENT = {
    *_VALUES,
    *("PROTO", "FRAME", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL"),
}


def unpickle(
    file: BinaryIO,
    operations: Iterator,
    known: Mapping[str, Callable],
    persistent: Callable[[object], object] | None = None,
    names: Collection[str] | None = None,
) -> object:
    """The object of the pickle at the position of `file`, which moves behind it.

    Args:
        operations: one item is taken for each operation, and running out of them is an error. A
            byte of a pickle can cost a hundred bytes of memory; a limit on operations limits both.
        known: "module.name" to the function that makes the object from the pickle's arguments.
        persistent: makes an object from its persistent id; None: there are none.
        names: all that the pickle may refer to, as "module.name"; None: anything.

    Returns:
        None, numbers, strings, bytes, lists (sets are read as lists), tuples, dictionaries with
        keys of type str or int, what `known` and `persistent` make, and `Name` and `Record`.
        Parts may be shared, or contain themselves.

    Raises:
        ValueError: the pickle is damaged, too long, or uses an operation or a name that is not
            read here.
    """
    machine = _Machine(known, persistent, names)
    while True:
        code = file.read(1)
        opcode = _OPCODES.get(code)
        if opcode is None:
            reason = f"has no operation {code!r}" if code else "is cut short"
            raise ValueError(f"its pickle {reason}")
        if next(operations, None) is None:
            raise ValueError("its pickle has too many operations for a network")
        if opcode.arg is not None and opcode.name not in _WITH_ARGUMENT:
            raise _unread(opcode.name)
        try:
            argument = opcode.arg.reader(file) if opcode.arg is not None else None
        except ValueError as error:
            raise ValueError(f"its pickle is damaged: {error}") from error
        if opcode.name in _VALUES:
            machine.stack.append(argument)
        elif opcode.name == "STOP":
            return machine.pop()
        else:
            machine.run(opcode.name, argument)


def _unread(name: str) -> ValueError:
    return ValueError(f"its pickle uses the operation {name}, which is not read here")


class _Machine:
    def __init__(
        self,
        known: Mapping[str, Callable],
        persistent: Callable | None,
        names: Collection[str] | None,
    ):
        self.known, self.persistent, self.names = known, persistent, names
        self.stack, self.marks, self.memo = [], [], {}

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("its pickle is damaged: it takes from an empty stack")
        return self.stack.pop()

    def pop_mark(self) -> list:
        """Everything above the last mark."""
        if not self.marks:
            raise ValueError("its pickle is damaged: a mark is missing")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def run(self, name: str, argument) -> None:
        """Any operation that does more than push its argument."""
        push = self.stack.append
        match name:
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(
                        f"its pickle is damaged: it refers to object {argument} too early"
                    )
                push(self.memo[argument])
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self.pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([self.pop() for _ in range(int(name[-1]))][::-1]))
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST" | "EMPTY_SET":
                push([])
            case "FROZENSET":
                push(self.pop_mark())
            case "SETITEM" | "SETITEMS":
                items = self.pop_mark() if name == "SETITEMS" else [self.pop(), self.pop()][::-1]
                _set_items(self._top(), items)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [self.pop()] if name == "APPEND" else self.pop_mark()
                _append(self._top(), items)
            case "GLOBAL":
                push(self._named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                # Two long strings, joined many times, would fill the memory.
                if any(type(s) is not str or len(s) > 1000 for s in (module, attribute)):
                    raise ValueError("its pickle is damaged: a name is no string, or too long")
                push(self._named(f"{module}.{attribute}"))
            case "REDUCE" | "NEWOBJ":
                args, function = self.pop(), self.pop()
                push(self._call(function, args))
            case "NEWOBJ_EX":
                kwargs, args, function = self.pop(), self.pop(), self.pop()
                push(Record(_name(function), (args, kwargs)))
            case "BUILD":
                state = self.pop()
                _set_state(self._top(), state)
            case "BINPERSID":
                if self.persistent is None:
                    raise ValueError("its pickle refers to data outside of it")
                push(self.persistent(self.pop()))
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                push(self._top())
            case "PROTO" | "FRAME":
                pass  # they say nothing that is needed
            case _:
                raise _unread(name)

    def _named(self, name: str) -> Name:
        if self.names is not None and name not in self.names:
            raise ValueError(f"its pickle refers to {name!r:.100}, which is not read here")
        return Name(name)

    def _top(self) -> object:
        top = self.pop()
        self.stack.append(top)
        return top

    def _call(self, function: object, args: object) -> object:
        name = _name(function)
        if type(args) is not tuple:
            raise ValueError(f"its pickle is damaged: no arguments for {name!r:.100}")
        if name not in self.known:
            return Record(name, args)
        try:
            return self.known[name](*args)
        except TypeError as error:
            raise ValueError(f"its pickle calls {name} with other arguments") from error


def _name(function: object) -> str:
    if not isinstance(function, Name):
        raise ValueError("its pickle is damaged: it calls what is no name")
    return function.name


def _set_items(target: object, items: list) -> None:
    if len(items) % 2:
        raise ValueError("its pickle is damaged: a key without a value")
    pairs = zip(items[::2], items[1::2], strict=True)
    if isinstance(target, Record):
        target.entries.extend(pairs)
    elif type(target) is dict:
        for key, value in pairs:
            # Large numbers can be chosen so that their hashes collide, which takes quadratic time.
            if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
                raise ValueError("its pickle has a key that is no string and no small number")
            target[key] = value
    else:
        raise ValueError("its pickle is damaged: it sets items of what is no dictionary")


def _append(target: object, items: list) -> None:
    if isinstance(target, Record):
        target.entries.extend(items)
    elif type(target) is list:
        target.extend(items)
    else:
        raise ValueError("its pickle is damaged: it appends to what is no list")


def _set_state(target: object, state: object) -> None:
    if isinstance(target, Record):
        target.state = state
    elif type(target) is not dict:  # attributes of an OrderedDict are left out
        raise ValueError("its pickle is damaged: it sets attributes of what is no object")
