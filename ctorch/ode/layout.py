"""How the user's state (a tensor or a pytree of tensors) maps to the one real tensor that a solver
steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch._trees import leaves_like


class Layout:
    """The shape of a state, seen by the user and seen by the solver.

    The solver always steps one real tensor. A plain real tensor is passed through as it is; a
    complex one is viewed as pairs of reals; a pytree is flattened and concatenated, to ``[N]`` or,
    in a batched solve, to ``[B, D]``.

    Args:
        y0: tensor, or pytree (tuple, list, dict) of tensors.
        batched: the first dimension of every tensor counts samples that step on their own.

    Raises:
        TypeError: a leaf is no tensor, or holds integers.
        ValueError: there is no leaf, devices differ, or (batched) the leaves disagree on the batch
            size.
    """

    def __init__(self, y0: Any, batched: bool = False) -> None:
        self.batched = batched
        self.is_tensor = isinstance(y0, Tensor)
        leaves, self._spec = pytree.tree_flatten(y0)
        _check_leaves(leaves, batched)
        self._shapes = [leaf.shape for leaf in leaves]
        dtype = leaves[0].dtype
        for leaf in leaves[1:]:
            dtype = torch.promote_types(dtype, leaf.dtype)
        self.is_complex = dtype.is_complex
        self.user_dtype = dtype
        self.dtype = dtype.to_real()
        self.device = leaves[0].device
        self.plain = self.is_tensor and not self.is_complex
        #: shape of a plain state; what a packed one has is known when it is packed
        self.shape = leaves[0].shape
        per_leaf = [shape[1:].numel() if batched else shape.numel() for shape in self._shapes]
        self._sizes = per_leaf
        #: lengths of the parts whose norms are taken apart; empty for a single part
        self.segments = [] if self.is_tensor else per_leaf

    def pack(self, y: Any) -> Tensor:
        """The user's state as the solver's tensor; differentiable."""
        if self.is_tensor:
            packed = y
        else:
            leaves = leaves_like(y, self._spec)
            start = 1 if self.batched else 0
            flat = [leaf.reshape(*leaf.shape[:start], -1).to(self.user_dtype) for leaf in leaves]
            packed = torch.cat(flat, dim=start)
        return torch.view_as_real(packed.resolve_conj()) if self.is_complex else packed

    def unpack(self, packed: Tensor, lead: tuple[int, ...] = ()) -> Any:
        """The solver's tensor as the user's state.

        Args:
            packed: the state, with ``lead`` dimensions (output times) before it; in a batched solve
                they stand after the batch dimension.
            lead: sizes of those dimensions.
        """
        if self.plain:
            return packed
        y = _pairs_as_complex(packed) if self.is_complex else packed
        if self.is_tensor:
            return y
        leaves, start = [], 0
        for size, shape in zip(self._sizes, self._shapes, strict=True):
            part = y[..., start : start + size]
            if self.batched:
                leaves.append(part.reshape(shape[0], *lead, *shape[1:]))
            else:
                leaves.append(part.view((*lead, *shape)))
            start += size
        return pytree.tree_unflatten(leaves, self._spec)

    def describe(self) -> str:
        """The expected shapes, for messages."""
        shapes = [str(list(shape)) for shape in self._shapes]
        return shapes[0] if self.is_tensor else f"({', '.join(shapes)})"

    def _leaves(self, value: Any, what: str) -> list[Any]:
        if isinstance(value, Tensor):
            return [value]
        try:
            return leaves_like(value, self._spec)
        except TypeError as error:
            raise TypeError(f"{what} must return what it was given: {error}") from None

    def check_like(self, value: Any, what: str) -> None:
        """Raise where ``value`` (what the vector field returned) does not have the state's
        structure and shapes.
        """
        leaves = self._leaves(value, what)
        same = len(leaves) == len(self._shapes) and (self.is_tensor == isinstance(value, Tensor))
        if not same or not all(isinstance(leaf, Tensor) for leaf in leaves):
            got = type(value).__name__ if not leaves else f"{type(value).__name__} of {len(leaves)}"
            kind = self._spec.type.__name__ if self._spec.type else "a pytree"
            raise TypeError(
                f"{what} must return what it was given: {self.describe()} as "
                f"{'a tensor' if self.is_tensor else kind}, but it returned {got}."
            )
        for index, (leaf, shape) in enumerate(zip(leaves, self._shapes, strict=True)):
            part = "" if self.is_tensor else f" (part {index})"
            if leaf.shape != shape:
                raise ValueError(
                    f"{what} returned shape {list(leaf.shape)}{part} for a state of shape"
                    f" {list(shape)}." + _batch_hint(leaf.shape, shape, self.batched)
                )
            if leaf.is_complex() and not self.is_complex:
                raise TypeError(
                    f"{what} returned {leaf.dtype}{part} for a real state ({self.user_dtype}):"
                    " make y0 complex."
                )
            if not _widens(leaf.dtype, self.user_dtype):
                wider = f", or give y0 as {leaf.dtype}" if leaf.is_floating_point() else ""
                raise TypeError(
                    f"{what} returned {leaf.dtype}{part} for a state of {self.user_dtype}: return"
                    f" the state's dtype (for instance `.to(y.dtype)`){wider}."
                )


def _pairs_as_complex(packed: Tensor) -> Tensor:
    packed = packed.contiguous()
    # a part of a larger state (the adjoint equation's) may begin at an odd place of its storage
    return torch.view_as_complex(packed.clone() if packed.storage_offset() % 2 else packed)


def _check_leaves(leaves: list[Any], batched: bool) -> None:
    if not leaves:
        raise ValueError("y0 holds no tensor.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"y0 must hold tensors only, but holds {type(leaf).__name__}.")
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"y0 must be floating point or complex, but is {leaf.dtype}: use y0.float() or"
                " y0.double()."
            )
        if leaf.device != leaves[0].device:
            raise ValueError(f"y0 lies on {leaves[0].device} and {leaf.device}: use one device.")
        if batched and (leaf.dim() == 0 or leaf.shape[0] != leaves[0].shape[:1].numel()):
            raise ValueError(
                "with batched=True every tensor of y0 is [B, ...] with one B, but the shapes are "
                f"{[list(x.shape) for x in leaves]}."
            )


def _widens(given: torch.dtype, state: torch.dtype) -> bool:
    """Whether a slope of dtype ``given`` fits the state without losing digits (autocast gives
    fewer, never more).
    """
    if not (given.is_floating_point or given.is_complex):
        return False
    return torch.promote_types(given, state) == state


def _batch_hint(got: torch.Size, want: torch.Size, batched: bool) -> str:
    if batched and len(got) == len(want) + 1:
        return (
            " In a batched solve func gets t as [B, 1, ..., 1], shaped to broadcast against y: use"
            " it as it is,"
            " without unsqueeze."
        )
    if got.numel() == want.numel():
        return " The number of elements agrees: reshape the result to the state's shape."
    return " Nothing is broadcast here, so that a wrong shape is never silent: expand it in func."
