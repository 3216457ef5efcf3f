"""The tensors that a function uses beyond its arguments: parameters, buffers, closures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_DEPTH = 6  # how far closures within closures are followed


@dataclass
class Captured:
    """A tensor that the function reaches on its own.

    Attributes:
        name: how a report names it, as ``"net.weight"``.
        tensor: the tensor object itself; whoever holds it sees what is written into it.
        places: functions that put another tensor object where this one is held.
    """

    name: str
    tensor: Tensor
    places: list[Callable[[Tensor], None]] = field(default_factory=list)

    @property
    def checked(self) -> bool:
        """Whether its gradient is checked: leaves that require a gradient are."""
        return self.tensor.requires_grad and self.tensor.is_leaf

    @contextmanager
    def replaced(self, other: Tensor) -> Iterator[None]:
        """Within the block every place that holds this tensor holds ``other``."""
        for put in self.places:
            put(other)
        try:
            yield
        finally:
            for put in self.places:
                put(self.tensor)


def find_captured(fn: Callable[..., Any]) -> list[Captured]:
    """All tensors that ``fn`` holds (integer buffers too), each once, in a fixed order.

    Looked at: modules (parameters, buffers, tensor attributes), closures, defaults and the globals
    that a function's code names, ``functools.partial``, bound methods, and the attributes of other
    callable objects.
    """
    found: dict[int, Captured] = {}
    seen: set[int] = set()
    _search(fn, "", found, seen, _DEPTH)
    return list(found.values())


@contextmanager
def widened(captured: list[Captured]) -> Iterator[None]:
    """Within the block the tensors hold copies, in double precision; then their own data again.

    Their ``.grad`` is set aside for as long, since its dtype must match.
    """
    kept = [(c.tensor, c.tensor.data, c.tensor.grad) for c in captured]
    try:
        for tensor, data, _ in kept:
            tensor.grad = None
            tensor.data = data.detach().clone().to(_WIDER.get(data.dtype, data.dtype))
        yield
    finally:
        for tensor, data, grad in kept:
            tensor.data = data
            tensor.grad = grad


def widen(tensor: Tensor) -> Tensor:
    """``tensor`` in double precision, detached, in the same memory layout; integers stay."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    dtype = _WIDER.get(tensor.dtype, tensor.dtype)
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = torch.as_strided(tensor, (count,), (1,), 0).to(dtype, copy=True)
    return torch.as_strided(storage, tensor.shape, tensor.stride(), tensor.storage_offset())


def _search(value: Any, name: str, found: dict[int, Captured], seen: set[int], depth: int) -> None:
    """Adds what ``value`` holds to ``found``; ``name`` is the path that led here."""
    if depth == 0 or id(value) in seen:
        return
    if isinstance(value, nn.Module):
        seen.add(id(value))
        _search_module(value, name, found, seen, depth)
    elif isinstance(value, functools.partial):
        seen.add(id(value))
        _search(value.func, name, found, seen, depth - 1)
        for i, item in enumerate(value.args):
            _hold(item, _join(name, f"args[{i}]"), None, found, seen, depth)
        for key in value.keywords:
            put_keyword = functools.partial(value.keywords.__setitem__, key)
            _hold(value.keywords[key], _join(name, key), put_keyword, found, seen, depth)
    elif inspect.ismethod(value):
        _search(value.__self__, name, found, seen, depth - 1)
        _search(value.__func__, name, found, seen, depth - 1)
    elif inspect.isfunction(value):
        seen.add(id(value))
        _search_function(value, name, found, seen, depth)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            put_item = functools.partial(value.__setitem__, i) if isinstance(value, list) else None
            _hold(item, f"{name}[{i}]", put_item, found, seen, depth)
    elif isinstance(value, dict):
        for key in value:
            put = functools.partial(value.__setitem__, key)
            _hold(value[key], f"{name}[{key!r}]", put, found, seen, depth)
    elif hasattr(value, "__dict__") and not inspect.ismodule(value) and not inspect.isclass(value):
        seen.add(id(value))
        for key, item in list(vars(value).items()):
            put = functools.partial(setattr, value, key)
            _hold(item, _join(name, key), put, found, seen, depth)


def _search_function(
    fn: Any, name: str, found: dict[int, Captured], seen: set[int], depth: int
) -> None:
    for key, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            item = cell.cell_contents
        except ValueError:  # a name that is bound later
            continue
        _hold(
            item,
            _join(name, key),
            functools.partial(setattr, cell, "cell_contents"),
            found,
            seen,
            depth,
        )
    for i, item in enumerate(fn.__defaults__ or ()):
        _hold(item, _join(name, f"default {i}"), None, found, seen, depth)
    for key in _names(fn.__code__):
        item = fn.__globals__.get(key)
        if _users_own(item):
            put = functools.partial(fn.__globals__.__setitem__, key)
            _hold(item, _join(name, key), put, found, seen, depth)
    wrapped = getattr(fn, "__wrapped__", None)
    if wrapped is not None:
        _search(wrapped, name, found, seen, depth - 1)


def _search_module(
    module: nn.Module, name: str, found: dict[int, Captured], seen: set[int], depth: int
) -> None:
    for path, part in module.named_modules():
        prefix = _join(name, path)
        for table in (part._parameters, part._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    put = functools.partial(table.__setitem__, key)
                    _add(tensor, _join(prefix, key), put, found)
        for key, item in list(vars(part).items()):
            if not key.startswith(
                "_"
            ):  # torch's own tables; parameters and buffers were taken above
                put = functools.partial(object.__setattr__, part, key)
                _hold(item, _join(prefix, key), put, found, seen, depth)


def _names(code: CodeType) -> list[str]:
    """The names that a function's code looks up, also in functions that it defines."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return list(dict.fromkeys([*code.co_names, *(name for c in inner for name in _names(c))]))


def _users_own(item: Any) -> bool:
    """Whether a global is followed: a tensor, a module, a function outside the libraries."""
    if inspect.isfunction(item) or isinstance(item, functools.partial):
        home = getattr(item, "__module__", "").partition(".")[0]
        return home not in ("torch", "ctorch", "numpy", "hypothesis")
    return isinstance(item, (Tensor, nn.Module))


def _hold(
    item: Any,
    name: str,
    put: Callable[[Any], None] | None,
    found: dict[int, Captured],
    seen: set[int],
    depth: int,
) -> None:
    if isinstance(item, Tensor):
        _add(item, name, put, found)
    else:
        _search(item, name, found, seen, depth - 1)


def _add(
    tensor: Tensor, name: str, put: Callable[[Any], None] | None, found: dict[int, Captured]
) -> None:
    held = found.setdefault(id(tensor), Captured(name, tensor))
    if put is not None:
        held.places.append(put)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
