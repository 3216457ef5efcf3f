"""Objects of Python itself that hold values or lead to others: what of them is compared."""

from __future__ import annotations

import array
import contextvars
import ctypes
import dis
import functools
import importlib.util
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

#: blocks of memory: compared by content
MEMORY = (
    array.array, bytearray, memoryview, np.ndarray, np.generic,
    ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union,
)  # fmt: skip
#: what gives another value at every use
ENDING = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)

_BOUND = (types.BuiltinMethodType, types.MethodWrapperType)
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_CACHED = type(functools.lru_cache(len))
#: by class: attributes through which its objects lead on
_ATTRIBUTES: list[tuple[Any, tuple[str, ...]]] = [
    (types.MethodType, ("__func__", "__self__")),
    (functools.partial, ("func", "args", "keywords")),
    (functools.partialmethod, ("func", "args", "keywords")),
    (functools.cached_property, ("func",)),
    (functools.singledispatchmethod, ("func", "dispatcher")),
    (_CACHED, ("__wrapped__",)),
    (_VIEWS, ("mapping",)),
]


def content(item: Any) -> Any:
    """Of a block of memory all that tells it from another."""
    if isinstance(item, (np.ndarray, np.generic)):
        return type(item), item.dtype, item.shape, item.tobytes()
    if isinstance(item, array.array):
        return type(item), item.typecode, item.tobytes()
    if isinstance(item, memoryview):
        return type(item), item.format, item.shape, item.tobytes()
    return type(item), bytes(item)


def parts(item: Any) -> list[tuple[Any, str]] | None:
    """The objects that one leads to, each with how it is reached; None: it is of no such kind."""
    for kind, names in _ATTRIBUTES:
        if isinstance(item, kind):
            return [(getattr(item, name), f".{name}") for name in names]
    if isinstance(item, _BOUND) and not isinstance(item.__self__, (types.ModuleType, type(None))):
        return [(item.__name__, ".__name__"), (item.__self__, ".__self__")]
    if isinstance(item, weakref.ReferenceType):
        return [(item(), "()")]
    if isinstance(item, contextvars.ContextVar):
        return [(item.get(None), ".get(None)")]
    return None


def names(code: types.CodeType) -> Iterator[str]:
    """Names that code may look up, by ``getattr`` and the like too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def imports(code: types.CodeType, package: str) -> Iterator[str]:
    """Modules that code imports as it runs, with the packages around them."""
    instructions = [x for x in dis.get_instructions(code) if x.opname != "EXTENDED_ARG"]
    for place, one in enumerate(instructions):
        if one.opname == "IMPORT_NAME":
            level = instructions[place - 2].argval  # then the names taken from it
            relative = isinstance(level, int) and level > 0
            full = "." * level + one.argval if relative else one.argval
            found = importlib.util.resolve_name(full, package) if relative else full
            ends = [i for i, letter in enumerate(found) if letter == "."]
            yield from (found[:end] for end in [*ends, len(found)])
            taken = instructions[place - 1].argval
            yield from (f"{found}.{name}" for name in taken or ())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from imports(constant, package)
