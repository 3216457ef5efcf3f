"""The gradient of a native solve: one node of the autograd graph, pulled back by compiled code."""

from __future__ import annotations

import copy
import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch.codegen.trace_record import count_of, shape_of
from ctorch.ode import native
from ctorch.ode.coefficients import coefficients
from ctorch.ode.native_task import Cotangents, Task
from ctorch.ode.run import Pieces, Run

if TYPE_CHECKING:
    from ctorch.codegen import Traced
    from ctorch.codegen.trace_verify import PullBack
    from ctorch.ode.native import Call
    from ctorch.ode.native_source import Form


def with_gradient(call: Call) -> Run:
    """Solve, keeping the accepted steps; the rows are differentiable."""
    traced = call.traced
    holder: list[Run] = []
    flags = zip(traced.problem.tensors, traced.field.owned, strict=True)
    owned = [x for x, own in flags if own]
    given = (call.problem.y0, call.problem.t, *owned, *traced.shared)
    outputs = _NativeSolve.apply(call, holder, *given)
    run = holder[0]
    if run.attached is None:
        run.rows = outputs
    else:
        run.rows, run.attached = outputs[0], Pieces(*outputs[1:])
    return run


class _Tape:
    """The accepted steps, in the memory of the library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.address = library.ct_tape()
        weakref.finalize(self, library.ct_free, self.address)


class _NativeSolve(torch.autograd.Function):
    """Rows, and the pieces of a continuous solution, as functions of y0, the times, the samples'
    own tensors, and the shared ones.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: Call, holder: list[Run], *inputs: Tensor
    ) -> Any:
        ctx.tape = _Tape(call.library)
        call.task.tape = ctx.tape.address
        run = call.result(call.make())
        holder.append(run)
        ctx.call = call
        ctx.save_for_backward(*inputs)
        if run.attached is None:
            return run.rows
        if not call.problem.t.requires_grad:
            ctx.mark_non_differentiable(run.attached.starts, run.attached.lengths)
        return (run.rows, *run.attached)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor, *pieces: Tensor
    ) -> tuple[Tensor | None, ...]:
        inputs, grads_given = ctx.saved_tensors, (grad, *pieces)
        if torch.is_grad_enabled():
            grads = _again(ctx.call, inputs, grads_given, ctx.needs_input_grad[2:])
        else:
            grads = _pull_back(ctx.call, inputs, grads_given, ctx.needs_input_grad[3])
        return (None, None, *grads)


