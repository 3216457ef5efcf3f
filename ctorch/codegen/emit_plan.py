"""What of a graph is computed, in which order, in which loops, and where results are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctorch.codegen.emit_loops import Where
from ctorch.codegen.graph import LOGICAL, Graph, Ids, Node

#: A graph of at most so many scalar operations becomes straight-line code; a function counts as
#: several, since its code is copied to each place.
STRAIGHT = 300
_FUNCTION = 6
CHEAP = {"add", "sub", "mul", "div", "neg", "abs", "select", "relu", "copy", "power", *LOGICAL}
#: The array of an operand that is a constant, or differing constants, and not a node's.
CONSTANT, TABLE = -1, -2


@dataclass
class Item:
    """A node, or what of it is needed.

    Attributes:
        node: in the graph.
        number: its position among the items.
        count: how many of its numbers are computed.
        operands: as the node's, of these numbers.
        rank: place of each of the node's numbers among those computed; -1 where it is not.
        uniform: the same for all samples.
        straight: one statement for each number.
        stored: in an array rather than in local variables.
        home: where that is: the name of an array and an offset.
    """

    node: Node
    number: int
    count: int
    operands: tuple[Ids, ...]
    rank: Ids
    uniform: bool
    straight: bool = False
    stored: bool = True
    home: tuple[str, int] = ("", 0)

    @property
    def given(self) -> bool:
        """Whether it is an input."""
        return self.node.kind == "input"


@dataclass
class Step:
    """Items that are computed together: one product or reduction, or a loop of maps."""

    items: list[Item]


class Plan:
    """The computation of some outputs.

    Args:
        graph: where they are.
        outputs: their ids.
    """

    def __init__(self, graph: Graph, outputs: Sequence[Ids]) -> None:
        self.graph = graph
        live = graph.live(outputs)
        varying = graph.dependence(
            {
                i: np.ones(1, np.int64)
                for i, node in enumerate(graph.nodes)
                if node.kind == "input" and node.op != "shared"
            }
        )
        self.items: list[Item] = []
        self._item_of_node = np.full(len(graph.nodes) + 1, -1, np.int64)
        for position, node in enumerate(graph.nodes):
            self._add_item(position, node, live, varying)
        cost = sum(_cost(item) for item in self.items)
        self.straight = cost <= STRAIGHT
        for item in self.items:
            item.straight = self.straight or (item.count == 1 and _cost(item) <= 16)
            item.stored = not item.straight and not (item.count == 1 and item.node.kind != "map")

    def _add_item(self, position: int, node: Node, live: NDArray[np.bool_], varying: Ids) -> None:
        places = self.graph.offsets(np.arange(node.size) + node.base)
        mine = live[places]
        if not mine.any():
            return
        if node.kind != "map" and node.kind != "reduce":
            mine = np.ones_like(mine)
        operands = node.operands
        if node.kind in ("map", "reduce"):
            operands = tuple(ids[mine] for ids in operands)
        rank = np.where(mine, np.cumsum(mine) - 1, -1)
        uniform = not varying[places[mine]].any() if node.kind != "input" else node.op == "shared"
        item = Item(node, len(self.items), int(mine.sum()), operands, rank, bool(uniform))
        self._item_of_node[position] = item.number
        self.items.append(item)

    def where(self, ids: Ids) -> Where:
        """Items and places of numbers; constants are at their ids."""
        nodes = self.graph.nodes_of(ids)
        arrays = np.where(nodes < 0, CONSTANT, self._item_of_node[nodes])
        places = np.where(nodes < 0, ids, 0)
        for array in np.unique(arrays):
            if array >= 0:
                here = arrays == array
                item = self.items[array]
                places[here] = item.rank[ids[here] - item.node.base]
        return Where(arrays, places)

    def operand(self, ids: Ids) -> Where:
        """The same for a loop, where differing constants are a table of their own; among computed
        numbers each is an array of its own, as ``constant_of`` reads it: places of constants are
        no places side by side.
        """
        where = self.where(ids)
        constant = where.array == CONSTANT
        if constant.all() and (where.place != where.place.reshape(-1)[0]).any():
            places = np.arange(ids.size) % period(where.place.reshape(-1))
            return Where(np.full_like(where.array, TABLE), places.reshape(ids.shape))
        arrays = np.where(constant, TABLE - 1 - where.place, where.array)
        return Where(arrays, np.where(constant, 0, where.place))

    def constant_of(self, array: int) -> float | None:
        """The value of a constant among the arrays of ``operand``."""
        return self.graph.constants.values[TABLE - 1 - array] if array < TABLE else None

    # ---- order and loops

    def steps(self) -> list[Step]:
        """The steps, in an order in which they can be run."""
        computed = [item for item in self.items if not item.given]
        needs = {item.number: self._needs(item) for item in computed}
        groups: list[list[Item]] = []
        group_of: dict[int, int] = {}
        below: list[int] = []  # by group, the groups that it needs, as bits, transitively
        for item in computed:
            wanted = {group_of[n] for n in needs[item.number] if n in group_of}
            reach = 0
            for g in wanted:
                reach |= below[g] | 1 << g
            chosen = self._joined(item, wanted, groups, below, group_of)
            if chosen is None:
                chosen = len(groups)
                groups.append([])
                below.append(0)
            groups[chosen].append(item)
            group_of[item.number] = chosen
            below[chosen] |= reach & ~(1 << chosen)
            for g, mask in enumerate(below):
                if g != chosen and mask >> chosen & 1:
                    below[g] |= below[chosen]
        return self._ordered(groups, below)

    def _joined(
        self,
        item: Item,
        wanted: set[int],
        groups: list[list[Item]],
        below: list[int],
        group_of: dict[int, int],
    ) -> int | None:
        """The loop that an elementwise item can be put into, where there is one."""
        if item.straight or item.node.kind != "map":
            return None
        for g in sorted(wanted, reverse=True):
            first = groups[g][0]
            if first.node.kind != "map" or first.straight or first.count != item.count:
                continue
            if first.uniform != item.uniform:
                continue
            if any(below[other] >> g & 1 for other in wanted if other != g):
                continue
            if all(self._in_step(ids, group_of, g) for ids in item.operands):
                return g
        return None

    def _in_step(self, ids: Ids, group_of: dict[int, int], g: int) -> bool:
        """Whether what an operand has of loop ``g`` is, element by element, what is there."""
        where = self.where(ids)
        arrays = np.unique(where.array)
        if not any(group_of.get(int(a)) == g for a in arrays):
            return True
        return len(arrays) == 1 and bool((where.place == np.arange(ids.size)).all())

    def _needs(self, item: Item) -> set[int]:
        found: set[int] = set()
        for ids in item.operands:
            found.update(int(a) for a in np.unique(self.where(ids).array) if a >= 0)
        return found

    def _ordered(self, groups: list[list[Item]], below: list[int]) -> list[Step]:
        done = 0
        left = list(range(len(groups)))
        steps = []
        while left:
            g = next(g for g in left if not below[g] & ~done)
            left.remove(g)
            done |= 1 << g
            steps.append(Step(groups[g]))
        return steps


def period(values: Ids) -> int:
    """After how many values they come again."""
    n = len(values)
    divisors = (p for p in range(1, n) if n % p == 0)
    return next((p for p in divisors if (values.reshape(-1, p) == values[:p]).all()), n)


def _cost(item: Item) -> int:
    if item.given:
        return 0
    if item.node.kind == "map":
        return item.count * (1 if item.node.op in CHEAP else _FUNCTION)
    if item.node.kind == "reduce":
        return item.operands[0].size
    return item.operands[0].size * item.operands[1].shape[2]


class Allocator:
    """Places in one array for what lives at different times."""

    def __init__(self) -> None:
        self.total = 0
        self._free: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        """The start of ``size`` free places."""
        for i, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[i : i + 1] = [(start + size, length - size)] if length > size else []
                return start
        if self._free and sum(self._free[-1]) == self.total:  # the last free places, extended
            start, _ = self._free.pop()
        else:
            start = self.total
        self.total = start + size
        return start

    def give(self, start: int, size: int) -> None:
        """Free places again."""
        merged = sorted([*self._free, (start, size)])
        self._free = []
        for begin, length in merged:
            if self._free and sum(self._free[-1]) == begin:
                self._free[-1] = (self._free[-1][0], self._free[-1][1] + length)
            else:
                self._free.append((begin, length))
