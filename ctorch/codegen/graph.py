"""The graph of a traced function, by elements.

Every number that the function computes for one sample has an id. A tensor is then an array of ids
of its shape, and whatever only moves numbers (views, cat, indexing, padding) is done on ids and
leaves nothing to compute. What computes is a node: an elementwise operator, a reduction or a matrix
product, whose results have consecutive ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]

#: ids of the numbers that movements and simplifications make
ZERO, ONE = 0, 1


@dataclass
class Node:
    """Numbers with ids ``base .. base + size - 1``.

    Attributes:
        kind: "input", "constant", "map", "reduce" or "product".
        op: of an input its name ("t", "y", "own", "shared", "ct", "kept"); else the operator.
        operands: ids of what is used; map: [size] each; reduce: one [size, terms]; product:
            [batch, m, k] and [batch, k, n], for a result of [batch, m, n].
        shape: the result's shape, as a hint for loops.
        index: which of the shared arrays an input is; where it begins in "kept".
        values: of constants.
        logical: whether the numbers are truth values.
        exponent: of the operator "power".
        varying: whether some depend on the sample.
    """

    kind: str
    op: str
    base: int
    shape: tuple[int, ...]
    operands: tuple[Ids, ...] = ()
    index: int = 0
    values: list[float] = field(default_factory=list)
    logical: bool = False
    exponent: int = 0
    varying: bool = False

    @property
    def size(self) -> int:
        """How many numbers."""
        return len(self.values) if self.kind == "constant" else math.prod(self.shape)


def as_reals(x: Tensor) -> Tensor:
    """A complex tensor as pairs [*shape, 2]; a real one as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.resolve_neg()


#: operators whose results are truth values
LOGICAL = {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "isnan"}


