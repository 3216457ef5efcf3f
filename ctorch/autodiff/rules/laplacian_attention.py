"""Products of two that carry derivatives, and attention, under the forward Laplacian.

In the first layer of attention over electrons, queries, keys and values depend on one electron each.
The scores then depend on pairs, the weights' rows are a rank-one change of the weights, and the
output's dense rows are written down without a product over pairs for each row (``PairWeights``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff import _lap_rows as forms
from ctorch.autodiff._lap import Lap
from ctorch.autodiff._propagated import RULES, constant, rule
from ctorch.autodiff.rules import laplacian, laplacian_norms, products, shapes


@rule("matmul", "__matmul__", "bmm", "mm", torch.linalg.matmul, kind=Lap)
def matmul(a: Any, b: Any) -> Any:
    if constant(b) and b.ndim <= 2 and a.ndim > 1:  # mixes the last dim of a alone
        return a.trailing(lambda s: s @ b)
    if constant(a) or constant(b) or a.ndim < 2 or b.ndim < 2:
        return products.matmul(a, b)
    if isinstance(a.special, PairWeights) and b.axes == (-2,):
        return a.special.times(b)
    if a.axes == (-2,) and b.axes == (-1,) and a.shape[-2] == b.shape[-1] > 1:
        if len(a.rows) == len(b.rows):
            return pair_products(a, b)
    return dense_product(a.densified(), b.densified())


def dense_product(a: Lap, b: Lap) -> Lap:
    """The product of matrices with dense rows, in GEMMs as tall as they can be."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    x, y = (p.value.expand(*batch, *p.shape[-2:]) for p in (a, b))
    ra, rb = (_batch_first(p, batch) for p in (a, b))
    rows = rows_times(ra, y) + times_rows(x, rb)
    lap = 2 * cross(ra, rb)
    if a.lap is not None:
        lap = lap + a.lap @ y
    if b.lap is not None:
        lap = lap + x @ b.lap
    return Lap(x @ y, rows.movedim(-3, 0), lap)


def _batch_first(x: Lap, batch: torch.Size) -> Tensor:
    """Rows ``[*batch, R, M, N]``."""
    return forms.widened(x.rows, len(batch) + 2).expand(-1, *batch, *x.shape[-2:]).movedim(0, -3)


def rows_times(rows: Tensor, y: Tensor) -> Tensor:
    """``[*b, R, M, K], [*b, K, N] -> [*b, R, M, N]`` in one GEMM for each of the batch."""
    return (rows.flatten(-3, -2) @ y).unflatten(-2, rows.shape[-3:-1])


def times_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``[*b, M, K], [*b, R, K, N] -> [*b, R, M, N]``."""
    wide = x @ rows.transpose(-3, -2).flatten(-2)  # [*b, M, R * N]
    return wide.unflatten(-1, (rows.shape[-3], rows.shape[-1])).transpose(-3, -2)


def cross(a: Tensor, b: Tensor) -> Tensor:
    """``sum_r a_r b_r``: ``[*b, R, M, K], [*b, R, K, N] -> [*b, M, N]``, a contraction of R * K."""
    return a.transpose(-3, -2).flatten(-2) @ b.flatten(-3, -2)


def pair_products(a: Lap, b: Lap) -> Lap:
    """``[.., N, K], [.., K, N] -> [.., N, N]`` of single slots: rows of pairs of slots."""
    x, y = a.value, b.value
    ra, rb = (forms.widened(p.rows, max(a.ndim, b.ndim)) for p in (a, b))
    ra = ra.expand(*ra.shape[:-1], x.shape[-1])
    rb = rb.expand(*rb.shape[:-2], y.shape[-2], rb.shape[-1])
    value = x @ y
    first, second = (part.expand(-1, *value.shape) for part in (ra @ y, x @ rb))
    same = 2 * (ra * rb.mT).sum((0, -1))  # [.., N]: the electrons' own
    lap = torch.diag_embed(same.expand(*value.shape[:-1])).expand(value.shape)
    if a.lap is not None:
        lap = lap + a.lap @ y
    if b.lap is not None:
        lap = lap + x @ b.lap
    axes = (-2, -1)
    return Lap(value, forms.halves(first, second, axes, value.shape), lap, axes)


class PairWeights:
    """Rows of a softmax, over the second of two slots, of scores that depend on both.

    The dense row of seed ``(n, c)``, at slots ``i, j``, is
    ``moved[c, i, n] (delta_jn - weights[i, j]) + delta_in local[c, i, j]``.

    Attributes:
        weights: ``[.., N, N]``. local, moved: ``[C, .., N, N]``. lap: ``[.., N, N]``.
    """

    def __init__(self, scores: Lap) -> None:
        own, other = scores.full().chunk(2)
        p = self.weights = scores.value.softmax(-1)
        change = own - (p * own).sum(-1, keepdim=True)
        self.local, self.moved = p * change, p * other
        squares = forms.squared(change, p.shape) + forms.squared(other, p.shape) * (1 - 2 * p)
        squares = squares + (self.moved * self.moved).sum((0, -1)).unsqueeze(-1)
        if scores.lap is not None:
            squares = squares + scores.lap
        self.lap = p * (squares - (p * squares).sum(-1, keepdim=True))

    def dense(self) -> Tensor:
        """``[N * C, .., N, N]``."""
        ahead = self.moved.movedim(-1, 0).unsqueeze(-1)  # [n, C, .., i, 1]
        rows = torch.diag_embed(self.moved, 0, 0, -1) - ahead * self.weights
        rows = rows + torch.diag_embed(self.local.transpose(-1, -2), 0, 0, -2)
        return rows.flatten(0, 1)

    def times(self, v: Lap) -> Lap:
        """The product with values of single slots, ``[.., N, D]``: its rows are dense."""
        p, x = self.weights, v.value
        rv = v.rows
        sizes = [*rv.shape[:-2], *x.shape[-2:]]
        rv = rv.expand(sizes)
        out = p @ x
        ahead = self.moved.movedim(-1, 0).unsqueeze(-1)  # [n, C, .., i, 1]
        source = x.movedim(-2, 0).unsqueeze(1).unsqueeze(-2)  # [n, 1, .., 1, D]
        share = p.movedim(-1, 0).unsqueeze(1).unsqueeze(-1)  # [n, 1, .., i, 1]
        given = rv.movedim(-2, 0).unsqueeze(-2)  # [n, C, .., 1, D]
        rows = ahead * (source - out) + share * given
        rows = rows + torch.diag_embed((self.local @ x).transpose(-1, -2), 0, 0, -2)
        own = torch.diag_embed(self.local.diagonal(0, -2, -1))
        lap = 2 * ((self.moved * (1 - p) + own) @ rv).sum(0) + self.lap @ x
        if v.lap is not None:
            lap = lap + p @ v.lap
        return Lap(out, rows.flatten(0, 1), lap)


@rule("softmax", F.softmax, torch.special.softmax, kind=Lap)
def softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if x.axes == (-2, -1) and dtype is None and dim in (-1, x.ndim - 1):
        weights = PairWeights(x)
        return Lap(weights.weights, weights, weights.lap)
    return laplacian_norms.softmax(x, dim, dtype=dtype)


@rule(F.scaled_dot_product_attention, kind=Lap)
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p or enable_gqa or not all(isinstance(x, Lap) for x in (query, key, value)):
        return RULES[F.scaled_dot_product_attention](
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = matmul(query * factor, shapes.transpose(key, -1, -2))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if constant(attn_mask) and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -math.inf)
        scores = laplacian.add(scores, attn_mask)
    return matmul(softmax(scores, -1), value)
