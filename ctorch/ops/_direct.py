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

from ctorch.ops import _kernels, step_control
from ctorch.ops._op import KNOWN_TORCH, transforms_active
from ctorch.ops.runge_kutta import rk_error, rk_stage

#: beyond so many elements the way through the operators is nothing beside the work
LARGEST = 64 * 512

_unwatched = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
#: (sizes, strides, dtype) -> a new tensor on the CPU, as compiled code gets it: not through the
#: dispatcher
empty_strided = getattr(_unwatched, "_empty_strided_cpu", None) or (
    lambda sizes, strides, dtype: torch.empty_strided(sizes, strides, dtype=dtype)
)
#: (x, sizes, strides, offset) -> a tensor that lies in the memory of ``x``, likewise
_lying_in = getattr(_unwatched, "_reinterpret_tensor", None) or torch.as_strided


class Weights:
    """Weights of stages as the kernels take them: [N] float64 on the CPU."""

    __slots__ = ("address", "count", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.address = tensor.data_ptr()
        self.count = tensor.numel()


#: (y, slope, slot, a) -> y + h * sum_j a[j] * k[j], after the slope was stored in k[slot]
StageFunction = Callable[[Tensor | None, Tensor, int, Weights], Tensor]
#: (func, amend, y, slope, times) -> (y1, the state of the last evaluation, its slope)
StepFunction = Callable[
    [Callable[..., Any], Callable[..., Tensor], Tensor, Tensor, Sequence[Tensor]],
    tuple[Tensor, Tensor, Tensor],
]
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
        self.by_address = nothing_around() and _small(k) and plain(y) and y.data_ptr() != 0
        if self.by_address:
            shape = k.shape[1:]
            self._row = shape[1:].numel() if shape else 1
            self._like = k[0]
            #: whether a slope is plain memory of the state's form, without a graph
            self._alike: Callable[[Any], bool] = _alike(self._like)
        else:
            self._alike = lambda x: False

    def stage(self, h: Tensor) -> StageFunction:
        """``rk_stage`` with this buffer and the step ``h`` ([] or [B] float64), which is read at
        each call.
        """
        k = self.k
        if not self.by_address:
            return lambda y, slope, slot, a: rk_stage(y, k, slope, slot, a.tensor, h)
        kernel, empty, address = _kernels.library.rk_stage, empty_strided, k.data_ptr()
        sizes, strides, dtype = _form(self._like)
        numel, row, wide = self._like.numel(), self._row, dtype is torch.float64
        step, stride = h.data_ptr(), h.stride(0) if h.dim() else 0

        def stage(y: Tensor | None, slope: Tensor, slot: int, a: Weights) -> Tensor:
            # (what `plain` says, without a call)
            at_hand = slope.__class__ is Tensor and slope.is_cpu and slope.is_contiguous()
            if at_hand and not slope.is_neg() and (source := slope.data_ptr()):
                out = empty(sizes, strides, dtype)
                kernel(
                    out.data_ptr(), 0 if y is None else y.data_ptr(), address, source, slot,
                    a.address, a.count, step, stride, numel, row, wide,
                )  # fmt: skip
                return out
            return rk_stage(y, k, slope, slot, a.tensor, h)

        return stage

    def step(self, h: Tensor, weights: Sequence[Weights], evaluations: int) -> StepFunction:
        """All stages of a step, with nothing between kernel and field: ``rk_stage`` with each of
        the ``weights`` in turn, and an evaluation ``func(t, y)`` after the first ``evaluations`` of
        them.

        A slope that is not in all like the state, or for which ``func`` wrote into the state, goes
        through ``amend(t, y, slope)``, which returns what to take for it, or raises.
        """
        k, alike, by_address = self.k, self._alike, self.by_address
        stages = [(slot, a.address, a.count, a.tensor) for slot, a in enumerate(weights)]
        if by_address:
            kernel, empty, address = _kernels.library.rk_stage, empty_strided, k.data_ptr()
            sizes, strides, dtype = _form(self._like)
            numel, row, wide = self._like.numel(), self._row, dtype is torch.float64
            pace, stride = h.data_ptr(), h.stride(0) if h.dim() else 0

        def step(
            func: Callable[..., Any],
            amend: Callable[..., Tensor],
            y: Tensor,
            slope: Tensor,
            times: Sequence[Tensor],
        ) -> tuple[Tensor, Tensor, Tensor]:
            known, state, before = alike(slope), y, y
            start = y.data_ptr() if by_address else 0
            for slot, weight, count, a in stages:
                before = state
                if known and (source := slope.data_ptr()):
                    state = empty(sizes, strides, dtype)
                    kernel(
                        state.data_ptr(), start, address, source, slot, weight, count,
                        pace, stride, numel, row, wide,
                    )  # fmt: skip
                else:
                    state = rk_stage(y, k, slope, slot, a, h)
                if slot == evaluations:
                    return state, before, slope
                slope = func(times[slot], state)
                known = alike(slope)
                if not known or state._version:
                    slope = amend(times[slot], state, slope)
                    known = by_address and plain(slope)
            return state, state, slope

        return step

    def error(
        self,
        h: Tensor,
        e: Weights,
        slot: int,
        tolerances: tuple[Tensor, Tensor],
        segments: Sequence[int],
        max_norm: bool,
        per_sample: bool = False,
    ) -> ErrorFunction:
        """``rk_error``, likewise. For the whole state it gives a number; for each sample [B], which
        the next call may write over.
        """
        k, (rtol, atol) = self.k, tolerances

        def by_operator(y: Tensor, y1: Tensor, slope: Tensor | None) -> Any:
            norm = rk_error(
                y, y1, k, slope, slot, e.tensor, h, rtol, atol, segments, max_norm, per_sample
            )
            return norm if per_sample else norm.item()

        if not self.by_address or segments or rtol.dim() or atol.dim():
            return by_operator
        kernel, address = _kernels.library.rk_error, k.data_ptr()
        numel, row, wide = self._like.numel(), self._row, k.dtype is torch.float64
        step, stride = h.data_ptr(), h.stride(0) if h.dim() else 0
        alike = self._alike
        relative, absolute = rtol.item(), atol.item()
        norms = k.new_empty(k.shape[1:2]) if per_sample else None
        out = 0 if norms is None else norms.data_ptr()

        def error(y: Tensor, y1: Tensor, slope: Tensor | None) -> Any:
            source = 0
            if slope is not None and not (
                (alike(slope) or plain(slope)) and (source := slope.data_ptr())
            ):
                return by_operator(y, y1, slope)
            norm = kernel(
                out, y.data_ptr(), y1.data_ptr(), address, source, slot, e.address, e.count,
                step, stride, relative, absolute, max_norm, numel, row, wide,
            )  # fmt: skip
            return norm if norms is None else norms

        return error


class BatchControl:
    """Step control of a batch whose samples step on their own: see ``ctorch.ops.step_control``.

    Args:
        samples, counts, goals, control: as the operators take them.
        c: abscissae of the stages.
        like: the time of a stage: for its dtype and shape.
        buffer: of the slopes.
    """

    def __init__(
        self,
        samples: Tensor,
        counts: Tensor,
        goals: Tensor,
        control: Tensor,
        c: Tensor,
        like: Tensor,
        buffer: Buffer,
    ) -> None:
        self._samples, self._counts, self._goals = samples, counts, goals.contiguous()
        self._control, self._c, self._like = control, Weights(c), like
        size = samples.shape[1]
        self._step = samples.new_empty((3, size))
        self._lands = samples.new_empty(size, dtype=torch.bool)
        self._moved = torch.empty_like(self._lands)
        self._state = buffer.k[0]
        self._form, self._time_form = _form(self._state), _form(like.contiguous())
        #: where an error norm that is not the kernels' may come, the operators judge it
        self.by_address = buffer.by_address and size <= LARGEST
        self._size = size
        self._row = self._state.numel() // size if size else 0
        self._wide = buffer.k.dtype is torch.float64

    def plan(self) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """``rk_plan``: step, lands (which the next call may write over), and the stages' times."""
        if not self.by_address:
            self._step, self._lands, times = step_control.rk_plan(
                self._samples, self._counts, self._c.tensor, self._control, self._like
            )
            return self._step, self._lands, times.unbind()
        (sizes, strides, dtype), size, lying_in = self._time_form, self._size, _lying_in
        total = self._c.count * size
        block = empty_strided((total,), (1,), dtype)
        _kernels.library.rk_plan(
            self._samples.data_ptr(), self._counts.data_ptr(), self._c.address, self._c.count,
            self._control.data_ptr(), size, self._step.data_ptr(), self._lands.data_ptr(),
            block.data_ptr(), self._wide,
        )  # fmt: skip
        times = [lying_in(block, sizes, strides, first) for first in range(0, total, size)]
        return self._step, self._lands, times

    def judge(self, error: Tensor) -> tuple[Tensor, int, int]:
        """``rk_judge`` of the step planned last: moved (which the next call may write over), and
        both flags as numbers.
        """
        step, lands = self._step, self._lands
        if not (self.by_address and error.dtype is self._state.dtype and plain(error)):
            moved, flags = step_control.rk_judge(
                self._samples, self._counts, step, lands, error, self._goals, self._control
            )
            bits, passed = flags.tolist()  # the one place where the host waits
            return moved, bits, passed
        found = _kernels.library.rk_judge(
            self._samples.data_ptr(), self._counts.data_ptr(), step.data_ptr(), lands.data_ptr(),
            error.data_ptr(), self._goals.data_ptr(), self._goals.shape[1],
            self._control.data_ptr(), self._size, self._moved.data_ptr(), self._wide,
        )  # fmt: skip
        return self._moved, found & 15, found >> 4

    def accept(
        self, moved: Tensor, y: Tensor, y1: Tensor, k0: Tensor, k1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``rk_accept``: state and slope at which the next step starts."""
        if not (self.by_address and plain(k0) and plain(k1)):
            return step_control.rk_accept(moved, y, y1, k0, k1)
        before, after = k0.data_ptr(), k1.data_ptr()
        if not (before and after):
            return step_control.rk_accept(moved, y, y1, k0, k1)
        next_y, next_k = empty_strided(*self._form), empty_strided(*self._form)
        _kernels.library.rk_accept(
            moved.data_ptr(), y.data_ptr(), y1.data_ptr(), before, after,
            next_y.data_ptr(), next_k.data_ptr(), self._size, self._row, self._wide,
        )  # fmt: skip
        return next_y, next_k


def stage_times(
    c: Weights, dtype: torch.dtype, before_end: bool
) -> Callable[[float, float, float], list[Tensor]] | None:
    """The function (t, h, t1) -> times of stages with abscissae ``c``, 0-dim on the CPU; None where
    it would be seen.
    """
    if not nothing_around():
        return None
    kernel, empty, everyone = _kernels.library.rk_times, empty_strided, range(c.count)
    wide = dtype is torch.float64
    real = torch.float64 if wide else torch.float32

    def times(t: float, h: float, t1: float) -> list[Tensor]:
        made = [empty((), (), real) for _ in everyone]
        kernel(c.address, t, h, t1, before_end, wide, *[x.data_ptr() for x in made])
        return made

    return times


def plain(x: Tensor) -> bool:
    """Whether the elements of ``x`` lie on the CPU one after the other, as they are."""
    return x.__class__ is Tensor and x.is_cpu and x.is_contiguous() and not x.is_neg()


def nothing_around() -> bool:
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


def same_form(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """The test of PyTorch's own compiler, where it is at hand: one call for all tensors.

    It holds for tensors of the same class, dispatch keys (which tell views that are conjugated or
    negated, wrappers, and autocast), shapes, strides, types, devices and demands of gradients; of
    those for which it does not hold, some are as good.
    """
    kind = getattr(_unwatched, "TensorGuards", None)
    if kind is None or not tensors:
        return None
    try:
        check: Callable[..., bool] = kind(
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check
        return check if check(*tensors) is True else None
    except Exception:  # it belongs to PyTorch, and may change
        return None


def _alike(like: Tensor) -> Callable[[Any], bool]:
    """Whether something is a plain tensor of the form of ``like``, without a graph."""
    check = same_form([like])
    if check is not None:
        return check
    shape, dtype = like.shape, like.dtype

    def alike(x: Any) -> bool:
        same = x.__class__ is Tensor and x.dtype is dtype and x.shape == shape
        return same and plain(x) and not x.requires_grad

    return alike


def _form(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(x.shape), x.stride(), x.dtype


def _small(k: Tensor) -> bool:
    known = k.dtype is torch.float32 or k.dtype is torch.float64
    return known and plain(k) and 0 < k[0].numel() <= LARGEST
