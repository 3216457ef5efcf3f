"""The Fokker-Planck equation of an SDE with diagonal noise, by dimension-wise derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctorch.autodiff.hollow import dimwise_derivative


class LogDensity(NamedTuple):
    """A log density and its derivatives at points: what ``log_density_derivatives`` returns.

    Attributes:
        value: ``log p``, ``[...]``.
        rate: ``d log p / dt``, ``[...]``.
        score: ``d log p / d x_i``, ``[..., d]``.
        curvature: ``d^2 log p / d x_i^2``, ``[..., d]``.
    """

    value: Tensor
    rate: Tensor
    score: Tensor
    curvature: Tensor


def log_density_derivatives(
    log_density: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor
) -> LogDensity:
    """Value, rate, score and diagonal curvature of a log density.

    By autograd, with ``d`` further backward passes for the curvature: a density that stays as it is
    is asked once, before training.

    Args:
        log_density: ``log p(t, x)``: from ``[..., 1]`` and ``[..., d]`` to ``[...]``, each sample
            alone, twice differentiable by autograd.
        t: ``[..., 1]``, of the dtype of ``x``.
        x: ``[..., d]``, floating point.

    Returns:
        The derivatives; they carry a graph to the density's parameters where gradients are enabled.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    _check(t, x)
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        t = t if t.requires_grad else t.detach().requires_grad_()
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = log_density(t, x)
        if not isinstance(value, Tensor) or value.shape != x.shape[:-1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"log_density: expected values [...] = {tuple(x.shape[:-1])} for x "
                f"{tuple(x.shape)}, got {got}"
            )
        rate, score = _gradients(value, (t, x))
        columns = [_gradients(part, (x,))[0][..., i] for i, part in enumerate(score.unbind(-1))]
        curvature = torch.stack(columns, -1) if columns else torch.zeros_like(score)
    out = LogDensity(value, rate.squeeze(-1), score, curvature)
    return out if recording else LogDensity(*(part.detach() for part in out))


def fokker_planck(
    drift: Any, diffusion: Any, score: Tensor, curvature: Tensor, t: Tensor, x: Tensor
) -> Tensor:
    """The rate at which an SDE changes the logarithm of a density.

    For ``dx_i = f_i(x, t) dt + g_i(x, t) dW_i`` (Ito) the Fokker-Planck equation, divided by p, is
    with ``D_i = g_i^2`` and ``s = grad log p``::

        d log p / dt = - sum_i (d_i f_i + f_i s_i)
                       + 1/2 sum_i (d_i^2 D_i + 2 s_i d_i D_i + D_i (d_i s_i + s_i^2))

    where only derivatives of ``f_i`` and ``g_i`` in ``x_i`` occur: one pass through a hollow net.
    An SDE is learned from snapshots of its marginals by fitting a density to them and matching
    this rate to the density's own.

    Args:
        drift: f, a hollow net (``ctorch.nn.HollowMLP``, ...), called ``f(t, x)``.
        diffusion: g, a hollow net; or what does not depend on x: a number, or a tensor that
            broadcasts against ``x``. Its sign does not matter.
        score: ``d log p / d x_i``, ``[..., d]``, as of ``log_density_derivatives``.
        curvature: ``d^2 log p / d x_i^2``, ``[..., d]``.
        t: ``[..., 1]``.
        x: ``[..., d]``.

    Returns:
        ``d log p / dt``, ``[...]``, differentiable in everything.

    Raises:
        TypeError: a net is not hollow; dtypes do not fit.
        ValueError: shapes do not fit.

    Source: Chen and Duvenaud, "Neural Networks with Cheap Differential Operators" (2019),
    section 5.

    Example:
        Brownian motion from a unit Gaussian: p(t) is a Gaussian of variance 1 + t.

        >>> import torch, ctorch
        >>> t, x = torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [2.0]])
        >>> still = ctorch.nn.HollowMLP(1)
        >>> with torch.no_grad():
        ...     for p in still.parameters():
        ...         _ = p.zero_()
        ...     rate = ctorch.autodiff.fokker_planck(still, 1.0, -x, -torch.ones(3, 1), t, x)
        >>> torch.allclose(rate, 0.5 * (x[:, 0] ** 2 - 1))
        True
    """
    _check(t, x)
    for name, given in (("score", score), ("curvature", curvature)):
        if not isinstance(given, Tensor) or given.shape != x.shape:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{name}: expected the shape of x, {tuple(x.shape)}, got {got}")
    f, (f1,) = dimwise_derivative(drift, x, 1, t)
    noise, noise1, noise2 = _squared(diffusion, t, x)
    spread = noise2 + 2 * score * noise1 + noise * (curvature + score**2)
    return (0.5 * spread - f1 - f * score).sum(-1)


def _squared(diffusion: Any, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """D = g^2 with its first two dimension-wise derivatives."""
    if isinstance(diffusion, (int, float, Tensor)):
        try:
            return (x.new_ones(()) * diffusion).expand(x.shape) ** 2, 0.0, 0.0
        except RuntimeError:
            got = tuple(diffusion.shape) if isinstance(diffusion, Tensor) else diffusion
            raise ValueError(
                f"diffusion: expected a shape that broadcasts to x's {tuple(x.shape)}, got {got}"
            ) from None
    g, (g1, g2) = dimwise_derivative(diffusion, x, 2, t)
    return g**2, 2 * g * g1, 2 * (g1**2 + g * g2)


def _check(t: Any, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor [..., d], got {got}")
    if not isinstance(t, Tensor) or t.dtype != x.dtype:
        got = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t: expected a tensor of x's dtype {x.dtype}, got {got}")
    if t.shape != (*x.shape[:-1], 1):
        raise ValueError(f"t: expected {(*x.shape[:-1], 1)} beside x, got {tuple(t.shape)}")


def _gradients(value: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        return tuple(map(torch.zeros_like, at))
    grads = torch.autograd.grad(value.sum(), at, create_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, at, strict=True))
