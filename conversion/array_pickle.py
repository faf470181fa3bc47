"""Reads pickles of NumPy arrays, as published in detectron2's model zoos, without running any code from them.

A pickle is a program for a stack machine, and Python's unpickler lets it import and call anything. This interpreter
implements only the instructions for containers and arrays, and seven global names. It never imports or calls these, but
performs the equivalent operation itself; any other name or instruction is rejected. Memory is bounded by the file size:
sizes are checked before data is read, and arrays are views of the bytes in which they were stored.
"""

import math
import mmap
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_faim2f.errors import ConversionError, first_line

# Maximum length in bytes of a text line, which holds a global's name or a number; strings are length-prefixed.
LONGEST_LINE = 1 << 16
# For comparison: a checkpoint with a thousand arrays has fifty thousand instructions.
MOST_INSTRUCTIONS = 1 << 20
# Maximum number of dimensions of an array; no weight has as many.
MOST_DIMENSIONS = 8
LONGEST_SIDE = 1 << 40
# Larger integer keys could be crafted to collide in the hash table, which would make a dictionary slow.
LARGEST_INTEGER_KEY = 1 << 31
TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
# The operation for each global name. NumPy 2 renamed `numpy.core`, and Python 3 renamed `__builtin__`.
SAME_NAMES = {
    **{f"numpy.{core}.multiarray._reconstruct": "reconstruct" for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": "scalar" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": "from buffer" for core in ("core", "_core")},
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "collections.OrderedDict": "ordered dictionary",
    "_codecs.encode": "encode",
    **{f"{builtins}.bytes": "no bytes" for builtins in ("builtins", "__builtin__")},
}
# The first value in files written by torch before version 1.6.
MAGIC_OF_TORCH = 0x1950A86A20F9469CFC6C


class _Refused(Exception):
    """The pickle is invalid or not allowed; the message continues a sentence that starts with the path."""


class _Mark:
    """Marks the start of a group of values on the stack."""


@dataclass(frozen=True)
class _Name:
    """An allowed global name on the stack: its operation, a value of SAME_NAMES, and its full name in the file."""

    kind: str
    full: str


@dataclass
class _Type:
    """The element type of an array; a later instruction sets its byte order."""

    code: str
    order: str = "<"

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


@dataclass
class _Array:
    """An array; a later instruction sets its values."""

    values: np.ndarray | None = None


