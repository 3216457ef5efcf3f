"""The gradient of a native solve: one node of the autograd graph, pulled back by compiled code."""

from __future__ import annotations

import copy
import ctypes
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch.ode.native_task import Cotangents
from ctorch.ode.run import Run

if TYPE_CHECKING:
    from ctorch.ode.native import Call


def with_gradient(call: Call) -> Run:
    """Solve, keeping the accepted steps; the rows are differentiable in all but the times."""
    traced = call.traced
    holder: list[Run] = []
    flags = zip(traced.problem.tensors, traced.field.owned, strict=True)
    owned = [x for x, own in flags if own]
    rows = _NativeSolve.apply(call, holder, call.problem.y0, *owned, *traced.shared)
    run = holder[0]
    run.rows = rows
    return run


class _Tape:
    """The accepted steps, in the memory of the library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.address = library.ct_tape()
        weakref.finalize(self, library.ct_free, self.address)


class _NativeSolve(torch.autograd.Function):
    """Rows as a function of y0, the samples' own tensors, and the shared ones."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: Call, holder: list[Run], *inputs: Tensor
    ) -> Tensor:
        ctx.tape = _Tape(call.library)
        call.task.tape = ctx.tape.address
        run = call.result(call.make())
        holder.append(run)
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return run.rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _again(ctx.call, inputs, grad, ctx.needs_input_grad[2:])
        else:
            grads = _pull_back(ctx.call, inputs, grad)
        return (None, None, *grads)


def _pull_back(call: Call, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor | None]:
    field, dtype = call.traced.field, call.y0.dtype
    grad = grad.detach().to(dtype).contiguous()
    y0_grad, own_grad = torch.empty_like(call.y0), torch.empty_like(call.own)
    wanted = [
        torch.zeros_like(x) if there else None
        for x, there in zip(call.shared, field.differentiated, strict=True)
    ]
    count = len(wanted)
    pointers = (ctypes.c_void_p * count)(*[None if x is None else x.data_ptr() for x in wanted])
    sizes = (ctypes.c_int64 * count)(*[x.numel() for x in call.shared])
    arrays = (ctypes.c_void_p * count)(*[x.data_ptr() for x in call.shared])
    call.task.shared = ctypes.addressof(arrays)
    given = Cotangents(
        out=grad.data_ptr(), y0=y0_grad.data_ptr(), own=own_grad.data_ptr(),
        shared=ctypes.addressof(pointers), sizes=ctypes.addressof(sizes),
    )  # fmt: skip
    call.library.ct_pull_back(ctypes.byref(call.task), ctypes.byref(given))
    owned = inputs[1 : len(inputs) - count]
    widths = [x.numel() // call.batch for x in owned]
    parts = [y0_grad, *own_grad.split(widths, 1), *wanted]
    return [None if part is None else _like(part, x) for part, x in zip(parts, inputs, strict=True)]


def _like(part: Tensor, x: Tensor) -> Tensor:
    """In the shape, the type and the place of ``x``."""
    if part.shape != x.shape:
        part = part.reshape(x.shape)
    return part if part.dtype is x.dtype and part.device == x.device else part.to(x)


def _again(
    call: Call, inputs: tuple[Tensor, ...], grad: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradient with a graph of its own, through the eager solver."""
    request = copy.copy(call.request)
    # another tensor, so that other paths from y0 into what func holds are not counted here
    start = inputs[0].clone()
    request.native, request.y0 = False, start
    run, rows, _ = request.solve()
    if run.failure is not None:
        run.failure.raise_()
    leaves = [start, *inputs[1:]]
    chosen = [i for i, need in enumerate(needed) if need]
    found = torch.autograd.grad(
        [rows], [leaves[i] for i in chosen], [grad], create_graph=True, allow_unused=True
    )
    results: list[Tensor | None] = [None] * len(inputs)
    for i, value in zip(chosen, found, strict=True):
        results[i] = value
    return results