class Graph:
    """Nodes in the order of computation; one of them holds all constants.

    Attributes:
        derivative: whether a derivative is being recorded, where a zero that padding made stays
            zero under multiplication.
        largest: the largest number of the type in which it is computed.
    """

    def __init__(self, largest: float = float("inf")) -> None:
        self.largest = largest
        self.constants = Node("constant", "constant", 0, ())
        self.nodes: list[Node] = []
        self.derivative = False
        self._total = 1 << 40  # constants lie below, so that they can be added at any time
        self._constant_ids: dict[str, int] = {}
        self._starts = np.empty(64, np.int64)  # of the nodes' ids
        self._known: dict[tuple[object, ...], int] = {}
        # these two are not shared with numbers that the function writes
        self.constants.values += [0.0, 1.0]

    # ---- numbers that are given

    def input(self, name: str, shape: Sequence[int], index: int = 0) -> Ids:
        """An array that comes from outside."""
        return self._add(Node("input", name, 0, tuple(shape), index=index)).reshape(tuple(shape))

    def constant(self, value: float) -> int:
        """The id of a number known now."""
        key = float(value).hex()
        if key == (1.0).hex():
            return ONE
        if key not in self._constant_ids:
            self._constant_ids[key] = len(self.constants.values)
            self.constants.values.append(float(value))
        return self._constant_ids[key]

    def constant_array(self, values: Tensor) -> Ids:
        """Ids of a tensor whose values are known now; [*shape, 2] of a complex one."""
        numbers = as_reals(values.detach()).double().numpy()
        unique, inverse = np.unique(numbers, return_inverse=True)
        ids = np.array([self.constant(value) for value in unique.tolist()], dtype=np.int64)
        # np.unique takes -0.0 and 0.0 for the same: they are, but for the sign of infinities
        return ids[inverse].reshape(numbers.shape)

    def value_of(self, number: int) -> float | None:
        """The value of a constant; None for what is computed."""
        return self.constants.values[number] if number < len(self.constants.values) else None

    # ---- numbers that are computed

    def map(self, op: str, *operands: Ids, exponent: int = 0) -> Ids:
        """An elementwise operator; operands broadcast."""
        arrays = np.broadcast_arrays(*operands)
        shape = arrays[0].shape
        flat = tuple(np.ascontiguousarray(a).reshape(-1) for a in arrays)
        simple = self._simplified(op, flat)
        if simple is None:
            return self._computed(op, flat, shape, exponent).reshape(shape)
        rest = np.flatnonzero(simple < 0)
        if len(rest):
            hint = shape if len(rest) == len(simple) else (len(rest),)
            simple[rest] = self._computed(op, tuple(a[rest] for a in flat), hint, exponent)
        return simple.reshape(shape)

    def reduce(self, op: str, terms: Ids, shape: tuple[int, ...]) -> Ids:
        """A reduction ("sum", "prod", "maximum", "minimum") of [n, terms] to a result of
        ``shape``.
        """
        if op == "sum" and terms.shape[1]:
            terms = terms[:, (terms != ZERO).any(0)]
            if not terms.shape[1]:
                return np.zeros(shape, np.int64)
        if terms.shape[1] == 0:
            return np.full(shape, self.constant(0.0 if op == "sum" else 1.0))
        binary = {"sum": "add", "prod": "mul"}.get(op, op)
        if terms.shape[1] <= 2:
            columns = [terms[:, i].reshape(shape) for i in range(terms.shape[1])]
            return columns[0] if len(columns) == 1 else self.map(binary, *columns)
        return self._add(Node("reduce", binary, 0, shape, (np.ascontiguousarray(terms),))).reshape(
            shape
        )

    def product(self, a: Ids, b: Ids) -> Ids:
        """[batch, m, k] times [batch, k, n] -> [batch, m, n]."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        if a.shape[2] == 0:
            return np.full(shape, self.constant(0.0))
        if self.derivative and ((a == ZERO).all() or (b == ZERO).all()):
            return np.zeros(shape, np.int64)
        if not self._varies(a) and self._varies(b):  # weights stand on the right
            return self.product(b.swapaxes(1, 2), a.swapaxes(1, 2)).swapaxes(1, 2)
        operands = (np.ascontiguousarray(a), np.ascontiguousarray(b))
        return self._add(Node("product", "product", 0, shape, operands)).reshape(shape)

    # ---- questions

    def node_of(self, number: int) -> Node:
        """Where an id belongs."""
        if number < 1 << 40:
            return self.constants
        position = np.searchsorted(self._bases(), number, side="right") - 1
        return self.nodes[int(position)]

    def nodes_of(self, ids: Ids) -> Ids:
        """Positions in ``nodes``; -1 for constants."""
        return np.searchsorted(self._bases(), ids, side="right") - 1

    def dependence(self, seeds: dict[int, Ids]) -> Ids:
        """For every computed number the union (as bits) of what it depends on.

        Args:
            seeds: bits of inputs, by position in ``nodes``; other inputs count as nothing.

        Returns:
            Bits by id, less ``first``, with a last entry of 0 for constants.
        """
        bits = np.zeros(self._total - (1 << 40) + 1, np.int64)
        for position, node in enumerate(self.nodes):
            place = slice(node.base - (1 << 40), node.base - (1 << 40) + node.size)
            if node.kind == "input":
                bits[place] = seeds.get(position, np.zeros(1, np.int64)).reshape(-1)
                continue
            used = [bits[self.offsets(ids)] for ids in node.operands]
            if node.kind == "map":
                bits[place] = np.bitwise_or.reduce(used)
            elif node.kind == "reduce":
                bits[place] = np.bitwise_or.reduce(used[0], axis=1)
            else:
                rows = np.bitwise_or.reduce(used[0], axis=2)[:, :, None]
                columns = np.bitwise_or.reduce(used[1], axis=1)[:, None, :]
                bits[place] = (rows | columns).reshape(-1)
        return bits

    def offsets(self, ids: Ids) -> Ids:
        """Ids as positions in what ``dependence`` returns."""
        return np.where(ids < 1 << 40, self._total - (1 << 40), ids - (1 << 40))

    def live(self, outputs: Sequence[Ids]) -> NDArray[np.bool_]:
        """Which numbers the outputs need, by ``offsets``."""
        live = np.zeros(self._total - (1 << 40) + 1, bool)
        for ids in outputs:
            live[self.offsets(ids)] = True
        for node in reversed(self.nodes):
            mine = live[node.base - (1 << 40) : node.base - (1 << 40) + node.size]
            if node.kind == "product":
                if mine.any():
                    for ids in node.operands:
                        live[self.offsets(ids)] = True
            elif node.kind != "input":
                for ids in node.operands:
                    live[self.offsets(ids[mine])] = True
        live[-1] = False
        return live

    # ---- within

    def _bases(self) -> Ids:
        return self._starts[: len(self.nodes)]

    def _computed(
        self, op: str, flat: tuple[Ids, ...], shape: tuple[int, ...], exponent: int
    ) -> Ids:
        key = (op, exponent, *(a.tobytes() for a in flat))
        if key not in self._known:
            node = Node("map", op, 0, shape, flat, exponent=exponent, logical=op in LOGICAL)
            self._known[key] = int(self._add(node)[0]) if flat[0].size else 0
        return np.arange(flat[0].size, dtype=np.int64) + self._known[key]

    def _varies(self, ids: Ids) -> bool:
        return any(self.nodes[n].varying for n in np.unique(self.nodes_of(ids)) if n >= 0)

    def _add(self, node: Node) -> Ids:
        given = node.kind == "input" and node.op != "shared"
        node.varying = given or any(self._varies(ids) for ids in node.operands)
        node.base = self._total
        self._total += node.size
        if node.size:
            if len(self.nodes) == len(self._starts):
                self._starts = np.concatenate([self._starts, np.empty_like(self._starts)])
            self._starts[len(self.nodes)] = node.base
            self.nodes.append(node)
        return np.arange(node.size, dtype=np.int64) + node.base

    def _simplified(self, op: str, flat: tuple[Ids, ...]) -> Ids | None:
        """What needs no computation, by ids, with -1 elsewhere; None where all is computed."""
        if op not in _SIMPLE:
            return None
        out = np.full(flat[0].shape, -1, np.int64)
        if op == "add":
            zero = self._zeros(flat[1])
            out[zero] = flat[0][zero]
            zero = self._zeros(flat[0])
            out[zero] = flat[1][zero]
        elif op == "sub":
            zero = self._zeros(flat[1])
            out[zero] = flat[0][zero]
        elif op == "mul":
            out = np.where(flat[1] == ONE, flat[0], np.where(flat[0] == ONE, flat[1], out))
            if self.derivative:
                out[(flat[0] == ZERO) | (flat[1] == ZERO)] = ZERO
        elif op == "div":
            out[flat[1] == ONE] = flat[0][flat[1] == ONE]
            if self.derivative:
                out[flat[0] == ZERO] = ZERO
        elif op == "neg":
            out[flat[0] == ZERO] = ZERO
        else:
            self._chosen(flat, out)
        return out

    def _zeros(self, ids: Ids) -> NDArray[np.bool_]:
        return (ids == ZERO) | (ids == self._constant_ids.get((0.0).hex(), ZERO))

    def _chosen(self, flat: tuple[Ids, ...], out: Ids) -> None:
        """Choices by a known condition."""
        values = self.constants.values
        known = np.flatnonzero(flat[0] < 1 << 40)
        for i in known:
            out[i] = flat[1][i] if values[flat[0][i]] else flat[2][i]
        same = flat[1] == flat[2]
        out[same] = flat[1][same]


_SIMPLE = {"add", "sub", "mul", "div", "neg", "select"}
