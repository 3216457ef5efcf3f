"""Gradients of what all samples share: sums over lanes, of which outer products are the largest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ctorch.codegen.emit_loops import Where, affine, pieces
from ctorch.codegen.emit_plan import CONSTANT, Item
from ctorch.codegen.graph import Graph, Ids

if TYPE_CHECKING:
    from ctorch.codegen.emit import Body
    from ctorch.codegen.emit_arrays import Output


def apart(graph: Graph, outputs: Sequence[Output]) -> list[Output]:
    """Outputs, where a sum over lanes of a sum becomes sums over lanes of its terms."""
    uses = _uses(graph, outputs)
    parts = [output for output in outputs if output.mode != "sum"]
    todo = [output for output in outputs if output.mode == "sum"]
    while todo:
        output = todo.pop()
        places = np.arange(output.ids.size) if output.places is None else output.places
        nodes = graph.nodes_of(output.ids)
        for position in np.unique(nodes):
            here = nodes == position
            part = type(output)(output.pointer, output.ids[here], "sum", places[here], output.array)
            terms = _terms(graph, int(position), part.ids, uses)
            if terms is not None:
                todo += [
                    type(output)(output.pointer, ids, "sum", part.places, output.array)
                    for ids in terms
                ]
            elif position >= 0 or any(graph.value_of(int(x)) for x in part.ids):
                parts.append(part)
    return parts


def _terms(graph: Graph, position: int, ids: Ids, uses: Ids) -> tuple[Ids, ...] | None:
    """The terms of a sum of products that nothing else uses."""
    if position < 0:
        return None
    node = graph.nodes[position]
    if node.kind != "map" or node.op != "add" or (uses[graph.offsets(ids)] > 1).any():
        return None
    terms = tuple(operand[ids - node.base] for operand in node.operands)
    below = {graph.nodes[int(n)] .kind + graph.nodes[int(n)].op
             for x in terms for n in np.unique(graph.nodes_of(x)) if n >= 0}  # fmt: skip
    return terms if below & {"productproduct", "mapadd"} else None


def _uses(graph: Graph, outputs: Sequence[Output]) -> Ids:
    live = graph.live([output.ids for output in outputs])
    uses = np.zeros(len(live), np.int64)
    for output in outputs:
        np.add.at(uses, graph.offsets(output.ids), 1)
    for node in graph.nodes:
        mine = live[graph.offsets(np.arange(node.size) + node.base)]
        for ids in node.operands:
            whole = node.kind == "product" and mine.any()
            used = ids if whole else ids[mine] if node.kind != "product" else ids[:0]
            np.add.at(uses, graph.offsets(used.reshape(-1)), 1)
    return uses


class Sums:
    """The sums over lanes among the outputs of a body."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._products: dict[int, Output] = {}
        if body.plan.straight:
            return
        uses = _uses(body.graph, body.outputs)
        for output in body.outputs:
            item = self._product(output)
            if item is not None and (uses[body.graph.offsets(output.ids)] == 1).all():
                self._products[item.number] = output

    def takes(self, item: Item) -> bool:
        """Whether a product is never written down, but added to a gradient as it is computed."""
        return item.number in self._products

    def _product(self, output: Output) -> Item | None:
        if output.mode != "sum":
            return None
        where = self._body.plan.where(output.ids)
        first = int(where.array[0])
        if first < 0 or (where.array != first).any():
            return None
        item = self._body.plan.items[first]
        if item.node.kind != "product" or output.ids.size != item.node.size or item.uniform:
            return None
        if np.unique(output.ids).size != item.node.size:
            return None
        return item if self._strides(item, output) is not None else None

    def _strides(self, item: Item, output: Output) -> list[tuple[int, int, int]] | None:
        """By batch, start and strides in the gradient of a product's rows and columns."""
        assert output.places is not None
        places = np.empty(item.node.size, np.int64)
        places[output.ids - item.node.base] = output.places
        found = []
        for matrix in places.reshape(item.node.shape):
            strides = affine(matrix)
            if strides is None:
                return None
            found.append((int(matrix[0, 0]), strides[0], strides[1]))
        return found

    def write(self, output: Output) -> None:
        """The statements that add an output's sums."""
        item = self._product(output)
        if item is not None and self.takes(item):
            return
        body = self._body
        assert output.places is not None
        constant = body.graph.value_of(int(output.ids[0])) is not None
        if body.plan.straight or output.ids.size == 1 or constant:
            for number, place in zip(output.ids.tolist(), output.places.tolist(), strict=True):
                text = body.number(number).full("V")
                body.lines.append(f"{output.pointer}[{place}] += ct::native::sum({text});")
            return
        target = Where(np.full_like(output.places, CONSTANT), output.places)
        for piece in pieces([(output.ids.size,)], [body.plan.operand(output.ids), target]):
            body.sum_piece(piece, output.pointer)

    def add_product(self, item: Item) -> None:
        """Add a product to its gradient."""
        body, output = self._body, self._products[item.number]
        a, b = item.operands
        strides = self._strides(item, output)
        assert strides is not None
        for i, (start, row, column) in enumerate(strides):
            for k in range(a.shape[2]):
                u, _, first, _ = body.array(a[i, :, k], lanes=True, packed=True)
                x, _, second, _ = body.array(b[i, k, :], lanes=True, packed=True)
                n, m = a.shape[1], b.shape[2]
                product = (output.array, start, n, m, row, column)
                place = body.shared.products.place(product)
                body.lines.append(
                    f"add_outer<Product<{', '.join(map(str, product))}>>"
                    f"({u}, {x}, ct_shared, {place});"
                )
                for offset, size in ((first, n), (second, m)):
                    if offset is not None:
                        body.release(offset, size)
