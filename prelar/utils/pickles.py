"""Pickles from elsewhere, read step by step: plain values, and inert stand-ins for the few names they need.

Nothing that a pickle names is imported, and what it calls or changes are the stand-ins of its reader. Each
step costs bounded time and memory beyond the bytes of its own argument, and their number is limited.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

from prelar.utils.errors import one_line, printable

MAX_STEPS = 2_000_000
MAX_ARGUMENTS = 16
MAX_KEY = 1_000

Known = Mapping[str, Callable[..., Any]]
"""What stands in for a name, written as "module name"."""


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A known name in a pickle. It can be called, and nothing can be changed by it."""

    name: str
    _made: Callable[..., Any]

    def call(self, arguments: Any) -> Any:
        """What the stand-in makes of the arguments."""
        if not isinstance(arguments, tuple) or len(arguments) > MAX_ARGUMENTS:
            raise ValueError("damaged (a call without arguments, or with too many)")
        return self._made(*arguments)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,  # nobody asks what is in it, and nothing is compared
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_PASSED = {"PROTO", "FRAME", "STOP"}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


class _Reader:
    """The stack and the memo of a pickle in reading."""

    def __init__(self, known: Known, persistent: Callable[[Any], Any] | None, kind: str) -> None:
        self.known, self.persistent, self.kind = known, persistent, kind
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def do(self, name: str, value: Any) -> None:
        """One step of the pickle: an opcode of `pickletools` and its argument."""
        stack = self.stack
        if name in _VALUES:
            stack.append(value)
        elif name == "MEMOIZE" or name in _PUTS:
            self.memo[len(self.memo) if value is None else value] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[value])
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in {"TUPLE", "FROZENSET"}:
            stack.append(tuple(self._marked()))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].build(state)
        elif name in {"REDUCE", "NEWOBJ"}:
            arguments = stack.pop()
            stack.append(stack.pop().call(arguments))
        elif name in {"APPEND", "APPENDS", "ADDITEMS"}:
            items = [stack.pop()] if name == "APPEND" else self._marked()
            stack[-1].extend(items)
        elif name in {"SETITEM", "SETITEMS"}:
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._marked()
            pairs = zip(items[::2], items[1::2], strict=True)
            stack[-1].update({key: item for key, item in pairs if _is_key(key)})
        elif name == "GLOBAL":
            stack.append(self._named(value))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [self._named(" ".join(stack[-2:]))]
        elif name == "BINPERSID" and self.persistent:
            stack.append(self.persistent(stack.pop()))
        elif name not in _PASSED:
            raise ValueError(f"holds {name}, which no {self.kind} needs: refused")

    def _named(self, name: str) -> Name:
        if name not in self.known:
            shown = printable(name.replace(" ", ".", 1), 100)
            raise ValueError(f"names {shown}, which no {self.kind} needs: refused")
        return Name(name, self.known[name])

    def _marked(self) -> list[Any]:
        """What was laid on the stack since the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items


def _is_key(value: Any) -> bool:
    """Whether a dict keeps what has this key: a short text or a whole number, which are quick to compare."""
    if isinstance(value, str) and len(value) > MAX_KEY:
        raise ValueError(f"a key of {len(value)} characters")
    return isinstance(value, str) or (isinstance(value, int) and value.bit_length() <= 64)


def load(
    stream: IO[bytes], known: Known, *, kind: str, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """What the pickle at a stream's place holds: plain values, and the stand-ins of `known` names.

    The stream stands behind it afterwards. A dict keeps what has a short text or a whole number as its key.
    `persistent` gives what stands for a persistent id; without it, those are refused. `kind` says in messages
    what the pickle should be. Raises `ValueError` where it is damaged or refused.
    """
    reader = _Reader(known, persistent, kind)
    try:
        for count, (opcode, value, _) in enumerate(pickletools.genops(stream)):
            if count >= MAX_STEPS:
                raise ValueError(f"takes more than {MAX_STEPS} steps")
            reader.do(opcode.name, value)
        return reader.stack.pop()
    except (AttributeError, IndexError, KeyError, TypeError, MemoryError, OverflowError):
        raise ValueError(f"damaged: not a pickle of a {kind}") from None
    except ValueError as error:
        raise ValueError(one_line(error)) from None
