"""Truncated Taylor series carried through torch code as one stack of coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff import _dtypes as dtypes
from ctorch.autodiff._dtypes import KERNEL_DTYPES
from ctorch.autodiff._propagated import Propagated, constant
from ctorch.ops import jet as ops
from ctorch.ops._op import transforms_active

Function = Callable[..., Any]


class Jet(Propagated):
    """``x(s) = sum_k coefficients[k] s^k`` up to ``order``.

    Attributes:
        coefficients: ``[degree + 1, *shape]``, normalized; above ``degree <= order`` they are zero,
            which is what makes the first layers of a network cheap.
        order: the order K at which series are cut off.
    """

    __slots__ = ("coefficients", "order")

    def __init__(self, coefficients: Tensor, order: int) -> None:
        self.coefficients = coefficients
        self.order = order

    @property
    def value(self) -> Tensor:
        return self.coefficients[0]

    @property
    def shape(self) -> torch.Size:
        return self.coefficients.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.coefficients.dtype

    @property
    def ndim(self) -> int:
        return self.coefficients.ndim - 1

    def dim(self) -> int:
        return self.coefficients.ndim - 1

    @property
    def device(self) -> torch.device:
        return self.coefficients.device

    @property
    def requires_grad(self) -> bool:
        return self.coefficients.requires_grad

    @property
    def degree(self) -> int:
        return self.coefficients.shape[0] - 1

    def stack(self) -> Tensor:
        """All coefficients ``[order + 1, *shape]``."""
        return pad(self.coefficients, self.order)

    def linear(self, fn: Function) -> Jet:
        return Jet(fn(self.coefficients), self.order)

    def shift(self, constant: Tensor | complex) -> Jet:
        return Jet(shift(self.coefficients, constant), self.order)

    def affine(self, fn: Function, constant: Tensor) -> Jet:
        stack = fn(self.coefficients)  # of its own: a bias can be added to it where no graph sees
        if _fits(constant.shape, stack) and not _recorded(stack, constant):
            stack[0].add_(constant)
            return Jet(stack, self.order)
        return Jet(shift(stack, constant), self.order)

    @classmethod
    def join(cls, fn: Function, parts: Sequence[Any]) -> Jet:
        if len(parts) == 2:  # the way of most sums, kept short
            a, b = parts
            if isinstance(a, Jet) and isinstance(b, Jet):
                first, second = a.coefficients, b.coefficients
                if first.shape[0] == second.shape[0]:
                    return Jet(fn([first, second]), a.order)
        jets = [part for part in parts if isinstance(part, Jet)]
        degree = max(jet.degree for jet in jets)
        stacks = [
            pad(part.coefficients if isinstance(part, Jet) else part.unsqueeze(0), degree)
            for part in parts
        ]
        return Jet(fn(stacks), jets[0].order)

    def unary(self, name: str, param: float = 0.0) -> Jet:
        return Jet(dtypes.unary(self.coefficients, name, self.order, param), self.order)

    def integrate(self, value: Tensor, slope: Any) -> Jet:
        if self.degree == 0 or self.order == 0:
            return Jet(value.unsqueeze(0), self.order)
        real = dtypes.real_of(self.dtype)
        weights = torch.arange(1, self.order + 1, dtype=real, device=self.device)
        weights = weights.reshape(-1, *(1,) * self.ndim)
        change = self.coefficients[1:] * weights[: self.degree]
        if constant(slope):
            rest = change * slope
        else:
            top = min(self.order, self.degree + slope.degree) - 1
            rest = dtypes.product(change, slope.coefficients, top)
        return Jet(torch.cat([value.unsqueeze(0), rest / weights[: rest.shape[0]]]), self.order)

    def times(self, other: Jet) -> Jet:
        degree = min(self.order, self.degree + other.degree)
        if self.dtype not in KERNEL_DTYPES or other.dtype is not self.dtype:
            return Jet(dtypes.product(self.coefficients, other.coefficients, degree), self.order)
        return Jet(ops.mul(self.coefficients, other.coefficients, degree), self.order)

    def over(self, other: Jet) -> Jet:
        if self.dtype not in KERNEL_DTYPES or other.dtype is not self.dtype:
            return self.times(other.unary("reciprocal"))
        if other.degree == 0:
            return Jet(ops.mul(self.coefficients, 1 / other.coefficients), self.order)
        return Jet(ops.div(self.coefficients, other.coefficients, self.order), self.order)

    @classmethod
    def bilinear(cls, fn: Function, a: Jet, b: Jet) -> Jet:
        top = min(a.order, a.degree + b.degree)
        flipped = b.coefficients.flip(0) if b.degree else b.coefficients
        orders = []
        for k in range(top + 1):
            first, last = max(0, k - b.degree), min(a.degree, k)  # indices of a that take part
            begin = b.degree - (k - first)
            left = a.coefficients[first : last + 1]
            right = flipped[begin : begin + last + 1 - first]
            orders.append(fn(left, right).sum(0))
        return Jet(torch.stack(orders), a.order)

    def _assign(self, other: Jet) -> None:
        self.coefficients = other.coefficients


def pad(stack: Tensor, order: int) -> Tensor:
    """A stack with zeros above its degree, up to ``order``."""
    missing = order + 1 - stack.shape[0]
    if missing <= 0:
        return stack
    return torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])])


def shift(stack: Tensor, constant: Tensor | complex) -> Tensor:
    """The stack with a constant added to its first coefficient."""
    wanted = getattr(constant, "shape", ())
    if not _fits(wanted, stack):
        shape = broadcast_shapes(stack.shape[1:], wanted)
        if shape != stack.shape[1:]:
            stack = widen(stack, len(shape)).expand(stack.shape[0], *shape)
    first = stack[:1] + constant
    if stack.shape[0] == 1:
        return first
    rest = stack[1:]
    return torch.cat([first, rest if rest.dtype is first.dtype else rest.to(first.dtype)])


def _fits(wanted: Any, stack: Tensor) -> bool:
    """Whether a shape is that of the coefficients, but for missing dims."""
    n = len(wanted)
    return n == 0 or (n < stack.ndim and wanted == stack.shape[-n:])


def _recorded(*tensors: Tensor) -> bool:
    """Whether something may look at what happens to the tensors."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return transforms_active() or is_compiling()


def widen(stack: Tensor, ndim: int) -> Tensor:
    """The stack with its coefficients brought to ``ndim`` dims."""
    extra = ndim - (stack.ndim - 1)
    return stack.reshape(stack.shape[0], *(1,) * extra, *stack.shape[1:]) if extra > 0 else stack
