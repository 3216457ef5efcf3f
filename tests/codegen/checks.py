"""A lowered field against the function that it comes from: value and derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch.codegen import Traced, trace

from .harness import Compiled


def _close(got: Tensor, want: Tensor, factor: float = 1.0) -> None:
    eps = torch.finfo(got.dtype).eps * factor
    finite = want[want.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=4000 * eps, atol=1000 * eps * scale, equal_nan=True)


def check(
    func: Callable[..., Any],
    y: Any,
    t: Any = 0.3,
    args: tuple[Any, ...] = (),
    *,
    batched: bool = True,
    width: int = 4,
    vjp: bool = True,
    factor: float = 1.0,
) -> Traced:
    """Trace, compile, compare with eager: value, and derivatives by t, y, args and what is held."""
    traced = trace(func, y, t, args, batched=batched)
    if vjp:
        assert not traced.field.derivative_error, traced.field.derivative_error
    compiled = Compiled(traced.source, width)
    traced.verify(compiled.eval, compiled.pull_back if vjp else None)
    split = traced.field.split
    leaves = pytree.tree_leaves(y)
    batch = leaves[0].shape[0] if split else 1
    dims = leaves[0].dim() if isinstance(y, Tensor) else 2
    time = torch.full((batch,) if batched else (1,), float(t), dtype=leaves[0].dtype)
    shaped = time.view(-1, *[1] * (dims - 1)) if batched else time[0]
    flat = torch.cat([x.reshape(batch, -1) for x in leaves], 1)
    times = time.expand(batch)
    with torch.no_grad():
        value = torch.cat(
            [x.reshape(batch, -1) for x in pytree.tree_leaves(func(shaped, y, *args))], 1
        )
    _close(compiled.eval(times, flat, traced.own, traced.shared), value, factor)
    if vjp:
        _check_vjp(compiled, traced, func, (shaped, y, args), (times, flat), factor)
    return traced


def _check_vjp(
    compiled: Compiled,
    traced: Traced,
    func: Callable[..., Any],
    given: tuple[Tensor, Any, tuple[Any, ...]],
    flat: tuple[Tensor, Tensor],
    factor: float,
) -> None:
    shaped, y, args = given
    batch = len(flat[1])
    t = shaped.detach().clone().requires_grad_(True)
    y = pytree.tree_map(lambda x: x.detach().clone().requires_grad_(True), y)
    leaves, spec = pytree.tree_flatten(args)
    leaves = [
        x.detach().clone().requires_grad_(True)
        if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in leaves
    ]  # fmt: skip
    floating = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    owned = [x for x, own in zip(floating, traced.field.owned, strict=True) if own]
    shared = [x for x, own in zip(floating, traced.field.owned, strict=True) if not own]
    held = traced.shared[len(shared) :]
    out = torch.cat(
        [
            x.reshape(batch, -1)
            for x in pytree.tree_leaves(func(t, y, *pytree.tree_unflatten(leaves, spec)))
        ],
        1,
    )
    ct = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    wanted = [t, *pytree.tree_leaves(y), *owned, *shared, *(x for x in held if x.requires_grad)]
    grads: list[Any] = [None] * len(wanted)
    if out.requires_grad:
        grads = list(torch.autograd.grad(out, wanted, ct, allow_unused=True))
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True)]
    for in_parts in (False, True)[: 1 + compiled.in_parts]:
        slope, ct_t, ct_y, ct_own, ct_shared = compiled.vjp(
            *flat, traced.own, traced.shared, ct, in_parts=in_parts
        )
        _close(slope, out.detach(), factor)
        _close(
            ct_t.sum() if t.dim() == 0 else ct_t,
            grads[0] if t.dim() == 0 else grads[0].reshape(-1),
            factor,
        )
        n = len(pytree.tree_leaves(y))
        _close(ct_y, torch.cat([g.reshape(batch, -1) for g in grads[1 : 1 + n]], 1), factor)
        rest = grads[1 + n :]
        if owned:
            _close(ct_own, torch.cat([g.reshape(batch, -1) for g in rest[: len(owned)]], 1), factor)
        by_shared = iter(rest[len(owned) :])
        for k, got in enumerate(ct_shared):
            if traced.field.differentiated[k]:
                _close(got, next(by_shared), factor)
