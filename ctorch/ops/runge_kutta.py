"""Fused operations of Runge-Kutta methods: stages, step ends with their error norm, dense output.

A state is a tensor ``y [*shape]``; its slopes are the rows of one buffer ``k [S, *shape]``.
The step ``h`` is a number, or one per sample, ``[B]`` with ``B = shape[0]``. Coefficients of a
tableau are plain numbers; stages whose coefficient is zero are not looked at, so what is left in
their rows, even NaN, does not matter.

The functions here check their arguments. A solver's inner loop calls the bare operators below,
``rk_combine``, ``rk_stage``, ``rk_error``, ``rk_step`` and ``rk_interpolate``, with all numbers as
float64 tensors on the CPU: a call costs a few microseconds.

Dtypes: float32 and float64; ``combine`` and ``stage_`` take float16 and bfloat16 too, and add them
up in float32. Steps, coefficients and times are float64 whatever the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ctorch.ops import _runge_kutta_reference as reference
from ctorch.ops import _runge_kutta_rules as rules
from ctorch.ops._op import define

Numbers = Sequence[float] | Tensor
Norms = ("rms", "max")


def combine(y: Tensor | None, k: Tensor, a: Numbers, h: float | Tensor) -> Tensor:
    """The state ``y + h * sum_j a[j] * k[j]`` at which a stage is evaluated.

    Differentiable any number of times in ``y``, ``k`` and ``h``, in both modes, and under vmap.

    Args:
        y: state ``[*shape]``; None stands for zeros.
        k: slopes ``[S, *shape]``.
        a: coefficients, at most S; the remaining rows are not used.
        h: step, ``[]`` or ``[B]``.

    Returns:
        ``[*shape]``, in the dtype of ``k``.

    Raises:
        ValueError: shapes do not fit; the message names the argument.
        TypeError: a dtype is not supported, or differs from that of ``k``.
    """
    a, h = _check(k, {"y": y}, {"a": a}, h, half=True)
    return cast(Tensor, rk_combine(y, k, a, h))


def stage_(
    y: Tensor | None, k: Tensor, slope: Tensor, slot: int, a: Numbers, h: float | Tensor
) -> Tensor:
    """Stores a slope in ``k[slot]`` and combines, in one pass: what a stage of a hot loop costs.

    It records no graph; use ``combine`` where one is needed.

    Args:
        y: state ``[*shape]``; None stands for zeros.
        k: slopes ``[S, *shape]``, contiguous; its row ``slot`` is overwritten.
        slope: ``[*shape]``, with any strides.
        slot: the row it belongs to.
        a: coefficients of the combination that follows, as for ``combine``.
        h: step, ``[]`` or ``[B]``.

    Returns:
        ``y + h * sum_j a[j] * k[j]`` with the new slope in its place.

    Raises:
        ValueError: shapes or ``slot`` do not fit, or ``k`` is not contiguous.
        TypeError: a dtype is not supported, or differs from that of ``k``.
        RuntimeError: an argument requires grad while grad mode is on.
    """
    _refuse_grad("stage_", "combine", y, k, slope, h)
    a, h = _check(k, {"y": y, "slope": slope}, {"a": a}, h, half=True)
    _check_slot(k, slot)
    return cast(
        Tensor,
        torch.ops.ctorch.rk_stage.default(
            None if y is None else y.contiguous(), k, slope, slot, a, h
        ),
    )


def error_norm(
    y: Tensor,
    y1: Tensor,
    k: Tensor,
    e: Numbers,
    h: float | Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
    *,
    slope: Tensor | None = None,
    slot: int = -1,
    segments: Sequence[int] = (),
    norm: str = "rms",
    per_sample: bool = False,
) -> Tensor:
    """Norm of ``h * sum_j e[j] * k[j] / (atol + rtol * max(|y|, |y1|))``, without a temporary.

    It records no graph; use ``step_end`` where one is needed. NaN in what is looked at gives NaN.

    Args:
        y: state at the start of the step ``[*shape]``.
        y1: state at its end ``[*shape]``.
        k: slopes ``[S, *shape]``, contiguous.
        e: error weights, at most S.
        h: step, ``[]`` or ``[B]``.
        rtol: relative tolerance, a number or anything that broadcasts against the state.
        atol: absolute tolerance, likewise.
        slope: if given, it is first stored in ``k[slot]``, in the same pass.
        slot: the row it belongs to; negative counts from the end.
        segments: lengths that partition the flattened state, or each flattened sample, into parts
            (say the tensors of a tuple): the norm is the largest of the parts' norms.
        norm: ``"rms"`` or ``"max"``.
        per_sample: a norm for each sample rather than for the whole state.

    Returns:
        ``[]``, or ``[B]`` if ``per_sample``; in the dtype of ``k``.

    Raises:
        ValueError: shapes, ``slot``, ``segments`` or ``norm`` do not fit.
        TypeError: a dtype is not supported, or differs from that of ``k``.
        RuntimeError: an argument requires grad while grad mode is on.
    """
    _refuse_grad("error_norm", "step_end", y, y1, k, slope, h, rtol, atol)
    e, h = _check(k, {"y": y, "y1": y1, "slope": slope}, {"e": e}, h)
    if slope is not None:
        slot = slot + k.shape[0] if slot < 0 else slot
        _check_slot(k, slot)
    rtol, atol, maximum = _check_norm(k, rtol, atol, segments, norm, per_sample)
    y, y1 = y.contiguous(), y1.contiguous()
    args = (y, y1, k, slope, slot, e, h, rtol, atol, list(segments), maximum, per_sample)
    return cast(Tensor, torch.ops.ctorch.rk_error.default(*args))


def step_end(
    y: Tensor,
    k: Tensor,
    b: Numbers,
    e: Numbers,
    h: float | Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
    *,
    segments: Sequence[int] = (),
    norm: str = "rms",
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """New state ``y + h * sum_j b[j] * k[j]`` and the norm of its scaled error, in one pass.

    Differentiable any number of times in ``y``, ``k``, ``h`` and tolerances that are tensors, in
    both modes, and under vmap. Where the norm is zero its derivative is taken as zero; among equal
    largest parts or elements it is shared evenly.

    Args:
        y: state ``[*shape]``.
        k: slopes ``[S, *shape]``.
        b: weights of the solution, at most S.
        e: weights of the error, at most S.
        h: step, ``[]`` or ``[B]``.
        rtol: as for ``error_norm``.
        atol: as for ``error_norm``.
        segments: as for ``error_norm``.
        norm: ``"rms"`` or ``"max"``.
        per_sample: a norm for each sample rather than for the whole state.

    Returns:
        The new state ``[*shape]``, and the norm ``[]``, or ``[B]`` if ``per_sample``.

    Raises:
        ValueError: shapes, ``segments`` or ``norm`` do not fit.
        TypeError: a dtype is not supported, or differs from that of ``k``.
    """
    b, e, h = _check(k, {"y": y}, {"b": b, "e": e}, h)
    rtol, atol, maximum = _check_norm(k, rtol, atol, segments, norm, per_sample)
    result = rk_step(y, k, b, e, h, rtol, atol, list(segments), maximum, per_sample)
    return cast(tuple[Tensor, Tensor], result)


def interpolate(
    y: Tensor,
    k: Tensor,
    p: Tensor,
    theta: Numbers,
    h: float | Tensor,
    *,
    sample: Tensor | None = None,
) -> Tensor:
    """Dense output ``y + h * sum_i b_i(theta) * k[i]`` at many times in one pass.

    Differentiable any number of times in ``y``, ``k``, ``theta`` and ``h``, in both modes, and
    under vmap.

    Args:
        y: state at the start of the step ``[*shape]``.
        k: slopes ``[S, *shape]``.
        p: polynomials of the weights, ``[<=S, D]`` float64 on the CPU:
            ``b_i(theta) = sum_{m=1..D} p[i, m-1] * theta**m``.
        theta: ``[M]``, the fraction of the step at which each query lies.
        h: step, ``[]`` or ``[B]``.
        sample: ``[M]`` int64, the sample that each query belongs to; None: all of them.

    Returns:
        ``[M, *shape]``; with ``sample``, ``[M, *shape[1:]]``.

    Raises:
        ValueError: shapes do not fit, or a sample is out of range (on the CPU).
        TypeError: a dtype is not supported, or differs from that of ``k``.
    """
    (h,) = _check(k, {"y": y}, {}, h)
    theta = theta if isinstance(theta, Tensor) else torch.tensor(theta, dtype=torch.float64)
    if theta.dim() != 1:
        raise ValueError(f"theta must be [M], got shape {tuple(theta.shape)}")
    if p.dim() != 2 or p.shape[0] > k.shape[0]:
        raise ValueError(f"p must be [<={k.shape[0]}, D], got shape {tuple(p.shape)}")
    if sample is not None and (sample.shape != theta.shape or k.dim() < 2):
        got = f"{tuple(sample.shape)} for a state {tuple(k.shape[1:])}"
        raise ValueError(f"sample must be [{len(theta)}] as theta is, and need samples; got {got}")
    p, theta = p.detach().to("cpu", torch.float64).contiguous(), theta.to(torch.float64)
    if sample is not None:
        theta = theta.to(k.device)
    return cast(Tensor, rk_interpolate(y, k, p, theta.contiguous(), h, sample))


# ---- the bare operators ------------------------------------------------------------------------


def _fake_state(y: Tensor | None, k: Tensor, *_: Any) -> Tensor:
    return k.new_empty(k.shape[1:])


def _fake_error(y: Tensor, y1: Tensor, k: Tensor, *args: Any) -> Tensor:
    return k.new_empty(k.shape[1:2] if args[-1] else ())


def _fake_step(y: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape[1:]), k.new_empty(k.shape[1:2] if args[-1] else ())


def _fake_interpolate(
    y: Tensor, k: Tensor, p: Tensor, theta: Tensor, h: Tensor, sample: Tensor | None
) -> Tensor:
    return k.new_empty((theta.shape[0], *k.shape[1 if sample is None else 2 :]))


rk_combine = define(
    "rk_combine(Tensor? y, Tensor k, Tensor a, Tensor h) -> Tensor",
    reference.combine,
    fake=_fake_state,
    backward=rules.combine_backward,
    jvp=rules.combine_jvp,
    vmap=rules.combine_vmap,
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
    backward=rules.step_backward,
    jvp=rules.step_jvp,
    vmap=rules.step_vmap,
)
rk_interpolate = define(
    "rk_interpolate(Tensor y, Tensor k, Tensor p, Tensor theta, Tensor h, Tensor? sample) "
    "-> Tensor",
    reference.interpolate,
    fake=_fake_interpolate,
    backward=rules.interpolate_backward,
    jvp=rules.interpolate_jvp,
    vmap=rules.interpolate_vmap,
)


# ---- checks ------------------------------------------------------------------------------------


def _check(
    k: Tensor,
    states: dict[str, Tensor | None],
    coefficients: dict[str, Numbers],
    h: float | Tensor,
    half: bool = False,
) -> list[Any]:
    """Checks what all functions share; returns the coefficients and the step as float64 tensors."""
    allowed = [torch.float32, torch.float64] + half * [torch.float16, torch.bfloat16]
    if k.dim() < 1:
        raise ValueError("k must be [S, *shape], got a 0-dim tensor")
    if k.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"k must have dtype {names}, got {k.dtype}; convert the state first")
    for name, x in states.items():
        if x is None:
            continue
        if x.shape != k.shape[1:]:
            want = f"{tuple(k.shape[1:])}, the shape of a row of k"
            raise ValueError(f"{name} must have shape {want}; got {tuple(x.shape)}")
        if x.dtype != k.dtype:
            raise TypeError(f"{name} must have the dtype of k, {k.dtype}; got {x.dtype}")
        if x.device != k.device:
            raise ValueError(f"{name} must be on the device of k, {k.device}; got {x.device}")
    numbers = [_coefficients(name, x, k.shape[0]) for name, x in coefficients.items()]
    return [*numbers, _step(h, k)]


def _coefficients(name: str, x: Numbers, stages: int) -> Tensor:
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"{name} is a constant of the method and has no gradient; detach it")
    x = x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
    if x.dim() != 1 or x.shape[0] > stages:
        raise ValueError(
            f"{name} must be [<={stages}], a number per row of k; got {tuple(x.shape)}"
        )
    return x.to("cpu", torch.float64).contiguous()


def _step(h: float | Tensor, k: Tensor) -> Tensor:
    if not isinstance(h, Tensor):
        return torch.tensor(h, dtype=torch.float64)
    if h.dim() > 1 or (h.dim() == 1 and (k.dim() < 2 or h.shape[0] != k.shape[1])):
        samples = k.shape[1] if k.dim() > 1 else "B"
        raise ValueError(f"h must be a number, [] or [{samples}]; got shape {tuple(h.shape)}")
    if h.is_complex():
        raise TypeError(f"h must be real, got {h.dtype}")
    return h.to(torch.float64) if h.dim() == 0 else h.to(k.device, torch.float64)


def _check_norm(
    k: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
    segments: Sequence[int],
    norm: str,
    per_sample: bool,
) -> tuple[Tensor, Tensor, bool]:
    if norm not in Norms:
        raise ValueError(f"norm must be one of {Norms}, got {norm!r}")
    if per_sample and k.dim() < 2:
        raise ValueError("per_sample needs a state with samples, [B, ...], but the state is 0-dim")
    shape = k.shape[2 if per_sample else 1 :]
    if segments and (min(segments) < 0 or sum(segments) != shape.numel()):
        what = "a sample" if per_sample else "the state"
        raise ValueError(
            f"segments must partition the {shape.numel()} elements of {what}, got {list(segments)}"
        )
    return _tolerance("rtol", rtol, k), _tolerance("atol", atol, k), norm == "max"


def _tolerance(name: str, x: float | Tensor, k: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.tensor(x, dtype=torch.float64)
    if x.dim() == 0 and x.device.type == "cpu":
        return x.to(torch.float64)
    try:
        return x.to(k.device, k.dtype).expand(k.shape[1:]).contiguous()
    except RuntimeError:
        shapes = f"{tuple(x.shape)} against {tuple(k.shape[1:])}"
        raise ValueError(f"{name} must broadcast against the state, got {shapes}") from None


def _check_slot(k: Tensor, slot: int) -> None:
    if not 0 <= slot < k.shape[0]:
        raise ValueError(f"slot must be a row of k, 0 to {k.shape[0] - 1}; got {slot}")
    if not k.is_contiguous():
        raise ValueError("k must be contiguous, since a slope is stored in it")


def _refuse_grad(name: str, instead: str, *tensors: Any) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{name} records no graph, but an argument requires grad: use {instead}, "
            "or call it under torch.no_grad()"
        )
