"""Rules of sums, products, quotients and matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff._propagated import constant, in_place, kind_of, rule


def _tensor(x: Any, like: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x, device=like.device)


def _widened(x: Any, fn: Any, other: Tensor) -> Any:
    """Linear ``fn(stack)`` where the other operand may have more dims than ``x``."""
    extra, n = other.ndim - x.ndim, x.ndim
    if extra <= 0:
        return x.linear(fn)

    def wide(s: Tensor) -> Tensor:
        lead = s.shape[: s.ndim - n]
        return fn(s.reshape(*lead, *(1,) * extra, *s.shape[s.ndim - n :]))

    return x.linear(wide)


@rule("add", "__add__", "__radd__")
def add(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        y = y * alpha
    if constant(x):
        return y.shift(x)
    if constant(y):
        return x.shift(y)
    if x.shape != y.shape:
        shape = torch.broadcast_shapes(x.shape, y.shape)
        x, y = (p if p.shape == shape else p.expand(shape) for p in (x, y))
    return kind_of(x, y).join(lambda s: s[0] + s[1], [x, y])


@rule("sub", "subtract", "__sub__")
def sub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        y = y * alpha
    if constant(x):
        return neg(y).shift(x)
    if constant(y):
        return x.shift(-y)
    if x.shape != y.shape:
        shape = torch.broadcast_shapes(x.shape, y.shape)
        x, y = (p if p.shape == shape else p.expand(shape) for p in (x, y))
    return kind_of(x, y).join(lambda s: s[0] - s[1], [x, y])


@rule("rsub", "__rsub__")
def rsub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return sub(y, x, alpha=alpha)


@rule("neg", "negative", "__neg__")
def neg(x: Any) -> Any:
    return x.linear(lambda s: -s)


@rule("positive", "__pos__")
def positive(x: Any) -> Any:
    return x


@rule("mul", "multiply", "__mul__", "__rmul__")
def mul(x: Any, y: Any) -> Any:
    if constant(x):
        x, y = y, x
    if not constant(y):
        return x.times(y)
    return _widened(x, lambda s: s * y, _tensor(y, x))


@rule("div", "divide", "true_divide", "__truediv__", "__div__")
def div(x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise TypeError("div: rounding_mode has no derivative")
    if constant(y):
        return _widened(x, lambda s: s / y, _tensor(y, x))
    if constant(x):
        return mul(y.unary("reciprocal"), x)
    return x.over(y)


@rule("__rtruediv__", "__rdiv__")
def rdiv(x: Any, y: Any) -> Any:
    return div(y, x)


@rule("addcmul")
def addcmul(x: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    return x + value * (a * b)


@rule("addcdiv")
def addcdiv(x: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    return x + value * (a / b)


@rule("lerp")
def lerp(x: Any, end: Any, weight: Any) -> Any:
    return x + weight * (end - x)


for _name, _function in (("add", add), ("sub", sub), ("mul", mul), ("div", div), ("neg", neg)):
    rule(f"{_name}_")(in_place(_function))
for _name, _function in (("iadd", add), ("isub", sub), ("imul", mul), ("itruediv", div)):
    rule(f"__{_name}__")(in_place(_function))


# ---- matrix products


@rule("matmul", "__matmul__", torch.linalg.matmul)
def matmul(a: Any, b: Any) -> Any:
    if not constant(a) and not constant(b):
        if a.ndim == 1 and b.ndim == 1:
            return (a * b).sum()
        if a.ndim == 1:
            return matmul(a.unsqueeze(0), b).squeeze(-2)
        if b.ndim == 1:
            return matmul(a, b.unsqueeze(-1)).squeeze(-1)
        return kind_of(a, b).bilinear(*_same_ndim(torch.matmul, a, b))
    if constant(b):
        if a.ndim == 1:  # a leading dim would turn it into a matrix
            return matmul(a.unsqueeze(0), b).squeeze(-2 if b.ndim > 1 else -1)
        return _widened(a, lambda s: s @ b, _batch_of(b, a))
    if b.ndim == 1:
        return matmul(a, b.unsqueeze(-1)).squeeze(-1)
    return _widened(b, lambda s: a @ s, _batch_of(a, b))


def _batch_of(c: Tensor, x: Any) -> Tensor:
    return c if c.ndim > x.ndim else torch.empty((1,) * x.ndim, device="meta")


def _same_ndim(fn: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
    """Brings both to the same number of dims, so that leading dims line up."""
    n = max(a.ndim, b.ndim)
    a, b = (x if x.ndim == n else x[(None,) * (n - x.ndim)] for x in (a, b))
    return fn, a, b


@rule("__rmatmul__")
def rmatmul(x: Any, a: Any) -> Any:
    return matmul(a, x)


@rule("mm", "bmm", "mv", "dot", "vdot", "inner_product")
def mm(a: Any, b: Any) -> Any:
    return matmul(a, b)


@rule("inner")
def inner(a: Any, b: Any) -> Any:
    return matmul(a, b.mT) if b.ndim > 1 else matmul(a, b)


@rule("outer", "ger")
def outer(a: Any, b: Any) -> Any:
    return a.unsqueeze(-1) * b


@rule("addmm", "addbmm", "baddbmm")
def addmm(c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return beta * c + alpha * matmul(a, b)


@rule(F.linear)
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if constant(weight) and not constant(x):
        if bias is not None and constant(bias):
            return x.affine(lambda s: F.linear(s, weight), bias)
        y = x.linear(lambda s: F.linear(s, weight))
    else:
        y = matmul(x, weight.mT if weight.ndim > 1 else weight)
    return y if bias is None else y + bias


@rule("einsum", torch.functional.einsum)
def einsum(equation: str, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if "..." in equation:
        equation = _name_ellipsis(equation, operands)
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not _:
        letters = "".join(terms)
        output = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    parts = list(zip(terms, operands, strict=True))
    while len(parts) > 2:  # pairwise, from the left
        (s, a), (r, b), *rest = parts
        later = set(output).union(*(term for term, _ in rest))
        both = "".join(sorted(set(s + r) & later))
        parts = [(both, _einsum_pair(s, a, r, b, both)), *rest]
    if len(parts) == 1:
        ((s, a),) = parts
        return a.linear(lambda x: torch.einsum(f"...{s}->...{output}", x))
    (s, a), (r, b) = parts
    return _einsum_pair(s, a, r, b, output)


def _einsum_pair(s: str, a: Any, r: str, b: Any, output: str) -> Any:
    if constant(a) and constant(b):
        return torch.einsum(f"{s},{r}->{output}", a, b)
    if constant(b):
        return a.linear(lambda x: torch.einsum(f"...{s},{r}->...{output}", x, b))
    if constant(a):
        return b.linear(lambda x: torch.einsum(f"{s},...{r}->...{output}", a, x))
    fn = lambda x, y: torch.einsum(f"...{s},...{r}->...{output}", x, y)  # noqa: E731
    return kind_of(a, b).bilinear(fn, a, b)


def _name_ellipsis(equation: str, operands: tuple[Any, ...]) -> str:
    """The equation with letters for the dims of an ellipsis (all operands must have them all)."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    counts = [
        x.ndim - len(term.replace("...", "")) if "..." in term else 0
        for term, x in zip(inputs.split(","), operands, strict=True)
    ]
    most = max(counts)
    named = [
        term.replace("...", "".join(free[most - n : most]))
        for term, n in zip(inputs.split(","), counts, strict=True)
    ]
    if not arrow:
        letters = "".join(t.replace("...", "") for t in inputs.split(","))
        output = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return ",".join(named) + "->" + output.replace("...", "".join(free[:most]))
