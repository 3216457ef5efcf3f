"""Pytrees of the same structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import _pytree as pytree


def leaves_like(
    value: Any, spec: pytree.TreeSpec, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """The leaves of ``value``, in the order of ``spec``.

    Entries of a dict are found by their keys: in torch's pytrees dicts keep the order of their
    making, and whoever returns one need not keep to that of another. A list may stand for a tuple.

    Raises:
        TypeError: ``value`` has other keys, or no dict, where ``spec`` has one.
    """
    leaves, own = pytree.tree_flatten(value, is_leaf=is_leaf)
    if own == spec:
        return leaves
    like = pytree.tree_unflatten([None] * spec.num_leaves, spec)
    return [
        leaf
        for part in _in_order(value, like)
        for leaf in pytree.tree_leaves(part, is_leaf=is_leaf)
    ]


def _in_order(value: Any, like: Any) -> Iterator[Any]:
    if isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            got = list(value) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise TypeError(f"a dict with the keys {list(like)} is wanted, but {got} was returned.")
        for key, part in like.items():
            yield from _in_order(value[key], part)
    elif (
        isinstance(like, (list, tuple))
        and isinstance(value, (list, tuple))
        and len(value) == len(like)
    ):
        for mine, part in zip(value, like, strict=True):
            yield from _in_order(mine, part)
    else:
        yield value
