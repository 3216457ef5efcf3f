"""Tensors from outside as leaves of the graph that autograd makes of a traced function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ctorch.codegen.lower_source import Untraceable


class Leaves(TorchFunctionMode):
    """Puts a leaf, in the place of every tensor from outside that requires a
    gradient.

    Where such tensors were computed from each other, a derivative by one would go through the
    others, and through the graph that made them, which is the user's.

    Args:
        tensors: those that the function reaches.
        values: for the leaves, in place of those of the tensors.
    """

    def __init__(self, tensors: Sequence[Tensor], values: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._given = {id(x): x for x in tensors if x.requires_grad}
        # made before the function begins its own transforms (torch.func), which allow no new leaf
        self._leaves = {
            id(x): value.detach().requires_grad_()
            for x, value in zip(tensors, tensors if values is None else values, strict=True)
            if x.requires_grad
        }

    def of(self, x: Tensor) -> Tensor:
        """What stands for a tensor; itself if nothing does."""
        return self._leaves[id(x)] if self._given.get(id(x)) is x else x

    def passed_by(self, result: Tensor) -> list[Tensor]:
        """The tensors whose leaves could not be put in their places, themselves leaves.

        Raises:
            Untraceable: there is one that was computed.
        """
        node_of = torch.autograd.graph.get_gradient_edge
        outside = {node_of(x).node: x for x in self._given.values()}
        todo, seen, found = [result.grad_fn], set(), []
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node not in outside:
                todo += [before for before, _ in node.next_functions]
            elif outside[node].is_leaf:
                found.append(outside[node])
            else:
                raise Untraceable(
                    "a tensor that was computed, and that func holds, goes into an"
                    " autograd.Function or another place that PyTorch does not show: give it in"
                    " args."
                )
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self.of, (args, kwargs or {}))
        return func(*args, **kwargs)
