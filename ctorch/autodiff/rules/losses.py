"""Rules of loss functions, made of functions that have rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ctorch.autodiff._propagated import rule, value_of


def _reduced(loss: Any, reduction: str) -> Any:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    return loss if reduction == "none" else getattr(loss, reduction)()


def _legacy(size_average: Any, reduce: Any, reduction: str) -> str:
    """The reduction that torch's two older arguments mean."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def _elementwise(function: Any, loss: Callable[..., Any]) -> None:
    """Registers ``f(x, target, ..., reduction=)`` from the loss of one element."""

    def apply(
        x: Any,
        target: Any,
        size_average: Any = None,
        reduce: Any = None,
        reduction: str = "mean",
        weight: Any = None,
        **options: Any,
    ) -> Any:
        terms = loss(x, target, **options)
        if weight is not None:
            terms = terms * weight
        if weight is not None and reduction == "mean" and function in _WEIGHTED_MEAN:
            return terms.sum() / torch.as_tensor(weight).expand(terms.shape).sum()
        return _reduced(terms, _legacy(size_average, reduce, reduction))

    rule(function)(apply)


_WEIGHTED_MEAN = (F.mse_loss, F.l1_loss)
_elementwise(F.mse_loss, lambda x, y: torch.square(x - y))
_elementwise(F.l1_loss, lambda x, y: torch.abs(x - y))
_elementwise(F.soft_margin_loss, lambda x, y: F.softplus(-y * x))


