"""Divergence of a vector field: exact, or by estimators of a Jacobian's trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctorch._numbers import as_int
from ctorch.autodiff._arguments import function, points
from ctorch.autodiff._blocks import alone, block_size
from ctorch.autodiff._dtypes import HALF
from ctorch.autodiff._propagated import MissingRuleError, propagate
from ctorch.autodiff._tangents import Tangents
from ctorch.autodiff.hollow import dimwise_derivative
from ctorch.autodiff.mlp import mlp_for
from ctorch.ops import mlp

Field = Callable[[Tensor], Tensor]

METHODS = ("exact", "hutchinson", "hutch++", "xtrace", "hollow")
PRODUCTS = {"hutchinson": 1, "hutch++": 1.5, "xtrace": 2}  # with the Jacobian, for each probe drawn
DISTRIBUTIONS = ("rademacher", "gaussian", "sphere")


def divergence(
    f: Field,
    x: Tensor,
    method: str = "exact",
    *,
    probes: int | None = None,
    distribution: str = "rademacher",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    t: Any = None,
) -> tuple[Tensor, Tensor]:
    """``f(x)`` and ``sum_i d f_i / d x_i``, in one pass and differentiable any number of times.

    Args:
        f: ``[..., d] -> [..., d]``, acting on each sample alone.
        x: ``[..., d]``.
        method:
            ``"exact"``: all d directions in forward mode, in blocks of the batch that fit the
            cache; for plain MLPs of one or two hidden layers the closed form, at the cost of one
            probe whatever d.
            ``"hutchinson"``: the mean of ``v . J v`` over probes (Hutchinson 1989); unbiased, the
            variance falls as 1/probes.
            ``"hutch++"``: exact on a subspace found with a third of the probes, Hutchinson on the
            rest (Meyer, Musco, Musco and Woodruff 2021); unbiased, better where the spectrum of J
            decays and there are six probes or more.
            ``"xtrace"``: the same idea with every probe used for both, leave-one-out (Epperly,
            Tropp and Webber 2024, section 2); unbiased.
            ``"hollow"``: ``f`` is a hollow net, as ``ctorch.nn.HollowMLP``, not a function of x;
            exact, from the diagonal that ``ctorch.dimwise_derivative`` gives, at little more than
            the cost of ``f``.
        probes: products with the Jacobian a sample is granted: default 1 for ``"hutchinson"``, 6
            for ``"hutch++"`` (a multiple of 3) and ``"xtrace"`` (even). Where these two are granted
            d of them or more, they are ``"exact"``, at the cost of d.
        distribution: of the probes, ``"rademacher"`` (signs; the least variance of independent
            entries), ``"gaussian"`` or ``"sphere"`` (uniform directions of length sqrt(d)).
        noise: the caller's own probes ``[probes, *x.shape]`` in place of drawn ones, so that they
            stay the same during a solve. ``"hutch++"`` uses the first half of them for the
            subspace; two thirds of ``probes`` are needed, and half of them for ``"xtrace"``.
        generator: source of drawn probes.
        t: time, for ``"hollow"`` alone, whose net is called as ``f(t, x)``; any other method takes
            ``lambda x: f(t, x)``.

    Returns:
        ``(f(x), divergence)``, ``[..., d]`` and ``[...]``.

    Raises:
        TypeError, ValueError: arguments do not fit, or ``f`` does not return the shape of ``x``,
            or is seen to mix samples, or is not hollow where that is asked for.

    Warns:
        UserWarning: ``f`` calls a function without a rule for forward mode; reverse mode is used.

    Example:
        >>> import torch, ctorch
        >>> value, div = ctorch.divergence(lambda x: x**3, torch.tensor([1.0, 2.0]))
        >>> div
        tensor(15.)
    """
    _check(f, x, method, distribution)
    d = x.shape[-1]
    if t is not None and method != "hollow":
        raise ValueError(f't: method="{method}" takes a function of x; give lambda x: f(t, x)')
    if method in ("exact", "hollow"):
        if probes is not None or noise is not None:
            raise ValueError(f'probes, noise: method="{method}" uses none')
        return _exact(f, x) if method == "exact" else _hollow(f, x, t)
    count = _count(method, probes, noise)
    v = _noise(x, count, distribution, noise, generator)
    if method == "hutchinson":
        value, products = jacobian_products(f, x, v)
        return value, (v * products).sum(-1).mean(0)
    if count * PRODUCTS[method] >= d:
        return _exact(f, x)
    if method == "hutch++":
        return _hutch_plus_plus(f, x, v)
    return _xtrace(f, x, v, rotated=distribution != "rademacher" and noise is None)


def jacobian_products(f: Field, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``f(x)`` and the products ``J v`` for all rows ``[R, *x.shape]`` (or with dims of size 1).

    Where a function within ``f`` has no rule, these are ``J^T v``, which has the same trace.
    """
    try:
        out = propagate(f, Tangents(x, rows))
    except MissingRuleError as error:
        warnings.warn(f"divergence in reverse mode: {error}", UserWarning, stacklevel=3)
        return _reverse_products(f, x, rows)
    if isinstance(out, Tangents):
        value, products = out.value, out.full()
    else:  # constant in x
        value, products = out, torch.zeros_like(x).expand(rows.shape[0], *x.shape)
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"f: expected to return the shape of x, {tuple(x.shape)}, got {got}")
    if not value.is_floating_point():
        raise TypeError(f"f: expected to return floating point, got {value.dtype}")
    return value, products


