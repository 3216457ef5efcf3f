"""The operators of hollow nets in plain PyTorch: what the kernels must equal, on any device.

Rows: x [N, M] and h [N, M, H] are taken as G groups of R rows, each group with a net of its own:
G = M groups of R = N rows, or one group of all. Taylor coefficients are those in x at fixed h,
normalized. ``theta`` [G, P] holds weight and bias of each layer in turn, ``widths`` how many units
the hidden layers have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctorch.ops import _jet_reference as jets
from ctorch.ops._mlp_reference import ACTIVATIONS as ACTIVATIONS

Series = list[Tensor]  # coefficients [G, R, ...], without the zeros at the end
Layer = tuple[Tensor, Tensor]  # [G, out, in], [G, out]


def transform(
    x: Tensor, h: Tensor, theta: Tensor, widths: Sequence[int], act: int, param: float, order: int
) -> Tensor:
    """Taylor coefficients of the net in x: ``[order+1, N, M]``."""
    layers = _layers(theta, h.shape[-1], widths)
    out = _Forward(x, h, layers, act, param, order).out
    return _ungrouped(jets.stack(out, order), x, 1)


def gradient(
    g: Tensor,
    x: Tensor,
    h: Tensor,
    theta: Tensor,
    widths: Sequence[int],
    act: int,
    param: float,
    order: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of ``sum(g * transform)`` in x, h and theta."""
    layers = _layers(theta, h.shape[-1], widths)
    run = _Forward(x, h, layers, act, param, order)
    bars = list(_grouped(g, theta.shape[0], 1).unsqueeze(-1).unbind(0))  # of a layer's outputs
    found: list[Tensor] = []
    for (weight, _), z, y in reversed(list(zip(layers[1:], run.z, run.y, strict=True))):
        weight_bar = torch.stack([bar.mT @ part for bar, part in zip(bars, y, strict=False)]).sum(0)
        found = [weight_bar.flatten(1), bars[0].sum(1), *found]
        slope = _function(z, act, param, order, 1)
        bars = [bar @ weight for bar in bars]
        bars = [_correlated(slope, bars, j) for j in range(len(z))]
    value = bars[0]
    of_x = (value * run.x.unsqueeze(-1)).sum(1)
    if len(bars) > 1:
        of_x = of_x + bars[1].expand_as(value).sum(1)
    weight_bar = torch.cat([of_x.unsqueeze(-1), value.mT @ run.h], -1)
    found = [weight_bar.flatten(1), value.sum(1), *found]
    inputs = value @ layers[0][0]
    return _ungrouped(inputs[..., 0], x), _ungrouped(inputs[..., 1:], x), torch.cat(found, -1)


class _Forward:
    """The series before (z) and behind (y) each activation, and of the output."""

    def __init__(
        self, x: Tensor, h: Tensor, layers: Sequence[Layer], act: int, param: float, order: int
    ) -> None:
        (weight, bias), *others = layers
        groups = weight.shape[0]
        self.x, self.h = _grouped(x, groups), _grouped(h, groups)
        line = weight[:, :, 0].unsqueeze(1)
        value = self.x.unsqueeze(-1) * line + self.h @ weight[:, :, 1:].mT + bias.unsqueeze(1)
        series = [value, line.expand_as(value)][: order + 1]
        self.z: list[Series] = []
        self.y: list[Series] = []
        for weight, bias in others:
            self.z.append(series)
            self.y.append(_function(series, act, param, order, 0))
            series = [y @ weight.mT for y in self.y[-1]]
            series[0] = series[0] + bias.unsqueeze(1)
        self.out = [each.squeeze(-1) for each in series]


def _function(z: Series, act: int, param: float, order: int, level: int) -> Series:
    """The activation, or its derivative (level 1), at a series."""
    name = ACTIVATIONS[act]
    if name == "identity":
        return [torch.ones_like(z[0])] if level else z
    if name == "relu":
        parts = [torch.ones_like(z[0])] if level else z
        return [torch.where(z[0] <= 0, 0, part) for part in parts]
    return jets.FUNCTIONS[name](z, order, level, param)[: order + 1]


def _correlated(slope: Series, bars: Series, j: int) -> Tensor:
    """Coefficient j of the cotangents: ``sum_{k >= j} bars_k slope_{k-j}``."""
    terms = [bar * s for bar, s in zip(bars[j:], slope, strict=False)]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def _layers(theta: Tensor, context: int, widths: Sequence[int]) -> list[Layer]:
    layers, at, inputs = [], 0, 1 + context
    for outputs in [*widths, 1]:
        end = at + outputs * inputs
        weight = theta[:, at:end].unflatten(1, (outputs, inputs))
        layers.append((weight, theta[:, end : end + outputs]))
        at, inputs = end + outputs, outputs
    return layers


def _grouped(x: Tensor, groups: int, at: int = 0) -> Tensor:
    """[N, M, ...] to [G, R, ...]; the first of the two dims is number ``at``."""
    if x.shape[at + 1] == groups:
        return x.transpose(at, at + 1)
    return x.flatten(at, at + 1).unsqueeze(at)


def _ungrouped(y: Tensor, like: Tensor, at: int = 0) -> Tensor:
    """The inverse, contiguous, for an x [N, M]."""
    if like.shape[1] == y.shape[at]:
        return y.transpose(at, at + 1).contiguous()
    return y.squeeze(at).unflatten(at, like.shape).contiguous()
