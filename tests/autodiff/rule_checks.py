"""Checks of one rule: a function's series along a curve, against two independent computations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch.autodiff import jet

Function = Callable[..., Any]


@dataclass
class Case:
    """A function and where to look at it.

    Attributes:
        name: of the test.
        f: the function, of tensors.
        shapes: of its arguments.
        low, high: the range of their values.
        reference: the same function of elementary operations, where torch's own derivatives of f are
            not to be trusted; "none" where there is no such function.
        orders: up to which nested reverse mode is compared.
        step: of the stencil.
    """

    name: str
    f: Function
    shapes: Sequence[tuple[int, ...]] = ((2, 3, 4),)
    low: float = 0.2
    high: float = 0.9
    reference: Any = None
    orders: int = 6
    step: float = 0.03

    def __str__(self) -> str:
        return self.name


def curve(case: Case, seed: int = 0) -> list[list[Tensor]]:
    """Coefficients ``[x, v, w]`` of ``x + t v + t^2 w`` for each argument."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for shape in case.shapes:
        x = torch.rand(shape, generator=g, dtype=torch.float64) * (case.high - case.low) + case.low
        v, w = (torch.randn(shape, generator=g, dtype=torch.float64) * s for s in (0.3, 0.1))
        out.append([x, v, w])
    return out


def flat(out: Any) -> Tensor:
    """All floating point results as one vector of real numbers."""
    parts = []
    for leaf in pytree.tree_leaves(out):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
            parts.append(real.reshape(-1))
    return torch.cat(parts)


def series(f: Function, coefficients: list[list[Tensor]], order: int) -> Tensor:
    """The rule's coefficients ``[order + 1, n]``."""
    rest = [[*c[1:], *[torch.zeros_like(c[0])] * (order - len(c) + 1)] for c in coefficients]
    rest = [terms[:order] for terms in rest]
    value, terms = jet(f, tuple(c[0] for c in coefficients), tuple(rest), factorial_scaled=False)
    leaves = pytree.tree_leaves(value)
    count = len(leaves)
    flat_terms = pytree.tree_leaves(terms)
    if order == 0:
        return flat(value).unsqueeze(0)
    kept = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    assert len(flat_terms) >= count or kept
    rows = [flat(value)]
    per_leaf = pytree.tree_flatten(terms, is_leaf=_is_series)[0]
    for k in range(order):
        rows.append(flat([s[k] for s in per_leaf if isinstance(s, list)]))
    return torch.stack(rows)


def _is_series(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(isinstance(t, Tensor) for t in x)


def at(coefficients: list[list[Tensor]], t: Any) -> list[Tensor]:
    return [sum((c * t**k for k, c in enumerate(cs)), torch.zeros(())) for cs in coefficients]


def stencil(f: Function, coefficients: list[list[Tensor]], step: float) -> Tensor:
    """Coefficients 0 to 4 of the polynomial through 13 points."""
    nodes = torch.linspace(-1, 1, 13, dtype=torch.float64)
    with torch.no_grad():
        values = torch.stack([flat(f(*at(coefficients, float(s) * step))) for s in nodes])
    powers = torch.stack([nodes**k for k in range(13)], 1)
    fitted = torch.linalg.solve(powers, values)
    return torch.stack([fitted[k] / step**k for k in range(5)])


def nested(f: Function, coefficients: list[list[Tensor]], orders: int, weights: Tensor) -> Tensor:
    """``<weights, coefficient k>`` for k = 0 to orders, by reverse mode nested in itself."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    y = (flat(f(*at(coefficients, t))) * weights).sum()
    out, factorial = [y.detach()], 1
    for k in range(1, orders + 1):
        if y.requires_grad:
            (grad,) = torch.autograd.grad(y, t, create_graph=True, allow_unused=True)
        else:
            grad = None
        y = torch.zeros((), dtype=torch.float64) if grad is None else grad
        factorial *= k
        out.append(y.detach() / factorial)
    return torch.stack(out)


def check(case: Case, seed: int = 0) -> None:
    """The value, orders 1-4 against the stencil, all orders against nested reverse mode."""
    coefficients = curve(case, seed)
    order = max(case.orders, 4)
    got = series(case.f, coefficients, order)
    value = flat(case.f(*[c[0] for c in coefficients]))
    torch.testing.assert_close(got[0], value, rtol=1e-12, atol=1e-13)
    expected = stencil(case.f, coefficients, case.step)
    for k, tolerance in zip(range(1, 5), (1e-9, 3e-8, 1e-6, 3e-5), strict=True):
        _close(got[k], expected[k], expected[: k + 1], tolerance, f"order {k}, stencil")
    for low in (0, 1, 2, 3):  # lower orders are the same numbers, computed with fewer
        part = series(case.f, coefficients, low)
        torch.testing.assert_close(part, got[: low + 1], rtol=1e-11, atol=1e-12)
    if case.reference == "none":
        return
    reference = case.reference or case.f
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(value.shape, generator=g, dtype=torch.float64)
    want = nested(reference, coefficients, case.orders, weights)
    have = got[: case.orders + 1] @ weights
    scale = (got.abs() @ weights.abs())[: case.orders + 1].clamp_min(1.0)
    error = (have - want).abs() / scale
    assert bool((error < 1e-9).all()), f"{case.name}: nested reverse mode, {error.tolist()}"


def _close(a: Tensor, b: Tensor, scale: Tensor, tolerance: float, what: str) -> None:
    size = scale.abs().max().clamp_min(1e-3)
    error = float((a - b).abs().max() / size)
    assert error < tolerance, f"{what}: off by {error:.1e}"