def _pull_back(
    call: Call, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], timed: bool
) -> list[Tensor | None]:
    """Of the cotangents of the rows and, where there are any, of the pieces."""
    field, dtype = call.traced.field, call.y0.dtype
    grad = grads[0].detach().to(dtype).contiguous()
    y0_grad, own_grad = torch.empty_like(call.y0), torch.empty_like(call.own)
    times = call.problem.t.shape[-1]
    t_grad = call.t.new_zeros((call.batch, times)) if timed else None
    sums = _Sums(call.shared, field.differentiated)
    call.task.shared = ctypes.addressof(sums.arrays)
    given = Cotangents(
        out=grad.data_ptr(), y0=y0_grad.data_ptr(), own=own_grad.data_ptr(),
        t=None if t_grad is None else t_grad.data_ptr(), times=times,
        shared=ctypes.addressof(sums.pointers), sizes=ctypes.addressof(sums.sizes),
    )  # fmt: skip
    if len(grads) > 1:
        pieces = Pieces(*grads[1:])
        states, slopes = pieces.y.contiguous(), pieces.k.transpose(0, 1).contiguous()
        given.states, given.slopes = states.data_ptr(), slopes.data_ptr()
        if timed:
            starts, lengths = (x.to(call.t.device).contiguous() for x in pieces[:2])
            given.starts, given.lengths = starts.data_ptr(), lengths.data_ptr()
    call.library.ct_pull_back(ctypes.byref(call.task), ctypes.byref(given))
    if t_grad is not None and call.t.dim() == 1:
        t_grad = t_grad.sum(0)
    owned = inputs[2 : len(inputs) - len(sums.wanted)]
    widths = [count_of([x]) // call.batch for x in owned]
    parts = [y0_grad, t_grad, *own_grad.split(widths, 1), *sums.wanted]
    return [None if part is None else _like(part, x) for part, x in zip(parts, inputs, strict=True)]


class _Sums:
    """Where gradients of shared arrays are added up.

    Args:
        shared: the arrays.
        differentiated: which have gradients.

    Attributes:
        wanted: the gradients, zeros; None of an array without.
        arrays, pointers, sizes: of the arrays and the gradients, as C takes them.
    """

    def __init__(self, shared: Sequence[Tensor], differentiated: Sequence[bool]) -> None:
        flags = zip(shared, differentiated, strict=True)
        self.wanted = [torch.zeros_like(x) if there else None for x, there in flags]
        addresses, count = ctypes.c_void_p * len(shared), ctypes.c_int64 * len(shared)
        self.arrays = addresses(*[x.data_ptr() for x in shared])
        self.pointers = addresses(*[None if x is None else x.data_ptr() for x in self.wanted])
        self.sizes = count(*[x.numel() for x in shared])


def derivative_of(
    library: Any, stand_still: Callable[[Task, Tensor], None], traced: Traced, form: Form
) -> PullBack:
    """The compiled derivative of the vector field by itself.

    It is that of a solve whose steps have no length, by the slopes at their starts.

    Args:
        library: the compiled solve.
        stand_still: puts such steps, at times [B], on a task's tape.
        traced, form: what it was made of.
    """
    total = coefficients(form.method, form.interpolant).total

    def pull_back(
        t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor], ct: Tensor
    ) -> list[Tensor | None]:
        t, y, own = (x.contiguous() for x in (t.double(), y, own))
        arrays = [native.plain(x, y.dtype, y.device) for x in shared]
        sums, tape = _Sums(arrays, traced.field.differentiated), _Tape(library)
        grads = [torch.zeros_like(x) for x in (t, y, own)]
        states, slopes = torch.zeros_like(y), y.new_zeros((total, *y.shape))
        slopes[0] = ct
        task = Task(
            batch=len(y), threads=1, t=t.data_ptr(), t_stride=1, y0=y.data_ptr(),
            own=own.data_ptr(), shared=ctypes.addressof(sums.arrays), tape=tape.address,
        )  # fmt: skip
        given = Cotangents(
            times=1, shared=ctypes.addressof(sums.pointers), sizes=ctypes.addressof(sums.sizes),
            states=states.data_ptr(), slopes=slopes.data_ptr(),
            **{name: x.data_ptr() for name, x in zip(("t", "y0", "own"), grads, strict=True)},
        )  # fmt: skip
        stand_still(task, t)
        library.ct_pull_back(ctypes.byref(task), ctypes.byref(given))
        return [*grads, *sums.wanted]

    return pull_back


def _like(part: Tensor, x: Tensor) -> Tensor:
    """In the shape, the type and the place of ``x``; pairs as complex numbers."""
    if x.is_complex():
        part = torch.view_as_complex(part.reshape(shape_of(x)))
    elif part.shape != x.shape:
        part = part.reshape(x.shape)
    return part if part.dtype is x.dtype and part.device == x.device else part.to(x)


def _again(
    call: Call, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradient with a graph of its own, through the eager solver."""
    request = copy.copy(call.request)
    # another tensor, so that other paths from y0 into what func holds are not counted here
    start, times, count = inputs[0].clone(), inputs[1].clone(), call.request.t.shape[-1]
    request.native, request.y0 = False, request.layout.unpack(start)
    request.t = times[..., :count]
    if times.shape[-1] > count:
        request.options = {**request.options, "grid_constructor": lambda *_: times[count:]}
    run, rows, _ = request.solve()
    # of samples that failed (throw=False) nothing is wanted behind what they reached
    if run.failure is not None and not bool(rows[grads[0] != 0].isfinite().all()):
        run.failure.raise_()
    outputs = [rows, *(run.attached or ())]
    leaves = [start, times, *inputs[2:]]
    chosen = [i for i, need in enumerate(needed) if need]
    pairs = [(x, g) for x, g in zip(outputs, grads, strict=True) if x.requires_grad]
    found = torch.autograd.grad(
        [x for x, _ in pairs],
        [leaves[i] for i in chosen],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    results: list[Tensor | None] = [None] * len(inputs)
    for i, value in zip(chosen, found, strict=True):
        results[i] = value
    return results
