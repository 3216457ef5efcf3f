"""Loops over elements: which places an operand's elements have, as sums of strides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctorch.codegen.graph import Ids

#: More pieces than this are not unrolled: a table of places is used.
MANY = 24


@dataclass
class Where:
    """Where an operand's elements are: of which array, and at which places in it; both [*shape]."""

    array: Ids
    place: Ids


@dataclass
class Access:
    """The elements ``base + sum(strides * index)`` of an array, or those in a table."""

    array: int
    base: int
    strides: tuple[int, ...]
    table: Ids | None = None


@dataclass
class Piece:
    """A rectangular part of a loop, in which every operand is an ``Access``.

    Attributes:
        sizes: of its dimensions; the last is the innermost.
        own: places of the results.
        operands: one access for each operand.
    """

    sizes: tuple[int, ...]
    own: Access
    operands: list[Access]


def pieces(shapes: Sequence[tuple[int, ...]], operands: Sequence[Where]) -> list[Piece]:
    """A loop over ``n`` elements, in as few rectangular pieces as can be found.

    Args:
        shapes: shapes of ``n`` elements that may suit the operands.
        operands: [n] each.
    """
    best: list[Piece] | None = None
    for shape in dict.fromkeys(shapes):
        found = _in_shape(shape, operands)
        if found is not None and (best is None or len(found) < len(best)):
            best = found
    if best is not None and len(best) <= MANY:
        return best
    return _by_tables(math.prod(shapes[0]), operands, best)


def affine(place: Ids) -> tuple[int, ...] | None:
    """The strides of places [*sizes] that are sums of strides; None where they are not."""
    strides = []
    for d, size in enumerate(place.shape):
        first = tuple(0 for _ in place.shape)
        second = (*first[:d], 1, *first[d + 1 :])
        strides.append(int(place[second] - place[first]) if size > 1 else 0)
    sums = place.reshape(-1)[0]
    for stride, grid in zip(strides, np.ogrid[tuple(slice(n) for n in place.shape)], strict=True):
        sums = sums + stride * grid
    return tuple(strides) if (sums == place).all() else None


def _in_shape(shape: tuple[int, ...], operands: Sequence[Where]) -> list[Piece] | None:
    shape = tuple(n for n in shape if n != 1) or (1,)
    arrays = [x.array.reshape(shape) for x in operands]
    places = [x.place.reshape(shape) for x in operands]
    own = np.arange(math.prod(shape)).reshape(shape)
    cuts = [_runs(d, shape[d], arrays, places) for d in range(len(shape))]
    if math.prod(map(len, cuts)) > 4 * MANY:
        return None
    found = []
    for cell in itertools.product(*cuts):
        inside = tuple(slice(*ends) for ends in cell)
        piece = _piece(own[inside], [a[inside] for a in arrays], [p[inside] for p in places])
        if piece is None:
            return None
        found.append(piece)
    return found


def _runs(d: int, size: int, arrays: list[Ids], places: list[Ids]) -> list[tuple[int, int]]:
    """Ranges of dimension ``d`` in which all operands move evenly."""
    if size == 1 or not arrays:
        return [(0, size)]
    moved = [np.moveaxis(p, d, 0).reshape(size, -1) for p in places]
    steps = np.concatenate([m[1:] - m[:-1] for m in moved], axis=1)
    names = np.concatenate([np.moveaxis(a, d, 0).reshape(size, -1) for a in arrays], axis=1)
    leaves = (names[1:] != names[:-1]).any(1)
    turns = np.concatenate([[False], (steps[1:] != steps[:-1]).any(1)])
    if not leaves.any() and not turns.any():
        return [(0, size)]
    runs, start = [], 0
    for j in range(1, size):
        if leaves[j - 1] or (j - start > 1 and turns[j - 1]):
            runs.append((start, j))
            start = j
    return [*runs, (start, size)]


def _piece(own: Ids, arrays: list[Ids], places: list[Ids]) -> Piece | None:
    accesses = []
    for array, place in [(np.zeros_like(own), own), *zip(arrays, places, strict=True)]:
        strides = affine(place)
        if strides is None or (array != array.reshape(-1)[0]).any():
            return None
        accesses.append(Access(int(array.reshape(-1)[0]), int(place.reshape(-1)[0]), strides))
    return _merged(Piece(own.shape, accesses[0], accesses[1:]))


def _merged(piece: Piece) -> Piece:
    """Dimensions that all operands run through as one become one."""
    accesses = [piece.own, *piece.operands]
    sizes = list(piece.sizes)
    strides = [list(a.strides) for a in accesses]
    d = 0
    while d < len(sizes) - 1:
        if sizes[d] == 1 or all(s[d] == s[d + 1] * sizes[d + 1] for s in strides):
            sizes[d + 1] *= sizes[d]
            del sizes[d]
            for s in strides:
                del s[d]
            d = 0
        else:
            d += 1
    for access, s in zip(accesses, strides, strict=True):
        access.strides = tuple(s)
    return Piece(tuple(sizes), piece.own, piece.operands)


def _by_tables(n: int, operands: Sequence[Where], best: list[Piece] | None) -> list[Piece]:
    if any((x.array != x.array[0]).any() for x in operands):
        if best is not None:
            return best
        return [
            Piece((1,), Access(0, i, (0,)), [Access(int(x.array[i]), int(x.place[i]), (0,))
                                             for x in operands])
            for i in range(n)
        ]  # fmt: skip
    accesses = []
    for x in operands:
        strides = affine(x.place)
        base = int(x.place[0])
        table = None if strides is not None else x.place
        accesses.append(Access(int(x.array[0]), base, strides or (0,), table))
    return [Piece((n,), Access(0, 0, (1,)), accesses)]
