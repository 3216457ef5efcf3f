"""Which way each derivative operator of an MLP goes: kernel in one autograd node, or reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ctorch.ops import _mlp_reference as reference


def derivative(net: Any, x: Tensor, v: Tensor, order: int) -> Tensor:
    return reference.derivative(net, x, v, order)


def series(net: Any, x: Tensor, order: int) -> Tensor:
    return reference.series(net, x, order)


def laplacian(
    net: Any, x: Tensor, rows: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    value, moved, lap = reference.laplacian(net, x, rows)
    return value, moved if gradient else None, lap


def divergence(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return reference.divergence(net, x)
