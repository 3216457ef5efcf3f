"""Forms in which Jacobian rows of a forward Laplacian are held: dense, shared, local to slots.

Rows that are the same over a dim have size 1 there. Rows of values that depend on one slot (an
electron) or a pair of slots alone are held at these slots only (``Lap.axes``). A function may treat
compact rows as it treats the value only where that is proved: here for functions that return a
view, by where the view takes a tensor whose strides tell the slots.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ctorch.ops._op import transforms_active

Axes = tuple[int, ...]


class _Meter(threading.local):
    """The largest rows of a pass, in elements, by which the batch is cut into chunks."""

    largest = 0


METER = _Meter()


def note(rows: Tensor) -> None:
    """Takes the size of new rows into account."""
    size = rows.numel()
    if size > METER.largest:
        METER.largest = size


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd, a transform or a compiler looks on, so that no memory may be reused."""
    if is_compiling() or transforms_active():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# ---- shared dims


def widened(rows: Tensor, ndim: int) -> Tensor:
    """Rows of values brought to ``ndim`` dims."""
    extra = ndim - rows.ndim + 1
    return rows.reshape(rows.shape[0], *(1,) * extra, *rows.shape[1:]) if extra > 0 else rows


def squeezed(rows: Tensor) -> Tensor:
    """Rows with size 1 in dims along which a stride of zero shows them to be the same."""
    strides = rows.stride()
    if 0 not in strides[1:]:
        return rows
    for dim in range(1, rows.ndim):
        if strides[dim] == 0 and rows.shape[dim] > 1:
            rows = rows.narrow(dim, 0, 1)
    return rows


# ---- sums over rows


def contracted(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """``sum_r a_r b_r``, ``[*shape]``."""
    out = (a * b).sum(0)
    return out if out.shape == shape else out.expand(shape)


def squared(rows: Tensor, shape: torch.Size) -> Tensor:
    """``sum_r rows_r^2``, ``[*shape]``."""
    return contracted(rows, rows, shape)


# ---- slots


def densified(rows: Tensor, axes: Axes, shape: torch.Size) -> Tensor:
    """Dense rows, slot by slot in the order of the seeds."""
    if not axes:
        return rows
    out = None
    for part, axis in zip(rows.chunk(len(axes)), axes, strict=True):
        sizes = list(part.shape)
        sizes[axis] = shape[axis]
        spread = torch.diag_embed(part.expand(sizes).movedim(axis, -1), 0, 0, axis).flatten(0, 1)
        out = spread if out is None else out + spread
    assert out is not None
    return out


def added_to_dense(dense: Tensor, rows: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """``dense`` plus rows that are local along ``axis``, without making those dense."""
    n, count = shape[axis], rows.shape[0]
    dense = dense.expand(-1, *shape)
    out = dense.clone(memory_format=torch.contiguous_format)
    target = out.unflatten(0, (n, count)).diagonal(0, 0, axis)  # [count, *shape but axis, n]
    sizes = list(rows.shape)
    sizes[axis] = n
    target += rows.expand(sizes).movedim(axis, -1)
    return out


def moved_axes(fn: Callable[..., Any], value: Tensor, axes: Axes) -> Axes:
    """Where a function takes the dims of slots; empty if it returns no view that keeps them.

    A view of a tensor with stride 1 along one dim and 0 along all others, of which again one dim
    has stride 1, full size and offset 0, has the slots in order along this dim, whatever it views.
    """
    if is_compiling():
        return ()
    moved: list[int] = []
    shape = value.shape
    for axis in axes:
        n = shape[axis]
        base = torch.zeros(n, dtype=value.dtype, device=value.device)
        strides = [0] * len(shape)
        strides[axis] = 1
        seen = fn(base.as_strided(shape, strides))
        if seen.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
            return ()
        dims = [i for i, stride in enumerate(seen.stride()) if stride and seen.shape[i] > 1]
        whole = len(dims) == 1 and seen.shape[dims[0]] == n and seen.stride(dims[0]) == 1
        if not whole or seen.storage_offset():
            return ()
        moved.append(dims[0] - seen.ndim)
    return tuple(moved)


def unflattened_seed(
    fn: Callable[..., Any], value: Tensor, scales: Tensor
) -> tuple[Tensor, Axes] | None:
    """Compact rows of ``x: [.., n * k]`` seen as ``[.., n, k]``, if that is how ``fn`` views it.

    Args:
        scales: ``[n * k]``, the diagonal of the seeds; expanded from one number where it is one.
    """
    if is_compiling():
        return None
    d = value.shape[-1]
    base = torch.zeros(d, dtype=value.dtype, device=value.device)
    seen = fn(base.as_strided(value.shape, [0] * (value.ndim - 1) + [1]))
    if seen.untyped_storage().data_ptr() != base.untyped_storage().data_ptr() or seen.ndim < 2:
        return None
    n, k = seen.shape[-2:]
    strides = [
        stride if size > 1 else 0 for size, stride in zip(seen.shape, seen.stride(), strict=True)
    ]
    if n < 2 or n * k != d or strides != [0] * (seen.ndim - 2) + [k, 1 if k > 1 else 0]:
        return None
    if scales.stride(0) == 0:
        rows = torch.diag_embed(scales[:k]).unsqueeze(1)
    else:
        rows = torch.diag_embed(scales.unflatten(0, (n, k))).movedim(-2, 0)
    return rows.reshape(k, *(1,) * (seen.ndim - 2), *rows.shape[1:]), (-2,)


def _same_slot(axes: Axes, shape: torch.Size, device: torch.device) -> Tensor:
    """``[*sizes]``, true where both slots of a pair are the same."""
    a, b = axes
    eye = torch.eye(shape[a], dtype=torch.bool, device=device)
    if a > b:
        a, b = b, a
    return eye.reshape(shape[a], *(1,) * (b - a - 1), shape[b], *(1,) * (-b - 1))


def common_axes(a: Tensor, axes_a: Axes, b: Tensor, axes_b: Axes, shape: torch.Size) -> Axes:
    """The form in which rows of both can be held."""
    if axes_a == axes_b:
        return axes_a
    if not axes_a or not axes_b:
        return ()
    union = tuple(sorted({*axes_a, *axes_b}))
    if len(union) > 2 or a.shape[0] // len(axes_a) != b.shape[0] // len(axes_b):
        return ()
    return union if shape[union[0]] == shape[union[1]] else ()


def brought(rows: Tensor, axes: Axes, to: Axes, shape: torch.Size) -> Tensor:
    """Rows of the form ``axes`` in the form ``to``, which ``common_axes`` allows."""
    if axes == to:
        return rows
    if not to:
        return densified(rows, axes, shape)
    if set(axes) == set(to):  # (b, a) for (a, b): the same slots' rows belong to the first half
        first, second = rows.chunk(2)
        return halves(second, first, to, shape)
    (axis,) = axes
    zero = torch.zeros_like(rows)
    return halves(*((rows, zero) if axis == to[0] else (zero, rows)), to, shape)


def halves(first: Tensor, second: Tensor, axes: Axes, shape: torch.Size) -> Tensor:
    """Both groups of rows of pairs, those of same slots in the first."""
    same = _same_slot(axes, shape, first.device)
    zero = first.new_zeros(())
    first = first + torch.where(same, second, zero)
    second = torch.where(same, zero, second)
    return torch.cat(torch.broadcast_tensors(first, second))
