"""Gradients of the parameters of linear layers, gathered over many evaluations.

A layer z = x W^T + b hands the cotangent g of z on to its parameters as g^T x and as the sum of g
over its rows: what a solve wants of either is one sum over the rows of all its evaluations. The
autograd engine would make a product, a sum and two additions at every evaluation, which is most of
what the pullback of a small network costs. Here it is asked for g alone; g and x are laid by, and
multiplied together for many evaluations at once, or, where they are large, straight into the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

Node = torch.autograd.graph.Node

#: cotangents are laid by until they have this many elements
GATHERED = 8192

#: cotangents of so many elements are added up before they are summed over their rows: below that a
#: sum over rows costs more than an addition of all elements, and beyond it the sum pushes more
#: useful things out of the cache
SUMMED_LATER = 32768

#: nodes of products x w (+ b), and the name under which they keep x
_KEPT = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}

#: (what makes a tuple, without a microsecond of Python) of a node and the number of its output
_edge = tuple.__new__
_OUTPUT = (0, *[None] * (len(GradientEdge._fields) - 2))


class Parameters(NamedTuple):
    """What a layer's products are added to.

    Attributes:
        weight, bias: places among the captured tensors; -1: no bias, or one that is not gathered.
        turned: the weight is [out, in], so that its transpose is multiplied.
        kept: name of the attribute in which the layer's node keeps x.
    """

    weight: int
    bias: int
    turned: bool
    kept: str


#: a layer in a graph: its node, its parameters, and the nodes of weight and bias (None: there is
#: none, or it is not gathered)
Candidate = tuple[Node, Parameters, Node, Node | None]


class Reached(NamedTuple):
    """How the graph of an evaluation reaches the captured tensors.

    Attributes:
        layers: linear layers whose parameters it reaches in no other way.
        edges: their results.
        rest: places of the captured tensors that it reaches in other ways.
    """

    layers: tuple[Parameters, ...]
    edges: tuple[GradientEdge, ...]
    rest: tuple[int, ...]


def hooks_so_far() -> int:
    """A number that grows with every hook registered anywhere.

    A hook on a tensor inside an evaluation may change the cotangent that goes on from there, but
    not the one that the engine gives of that tensor: where there are any, nothing is gathered.
    """
    return RemovableHandle.next_id


class Places:
    """The captured tensors by the nodes that stand for them in graphs."""

    def __init__(self, tensors: Sequence[Tensor], nodes: Sequence[Node]) -> None:
        self._tensors, self._nodes = tensors, nodes
        #: of the tensors that may be parameters of a layer
        self._leaves = {
            node: place
            for place, (node, x) in enumerate(zip(nodes, tensors, strict=True))
            if x.is_leaf and x.layout is torch.strided and not x.is_complex()
        }
        self._layers: dict[Any, Parameters] = {}
        self._without_layers: dict[frozenset[Node], Reached] = {}

    def layer(self, node: Node, edges: Any) -> Candidate | None:
        """The layer whose product ``node`` is, with ``edges`` to what comes before it."""
        name = node.__class__.__name__
        if name not in _KEPT:
            return None
        bias, weight, turn = edges[0][0], edges[-1][0], None
        if weight not in self._leaves:
            turn = weight
            if turn is None or not _turns(turn):
                return None
            weight = turn.next_functions[0][0]
        if len(edges) == 2:
            bias = None
        elif node._saved_alpha != 1 or node._saved_beta != 1:  # type: ignore[attr-defined]
            return None
        key = (weight, bias, turn is None, name)
        parameters = self._layers.get(key)
        if parameters is None:
            if weight not in self._leaves:
                return None
            parameters = self._layers[key] = self._parameters(weight, bias, turn is not None, name)
        return node, parameters, weight, bias if parameters.bias >= 0 else None

    def _parameters(self, weight: Node, bias: Node | None, turned: bool, name: str) -> Parameters:
        place, bias_place = self._leaves[weight], self._leaves.get(bias, -1)  # type: ignore[arg-type]
        width = self._tensors[place].shape[0 if turned else 1]
        if bias_place >= 0 and self._tensors[bias_place].shape != (width,):
            bias_place = -1  # it is spread otherwise than over the rows
        return Parameters(place, bias_place, turned, _KEPT[name])

    def reached(self, layers: list[Candidate], seen: set[Node]) -> Reached:
        """Sort out what is gathered: no tensor to which there is another way, one in ``seen``."""
        found = seen.intersection(self._nodes)
        if not layers:
            key = frozenset(found)
            reached = self._without_layers.get(key)
            if reached is None:
                rest = tuple(i for i, node in enumerate(self._nodes) if node in found)
                reached = self._without_layers[key] = Reached((), (), rest)
            return reached
        edges = [_edge(GradientEdge, (layer[0], *_OUTPUT)) for layer in layers]
        if not found:
            return Reached(tuple([layer[1] for layer in layers]), tuple(edges), ())
        # what the engine is asked for at one place, it is asked for at all
        found.update(b for _, _, weight, b in layers if weight in found and b is not None)
        kept = [i for i, layer in enumerate(layers) if layer[2] not in found]
        parameters = [layers[i][1] for i in kept]
        return Reached(
            tuple(
                p._replace(bias=-1) if layers[i][3] in found else p
                for i, p in zip(kept, parameters, strict=True)
            ),
            tuple(edges[i] for i in kept),
            tuple(i for i, node in enumerate(self._nodes) if node in found),
        )


def _turns(node: Node) -> bool:
    name = node.__class__.__name__
    return name == "TBackward0" or (
        name == "PermuteBackward0" and node._saved_dims == (1, 0)  # type: ignore[attr-defined]
    )


class Gathered:
    """Sums of layers' gradients over evaluations.

    Args:
        sums: one for each captured tensor, to be added to; None: nothing yet.
    """

    def __init__(self, sums: list[Tensor | None]) -> None:
        self._sums = sums
        self._waiting: dict[Parameters, tuple[list[Tensor], list[Tensor]]] = {}
        #: by place of a bias: the sum of cotangents that are still to be summed over their rows
        self._rows: dict[int, Tensor] = {}
        #: places of sums that are kept transposed
        self._lying: set[int] = set()

    def add(self, reached: Reached, cotangents: Sequence[Tensor | None]) -> None:
        """Add the products of one evaluation."""
        for layer, edge, g in zip(reached.layers, reached.edges, cotangents, strict=True):
            if g is None:
                continue
            x = getattr(edge.node, layer.kept)
            if x.layout is not torch.strided:
                x = x.to_dense()
            if max(g.numel(), x.numel()) >= GATHERED:
                self._multiply(layer, g, x)
                continue
            waiting = self._waiting.get(layer)
            if waiting is None:
                waiting = self._waiting[layer] = ([], [])
            gs, xs = waiting
            gs.append(g)
            xs.append(x)
            if len(gs) * max(g.numel(), x.numel()) >= GATHERED:
                self._multiply(layer, torch.cat(gs), torch.cat(xs))
                gs.clear()
                xs.clear()

    def finish(self) -> None:
        """Add what is still waiting."""
        for layer, (gs, xs) in self._waiting.items():
            if gs:
                self._multiply(layer, torch.cat(gs), torch.cat(xs))
        self._waiting.clear()
        for place, rows in self._rows.items():
            self._add_bias(place, rows)
        self._rows.clear()
        for place in self._lying:
            total = self._sums[place]
            assert total is not None
            self._sums[place] = total.contiguous()
        self._lying.clear()

    def _multiply(self, layer: Parameters, g: Tensor, x: Tensor) -> None:
        a, b = (g.t(), x) if layer.turned else (x.t(), g)
        total = self._sums[layer.weight]
        if total is not None:
            total.addmm_(a, b)
        elif a.shape[0] > b.shape[1]:  # products of few rows and many columns are faster
            self._sums[layer.weight] = b.t().mm(a.t()).t()
            self._lying.add(layer.weight)
        else:
            self._sums[layer.weight] = a.mm(b)
        if layer.bias < 0:
            return
        if g.numel() > SUMMED_LATER:
            self._add_bias(layer.bias, g)
            return
        rows = self._rows.get(layer.bias)
        if rows is None:
            self._rows[layer.bias] = g.clone()
        elif rows.shape == g.shape:
            rows.add_(g)
        else:
            self._add_bias(layer.bias, g)

    def _add_bias(self, place: int, g: Tensor) -> None:
        total = self._sums[place]
        if total is None:
            self._sums[place] = g.sum(0)
        else:
            total.add_(g.sum(0))  # (a product with ones would be faster, and far less exact)