def _reverse_products(f: Field, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        inner = x if x.requires_grad else x.detach().requires_grad_()
        value = f(inner)
        (products,) = torch.autograd.grad(
            value,
            inner,
            rows.expand(rows.shape[0], *x.shape),
            is_grads_batched=True,
            create_graph=recorded,
            allow_unused=True,
        )
    if products is None:
        products = torch.zeros_like(x).expand(rows.shape[0], *x.shape)
    return (value, products) if recorded else (value.detach(), products)


# ---- exact


def _exact(f: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    net = mlp_for(f, x)
    if net is not None and net.weights[-1].shape[0] == x.shape[-1]:
        return mlp.divergence(net, x)
    d = x.shape[-1]
    if d == 0:
        return f(x), x.sum(-1)
    seeds = torch.eye(d, dtype=x.dtype, device=x.device)
    batch, size = x.shape[:-1].numel(), block_size(f, d)
    if batch > size:
        with torch.no_grad():
            value = f(x.clone())  # which f may write into
        if isinstance(value, Tensor) and value.shape == x.shape and alone(f, x, value):
            return _blockwise(f, x, seeds, size)
    value, div = _trace(f, x, seeds.reshape(d, *(1,) * (x.ndim - 1), d))
    if batch <= size:
        alone(f, x, value)  # refuses what mixes samples
    return value, div


def _blockwise(f: Field, x: Tensor, seeds: Tensor, size: int) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    parts = [_trace(f, block, seeds.unsqueeze(1)) for block in flat.split(size)]
    value, div = (torch.cat(part) for part in zip(*parts, strict=True))
    return value.reshape(x.shape), div.reshape(x.shape[:-1])


def _trace(f: Field, x: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    value, products = jacobian_products(f, x, seeds)
    return value, products.diagonal(dim1=0, dim2=-1).sum(-1)


def _hollow(f: Any, x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
    value, diagonal = dimwise_derivative(f, x, 1, t)
    return value, diagonal[0].sum(-1)


# ---- estimators


def _hutch_plus_plus(f: Field, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k = v.shape[0] // 2
    with torch.no_grad():
        q = _orthonormal(jacobian_products(f, x, v[:k])[1])
        rest = v[k:]
        rest = rest - _combine(q, _inner(q, rest))
    value, products = jacobian_products(f, x, torch.cat([q, rest]))
    inside = (q * products[:k]).sum((0, -1))
    return value, inside + (rest * products[k:]).sum(-1).mean(0)


def _xtrace(f: Field, x: Tensor, v: Tensor, rotated: bool) -> tuple[Tensor, Tensor]:
    k, d = v.shape[0], x.shape[-1]
    value, sketch = jacobian_products(f, x, v)  # [k, ..., d]
    sketch, v = _wide(sketch), _wide(v)
    dtype = v.dtype
    with torch.no_grad():
        q, r = torch.linalg.qr(sketch.detach().movedim(0, -1))  # [..., d, k], [..., k, k]
        # s_i: the direction within the range that the sketch without probe i does not reach
        eps = torch.finfo(dtype).eps * r.abs().amax((-2, -1), keepdim=True)
        eye = torch.eye(k, dtype=dtype, device=x.device)
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        sign = torch.where(diagonal < 0, -1.0, 1.0).to(dtype)
        r = r + (eps + torch.finfo(dtype).tiny) * torch.diag_embed(sign)
        s = torch.linalg.solve_triangular(r.mT, eye, upper=False)  # columns of R^-T
        s = s / torch.linalg.vector_norm(s, dim=-2, keepdim=True)
        probes = v.movedim(0, -1)  # [..., d, k]
        w = q.mT @ probes
        w = w - s * (s * w).sum(-2, keepdim=True)  # the part of probe i that its subspace takes
        rest = probes - q @ w
        scale = torch.ones((), dtype=dtype, device=x.device)
        if rotated and d > k:  # what is left of a probe has any direction, whatever its length
            scale = (d - k + 1) / rest.square().sum(-2)
    basis = q.movedim(-1, 0).to(x.dtype)
    _, products = jacobian_products(f, x, basis)  # [k, ..., d]
    z = _wide(products).movedim(0, -1)
    h = q.mT @ z
    inside = h.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - (s * (h @ s)).sum(-2)
    outside = (rest * (sketch.movedim(0, -1) - z @ w)).sum(-2)
    return value, (inside + scale * outside).mean(-1).to(x.dtype)


def _orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of the span of the rows ``[k, ..., d]``, of the same shape."""
    return torch.linalg.qr(_wide(rows).movedim(0, -1))[0].movedim(-1, 0).to(rows.dtype)


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32: torch decomposes no others."""
    return x.float() if x.dtype in HALF else x


def _inner(q: Tensor, rows: Tensor) -> Tensor:
    return torch.einsum("k...d,r...d->rk...", q, rows)


def _combine(q: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("k...d,rk...->r...d", q, weights)


# ---- probes


def _count(method: str, probes: int | None, noise: Tensor | None) -> int:
    """How many probe vectors a method draws."""
    share = {"hutchinson": (1, 1), "hutch++": (3, 2), "xtrace": (2, 1)}[method]
    if probes is None:
        if noise is not None:
            probes = noise.shape[0] // share[1] * share[0]
        else:
            probes = 1 if method == "hutchinson" else 6
    number = as_int(probes)
    if number is None:
        raise TypeError(f"probes: expected an int, got {type(probes).__name__}")
    probes = number
    if probes < share[0] or probes % share[0]:
        multiple = f"a multiple of {share[0]}, " if share[0] > 1 else ""
        raise ValueError(f'probes: method="{method}" takes {multiple}>= {share[0]}, got {probes}')
    return probes // share[0] * share[1]


def _noise(
    x: Tensor,
    count: int,
    distribution: str,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    shape = (count, *x.shape)
    if noise is not None:
        if not isinstance(noise, Tensor) or noise.shape != shape or noise.dtype != x.dtype:
            got = (
                f"{tuple(noise.shape)}, {noise.dtype}"
                if isinstance(noise, Tensor)
                else type(noise).__name__
            )
            raise ValueError(f"noise: expected {shape}, {x.dtype}, got {got}")
        return noise
    if distribution == "rademacher":
        signs = torch.randint(0, 2, shape, generator=generator, device=x.device)
        return (2 * signs - 1).to(x.dtype)
    v = torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)
    if distribution == "sphere":
        v = v * (math.sqrt(x.shape[-1]) / torch.linalg.vector_norm(v, dim=-1, keepdim=True))
    return v


def _check(f: Field, x: Tensor, method: str, distribution: str) -> None:
    function("f", f)
    points(x)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}"
        )
