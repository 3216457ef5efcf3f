"""Rules of attention: matrix products around a softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff._propagated import constant, rule


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    weights = _weights(query, key, attn_mask, is_causal, scale, enable_gqa)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p, True)
    if enable_gqa:
        value = _repeated(value, query.shape[-3])
    return torch.matmul(weights, value)


def _weights(
    query: Any, key: Any, mask: Any, causal: bool, scale: float | None, grouped: bool
) -> Any:
    """``softmax(scale q k^T + mask)``, ``[..., L, S]``; zero where a query may look at nothing."""
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    if grouped:
        key = _repeated(key, query.shape[-3])
    scores = torch.matmul(query * scale, key.mT)
    if causal:
        if mask is not None:
            raise ValueError("attn_mask: must be None where is_causal is True")
        shape = scores.shape[-2:]
        mask = torch.ones(shape, dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return torch.softmax(scores, -1)
    if constant(mask) and mask.dtype == torch.bool:
        seen = mask
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
    elif constant(mask):
        seen = mask > -math.inf
    else:
        return torch.softmax(scores + mask, -1)
    weights = torch.softmax(scores + mask, -1)
    none = ~seen.any(-1, keepdim=True)
    return torch.where(none, 0.0, weights)


def _repeated(x: Any, heads: int) -> Any:
    """Heads of keys or values, each for a group of queries."""
    return torch.repeat_interleave(x, heads // x.shape[-3], -3)


@rule(F.multi_head_attention_forward)
def multi_head_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Of ``[L, B, E]`` or ``[L, E]``; returns ``(output, weights or None)``."""
    batched = query.ndim == 3
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        matrices = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b)
            for x, w, b in zip((query, key, value), matrices, biases, strict=True)
        )
    else:
        q, k, v = _projected(query, key, value, in_proj_weight, in_proj_bias)
    batch, mask = q.shape[1], _attention_mask(attn_mask, num_heads, q)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, batch, k.shape[-1])])
        v = torch.cat([v, bias_v.expand(1, batch, v.shape[-1])])
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    k = k if static_k is None else _unfolded(static_k, batch)
    v = v if static_v is None else _unfolded(static_v, batch)
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    mask = _with_padding(mask, key_padding_mask, k.shape[-2], q)
    weights = _weights(q, k, mask, False, None, False)
    if training and dropout_p > 0:
        weights = F.dropout(weights, dropout_p, True)
    y = torch.matmul(weights, v).permute(2, 0, 1, 3).flatten(2)  # [L, B, E]
    y = F.linear(y, out_proj_weight, out_proj_bias)
    if average_attn_weights and need_weights:
        weights = weights.mean(1)
    if not batched:
        y, weights = y.squeeze(1), weights.squeeze(0)
    return y, weights if need_weights else None


def _projected(query: Any, key: Any, value: Any, weight: Any, bias: Any) -> Any:
    """Queries, keys and values; in one product where they are of the same."""
    if query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    weights = weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return tuple(
        F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )


def _heads(x: Any, heads: int) -> Any:
    """``[L, B, E]`` as ``[B, heads, L, E / heads]``."""
    return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _unfolded(x: Any, batch: int) -> Any:
    return x.unflatten(0, (batch, -1))  # static_k: [B * heads, S, D]


def _attention_mask(mask: Any, heads: int, q: Any) -> Any:
    """``[L, S]`` or ``[B * heads, L, S]``, as numbers to add."""
    if mask is None:
        return None
    mask = _additive(mask, q.dtype)
    return mask if mask.ndim == 2 else mask.unflatten(0, (-1, heads))


def _with_padding(mask: Any, padding: Any, keys: int, q: Any) -> Any:
    """The mask with the keys that are padding, and open to keys that were put on."""
    if mask is not None and mask.shape[-1] < keys:
        mask = F.pad(mask, (0, keys - mask.shape[-1]))
    if padding is None:
        return mask
    padding = _additive(padding, q.dtype)
    if padding.shape[-1] < keys:
        padding = F.pad(padding, (0, keys - padding.shape[-1]))
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding


def _additive(mask: Any, dtype: torch.dtype) -> Any:
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:  # True: not to be looked at
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return mask
