"""Rules of sortlets.

Series go through the sorted list: the order is that of the values, the rest is functions with
rules of their own. For the forward Laplacian there are kernels that read each Jacobian row once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._lap import Lap
from ctorch.autodiff._propagated import constant, rule, value_of
from ctorch.ops import sortlet as ops

# ---- series: by the order of the values, functions with rules of their own


@rule(ops.sortlet)
def sortlet(scores: Any, gap: str = "linear") -> Any:
    sign, logabs = ops.sortlet(scores.value, gap)
    gaps, values = _gaps(scores)
    tied = values == 0  # contributes nothing
    series = _phi(torch.where(tied, torch.ones_like(values), gaps), gap).log().sum(-1)
    return sign, series + torch.where(tied.any(-1), logabs, torch.zeros_like(logabs))


@rule(ops.sum_of_sortlets)
def sum_of_sortlets(
    scores: Any, log_coeff: Any, sign: Tensor | None = None, gap: str = "linear"
) -> Any:
    of_terms, logs, largest = _sizes(scores, log_coeff, sign, gap)
    shift = log_coeff - largest.unsqueeze(-1)
    if constant(scores):
        terms = of_terms * (shift + logs).exp()
    else:
        gaps, values = _gaps(scores)
        phi = _phi(gaps, gap)
        unit = torch.where(values == 0, torch.ones_like(values), value_of(phi)).detach()
        order = _order(scores.value)
        terms = (shift + unit.log().sum(-1)).exp() * _product(phi / unit)
        terms = ops.reference.parity(order).to(unit.dtype) * terms
    total = (terms if sign is None else terms * sign).sum(-1)
    value = total.value
    zero = value == 0
    size = torch.where(zero, torch.ones_like(value), total * value.sign())
    ends = torch.where(zero, torch.full_like(value, -torch.inf), largest)
    return value.sign().detach(), size.log() + ends


def _gaps(scores: Any) -> tuple[Any, Tensor]:
    """Gaps between sorted scores, and their values."""
    order = _order(scores.value)
    gaps = scores.linear(lambda s: s.gather(-1, order.expand(s.shape)).diff(dim=-1))
    return gaps, gaps.value


def _order(x: Tensor) -> Tensor:
    return torch.sort(x.detach(), dim=-1, stable=True).indices


def _phi(gaps: Any, gap: str) -> Any:
    return gaps.tanh() if gap == "tanh" else gaps


def _product(x: Any) -> Any:
    """Of all elements of the last dim, by products of neighbors."""
    while x.shape[-1] > 1:
        even, odd = x[..., : x.shape[-1] // 2 * 2 : 2], x[..., 1::2]
        rest = x[..., -1:] if x.shape[-1] % 2 else None
        x = even * odd if rest is None else torch.cat([even * odd, rest], -1)
    return x.squeeze(-1) if x.shape[-1] else x.sum(-1) + 1


def _sizes(
    scores: Any, log_coeff: Any, sign: Tensor | None, gap: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Signs and logarithms of the sortlets of a sum, and the largest term's logarithm."""
    x, c = value_of(scores).detach(), value_of(log_coeff).detach()
    coefficients, _ = ops.check_terms(x, c, sign)
    of_terms, logs = ops.sortlet(x, gap)
    return of_terms, logs, ops.largest_of(logs + coefficients)


# ---- the forward Laplacian


@rule(ops.sortlet, kind=Lap)
def sortlet_laplacian(scores: Any, gap: str = "linear") -> Any:
    sign, logabs = ops.sortlet(scores.value, gap)
    slopes, lap, _ = ops.sortlet_laplacian(
        scores.value, scores.densified().full(), scores.laplacian(), ops.GAPS[gap]
    )
    return sign, Lap(logabs, slopes, lap)


@rule(ops.sum_of_sortlets, kind=Lap)
def sum_of_sortlets_laplacian(
    scores: Any, log_coeff: Any, sign: Tensor | None = None, gap: str = "linear"
) -> Any:
    """By ``lap(psi)`` itself, in which nothing cancels where scores of one term tie."""
    of_terms, logs, largest = _sizes(scores, log_coeff, sign, gap)
    shift = log_coeff - largest.unsqueeze(-1) + torch.zeros_like(logs)
    plain = value_of(shift)
    if constant(scores):
        terms = of_terms * torch.exp(plain + logs)
        rows, laps = torch.zeros_like(terms), torch.zeros_like(terms)
    else:
        rows = scores.densified().full()
        terms, rows, laps = ops.sortlet_term_laplacian(
            scores.value, plain, rows, scores.laplacian(), ops.GAPS[gap]
        )
    if not constant(shift):  # derivatives of exp(shift) psi
        dense = shift.densified().full()
        laps = laps + 2 * (rows * dense).sum(0)
        laps = laps + terms * (shift.laplacian() + dense.square().sum(0))
        rows = rows + terms * dense
    if sign is not None:
        terms, rows, laps = terms * sign, rows * sign, laps * sign
    total = terms.sum(-1)
    of_sum, logabs = ops.signed_log(total, largest)
    safe = torch.where(total == 0, torch.full_like(total, torch.inf), total)
    slopes = rows.sum(-1) / safe
    return of_sum, Lap(logabs, slopes, laps.sum(-1) / safe - slopes.square().sum(0))
