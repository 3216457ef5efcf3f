"""Fused operations of Runge-Kutta methods."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ctorch.ops import _runge_kutta_reference as reference
from ctorch.ops._op import define


def _fake_state(y: Tensor | None, k: Tensor, *_: object) -> Tensor:
    return k.new_empty(k.shape[1:])


def _fake_error(
    y: Tensor,
    y1: Tensor,
    k: Tensor,
    slope: Tensor | None,
    slot: int,
    e: Tensor,
    h: Tensor,
    rtol: Tensor,
    atol: Tensor,
    segments: Sequence[int],
    max_norm: bool,
    per_sample: bool,
) -> Tensor:
    return k.new_empty(k.shape[1:2] if per_sample else ())


def _fake_step(
    y: Tensor,
    k: Tensor,
    b: Tensor,
    e: Tensor,
    h: Tensor,
    rtol: Tensor,
    atol: Tensor,
    segments: Sequence[int],
    max_norm: bool,
    per_sample: bool,
) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape[1:]), k.new_empty(k.shape[1:2] if per_sample else ())


def _fake_interpolate(
    y: Tensor, k: Tensor, p: Tensor, theta: Tensor, h: Tensor, sample: Tensor | None
) -> Tensor:
    return k.new_empty((theta.shape[0], *k.shape[1 if sample is None else 2 :]))


rk_combine = define(
    "rk_combine(Tensor? y, Tensor k, Tensor a, Tensor h) -> Tensor",
    reference.combine,
    fake=_fake_state,
)
rk_stage = define(
    "rk_stage(Tensor? y, Tensor(a!) k, Tensor slope, int slot, Tensor a, Tensor h) -> Tensor",
    reference.stage,
    fake=_fake_state,
)
rk_error = define(
    "rk_error(Tensor y, Tensor y1, Tensor(a!) k, Tensor? slope, int slot, Tensor e, Tensor h, "
    "Tensor rtol, Tensor atol, int[] segments, bool max_norm, bool per_sample) -> Tensor",
    reference.error,
    fake=_fake_error,
)
rk_step = define(
    "rk_step(Tensor y, Tensor k, Tensor b, Tensor e, Tensor h, Tensor rtol, Tensor atol, "
    "int[] segments, bool max_norm, bool per_sample) -> (Tensor, Tensor)",
    reference.step,
    fake=_fake_step,
)
rk_interpolate = define(
    "rk_interpolate(Tensor y, Tensor k, Tensor p, Tensor theta, Tensor h, Tensor? sample) -> Tensor",
    reference.interpolate,
    fake=_fake_interpolate,
)
