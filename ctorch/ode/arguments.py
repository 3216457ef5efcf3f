"""Checking and normalizing the arguments of a solve."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch._exceptions import ArgumentError, ArgumentTypeError
from ctorch._numbers import as_int
from ctorch._trees import leaves_like
from ctorch.ode.layout import Layout
from ctorch.ode.problem import Tolerances

ADAPTIVE_OPTIONS = {
    "norm", "first_step", "step_t", "jump_t", "safety", "ifactor", "dfactor", "max_num_steps",
    "min_step", "max_step", "dtype",
}  # fmt: skip
FIXED_OPTIONS = {"norm", "step_size", "grid_constructor", "interp", "perturb", "max_num_steps"}
ROOT_OPTIONS = {"root_finder", "root_tol", "max_iters", "diagonal", "batch_dims"}
ADAMS_OPTIONS = FIXED_OPTIONS | ROOT_OPTIONS | {"max_order"}
BDF_OPTIONS = ADAPTIVE_OPTIONS | FIXED_OPTIONS | ROOT_OPTIONS
TAYLOR_OPTIONS = ADAPTIVE_OPTIONS - {"safety", "ifactor", "dfactor"} | {
    "order", "step_size", "grid_constructor",
}  # fmt: skip
SCIPY_OPTIONS = {"norm", "solver", "min_step", "max_step"}
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def check_func(func: Any) -> None:
    """``func`` must be callable."""
    if not callable(func):
        raise ArgumentTypeError(
            f"func must be callable as func(t, y), but is {type(func).__name__}."
        )


def check_args(args: Any) -> tuple[Any, ...]:
    """Further arguments of ``func``, as a tuple.

    Raises:
        TypeError: they are not in a tuple or list; a tensor would fall apart into its rows.
    """
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple, but is {type(args).__name__}: use args=(value,).")
    return tuple(args)


def as_options(options: Any) -> dict[str, Any]:
    """A copy of ``options``.

    Raises:
        TypeError: it is no mapping.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict, but is {type(options).__name__}.")
    return dict(options or {})


def first_step(dt0: Any) -> float | None:
    """``dt0`` as a number.

    Raises:
        TypeError, ValueError: it is none, or not positive.
    """
    if dt0 is None:
        return None
    try:
        length = float(dt0.detach() if isinstance(dt0, Tensor) else dt0)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"dt0 must be a number, but is {dt0!r}.") from None
    if not 0 < length < math.inf:
        raise ValueError(
            f"dt0 must be positive and finite, but is {length}: the direction is that of t."
        )
    return length


def step_limit(max_steps: Any, name: str = "max_steps") -> int:
    """``max_steps`` as an int; it may be written as 1e5.

    Raises:
        ArgumentError: it is no positive int.
    """
    integral = isinstance(max_steps, float) and max_steps.is_integer()
    count = int(max_steps) if integral else as_int(max_steps)
    if count is None or count < 1:
        raise ArgumentError(f"{name} must be an int, at least 1, but is {max_steps!r}.")
    return count


def check_precision(layout: Layout, method: str) -> None:
    """Error control and linear algebra need a state of float32 or float64.

    Raises:
        TypeError: it is narrower.
    """
    if layout.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"method {method!r} needs a state of float32 or float64, but y0 is {layout.user_dtype}:"
            " keep the state in float32 (y0.float()), func may compute in less (under autocast, or"
            " by casts of its own); or take a fixed-step method."
        )


def check_rows(t: Tensor, size: int) -> None:
    """Times of their own for all samples of a batch.

    Raises:
        ValueError: there are more or fewer.
    """
    if t.dim() == 2 and t.shape[0] != size:
        raise ValueError(
            f"t has {t.shape[0]} rows for a batch of {size}: give [T] or [B, T] with the B of y0."
        )


