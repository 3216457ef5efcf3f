"""Rules of norms, distances and angles between vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ctorch.autodiff._propagated import rule, value_of
from ctorch.autodiff.rules._common import negatives, root


@rule(torch.linalg.vector_norm)
def vector_norm(
    x: Any,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    out: None = None,
) -> Any:
    if dtype is not None:
        x = x.to(dtype)
    if x.ndim == 0:
        return vector_norm(x.reshape(1), ord).reshape(())
    dims = negatives(dim, x.ndim)
    if ord == 2:
        if x.dtype.is_complex:
            square = torch.square(x.real) + torch.square(x.imag)
        else:
            square = torch.square(x)
        return root(square.sum(dims, keepdim=keepdim), 2)
    size = torch.abs(x)
    if ord == math.inf:
        return torch.amax(size, dims, keepdim)
    if ord == -math.inf:
        return torch.amin(size, dims, keepdim)
    if ord == 0:
        return (value_of(x) != 0).sum(dims, keepdim=keepdim).to(size.dtype)
    if ord == 1:
        return size.sum(dims, keepdim=keepdim)
    used = value_of(size).detach() != 0  # |0|^p adds nothing; its derivatives are not finite
    power = torch.where(used, torch.where(used, size, 1.0) ** float(ord), 0.0)
    return root(power.sum(dims, keepdim=keepdim), float(ord))


@rule("norm", torch.functional.norm)
def norm(
    x: Any,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: None = None,
    dtype: Any = None,
) -> Any:
    if p in ("fro", None):
        return vector_norm(x, 2, dim, keepdim, dtype=dtype)
    if p == "nuc":
        return torch.linalg.matrix_norm(x, "nuc", (-2, -1) if dim is None else dim, keepdim)
    return vector_norm(x, p, dim, keepdim, dtype=dtype)


@rule(torch.linalg.norm)
def linalg_norm(
    x: Any,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    out: None = None,
    dtype: Any = None,
) -> Any:
    if ord is None:
        return vector_norm(x, 2, dim, keepdim, dtype=dtype)
    dims = negatives(dim, x.ndim)
    if isinstance(ord, str) or len(dims) == 2:
        return matrix_norm(x, ord, tuple(dims), keepdim, dtype=dtype)
    return vector_norm(x, ord, dim, keepdim, dtype=dtype)


@rule(torch.linalg.matrix_norm)
def matrix_norm(
    x: Any,
    ord: Any = "fro",
    dim: Any = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: Any = None,
    out: None = None,
) -> Any:
    dims = negatives(dim, x.ndim)
    if ord == "fro":
        return vector_norm(x, 2, dims, keepdim, dtype=dtype)
    moved = x.movedim(dims, (-2, -1))
    if ord in ("nuc", 2, -2):
        s = torch.linalg.svdvals(moved)
        y = s.sum(-1) if ord == "nuc" else s.select(-1, 0 if ord == 2 else s.shape[-1] - 1)
    elif ord in (1, -1, math.inf, -math.inf):
        sums = torch.abs(moved).sum(-2 if abs(ord) == 1 else -1)
        y = torch.amax(sums, -1) if ord > 0 else torch.amin(sums, -1)
    else:
        raise ValueError(f"ord: {ord!r} is not an order of matrix norms")
    if keepdim:
        y = y.reshape([1 if d in dims else x.shape[d] for d in range(-x.ndim, 0)])
    return y


@rule(F.normalize)
def normalize(x: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None) -> Any:
    return x / torch.clamp_min(vector_norm(x, p, dim, True), eps)


@rule("cosine_similarity", F.cosine_similarity)
def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    x1, x2 = torch.broadcast_tensors(x1, x2)
    product = (x1 * x2).sum(dim)
    for x in (x1, x2):
        product = product / torch.clamp_min(torch.linalg.vector_norm(x, 2, dim), eps)
    return product


@rule("pairwise_distance", F.pairwise_distance)
def pairwise_distance(
    x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Any:
    return vector_norm(x1 - x2 + eps, p, -1, keepdim)


@rule("dist")
def dist(x: Any, other: Any, p: float = 2) -> Any:
    return vector_norm(x - other, p)


@rule("cdist", torch.functional.cdist)
def cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    return vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


@rule("pdist", F.pdist)
def pdist(x: Any, p: float = 2.0) -> Any:
    rows, columns = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return vector_norm(x.index_select(0, rows) - x.index_select(0, columns), p, -1)


@rule("renorm")
def renorm(x: Any, p: float, dim: int, maxnorm: float) -> Any:
    others = [d for d in range(-x.ndim, 0) if d != (dim if dim < 0 else dim - x.ndim)]
    size = vector_norm(x, p, others, True)
    factor = torch.where(size.value > maxnorm, maxnorm / (size + 1e-7), 1.0)
    return x * factor
