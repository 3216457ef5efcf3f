"""Rules of the forward Laplacian for functions under which compact rows stay compact.

What a rule here does not know it hands to the generic rule, whose primitives make rows dense.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff import _lap_rows as forms
from ctorch.autodiff._lap import Lap, pair
from ctorch.autodiff._propagated import RULES, constant, in_place, rule, value_of
from ctorch.autodiff.rules import products, shapes
from ctorch.autodiff.rules._common import as_tensor, negative, negatives, scalars_too
from ctorch.ops._op import transforms_active


@rule(F.linear, kind=Lap)
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    fits = not constant(x) and constant(weight) and constant(bias) and weight.ndim == 2
    if not fits:
        return products.linear(x, weight, bias)
    y = x.trailing(lambda s: F.linear(s, weight))
    return y if bias is None else Lap(y.value + bias, y.rows, y.lap, y.axes)


@rule("mul", "multiply", "__mul__", "__rmul__", kind=Lap)
def mul(x: Any, y: Any) -> Any:
    if constant(x):
        x, y = y, x
    if not constant(y):
        return x.times(y)
    if not isinstance(y, Tensor):
        return x.elementwise(lambda s: s * y)
    return x.elementwise(lambda s: s * y, broadcast_shapes(x.shape, y.shape))


@rule("div", "divide", "true_divide", "__truediv__", "__div__", kind=Lap)
def div(x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None or constant(x) or not constant(y):
        return products.div(x, y, rounding_mode=rounding_mode)
    if not isinstance(y, Tensor):
        return x.elementwise(lambda s: s / y)
    return x.elementwise(lambda s: s / y, broadcast_shapes(x.shape, y.shape))


@rule("neg", "negative", "__neg__", kind=Lap)
def neg(x: Any) -> Any:
    return x.elementwise(torch.neg)


@rule("add", "__add__", "__radd__", kind=Lap)
def add(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        y = mul(y, alpha) if not constant(y) else y * alpha
    if constant(x):
        return y.shift(x)
    if constant(y):
        return x.shift(y)
    return _sum(x, y)


@rule("sub", "subtract", "__sub__", kind=Lap)
def sub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        y = mul(y, alpha) if not constant(y) else y * alpha
    if constant(x):
        return neg(y).shift(x)
    if constant(y):
        return x.shift(-y)
    return _sum(x, neg(y))


def _sum(x: Lap, y: Lap) -> Lap:
    """The sum of two; dense rows take in local ones at the cost of a copy."""
    shape = broadcast_shapes(x.shape, y.shape)
    x, y = x.fitted(shape), y.fitted(shape)
    value = x.value + y.value
    lap = x.lap if y.lap is None else y.lap if x.lap is None else x.lap + y.lap
    lap = lap if lap is None or lap.shape == shape else lap.expand(shape)
    if len(x.axes) > len(y.axes):
        x, y = y, x
    a, b = forms.widened(x.rows, len(shape)), forms.widened(y.rows, len(shape))
    if not x.axes and len(y.axes) == 1 and not transforms_active():
        return Lap(value, forms.added_to_dense(a, b, y.axes[0], shape), lap)
    axes = forms.common_axes(a, x.axes, b, y.axes, shape)
    return Lap(
        value,
        forms.brought(a, x.axes, axes, shape) + forms.brought(b, y.axes, axes, shape),
        lap,
        axes,
    )


for _name, _function in (("add", add), ("sub", sub), ("mul", mul), ("div", div), ("neg", neg)):
    rule(f"{_name}_", kind=Lap)(in_place(_function))
for _name, _function in (("iadd", add), ("isub", sub), ("imul", mul), ("itruediv", div)):
    rule(f"__{_name}__", kind=Lap)(in_place(_function))


# ---- reductions


@rule("sum", kind=Lap)
@scalars_too
def sum_(
    x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None
) -> Any:
    dims = negatives(dim if axis is None else axis, x.ndim)
    if not dims or dtype is not None:
        return RULES[torch.sum](x, dims, keepdim, dtype=dtype)
    return reduced(x, dims, keepdim)


@rule("mean", kind=Lap)
@scalars_too
def mean(
    x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None
) -> Any:
    dims = negatives(dim if axis is None else axis, x.ndim)
    if not dims or dtype is not None:
        return RULES[torch.mean](x, dims, keepdim, dtype=dtype)
    count = 1
    for d in dims:
        count *= x.shape[d]
    return reduced(x, dims, keepdim).elementwise(lambda s: s / count)


def reduced(x: Lap, dims: list[int], keepdim: bool) -> Lap:
    """Sums over dims; over slots they move rows to where the dense ones are, and add nothing."""
    over = [d for d in dims if d in x.axes]
    if over and not (len(x.axes) == 1 and len(dims) == 1):
        rest = [d for d in dims if d not in x.axes]
        if len(x.axes) > 1 or not rest:
            x = x.densified()
        else:  # first over the others, which keeps slots apart
            x = reduced(x, rest, True)
            y = reduced(x, over, True)
            return y if keepdim else shapes.squeeze(y, dims)
    value = x.value.sum(dims, keepdim=keepdim)
    lap = None if x.lap is None else x.lap.sum(dims, keepdim=keepdim)
    rows, axes = x.rows, x.axes
    if over and axes:
        (at,) = dims
        sizes = list(rows.shape)
        sizes[at] = x.shape[at]
        rows = rows.expand(sizes).movedim(at, 0)  # a negative dim: counts the same with rows
        rows = rows.flatten(0, 1)
        return Lap(value, rows.unsqueeze(at) if keepdim else rows, lap)
    sizes = [
        x.shape[d - x.ndim] if d - x.ndim in dims else rows.shape[d + 1] for d in range(x.ndim)
    ]
    rows = rows.expand(-1, *sizes).sum(dims, keepdim=keepdim)
    if not keepdim:
        axes = tuple(a + sum(1 for d in dims if d > a) for a in axes)
    return Lap(value, rows, lap, axes)


# ---- joining


@rule(Tensor.where, kind=Lap)
def where_method(x: Any, condition: Any, y: Any) -> Any:
    return where(condition, x, y)


@rule(torch.where, kind=Lap)
def where(condition: Any, x: Any, y: Any) -> Any:
    """Elementwise, so that slots stay apart; constants have rows of zeros."""
    if not constant(condition):
        condition = condition.value
    like = x if not constant(x) else y
    if constant(like):
        return torch.where(condition, x, y)
    x, y = as_tensor(x, like), as_tensor(y, like)
    shape = broadcast_shapes(condition.shape, x.shape, y.shape)
    zero = like.value.new_zeros(())
    value = torch.where(condition, value_of(x), value_of(y))
    laps = [part.laplacian() if isinstance(part, Lap) else zero for part in (x, y)]
    lap = torch.where(condition, laps[0], laps[1]).expand(shape)
    if constant(x) or constant(y):
        part = like.fitted(shape)
        rows, axes = forms.widened(part.rows, len(shape)), part.axes
        a, b = (zero, rows) if constant(x) else (rows, zero)
    else:
        a, b, axes, _ = pair(x.fitted(shape), y.fitted(shape))
        a, b = (forms.widened(rows, len(shape)) for rows in (a, b))
    return Lap(value, torch.where(condition, a, b), lap, axes)


@rule("cat", "concat", "concatenate", kind=Lap)
def cat(tensors: Any, dim: int = 0) -> Any:
    parts = [x for x in tensors if x.shape != (0,)]
    at = negative(dim, parts[0].ndim)
    laps = [x for x in parts if isinstance(x, Lap)]
    axes = laps[0].axes
    if at in axes or any(x.axes != axes or len(x.rows) != len(laps[0].rows) for x in laps):
        return shapes.cat(tensors, dim)
    ndim, count = parts[0].ndim, laps[0].rows.shape[0]
    sizes = [
        next((x.rows.shape[d] for x in laps if x.rows.shape[d] != 1), 1) for d in range(1, ndim + 1)
    ]
    rows = []
    for x in parts:  # sizes of 1 stay where all have them
        sizes[at] = x.shape[at]
        rows.append(
            x.rows.expand(-1, *sizes)
            if isinstance(x, Lap)
            else x.new_zeros(()).expand(count, *sizes)
        )
    lap = None
    if any(x.lap is not None for x in laps):
        lap = torch.cat(
            [x.laplacian() if isinstance(x, Lap) else torch.zeros_like(x) for x in parts], at
        )
    values = [x.value if isinstance(x, Lap) else x for x in parts]
    return Lap(torch.cat(values, at), torch.cat(rows, at), lap, axes)


@rule("stack", kind=Lap)
def stack(tensors: Any, dim: int = 0) -> Any:
    at = dim if dim < 0 else dim - tensors[0].ndim - 1
    return cat([x.unsqueeze(at) for x in tensors], at)
