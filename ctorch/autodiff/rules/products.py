"""Rules of sums, products, quotients and matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff._propagated import (
    Propagated,
    constant,
    in_place,
    kind_of,
    rule,
    value_of,
)
from ctorch.autodiff.rules._common import negative


def _tensor(x: Any, like: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x, device=like.device)


def _constant(x: Any) -> Any:
    """Tensors and numbers as they are, arrays as tensors."""
    return x if isinstance(x, (Tensor, int, float, complex)) else torch.as_tensor(x)


def _widened(x: Any, fn: Any, ndim: int) -> Any:
    """Linear ``fn(stack)`` where the other operand, of ``ndim`` dims, may have more than ``x``."""
    n = x.ndim
    if ndim <= n:
        return x.linear(fn)

    def wide(s: Tensor) -> Tensor:
        lead = s.shape[: s.ndim - n]
        return fn(s.reshape((*lead, *(1,) * (ndim - n), *s.shape[s.ndim - n :])))

    return x.linear(wide)


@rule("add", "__add__", "__radd__")
def add(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        y = y * alpha
    if constant(x):
        return y.shift(_constant(x))
    if constant(y):
        return x.shift(_constant(y))
    if x.shape != y.shape:
        x, y = torch.broadcast_tensors(x, y)
    return kind_of(x, y).join(lambda s: s[0] + s[1], [x, y])


@rule("sub", "subtract", "__sub__")
def sub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        y = y * alpha
    if constant(x):
        return neg(y).shift(_constant(x))
    if constant(y):
        return x.shift(-_constant(y))
    if x.shape != y.shape:
        x, y = torch.broadcast_tensors(x, y)
    return kind_of(x, y).join(lambda s: s[0] - s[1], [x, y])


@rule("rsub", "__rsub__")
def rsub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return sub(y, x if alpha == 1 else x * alpha)


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
    if isinstance(y, (int, float)):
        return x.linear(lambda s: s * y)
    if not constant(y):
        if type(x) is not type(y):
            kind_of(x, y)
        return x.times(y)
    y = _tensor(y, x)
    return _widened(x, lambda s: s * y, y.ndim)


@rule("div", "divide", "true_divide", "__truediv__", "__div__")
def div(x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return torch.div(value_of(x), value_of(y), rounding_mode=rounding_mode)
    if isinstance(y, (int, float)):  # as a tensor it would be float32
        return x.linear(lambda s: s / y)
    if constant(y):
        y = _tensor(y, x)
        return _widened(x, lambda s: s / y, y.ndim)
    if constant(x):
        return mul(torch.reciprocal(y), x)
    if type(x) is not type(y):
        kind_of(x, y)
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


for _name, _function in (("iadd", add), ("isub", sub), ("imul", mul), ("itruediv", div)):
    rule(f"__{_name}__")(in_place(_function))


# ---- matrix products


@rule("matmul", "__matmul__", torch.linalg.matmul)
def matmul(a: Any, b: Any) -> Any:
    if constant(b):
        if constant(a):  # of a rule: what carries derivatives is added to it
            return torch.matmul(a, b)
        if a.ndim == 1:  # a leading dim would turn it into a matrix
            return matmul(a.unsqueeze(0), b).squeeze(-2 if b.ndim > 1 else -1)
        return _widened(a, lambda s: s @ b, b.ndim)
    if b.ndim == 1 and a.ndim > 1:
        return matmul(a, b.unsqueeze(-1)).squeeze(-1)
    if a.ndim == 1:
        wide = matmul(a.unsqueeze(0), b if b.ndim > 1 else b.unsqueeze(-1))
        return wide.squeeze(-2) if b.ndim > 1 else wide.reshape(())
    if constant(a):
        return _widened(b, lambda s: a @ s, a.ndim)
    n = max(a.ndim, b.ndim)  # the same number of dims, so that leading dims line up
    a, b = (x if x.ndim == n else x[(None,) * (n - x.ndim)] for x in (a, b))
    return kind_of(a, b).bilinear(torch.matmul, a, b)


@rule("__rmatmul__")
def rmatmul(x: Any, a: Any) -> Any:
    return matmul(a, x)


@rule("mm", "bmm", "mv", "dot", "smm")
def mm(a: Any, b: Any) -> Any:
    return matmul(a, b)


@rule("vdot")
def vdot(a: Any, b: Any) -> Any:
    return matmul(torch.conj(a), b)


@rule(torch.linalg.vecdot)
def vecdot(a: Any, b: Any, *, dim: int = -1, out: None = None) -> Any:
    return (torch.conj(a) * b).sum(dim)


@rule("inner")
def inner(a: Any, b: Any) -> Any:
    if a.ndim == 0 or b.ndim == 0:
        return a * b
    return torch.tensordot(a, b, dims=([-1], [-1]))


@rule("outer", "ger")
def outer(a: Any, b: Any) -> Any:
    return a.unsqueeze(-1) * b


@rule("kron")
def kron(a: Any, b: Any) -> Any:
    n = max(a.ndim, b.ndim)
    a, b = (x.reshape((1,) * (n - x.ndim) + tuple(x.shape)) for x in (a, b))
    apart = [size for s in a.shape for size in (s, 1)]
    other = [size for s in b.shape for size in (1, s)]
    sizes = [s * r for s, r in zip(a.shape, b.shape, strict=True)]
    return (a.reshape(apart) * b.reshape(other)).reshape(sizes)


@rule("cross")
def cross(a: Any, b: Any, dim: int | None = None, *, out: None = None) -> Any:
    a, b = torch.broadcast_tensors(a, b)
    if dim is None:
        dim = next(i for i, size in enumerate(a.shape) if size == 3)
    at = negative(dim, a.ndim)
    return two_leading(lambda x, y: torch.linalg.cross(x, y, dim=at), a, b)


@rule(torch.linalg.cross)
def linalg_cross(a: Any, b: Any, *, dim: int = -1, out: None = None) -> Any:
    return cross(a, b, dim)


def two_leading(fn: Any, a: Any, b: Any) -> Any:
    """A bilinear ``fn`` that broadcasts over leading dims, either of the values constant."""
    if constant(a) and constant(b):
        return fn(a, b)
    if constant(b):
        return a.linear(lambda s: fn(s, b.expand(s.shape)))
    if constant(a):
        return b.linear(lambda s: fn(a.expand(s.shape), s))
    return kind_of(a, b).bilinear(fn, a, b)


@rule("addmm", "addmv", "baddbmm")
def addmm(c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return _plus(c, matmul(a, b), beta, alpha)


@rule("addbmm")
def addbmm(c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return _plus(c, matmul(a, b).sum(0), beta, alpha)


@rule("addr")
def addr(c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return _plus(c, outer(a, b), beta, alpha)


def _plus(c: Any, product: Any, beta: float, alpha: float) -> Any:
    product = product if alpha == 1 else product * alpha
    if beta == 0:  # c is not looked at, as NaN times zero would be NaN
        return product.expand(broadcast_shapes(c.shape, product.shape))
    return product + (c if beta == 1 else c * beta)


@rule("chain_matmul", torch.functional.chain_matmul)
def chain_matmul(*matrices: Any, out: None = None) -> Any:
    result = matrices[0]
    for matrix in matrices[1:]:
        result = matmul(result, matrix)
    return result


@rule(torch.linalg.multi_dot)
def multi_dot(tensors: Sequence[Any], *, out: None = None) -> Any:
    return chain_matmul(*tensors)


@rule("matrix_power", torch.linalg.matrix_power)
def matrix_power(x: Any, n: int, *, out: None = None) -> Any:
    if n < 0:
        return matrix_power(torch.linalg.inv(x), -n)
    if n == 0:
        return torch.linalg.matrix_power(x.value.detach(), 0)
    if n == 1:
        return x.linear(lambda s: s.clone())
    half = matrix_power(x, n // 2)
    square = matmul(half, half)
    return matmul(square, x) if n % 2 else square


@rule(F.linear)
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(x, Propagated) and not isinstance(weight, Propagated):
        if bias is not None and not isinstance(bias, Propagated):
            return x.affine(lambda s: F.linear(s, weight), bias)
        y = x.linear(lambda s: F.linear(s, weight))
    else:
        y = matmul(x, weight.mT if weight.ndim > 1 else weight)
    return y if bias is None else y + bias


@rule("bilinear", F.bilinear)
def bilinear(x: Any, y: Any, weight: Any, bias: Any = None) -> Any:
    z = torch.einsum("...i,oij,...j->...o", x, weight, y)
    return z if bias is None else z + bias


def _summed(x: Any, dims: Sequence[int], other: Any, of_other: Sequence[int]) -> Any:
    """``x`` with its sum over the dims that meet a size of one, to which torch broadcasts."""
    pairs = zip(dims, of_other, strict=True)
    wide = [d for d, e in pairs if other.shape[e] == 1 and x.shape[d] != 1]
    return x.sum(wide, keepdim=True) if wide else x


@rule("tensordot", torch.functional.tensordot)
def tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Any:
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = (range(a.ndim - dims, a.ndim), range(dims))
    of_a, of_b = ([negative(d, x.ndim) for d in ds] for ds, x in zip(dims, (a, b), strict=True))
    a, b = _summed(a, of_a, b, of_b), _summed(b, of_b, a, of_a)
    kept_a = [d for d in range(-a.ndim, 0) if d not in of_a]
    kept_b = [d for d in range(-b.ndim, 0) if d not in of_b]
    rows, columns = ([x.shape[d] for d in ds] for x, ds in ((a, kept_a), (b, kept_b)))
    inner = math.prod(a.shape[d] for d in of_a)
    left = a.permute(*kept_a, *of_a).reshape(-1, inner)
    right = b.permute(*of_b, *kept_b).reshape(inner, -1)
    return matmul(left, right).reshape([*rows, *columns])