@rule(F.smooth_l1_loss)
def smooth_l1_loss(
    x: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Any:
    size = torch.abs(x - target)
    reduction = _legacy(size_average, reduce, reduction)
    if beta == 0:
        return _reduced(size, reduction)
    near = value_of(size) < beta
    loss = torch.where(near, torch.square(size) * (0.5 / beta), size - 0.5 * beta)
    return _reduced(loss, reduction)


@rule(F.huber_loss)
def huber_loss(
    x: Any, target: Any, reduction: str = "mean", delta: float = 1.0, weight: Any = None
) -> Any:
    size = torch.abs(x - target)
    near = value_of(size) < delta
    loss = torch.where(near, torch.square(size) * 0.5, (size - 0.5 * delta) * delta)
    if weight is not None:
        loss = loss * weight
        if reduction == "mean":
            return loss.sum() / weight.expand(loss.shape).sum()
    return _reduced(loss, reduction)


@rule(F.binary_cross_entropy)
def binary_cross_entropy(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    """Logarithms are cut off at -100, as torch does."""
    loss = -(target * _bounded_log(x) + (1 - target) * _bounded_log(1 - x))
    if weight is not None:
        loss = loss * weight
    return _reduced(loss, _legacy(size_average, reduce, reduction))


def _bounded_log(x: Any) -> Any:
    used = value_of(x) > math.exp(-100)
    return torch.where(used, torch.log(torch.where(used, x, 1.0)), -100.0)


@rule(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> Any:
    """``softplus(x) - target x``; positive targets weigh ``pos_weight``."""
    below = F.softplus(-x)
    if pos_weight is None:
        loss = (1 - target) * x + below
    else:
        loss = (1 - target) * x + ((pos_weight - 1) * target + 1) * below
    if weight is not None:
        loss = loss * weight
    return _reduced(loss, _legacy(size_average, reduce, reduction))


@rule(F.kl_div)
def kl_div(
    x: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    if log_target:
        loss = torch.exp(target) * (target - x)
    else:
        loss = torch.xlogy(target, target) - target * x
    if reduction == "batchmean":
        return loss.sum() / x.shape[0]
    return _reduced(loss, _legacy(size_average, reduce, reduction))


@rule(F.poisson_nll_loss)
def poisson_nll_loss(
    x: Any,
    target: Any,
    log_input: bool = True,
    full: bool = False,
    size_average: Any = None,
    eps: float = 1e-8,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    loss = torch.exp(x) - target * x if log_input else x - target * torch.log(x + eps)
    if full:
        many = value_of(target) > 1
        safe = torch.where(many, target, 2.0)
        stirling = safe * torch.log(safe) - safe + 0.5 * torch.log(2 * math.pi * safe)
        loss = loss + torch.where(many, stirling, 0.0)
    return _reduced(loss, _legacy(size_average, reduce, reduction))


@rule(F.gaussian_nll_loss)
def gaussian_nll_loss(
    x: Any, target: Any, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Any:
    if not isinstance(var, float) and var.shape != x.shape and var.ndim == x.ndim - 1:
        var = var.unsqueeze(-1)
    if isinstance(var, float):
        var = torch.full_like(value_of(x), var)
    small = value_of(var) < eps  # torch bounds the value alone, and keeps the derivative
    var = var + torch.where(small, eps - value_of(var), 0.0).detach()
    loss = 0.5 * (torch.log(var) + torch.square(x - target) / var)
    return _reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


# ---- classes


@rule(F.nll_loss, torch.nll_loss if hasattr(torch, "nll_loss") else F.nll_loss)
def nll_loss(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    reduction = _legacy(size_average, reduce, reduction)
    at = 0 if x.ndim == 1 else 1
    used = target != ignore_index
    place = torch.where(used, target, torch.zeros_like(target))
    picked = -torch.gather(x, at, place.unsqueeze(at)).squeeze(at)
    scale = used.to(x.dtype) if weight is None else weight[place] * used
    loss = picked * scale
    if reduction == "mean":
        return loss.sum() / scale.sum()
    return _reduced(loss, reduction)


@rule(F.cross_entropy)
def cross_entropy(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    reduction = _legacy(size_average, reduce, reduction)
    at, classes = (0, x.shape[0]) if x.ndim == 1 else (1, x.shape[1])
    logs = torch.log_softmax(x, at)
    spread = (1,) * at + (-1,) + (1,) * (x.ndim - at - 1)
    if target.shape == x.shape:  # probabilities of classes
        if label_smoothing:
            target = target * (1 - label_smoothing) + label_smoothing / classes
        terms = target * logs if weight is None else target * logs * weight.reshape(spread)
        loss = -terms.sum(at)
        if reduction == "mean":
            return loss.sum() / max(loss.numel(), 1)
        return _reduced(loss, reduction)
    if not label_smoothing:
        return nll_loss(logs, target, weight, None, ignore_index, None, reduction)
    used = target != ignore_index
    place = torch.where(used, target, torch.zeros_like(target))
    scale = used.to(value_of(x).dtype) if weight is None else weight[place] * used
    right = torch.gather(logs, at, place.unsqueeze(at)).squeeze(at) * scale
    every = logs.sum(at) if weight is None else (logs * weight.reshape(spread)).sum(at)
    loss = -(1 - label_smoothing) * right - (label_smoothing / classes) * (every * used)
    return loss.sum() / scale.sum() if reduction == "mean" else _reduced(loss, reduction)


# ---- margins


@rule(F.cosine_embedding_loss)
def cosine_embedding_loss(
    x1: Any,
    x2: Any,
    target: Any,
    margin: float = 0,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    dots = [(a * b).sum(-1) for a, b in ((x1, x2), (x1, x1), (x2, x2))]
    cosine = dots[0] / torch.sqrt((dots[1] + 1e-12) * (dots[2] + 1e-12))
    loss = torch.where(target == 1, 1 - cosine, torch.clamp_min(cosine - margin, 0))
    return _reduced(loss, _legacy(size_average, reduce, reduction))


@rule(F.margin_ranking_loss)
def margin_ranking_loss(
    x1: Any,
    x2: Any,
    target: Any,
    margin: float = 0,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    loss = torch.clamp_min(-target * (x1 - x2) + margin, 0)
    return _reduced(loss, _legacy(size_average, reduce, reduction))


@rule(F.hinge_embedding_loss)
def hinge_embedding_loss(
    x: Any,
    target: Any,
    margin: float = 1.0,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    near = torch.where(target != 1, torch.clamp_min(margin - x, 0), 0.0)
    return _reduced(
        near + torch.where(target != -1, x, 0.0), _legacy(size_average, reduce, reduction)
    )


@rule(F.triplet_margin_loss)
def triplet_margin_loss(
    anchor: Any,
    positive: Any,
    negative: Any,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    def distance(a: Any, b: Any) -> Any:
        return F.pairwise_distance(a, b, p, eps)

    return triplet_margin_with_distance_loss(
        anchor,
        positive,
        negative,
        distance_function=distance,
        margin=margin,
        swap=swap,
        reduction=_legacy(size_average, reduce, reduction),
    )


@rule(F.triplet_margin_with_distance_loss)
def triplet_margin_with_distance_loss(
    anchor: Any,
    positive: Any,
    negative: Any,
    *,
    distance_function: Any = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Any:
    distance = F.pairwise_distance if distance_function is None else distance_function
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    return _reduced(torch.clamp_min(near - far + margin, 0), reduction)


@rule(F.multi_margin_loss)
def multi_margin_loss(
    x: Any,
    target: Any,
    p: int = 1,
    margin: float = 1.0,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    """``sum_(j != y) w_y max(0, margin - x_y + x_j)^p / C``."""
    x = x.reshape(1) if x.ndim == 0 else x
    place = target.reshape(*x.shape[:-1], 1)
    gaps = torch.clamp_min(margin - torch.gather(x, -1, place) + x, 0) ** p
    if weight is not None:
        gaps = gaps * weight[place]
    others = torch.ones_like(value_of(x)).scatter(-1, place, 0.0)
    loss = (gaps * others).sum(-1) / x.shape[-1]
    return _reduced(loss, _legacy(size_average, reduce, reduction))


@rule(F.multilabel_margin_loss)
def multilabel_margin_loss(
    x: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean"
) -> Any:
    """``sum_ij max(0, 1 - x_i + x_j) / C`` over labels i, listed ahead of a -1, and others j."""
    if x.ndim == 0:
        x, target = x.reshape(1), target.reshape(1)
    listed = (target >= 0).cumprod(-1).bool()
    place = torch.where(listed, target, 0)
    labels = torch.zeros_like(target).scatter_add(-1, place, listed.long()) > 0
    gaps = torch.clamp_min(1 - torch.gather(x, -1, place).unsqueeze(-1) + x.unsqueeze(-2), 0)
    used = listed.unsqueeze(-1) & ~labels.unsqueeze(-2)
    loss = (gaps * used).sum((-2, -1)) / x.shape[-1]
    return _reduced(loss, _legacy(size_average, reduce, reduction))


@rule(F.multilabel_soft_margin_loss)
def multilabel_soft_margin_loss(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    loss = binary_cross_entropy_with_logits(x, target, weight, reduction="none")
    return _reduced(loss.mean(-1), _legacy(size_average, reduce, reduction))
