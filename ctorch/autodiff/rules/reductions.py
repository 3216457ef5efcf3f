"""Rules of reductions and scans."""

from __future__ import annotations

from typing import Any

import torch

from ctorch.autodiff._propagated import rule, value_of


def _dims(x: Any, dim: Any) -> list[int]:
    """The dims to reduce, counted from the end."""
    if dim is None or dim == ():
        return [d - x.ndim for d in range(x.ndim)]
    given = [dim] if isinstance(dim, int) else list(dim)
    return [d if d < 0 else d - x.ndim for d in given]


@rule("sum")
def sum_(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    dims = _dims(x, dim if axis is None else axis)
    if not dims:
        return x.linear(lambda s: s.clone())
    return x.linear(lambda s: s.sum(dims, keepdim=keepdim, dtype=dtype))


@rule("mean")
def mean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    dims = _dims(x, dim if axis is None else axis)
    if not dims:
        return x.linear(lambda s: s.clone())
    return x.linear(lambda s: s.mean(dims, keepdim=keepdim, dtype=dtype))


@rule("cumsum")
def cumsum(x: Any, dim: int, **_: Any) -> Any:
    at = dim if dim < 0 else dim - x.ndim
    return x.linear(lambda s: s.cumsum(at))


def _pick(x: Any, dim: int, keepdim: bool, index: Any) -> Any:
    at = dim if dim < 0 else dim - x.ndim
    picked = x.take_along_dim(index if keepdim else index.unsqueeze(at), at)
    return picked if keepdim else picked.squeeze(at)


def _extreme(name: str) -> Any:
    def apply(x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        if dim is not None and not isinstance(dim, int):  # max(x, y)
            return torch.maximum(x, dim) if name == "max" else torch.minimum(x, dim)
        if dim is None:
            flat = x.flatten()
            return _pick(flat, 0, False, getattr(flat.value, f"arg{name}")(0))
        values, index = getattr(value_of(x), name)(dim, keepdim=keepdim)
        kind = getattr(torch.return_types, name)
        return kind((_pick(x, dim, keepdim, index), index))

    return apply


rule("max")(_extreme("max"))
rule("min")(_extreme("min"))
