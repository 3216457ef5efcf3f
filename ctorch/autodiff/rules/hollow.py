"""Rule of the transformers of hollow nets: their formula, in functions that have rules.

Its coefficients in x are a second series inside of the one that is carried: each is a sum of
products of the lower ones.
"""

from __future__ import annotations

from typing import Any

import torch

from ctorch.autodiff._propagated import rule
from ctorch.ops import hollow as ops
from ctorch.ops._mlp_reference import Series


@rule(ops.transform)
def transform(x: Any, h: Any, transformer: ops.Transformer, order: int = 0) -> Any:
    weights, biases, activation, param = transformer
    first, *others = weights
    line = first[..., 0]
    value = x.unsqueeze(-1) * line + _times(first[..., 1:], h) + biases[0]
    zero = torch.zeros_like(value)
    z = [value, zero + line, *[zero] * (order - 1)][: order + 1]
    for weight, bias in zip(others, biases[1:], strict=True):
        series = Series(activation, param)
        z = [_times(weight, series.push(part)) for part in z]
        z[0] = z[0] + bias
    return torch.stack([part.squeeze(-1) for part in z])


def _times(weight: Any, y: Any) -> Any:
    """The products of a layer: weight [G, out, in] and y [..., d, in] to [..., d, out]."""
    if weight.shape[0] == 1:
        return torch.matmul(y, weight.squeeze(0).mT)
    return torch.einsum("...gi,goi->...go", y, weight)