class _Bytes:
    """A file-like object for `pickletools` that never reads beyond the end of the file."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0

    def read(self, count: int) -> bytes:
        if count > len(self.content) - self.place:
            raise _Refused(f"is truncated: it ends in the middle of {count} bytes at {self.place}; download it again")
        self.place += count
        return self.content[self.place - count : self.place]

    def readline(self) -> bytes:
        end = self.content.find(b"\n", self.place, self.place + LONGEST_LINE)
        if end < 0:
            raise _Refused(f"has text at {self.place} that does not end within {LONGEST_LINE} bytes")
        return self.read(end + 1 - self.place)

    def tell(self) -> int:
        return self.place


def read_array_pickle(path: Path) -> Any:
    """Reads a pickle of dictionaries, lists, tuples, strings, bytes, numbers, and arrays (as `np.ndarray`).

    Arrays are read-only views of bytes in memory, with floating-point, integer or boolean elements. A container may
    contain itself.

    Raises:
        ConversionError: the file is truncated, is not a pickle, or contains anything but plain containers and arrays.
    """
    if path.stat().st_size == 0:
        raise ConversionError(f"{path} is empty; download it again.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            source = _Bytes(content)
            found = _run(source)
            left = len(content) - source.place
            if found == MAGIC_OF_TORCH and type(found) is int:
                raise _Refused("was written by torch before 1.6: load it there and save it once more by `torch.save`")
            if left:
                raise _Refused(f"has {left} bytes behind its end, so it is damaged or forged")
            return found
    except _Refused as error:
        raise ConversionError(f"{path} {error}.") from error
    # pickletools raises ValueError if the file is not a pickle; invalid UTF-8 is also a ValueError.
    except (ValueError, IndexError, OverflowError, MemoryError, RecursionError) as error:
        reason = first_line(error, kind=False)
        raise ConversionError(f"{path} is not a complete pickle ({reason}); download it again.") from error


def _run(source: _Bytes) -> Any:
    machine = _Machine(len(source.content))
    for count, (operation, argument, place) in enumerate(pickletools.genops(source)):  # type: ignore[arg-type]
        if operation.name == "STOP":
            break
        if count == MOST_INSTRUCTIONS:
            raise _Refused(
                f"has more than {MOST_INSTRUCTIONS} instructions, which pickles of arrays do not need: refused"
            )
        do = INSTRUCTIONS.get(operation.name)
        if do is None:
            raise _Refused(
                f"has the instruction {operation.name} at {place}, which pickles of arrays do not need: refused"
            )
        try:
            do(machine, argument)
        except (IndexError, KeyError, TypeError) as error:
            raise _Refused(f"has the instruction {operation.name} at {place} without what it works on") from error
    if len(machine.stack) != 1:
        raise _Refused(f"leaves {len(machine.stack)} values where one was expected, so it is damaged or forged")
    return _finished(machine.stack[0])


class _Machine:
    """The stack and the memo (numbered values) of the pickle virtual machine."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: size of the file in bytes.
        """
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}  # a dictionary, so that large numbers need no memory
        self.left = size

    def spend(self, count: int) -> None:
        """Limits the total of bytes and entries copied by calls, because calls can copy the same value repeatedly."""
        self.left -= count
        if self.left < 0:
            raise _Refused("expands to more data than the file contains: refused as malicious")

    def pop(self) -> Any:
        value = self.stack.pop()
        if isinstance(value, _Mark):
            raise IndexError
        return value

    def group(self) -> list[Any]:
        """Pops the values above the last mark, and the mark."""
        values: list[Any] = []
        while not isinstance(value := self.stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError
        return self.stack[-1]

    def remember(self, number: int | None) -> None:
        if isinstance(self.stack[-1], _Mark):
            raise IndexError
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Other types, such as nested tuples, can take forever to hash, and checkpoints do not use them as keys.
            if not isinstance(key, str) and (type(key) is not int or abs(key) > LARGEST_INTEGER_KEY):
                raise _Refused(f"has a dictionary whose key is a {type(key).__name__}, which none of weights has")
            target[key] = _finished(value)

    def name(self, full: str) -> None:
        if full not in SAME_NAMES:
            raise _Refused(
                f"holds `{ascii(full[:100])[1:-1]}`, and reading it could run code: refused. Save the weights "
                "alone, as arrays in a pickle or by `torch.save`"
            )
        self.stack.append(_Name(SAME_NAMES[full], full))

    def name_from_stack(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError
        self.name(f"{module}.{name}")

    def call(self, _: None) -> None:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise TypeError
        known = CALLS.get(name.kind)
        if known is None:
            raise _Refused(f"calls `{name.full}`, which no pickle of arrays does: refused")
        self.stack.append(known(self, *arguments))

    def build(self, _: None) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, _Type):
            _set_order(target, state)
        elif isinstance(target, _Array):
            _fill(self, target, state)
        # Attributes of an OrderedDict, such as the versions that torch stores in a state dict, are ignored.
        elif not isinstance(target, dict) or not isinstance(state, dict):
            raise _Refused(
                f"sets the state of a {type(target).__name__.lower()}, which no pickle of arrays does: refused"
            )


def _finished(value: Any) -> Any:
    """Converts a value for the caller: arrays become NumPy arrays."""
    if isinstance(value, _Array):
        if value.values is None:
            raise _Refused("has an array without values, so it is damaged or forged")
        return value.values
    if isinstance(value, (_Name, _Type)):
        return None
    return value


def _ordered_dictionary(machine: _Machine, pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, (list, tuple)):
        raise TypeError
    machine.spend(len(pairs))
    machine.stack.append({})
    machine.set_items([part for pair in pairs for part in _pair(pair)])
    return machine.pop()


def _pair(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise TypeError
    return pair[0], pair[1]


def _type(machine: _Machine, code: Any, *_: Any) -> _Type:
    name = _text(code)
    if name not in TYPES:
        raise _Refused(
            f"has an array of type {name[:20]!r}, where only numbers are weights ({', '.join(TYPES)}) and objects "
            "could hold code: refused"
        )
    return _Type(name)


def _text(value: Any) -> str:
    if not isinstance(value, str):  # not printed in the message: self-containing lists have an endless representation
        raise TypeError
    return value


def _set_order(target: _Type, state: Any) -> None:
    # (version, byte order, subarray, names, fields, size, alignment, flags); the last three are ignored.
    if not isinstance(state, tuple) or not 5 <= len(state) <= 8 or any(part is not None for part in state[2:5]):
        raise _Refused("has an array of structures, which is not a weight: refused")
    if _text(state[1]) not in ("<", ">", "=", "|"):
        raise _Refused(f"has an array of the byte order {state[1][:20]!r}, so it is damaged or forged")
    target.order = "<" if state[1] in "=|" else state[1]


def _reconstruct(machine: _Machine, kind: Any, shape: Any, code: Any) -> _Array:
    if not isinstance(kind, _Name) or kind.kind != "ndarray":
        raise _Refused("has an array of a kind other than `numpy.ndarray`: refused")
    return _Array()


def _fill(machine: _Machine, target: _Array, state: Any) -> None:
    # (version, shape, dtype, column-major, bytes); old files have no version.
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        raise TypeError
    shape, kind, is_fortran, values = state[-4:]
    if target.values is not None:
        raise _Refused("fills an array twice, so it is damaged or forged")
    target.values = _array(machine, values, kind, shape, "F" if is_fortran else "C")


def _from_buffer(machine: _Machine, values: Any, kind: Any, shape: Any, order: Any = "C") -> _Array:
    return _Array(_array(machine, values, kind, shape, "F" if order == "F" else "C"))


def _scalar(machine: _Machine, kind: Any, values: Any) -> _Array:
    return _Array(_array(machine, values, kind, (), "C"))


def _array(machine: _Machine, values: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(values, str):  # from Python 2, in which text and bytes are the same type
        values = _encode(machine, values)
    if not isinstance(values, (bytes, bytearray)) or not isinstance(kind, _Type):
        raise _Refused("has an array whose values are not bytes (an array of objects?): refused")
    sides = isinstance(shape, tuple) and len(shape) <= MOST_DIMENSIONS
    if not sides or not all(type(side) is int and 0 <= side <= LONGEST_SIDE for side in shape):
        raise _Refused("has an array of a shape that cannot be, so it is damaged or forged")
    claimed = math.prod(shape) * kind.numpy().itemsize
    if claimed != len(values):
        raise _Refused(f"has an array of the shape {shape} with {len(values)} bytes in place of {claimed}, so it is "
                       "damaged or forged")  # fmt: skip
    return np.ndarray(shape, kind.numpy(), buffer=values, order=order)


def _encode(machine: _Machine, text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    machine.spend(len(_text(text)))
    if _text(encoding).lower().replace("-", "") not in ("latin1", "iso88591"):
        raise TypeError
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise _Refused("has bytes that are not Latin-1, so it is damaged or forged") from error


CALLS: dict[str, Callable[..., Any]] = {
    "reconstruct": _reconstruct,
    "scalar": _scalar,
    "from buffer": _from_buffer,
    "dtype": _type,
    "ordered dictionary": _ordered_dictionary,
    "encode": _encode,
    "no bytes": lambda machine: b"",  # protocol 2 has no other way to write empty bytes
}


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _append_all(machine: _Machine, values: list[Any]) -> None:
    machine.top(list).extend(_finished(value) for value in values)


def _dictionary(machine: _Machine, pairs: list[Any]) -> None:
    machine.stack.append({})
    machine.set_items(pairs)


def _pair_of_stack(machine: _Machine) -> list[Any]:
    value, key = machine.pop(), machine.pop()
    return [key, value]


# Instructions by their names in pickletools. Those for instances, extensions, persistent ids and external buffers are
# deliberately omitted.
INSTRUCTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
        "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split(),
        _push,
    ),
    "NONE": lambda machine, _: _push(machine, None),
    "NEWTRUE": lambda machine, _: _push(machine, True),
    "NEWFALSE": lambda machine, _: _push(machine, False),
    "MARK": lambda machine, _: _push(machine, _Mark()),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.group(),
    "DUP": lambda machine, _: _push(machine, machine.top(object)),
    "EMPTY_TUPLE": lambda machine, _: machine.tuple_of(0),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.group())),
    "EMPTY_LIST": lambda machine, _: _push(machine, []),
    "LIST": lambda machine, _: _push(machine, [_finished(value) for value in machine.group()]),
    "APPEND": lambda machine, _: _append_all(machine, [machine.pop()]),
    "APPENDS": lambda machine, _: _append_all(machine, machine.group()),
    "EMPTY_DICT": lambda machine, _: _push(machine, {}),
    "DICT": lambda machine, _: _dictionary(machine, machine.group()),
    "SETITEM": lambda machine, _: machine.set_items(_pair_of_stack(machine)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.group()),
    "PUT": lambda machine, number: machine.remember(number),
    "BINPUT": lambda machine, number: machine.remember(number),
    "LONG_BINPUT": lambda machine, number: machine.remember(number),
    "MEMOIZE": lambda machine, _: machine.remember(None),
    "GET": lambda machine, number: _push(machine, machine.memo[number]),
    "BINGET": lambda machine, number: _push(machine, machine.memo[number]),
    "LONG_BINGET": lambda machine, number: _push(machine, machine.memo[number]),
    "GLOBAL": lambda machine, full: machine.name(full.replace(" ", ".")),
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}

__all__ = ["read_array_pickle"]
