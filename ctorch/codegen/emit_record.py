"""A derivative in two parts: what is known with the slope, and what waits for the cotangents."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ctorch.codegen.emit_plan import CHEAP
from ctorch.codegen.graph import Graph, Ids, Node

if TYPE_CHECKING:
    from ctorch.codegen.emit_arrays import Output


def split(graph: Graph, outputs: Sequence[Output]) -> tuple[Ids, Graph] | None:
    """What is to be kept of the first part, and the graph of the second, where that is an input.

    Kept is what took work: results of products, reductions and functions. What follows from them by
    cheap operators is computed again.

    Args:
        graph: of both parts.
        outputs: of the second.

    Returns:
        None where nothing is kept.
    """
    waiting = _waiting(graph, outputs)
    kept: set[int] = set()
    seen: set[int] = set()
    todo = [output.ids for output in outputs]
    todo += [ids for position in waiting for ids in graph.nodes[position].operands]
    while todo:
        for position in np.unique(graph.nodes_of(todo.pop())).tolist():
            if position < 0 or position in seen or position in waiting:
                continue
            seen.add(position)
            node = graph.nodes[position]
            if node.kind == "input" or not node.varying:
                continue
            if node.kind == "map" and node.op in CHEAP:
                todo += node.operands
            else:
                kept.add(position)
    if not kept:
        return None
    rest = copy.copy(graph)
    rest.nodes = [*graph.nodes]
    parts: list[Ids] = []
    start = 0
    for position in sorted(kept):
        node = graph.nodes[position]
        rest.nodes[position] = Node(
            "input", "kept", node.base, node.shape, index=start, varying=True
        )
        parts.append(np.arange(node.size, dtype=np.int64) + node.base)
        start += node.size
    return np.concatenate(parts), rest


def _waiting(graph: Graph, outputs: Sequence[Output]) -> set[int]:
    """Positions of nodes that depend on the cotangents, of those that the outputs need."""
    seeds = {
        position: np.ones(1, np.int64)
        for position, node in enumerate(graph.nodes)
        if node.kind == "input" and node.op == "ct"
    }
    waits = graph.dependence(seeds).astype(bool) & graph.live([output.ids for output in outputs])
    return {
        position
        for position, node in enumerate(graph.nodes)
        if waits[graph.offsets(np.arange(node.size) + node.base)].any()
    }