def check_times(t: Any, device: torch.device, strict: bool, batched: bool) -> Tensor:
    """Times as a floating tensor, 1-D or (batched) 2-D, monotone; moved to ``device`` with a
    warning.

    Raises:
        ArgumentTypeError: no tensor (AssertionError, TypeError).
        TypeError: not floating point.
        ArgumentError: wrong dimensions, NaN, or not monotone (AssertionError, ValueError).
        IndexError: empty.
        NotImplementedError: they cannot be read, as the solve is being recorded.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        by = "torch.jit.trace" if torch.jit.is_tracing() else "torch.export"
        raise NotImplementedError(
            f"{by} of a solve is not built: its steps depend on numbers, which a recording has"
            " not. Record the vector field alone, or call the solve under torch.compile."
        )
    if not isinstance(t, Tensor):
        raise ArgumentTypeError(
            f"t must be a torch.Tensor of times, but is {type(t).__name__}: use"
            " torch.tensor([...])."
        )
    if not t.is_floating_point():
        raise TypeError(f"t must be a floating point tensor, but is {t.dtype}: use t.double().")
    if t.dim() != 1 and not (batched and t.dim() == 2):
        allowed = "[T] or [B, T]" if batched else "one dimensional, [T]"
        raise ArgumentError(f"t must be {allowed}, but has shape {list(t.shape)}.")
    if t.shape[-1] == 0:
        raise IndexError("t is empty: it must hold at least the initial time.")
    if t.device != device:
        warnings.warn(f"t is on {t.device} and y0 on {device}: t is moved there.", stacklevel=4)
        t = t.to(device)
    if not _transformed(t):
        _check_monotone(t.detach(), strict)
    return t


def _check_monotone(t: Tensor, strict: bool) -> None:
    word = "strictly increasing or decreasing" if strict else "monotone (repeats are allowed)"
    for number, row in enumerate(t.tolist() if t.dim() == 2 else [t.tolist()]):
        steps = [b - a for a, b in itertools.pairwise(row)]
        if not all(map(math.isfinite, row)):
            raise ArgumentError(f"t must be finite, but is {t}.")
        if strict:
            monotone = all(x > 0 for x in steps) or all(x < 0 for x in steps)
        else:
            monotone = all(x >= 0 for x in steps) or all(x <= 0 for x in steps)
        if not monotone:
            where = "" if t.dim() == 1 else f" in row {number}"
            raise ArgumentError(f"t must be {word}{where}, but is {row if len(row) < 20 else t}.")


def _transformed(x: Tensor) -> bool:
    return bool(torch._C._functorch.is_batchedtensor(x))


def make_tolerances(layout: Layout, y0: Any, rtol: Any, atol: Any) -> Tolerances:
    """Tolerances for the kernels, from numbers, tensors that broadcast to y0, or (pytree y0) one
    for each part.
    """
    r, a = _tolerance("rtol", rtol, layout, y0), _tolerance("atol", atol, layout, y0)
    if r.dim() != a.dim():
        shape = r.shape if r.dim() else a.shape
        reference = r if r.dim() else a
        r, a = (x.to(reference).expand(shape).contiguous() for x in (r, a))
    positive = r.item() + a.item() > 0 if r.dim() == 0 else bool((a + r > 0).all())
    if not positive:
        raise ArgumentError(
            "rtol and atol must not both be 0 for any element: no step could be accepted."
        )
    return Tolerances(r, a)


def _tolerance(name: str, value: Any, layout: Layout, y0: Any) -> Tensor:
    if isinstance(value, (int, float)):
        if not value >= 0:
            raise ArgumentError(f"{name} must be at least 0 and not NaN, but is {value}.")
        return torch.scalar_tensor(value, dtype=torch.float64)
    parts = [value] if layout.is_tensor else _parts(name, value, y0)
    for part in parts:
        if isinstance(part, Tensor) and part.requires_grad:
            raise ArgumentError(f"{name} cannot require gradient.")
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0):
        tolerance = torch.tensor(float(value), dtype=torch.float64)
    elif layout.is_tensor:
        tolerance = _expand(name, _numbers(name, value), y0, layout)
    else:
        if isinstance(value, Tensor) and value.dim() == 1:
            parts = list(value.unbind())
        leaves = pytree.tree_leaves(y0)
        if len(parts) != len(leaves):
            raise ArgumentError(
                f"{name} has {len(parts)} parts, but y0 has {len(leaves)}: give a number, or one"
                " for each part."
            )
        expanded = [
            _expand(name, _numbers(name, p), leaf, layout)
            for p, leaf in zip(parts, leaves, strict=True)
        ]
        start = 1 if layout.batched else 0
        tolerance = torch.cat([x.reshape(*x.shape[:start], -1) for x in expanded], dim=start)
    if not bool((tolerance >= 0).all()):
        raise ArgumentError(f"{name} must be at least 0 and not NaN, but is {value}.")
    return tolerance


def _parts(name: str, value: Any, y0: Any) -> list[Any]:
    if not isinstance(value, dict):
        return pytree.tree_leaves(value)
    try:
        return leaves_like(value, pytree.tree_structure(y0))
    except TypeError as error:
        raise ArgumentTypeError(f"{name} must have the structure of y0: {error}") from None


def _numbers(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"{name} must be a number or a tensor, but is {value!r}.") from None


def _expand(name: str, value: Tensor, y: Tensor, layout: Layout) -> Tensor:
    try:
        return value.to(layout.device, layout.dtype).expand(y.shape).contiguous()
    except RuntimeError:
        raise ArgumentError(
            f"{name} has shape {list(value.shape)}, which does not broadcast to the state's"
            f" {list(y.shape)}."
        ) from None


def check_options(options: dict[str, Any], known: set[str], solver: str, strict: bool) -> None:
    """Unknown options are an error (``strict``) or, as in torchdiffeq, a warning."""
    unknown = {key: value for key, value in options.items() if key not in known}
    if not unknown:
        return
    message = f"{solver}: Unexpected arguments {unknown}; known options are {sorted(known)}."
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)


def number(options: dict[str, Any], name: str, default: float, positive: bool = False) -> float:
    """A number from the options; infinity only where it is the default."""
    value = options.get(name, default)
    try:
        value = default if value is None else float(value)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"options[{name!r}] must be a number, but is {value!r}.") from None
    endless = value == math.inf != default
    if math.isnan(value) or value < 0 or (positive and value == 0) or endless:
        allowed = "positive" if positive else "at least 0"
        finite = " and finite" if endless else ""
        raise ArgumentError(f"options[{name!r}] must be {allowed}{finite}, but is {value}.")
    return value


def whole(options: dict[str, Any], name: str, default: int, lowest: int, highest: int) -> int:
    """A whole number from the options."""
    value = options.get(name)
    count = default if value is None else as_int(value)
    if count is None or not lowest <= count <= highest:
        most = f" and at most {highest}" if highest < sys.maxsize else ""
        raise ArgumentError(f"{name} must be an int, at least {lowest}{most}, but is {value!r}.")
    return count


def interpolation(options: dict[str, Any], default: str) -> str:
    """How outputs between fixed steps are read: "linear" or "cubic"."""
    interp = options.get("interp", default)
    if interp not in ("linear", "cubic"):
        raise ArgumentError(
            f'Unknown interpolation method {interp!r}: options["interp"] is "linear" or "cubic".'
        )
    return interp


def special_times(options: dict[str, Any], direction: int) -> tuple[list[float], list[float]]:
    """(step_t, jump_t) in tau = direction * t, increasing.

    Raises:
        ValueError: a time is NaN, or occurs twice between them.
    """
    both = []
    for name in ("step_t", "jump_t"):
        value = options.get(name)
        given: Any = (
            [] if value is None else torch.as_tensor(value, dtype=torch.float64).reshape(-1)
        )
        times = [direction * float(x) for x in given]
        if any(map(math.isnan, times)):
            raise ArgumentError(f"options[{name!r}] must not hold NaN, but is {value}.")
        both.append(sorted(times))
    merged = both[0] + both[1]
    if len(set(merged)) != len(merged):
        raise ValueError(
            "`step_t` and `jump_t` must not have any repeated elements between them, but are"
            f" {options.get('step_t')} and {options.get('jump_t')}."
        )
    return both[0], both[1]


def find_callbacks(
    func: Any, supported: tuple[str, ...], method: str
) -> dict[str, Callable[..., None]]:
    """The user's callbacks on ``func``; a warning for those that the method never calls."""
    found = {}
    for name in CALLBACKS:
        callback = getattr(func, name, None)
        if callback is not None and callable(callback):
            found[name] = callback
    missing = sorted(set(found) - set(supported))
    if missing:
        warnings.warn(
            f"Solver '{method}' does not support callbacks {missing}: they are not called.",
            stacklevel=4,
        )
    return {name: found[name] for name in found if name in supported}
