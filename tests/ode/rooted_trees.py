"""Rooted trees and the order conditions of Runge-Kutta methods that hang on them.

A tree is the tuple of the subtrees at its root, sorted; the leaf is ``()``. A method with weights b
and stage matrix A has order p if ``b . stage_weights(tree, A) == 1 / density(tree)`` for all trees
of at most p nodes; an interpolant, if the same holds with ``theta**nodes / density(tree)``.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement
from math import prod

import numpy as np
from numpy.typing import NDArray

Tree = tuple  # of trees; the type is recursive


def nodes(tree: Tree) -> int:
    return 1 + sum(map(nodes, tree))


def density(tree: Tree) -> int:
    return nodes(tree) * prod(map(density, tree))


@cache
def trees(size: int) -> tuple[Tree, ...]:
    """All rooted trees with ``size`` nodes: 1, 1, 2, 4, 9, 20, 48, 115, ..."""
    return tuple(_forests(size - 1, largest=size - 1))


@cache
def _forests(size: int, largest: int) -> tuple[Tree, ...]:
    """Multisets of trees of at most ``largest`` nodes each that have ``size`` nodes together."""
    if size == 0:
        return ((),)
    if largest == 0:
        return ()
    found = []
    for count in range(size // largest + 1):
        for group in combinations_with_replacement(trees(largest), count) if count else [()]:
            found += [group + rest for rest in _forests(size - count * largest, largest - 1)]
    return tuple(found)


def stage_weights(tree: Tree, a: NDArray[np.floating]) -> NDArray[np.floating]:
    """Elementary weights of the stages [S] for stage weights ``a`` [S, S]."""
    weights = np.ones(len(a), dtype=a.dtype)
    for branch in tree:
        weights = weights * (a @ stage_weights(branch, a))
    return weights
