"""Defines an operator once: schema, reference, fake kernel, derivative and batching rules.

A compiled kernel alone is opaque to PyTorch's transforms, and ``torch.library`` has no rule for
forward mode: under ``torch.func.jvp`` a library operator silently returns zero tangents. A
``torch.autograd.Function`` has one, but nested forward mode through it is zero as well, and
``torch.compile`` drops it. No mechanism serves all cases, so an operator chooses at each call:

- no transform active: the library operator, with its registered autograd formula (so in eager mode,
  when compiling, when exporting); where there is nothing to record, the kernel beneath it, which
  saves half of the time of a small call;
- a transform or forward mode active: an ``autograd.Function`` around the same kernel;
- transforms while compiling, or forward mode over forward mode: the reference, in plain PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "ctorch"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Function = Callable[..., Any]

# Private to torch, but in every release from 2.10 on; a test fails where one is gone.
try:
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
    below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd
    _ = forward_ad._current_level, TransformType.Jvp
    KNOWN_TORCH = True
except (ImportError, AttributeError) as error:  # then the reference is right, if slower
    warnings.warn(f"ctorch does not know this torch ({error}); kernels are not used", stacklevel=2)
    KNOWN_TORCH = False


def define(
    schema: str,
    reference: Function,
    *,
    fake: Function,
    backward: Function | None = None,
    jvp: Function | None = None,
    vmap: Function | None = None,
) -> Function:
    """Registers ``ctorch::<schema>`` and returns the function to call, with positional arguments.

    An operator with only a reference and a fake kernel has no graph: it is for loops that run
    without gradients, and the returned function is the bare call beneath the ``torch.ops``
    overload, which ``torch.compile`` cannot look through.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``, without the namespace.
        reference: the same computation in plain, differentiable PyTorch. It serves devices without
            a kernel, and it is what a kernel is tested against.
        fake: from (fake) arguments to empty outputs, for shape inference.
        backward: ``(args, needed, *grads) -> grads of args``: ``needed`` says which are wanted, a
            grad may be None. Written in differentiable operations, for double backward.
        jvp: ``(args, tangents) -> tangent(s) of the output(s)``; tangents may be None.
        vmap: ``(call, size, batched, args) -> (output(s), out_dims)``: ``batched`` says which
            arguments carry the mapped dimension, always as their first; ``call`` is the operator.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is None or jvp is None or vmap is None:
        return cast(Function, getattr(overload, "_op", overload))  # a microsecond less at each call
    call: Function = lambda *args: chosen(*args)  # noqa: E731  the rules call the operator itself
    node = _autograd_function(name, overload, backward, jvp, partial(vmap, call))
    torch.library.register_autograd(
        qualified, node.backward, setup_context=node.setup_context, lib=LIBRARY
    )
    torch.library.register_vmap(qualified, node.vmap, lib=LIBRARY)
    tensors = schema.partition(") ->")[0].count("Tensor")  # they come first
    chosen = _choose(overload, node, reference, tensors)
    return chosen


def _choose(overload: Any, node: Any, reference: Function, tensors: int) -> Function:
    """The function that takes one of the ways at each call."""
    if not KNOWN_TORCH:
        return reference
    active, level, compiling = transforms_active, forward_ad, torch.compiler.is_compiling
    kernel = getattr(overload, "_op", overload)

    def call(*args: Any) -> Any:
        if not active() and level._current_level < 0:
            if compiling() or (torch.is_grad_enabled() and _any_requires_grad(args[:tensors])):
                return overload(*args)
            with below_autograd():
                return kernel(*args)
        if compiling() or _forward_levels() > 1:
            return reference(*args)
        return node.apply(*args)

    return call


def _any_requires_grad(tensors: Sequence[Any]) -> bool:
    for x in tensors:  # noqa: SIM110  any() with a generator costs a microsecond
        if x is not None and x.requires_grad:
            return True
    return False


def _forward_levels() -> int:
    """How many ``torch.func.jvp`` are active around this call."""
    levels = retrieve_all_functorch_interpreters()
    return sum(level.key() == TransformType.Jvp for level in levels)


def _autograd_function(
    name: str, overload: Function, backward: Function, jvp: Function, vmap: Function
) -> Any:
    """An ``autograd.Function`` around the kernel, from the rules of an operator."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        if hasattr(ctx, "save_for_forward"):
            ctx.save_for_forward(*tensors)
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def inputs_of(ctx: Any) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        return tuple(next(tensors) if other is None else other[0] for other in ctx.others)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return overload(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return backward(inputs_of(ctx), ctx.needs_input_grad, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            return jvp(inputs_of(ctx), tangents)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            moved, batched = _batch_first(in_dims, args)
            return vmap(info.batch_size, batched, moved)

        @classmethod
        def apply(cls, *args: Any) -> Any:
            if transforms_active():
                return super().apply(*args)
            # Function.apply binds the signature of forward at every call, which costs five times
            # the rest; without transforms the C++ implementation underneath is all there is to do.
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    Node.__name__ = Node.__qualname__ = name
    return Node


def _batch_first(
    in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    batched = tuple(
        dim is not None and isinstance(x, Tensor) for dim, x in zip(in_dims, args, strict=True)
    )
    moved = tuple(
        x.movedim(d, 0) if b else x for x, d, b in zip(args, in_dims, batched, strict=True)
    )
    return moved, batched
