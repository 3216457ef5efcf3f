"""Lowering rules of convolutions: a gather of what lies under the taps, and a matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctorch.codegen.graph import ZERO, Ids
from ctorch.codegen.lower_expression import Expr, joined


@dataclass
class Taps:
    """Which numbers of the input a convolution multiplies for which of its outputs.

    Attributes:
        inputs: [O, K], places in the flattened input; -1: in the padding.
        outputs: [I, K], places in the flattened output to which an input goes by a tap; -1: none.
    """

    inputs: Ids
    outputs: Ids

    @classmethod
    def of(
        cls, inputs: Sequence[int], outputs: Sequence[int], kernel: Sequence[int],
        stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ) -> Taps:  # fmt: skip
        """From the sizes; ``outputs[d] * stride[d] + tap * dilation[d] - padding[d]`` is where."""
        grid = np.indices((*outputs, *kernel)).reshape(2 * len(kernel), -1)
        out, tap = grid[: len(kernel)], grid[len(kernel) :]
        column = [np.array(x)[:, None] for x in (stride, dilation, padding, inputs)]
        at = out * column[0] + tap * column[1] - column[2]
        inside = ((at >= 0) & (at < column[3])).all(0)
        position = np.ravel_multi_index(tuple(np.where(inside, at, 0)), tuple(inputs))
        o, k = (
            np.arange(grid.shape[1]) // math.prod(kernel),
            np.arange(grid.shape[1]) % math.prod(kernel),
        )
        places = np.full((math.prod(outputs), math.prod(kernel)), -1)
        back = np.full((math.prod(inputs), math.prod(kernel)), -1)
        places[o[inside], k[inside]] = position[inside]
        back[position[inside], k[inside]] = o[inside]
        return cls(places, back)


def _gathered(x: Expr, places: Ids) -> Ids:
    """[n, c, places] of x [n, c, positions]; zero where there is no place."""
    return np.where(places < 0, ZERO, x.ids[:, :, places])


def _correlate(x: Expr, weight: Expr, taps: Taps, groups: int) -> Expr:
    """[n, c, I] and [o, c / groups, K] -> [n, o, O]."""
    n, per_group = x.shape[0], weight.shape[1]
    parts = []
    for g, kernels in enumerate(np.split(weight.ids, groups)):
        mine = x[:, g * per_group : (g + 1) * per_group]
        patches = _gathered(mine, taps.inputs)  # [n, c, O, K]
        rows = patches.transpose(0, 2, 1, 3).reshape(1, -1, per_group * taps.inputs.shape[1])
        columns = kernels.reshape(1, len(kernels), -1).swapaxes(1, 2)
        product = Expr(x.graph, rows).matmul(Expr(x.graph, columns))
        parts.append(product.reshape(n, -1, len(kernels)).swap())
    return joined(parts, 1)


def _spread(x: Expr, weight: Expr, taps: Taps, groups: int) -> Expr:
    """The transpose: [n, o, O] and [o, c / groups, K] -> [n, c, I]."""
    n, channels = x.shape[0], weight.shape[1]
    parts = []
    for g, kernels in enumerate(np.split(weight.ids, groups)):
        mine = x[:, g * len(kernels) : (g + 1) * len(kernels)]
        patches = _gathered(mine, taps.outputs)  # [n, o, I, K]
        rows = patches.transpose(0, 2, 1, 3).reshape(1, n * len(taps.outputs), -1)
        columns = kernels.transpose(0, 2, 1).reshape(1, -1, channels)
        product = Expr(x.graph, rows).matmul(Expr(x.graph, columns))
        parts.append(product.reshape(n, -1, channels).swap())
    return joined(parts, 1)


def _overlap(x: Expr, g: Expr, taps: Taps, groups: int) -> Expr:
    """[n, c, I] and cotangents [n, o, O] -> those of the weight [o, c / groups, K]."""
    channels, outputs = x.shape[1] // groups, g.shape[1] // groups
    parts = []
    for i in range(groups):
        patches = _gathered(x[:, i * channels : (i + 1) * channels], taps.inputs)
        columns = patches.transpose(0, 2, 1, 3).reshape(1, -1, channels * taps.inputs.shape[1])
        mine = g.ids[:, i * outputs : (i + 1) * outputs]
        rows = mine.transpose(1, 0, 2).reshape(1, outputs, -1)
        product = Expr(x.graph, rows).matmul(Expr(x.graph, columns))
        parts.append(product.reshape(outputs, channels, -1))
    return joined(parts, 0)


def _flat(x: Expr) -> Expr:
    return x.reshape(x.shape[0], x.shape[1], -1)


def _size(
    x: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, more: Sequence[int],
) -> list[int]:  # fmt: skip
    """Of the output."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    dims = range(len(reach))
    if transposed:
        return [(x[d] - 1) * stride[d] - 2 * padding[d] + reach[d] + more[d] for d in dims]
    return [(x[d] + 2 * padding[d] - reach[d]) // stride[d] + 1 for d in dims]


def _taps(
    x: Sequence[int], y: Sequence[int], kernel: Sequence[int], stride: Any, padding: Any,
    dilation: Any, transposed: bool,
) -> Taps:  # fmt: skip
    # a transposed convolution is the transpose of the one from its outputs to its inputs
    inputs, outputs = (y, x) if transposed else (x, y)
    return Taps.of(inputs, outputs, kernel, stride, padding, dilation)


def _convolution(
    x: Expr, weight: Expr, bias: Expr | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Expr:  # fmt: skip
    kernel = weight.shape[2:]
    size = _size(x.shape[2:], kernel, stride, padding, dilation, transposed, output_padding)
    taps = _taps(x.shape[2:], size, kernel, stride, padding, dilation, transposed)
    y = (_spread if transposed else _correlate)(_flat(x), _flat(weight), taps, groups)
    y = y if bias is None else y + bias.reshape(1, -1, 1)
    return y.reshape(*y.shape[:2], *size)


def _convolution_backward(
    g: Expr, x: Expr, weight: Expr, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: Sequence[bool],
) -> tuple[Expr | None, Expr | None, Expr | None]:  # fmt: skip
    kernel = weight.shape[2:]
    taps = _taps(x.shape[2:], g.shape[2:], kernel, stride, padding, dilation, transposed)
    flat_x, flat_g, kernels = _flat(x), _flat(g), _flat(weight)
    by_x = by_weight = None
    if wanted[0]:
        back = (_correlate if transposed else _spread)(flat_g, kernels, taps, groups)
        by_x = back.reshape(*x.shape)
    if wanted[1]:
        pair = (flat_g, flat_x) if transposed else (flat_x, flat_g)
        by_weight = _overlap(*pair, taps, groups).reshape(*weight.shape)
    return by_x, by_weight, flat_g.sum((0, 2)) if wanted[2] else None


RULES: dict[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}
