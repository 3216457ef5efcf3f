"""Step kernels by address: what a solver's inner loop calls where nothing but numbers is at stake.

A call through the dispatcher costs about three microseconds, and the arithmetic of a small step a
fraction of one. ``Buffer`` gives a loop functions that hand the addresses of its tensors to the
kernels themselves, as long as that cannot be told from the operators: plain tensors on the CPU,
float32 or float64, few enough elements that threads would not share them, no mode and no transform
around. Everything else, tensor by tensor, takes the operators; the arithmetic is the same, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ctorch.ops import _kernels
from ctorch.ops._op import KNOWN_TORCH, transforms_active
from ctorch.ops.runge_kutta import rk_error, rk_stage

#: beyond so many elements the operators share the work among threads
LARGEST = 64 * 512


class Weights:
    """Weights of stages as the kernels take them: [N] float64 on the CPU."""

    __slots__ = ("address", "count", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.address = tensor.data_ptr()
        self.count = tensor.numel()


#: (y, slope, slot, a) -> y + h * sum_j a[j] * k[j], after the slope was stored in k[slot]
StageFunction = Callable[[Tensor | None, Tensor, int, Weights], Tensor]
#: (y, y1, slope) -> the scaled norm of the error, after the slope was stored
ErrorFunction = Callable[[Tensor, Tensor, Tensor | None], Any]


class Buffer:
    """A buffer of slopes, and functions that work on it.

    Args:
        k: slopes [S, *shape], contiguous.
        y: a state [*shape], as all those that the functions will be given: contiguous, without a
            graph, and of the caller's own making. Slopes may be anything of its shape and dtype.
    """

    def __init__(self, k: Tensor, y: Tensor) -> None:
        self.k = k
        self.by_address = _nothing_around() and _small(k) and plain(y) and y.data_ptr() != 0
        if self.by_address:
            shape = k.shape[1:]
            self._row = shape[1:].numel() if shape else 1
            self._like = k[0]

    def stage(self, h: Tensor) -> StageFunction:
        """``rk_stage`` with this buffer and the step ``h`` ([] or [B] float64), which is read at
        each call.
        """
        k = self.k
        if not self.by_address:
            return lambda y, slope, slot, a: rk_stage(y, k, slope, slot, a.tensor, h)
        kernel, empty_like = _kernels.library.rk_stage, torch.empty_like
        like, address = self._like, k.data_ptr()
        numel, row, wide = like.numel(), self._row, like.dtype is torch.float64
        step, stride = h.data_ptr(), h.stride(0) if h.dim() else 0

        def stage(y: Tensor | None, slope: Tensor, slot: int, a: Weights) -> Tensor:
            if plain(slope) and (source := slope.data_ptr()):
                out = empty_like(like)
                kernel(
                    out.data_ptr(), 0 if y is None else y.data_ptr(), address, source, slot,
                    a.address, a.count, step, stride, numel, row, wide,
                )  # fmt: skip
                return out
            return rk_stage(y, k, slope, slot, a.tensor, h)

        return stage

    def error(
        self,
        h: Tensor,
        e: Weights,
        slot: int,
        tolerances: tuple[Tensor, Tensor],
        segments: Sequence[int],
        max_norm: bool,
    ) -> ErrorFunction:
        """``rk_error`` for the whole state, likewise, as a number."""
        k, (rtol, atol) = self.k, tolerances

        def by_operator(y: Tensor, y1: Tensor, slope: Tensor | None) -> float:
            norm = rk_error(
                y, y1, k, slope, slot, e.tensor, h, rtol, atol, segments, max_norm, False
            )
            return float(norm.item())

        if not self.by_address or segments or rtol.dim() or atol.dim():
            return by_operator
        kernel, address = _kernels.library.rk_error, k.data_ptr()
        numel, row, wide = self._like.numel(), self._row, k.dtype is torch.float64
        step, relative, absolute = h.data_ptr(), rtol.item(), atol.item()

        def error(y: Tensor, y1: Tensor, slope: Tensor | None) -> float:
            source = 0
            if slope is not None and not (plain(slope) and (source := slope.data_ptr())):
                return by_operator(y, y1, slope)
            norm: float = kernel(
                0, y.data_ptr(), y1.data_ptr(), address, source, slot, e.address, e.count,
                step, 0, relative, absolute, max_norm, numel, row, wide,
            )  # fmt: skip
            return norm

        return error


def plain(x: Tensor) -> bool:
    """Whether the elements of ``x`` lie on the CPU one after the other, as they are."""
    return x.__class__ is Tensor and x.is_cpu and x.is_contiguous() and not x.is_neg()


def _small(k: Tensor) -> bool:
    known = k.dtype is torch.float32 or k.dtype is torch.float64
    return known and plain(k) and 0 < k[0].numel() <= LARGEST


def _nothing_around() -> bool:
    """Whether nobody is watching: every operator is to be seen by modes, transforms, compilers."""
    return (
        _kernels.library is not None
        and KNOWN_TORCH
        and not transforms_active()
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
    )
