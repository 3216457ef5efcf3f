"""Arguments given by name: rules take torch's order, and few of torch's many names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ctorch.autodiff._functions import name_of

Function = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_NUMPY = {"axis": "dim", "keepdims": "keepdim", "x1": "input", "x2": "other"}  # torch takes both
_known: dict[Function, tuple[str, frozenset[str], bool]] = {}


def arranged(rule: Function, function: Function, args: Any, kwargs: dict[str, Any]) -> Arguments:
    """A call's arguments as the rule takes them.

    Args:
        function: the torch function that was called, which knows the order of its arguments.

    Raises:
        TypeError: neither the rule nor the function knows a name.
    """
    first, names, any_name = _known.get(rule) or _names(rule)
    if kwargs.keys() <= names and (args or first in kwargs):
        return args, kwargs
    given = {name if name in names else _NUMPY.get(name, name): x for name, x in kwargs.items()}
    if "out" in given and "out" not in names:
        del given["out"]  # it is None
    if args and (any_name or given.keys() <= names):
        return args, given
    for order, every in _orders(function):
        placed, rest = list(args), dict(given)
        if not rest.keys() <= every:
            continue
        for name in order[len(args) :]:
            if name not in rest or (placed and (any_name or rest.keys() <= names)):
                break
            placed.append(rest.pop(name))
        if placed and (any_name or rest.keys() <= names):
            return tuple(placed), rest
    if any_name:
        return args, given
    unknown = ", ".join(sorted(given.keys() - names))
    raise TypeError(
        f"{name_of(function)}: unknown among its arguments given by name: {unknown}; give them by "
        f"position"
    )


def _names(rule: Function) -> tuple[str, frozenset[str], bool]:
    """The name of a rule's first argument, all names that it takes, and whether it takes any."""
    parameters = inspect.signature(rule).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in parameters if p.kind in kinds]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    found = _known[rule] = (names[0] if names else "", frozenset(names), any_name)
    return found


def _orders(function: Any) -> list[tuple[list[str], set[str]]]:
    """Names of a function's arguments by position, and all names, for each way to call it."""
    packet = getattr(torch.ops.aten, getattr(function, "__name__", ""), None)
    overloads = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    orders = []
    for overload in overloads:
        arguments = [
            ("input" if a.name == "self" else a.name, a) for a in overload._schema.arguments
        ]
        orders.append(([n for n, a in arguments if not a.kwarg_only], {n for n, _ in arguments}))
    return orders
