"""The derivative of a root z = constant + scale * f(t, z), by the implicit function theorem.

With M = I - scale * df/dy at the root and M kept fixed, every chord step z <- z - M^-1 r(z) makes
one more derivative of z right: if z is off by a term of order n in the inputs, r(z) is M times that
term and one of order n + 1. So from the bare number one step gives first derivatives and two give
second ones, in ordinary operations but for M^-1. Its transpose is applied by iterating with
vector-Jacobian products, preconditioned as the root finder's own iteration was, which converges at
the same rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctorch._exceptions import GradientError
from ctorch.ode.field import Stage
from ctorch.ode.root_finding import RootFinder

#: iterations of a linear solve before it is given up
LIMIT = 500


def attach(
    root: Tensor,
    constant: Tensor,
    scale: Any,
    t: Tensor,
    finder: RootFinder,
    order: int,
    count: Callable[[], None],
) -> tuple[Tensor, Stage]:
    """The root with its derivatives up to ``order`` (1 or 2) in all that it hangs on.

    Args:
        root: the root, without graph.
        constant, scale, t: of the equation; scale is a number or a 0-dim tensor.
        finder: evaluates the field, and says what P is.
        order: how many derivatives are wanted.
        count: called for every vector-Jacobian product.

    Returns:
        The root, and the evaluation there over a leaf (for looking through its graph).
    """
    leaf = root.detach().clone().requires_grad_()
    with torch.enable_grad():
        slope = finder.field(t, leaf)
        matrix = _Matrix(
            finder,
            t,
            leaf,
            slope,
            float(scale.detach()) if isinstance(scale, Tensor) else scale,
            count,
        )
        z, k = leaf.detach(), slope
        for depth in range(order):
            if depth:
                k = finder.field(t, z)
            residual = z - scale * k - constant
            z = z - _Inverse.apply(residual - residual.detach(), matrix, False, order)
    return z, Stage(t, leaf, slope)


class _Matrix:
    """M at a root, and the solution of systems with it."""

    def __init__(
        self,
        finder: RootFinder,
        t: Tensor,
        z: Tensor,
        k: Tensor,
        scale: float,
        count: Callable[[], None],
    ) -> None:
        self._finder, self._t, self._z, self._k, self._scale = finder, t, z, k, scale
        self._count = count
        self._approximation: Any = None

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """M^-1 b or M^-T b. Under ``no_grad``.

        Raises:
            GradientError: the iteration does not converge.
        """
        if self._approximation is None:
            with torch.enable_grad():
                self._approximation = self._finder.at_root(self._t, self._z, self._k, self._scale)
        p = self._approximation
        invert = p.solve_transposed if transposed else p.solve
        product = self._vjp if transposed else self._jvp
        x = invert(b)
        tolerance = torch.finfo(b.dtype).eps ** 0.75
        for _ in range(LIMIT):
            change = invert(b - x + self._scale * product(x))
            x = x + change
            if not x.numel() or bool(change.abs().amax() <= tolerance * x.abs().amax()):
                return x
            if not bool(torch.isfinite(change).all()):
                break
        raise GradientError(
            f"the equation for the gradient at t={float(self._t):.6g} was not solved by"
            f" {LIMIT} iterations of {self._finder.name}: use shorter steps, or"
            ' root_finder="newton".'
        )

    def _vjp(self, w: Tensor) -> Tensor:
        if not self._k.requires_grad:
            return torch.zeros_like(w)
        self._count()
        (found,) = torch.autograd.grad(self._k, self._z, w, retain_graph=True, allow_unused=True)
        return torch.zeros_like(w) if found is None else found.detach()

    def _jvp(self, v: Tensor) -> Tensor:
        """The product with the Jacobian: the derivative of that with its transpose."""
        if not self._k.requires_grad:
            return torch.zeros_like(v)
        self._count()
        with torch.enable_grad():
            w = torch.zeros_like(v, requires_grad=True)
            (back,) = torch.autograd.grad(self._k, self._z, w, create_graph=True, allow_unused=True)
            if back is None or not back.requires_grad:
                return torch.zeros_like(v)
            (found,) = torch.autograd.grad(back, w, v, allow_unused=True)
        return torch.zeros_like(v) if found is None else found


class _Inverse(torch.autograd.Function):
    """x -> M^-1 x of a fixed M. Zeros come in, so zeros go out. What counts is the derivative."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, matrix: _Matrix, transposed: bool, order: int
    ) -> Tensor:
        ctx.matrix, ctx.transposed, ctx.left = matrix, transposed, order - 1
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if not torch.is_grad_enabled():
            return ctx.matrix.solve(grad, not ctx.transposed), None, None, None
        if not ctx.left:
            raise GradientError(
                "an implicit method's solution can be differentiated twice only (create_graph=True"
                " was asked for in the second pass)."
            )
        ctx.left -= 1
        solved = _Solved.apply(grad, ctx.matrix, not ctx.transposed)
        return solved, None, None, None


class _Solved(torch.autograd.Function):
    """b -> M^-1 b of a fixed M, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, matrix: _Matrix, transposed: bool) -> Tensor:  # type: ignore[override]
        ctx.matrix, ctx.transposed = matrix, transposed
        return matrix.solve(b, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _Solved.apply(grad, ctx.matrix, not ctx.transposed), None, None
