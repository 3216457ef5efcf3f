"""A vector field with its arguments, and how it is called with some of its samples."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch._trees import leaves_like
from ctorch.codegen.lower_source import Untraceable
from ctorch.codegen.trace_record import Inputs


class Problem:
    """A vector field with its arguments, as it is traced.

    Args:
        func: ``func(t, y, *args)``.
        y: state, a tensor or a pytree of tensors.
        t: time, 0-dim; in a batched problem also [B] or [B, 1, ..].
        args: further arguments.
        batched: every sample (first dimension) has its own time.
    """

    def __init__(
        self, func: Callable[..., Any], y: Any, t: Any, args: tuple[Any, ...], batched: bool
    ) -> None:
        self.func, self.batched = func, batched
        if isinstance(y, Tensor):
            self.y, self.y_spec = [y], None
        else:
            self.y, self.y_spec = pytree.tree_flatten(y)
        self.dtype = _dtype(self.y)
        self.state_dtype = self.y[0].dtype
        self.batch = self.y[0].shape[0] if self.y[0].dim() else 1
        self.t = torch.as_tensor(0.0 if t is None else t, dtype=self.dtype).detach()
        leaves: list[Any] = []
        self.args_spec: pytree.TreeSpec | None = None
        if args:
            leaves, self.args_spec = pytree.tree_flatten(args)
        self._is_input = [
            isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in leaves
        ]
        self.tensors = [x for x, given in zip(leaves, self._is_input, strict=True) if given]
        self._values = tuple(
            x for x, given in zip(leaves, self._is_input, strict=True) if not given
        )
        #: what is walked for guards
        self.root: tuple[Any, tuple[Any, ...]] = (func, self._values)

    @property
    def may_split(self) -> bool:
        """Whether the first dimension of the state may count independent samples."""
        return self.y_spec is None and self.y[0].dim() > 1

    @property
    def key(self) -> Any:
        """What problems with the same trace agree in, cheap to compare."""
        shapes = tuple(tuple(x.shape[1:] if self.batched else x.shape) for x in self.y)
        inputs = tuple((x.dtype, x.dim()) for x in self.tensors)
        sample = (shapes, self.state_dtype, self.y_spec, self.batched)
        return (code_of(self.func), sample, inputs, self.args_spec, environment())

    def call(self, owned: Sequence[bool], rows: int | None) -> Callable[[Inputs], list[Tensor]]:
        """The function on ``Inputs`` of ``rows`` samples (None: on the whole state)."""

        def call(inputs: Inputs) -> list[Tensor]:
            own, shared, values = iter(inputs.own), iter(inputs.shared), iter(self._values)
            flags = iter(owned)
            leaves = [
                (next(own) if next(flags) else next(shared)) if given else next(values)
                for given in self._is_input
            ]
            args = pytree.tree_unflatten(leaves, self.args_spec) if self.args_spec else ()
            y = (
                inputs.y[0]
                if self.y_spec is None
                else (pytree.tree_unflatten(inputs.y, self.y_spec))
            )
            return self._slope(self.func(inputs.t, y, *args), inputs.y)

        return call

    def _slope(self, value: Any, y: list[Tensor]) -> list[Tensor]:
        leaves = [value] if self.y_spec is None else leaves_like(value, self.y_spec)
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves]
        if shapes != [tuple(x.shape) for x in y]:
            raise ValueError(f"func returned {shapes} for a state of {[tuple(x.shape) for x in y]}")
        for leaf in leaves:
            if leaf.dtype not in (self.dtype, self.state_dtype):
                raise Untraceable(
                    f"func returned {leaf.dtype} for a state of {self.state_dtype}: native solves "
                    "compute in the state's type."
                )
        return [leaf.to(self.state_dtype) for leaf in leaves]

    def inputs(
        self, owned: Sequence[bool], rows: int | None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Inputs like the given ones, copied, of the first ``rows`` samples; with a generator,
        near them.
        """

        def first(x: Tensor) -> Tensor:
            if rows is None:
                return near(x, generator)
            return near(x, generator)[torch.arange(rows) % x.shape[0]]

        t = near(self.t.reshape(-1)[:1] if self.t.numel() else self.t, generator)
        time = t.reshape(())
        if self.batched and rows is not None:
            dims = self.y[0].dim() if self.y_spec is None else 2
            spread = self.t.reshape(-1)
            spread = near(spread[torch.arange(rows) % spread.numel()], generator)
            time = spread.reshape(rows, *[1] * (dims - 1))
        y = [first(x) for x in self.y]
        own = [first(x) for x, mine in zip(self.tensors, owned, strict=True) if mine]
        shared = [
            near(x, generator) for x, mine in zip(self.tensors, owned, strict=True) if not mine
        ]
        return Inputs(time, y, own, shared)


def near(x: Tensor, generator: torch.Generator | None, by: float = 1.0) -> Tensor:
    """A copy, with a generator moved by about ``by`` tenths."""
    x = x.detach().contiguous().clone()
    if generator is None or not x.numel():
        return x
    kind = torch.complex128 if x.is_complex() else torch.float64
    noise = by * torch.randn(x.shape, generator=generator, dtype=kind).to(x)
    size = float(x.abs().mean())
    if not size:  # zeros are often where something begins: nothing may be there before
        return 0.05 * noise.abs().to(x)
    return x + noise * (0.1 * x.abs() + 0.05 * size)


def environment() -> tuple[Any, ...]:
    """The settings of PyTorch that a trace is made under."""
    return torch.get_default_dtype(), torch.is_autocast_enabled("cpu")


def _dtype(leaves: Sequence[Any]) -> torch.dtype:
    if not leaves or not all(isinstance(x, Tensor) for x in leaves):
        raise Untraceable("y must be a tensor or a pytree of tensors.")
    dtype = leaves[0].dtype.to_real()
    if dtype not in (torch.float32, torch.float64) or len({x.dtype for x in leaves}) > 1:
        raise Untraceable(
            f"y has {', '.join(sorted({str(x.dtype) for x in leaves}))}: native solves compute in "
            "torch.float32 or torch.float64, or in complex numbers of these."
        )
    return dtype


def code_of(func: Any) -> Any:
    """What functions with the same trace have in common."""
    if isinstance(func, types.FunctionType):
        return func.__code__
    if isinstance(func, types.MethodType):
        return (getattr(func.__func__, "__code__", func.__func__), type(func.__self__))
    return type(func)
