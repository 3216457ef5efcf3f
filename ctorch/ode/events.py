"""Events: stopping a solve where a function of time and state crosses zero, and the derivative of
that time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch._exceptions import GradientError
from ctorch._trees import leaves_like
from ctorch.ode.layout import Layout


@dataclasses.dataclass(frozen=True)
class Event:
    """A terminal event: the solve ends where ``fn(t, y, *args)`` crosses zero.

    A function that is zero at the start fires only after it has departed from zero and come back: a
    ball that leaves the floor does not hit it at once.

    Args:
        fn: ``fn(t, y, *args)`` returns a tensor of any shape; the event is the first crossing of
            any element.
        direction: +1: only crossings from negative to positive (in the sense in which the solve
            runs); -1: only from positive to negative; 0: both.

    Example:
        >>> import torch, ctorch
        >>> half = ctorch.ode.Event(lambda t, y: y - 0.5, direction=-1)
        >>> t = torch.tensor([0.0, 9.0])
        >>> sol = ctorch.solve_ode(lambda t, y: -y, torch.ones(1), t, events=half)
        >>> print(f"{sol.event.t.item():.4f} {sol.event.y.item():.4f}")
        0.6931 0.5000
    """

    fn: Callable[..., Tensor]
    direction: int = 0

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"an event's fn must be callable, but is {type(self.fn).__name__}.")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"an event's direction must be -1, 0 or 1, but is {self.direction}.")


#: places within a step at which events are looked at, so that two crossings in one step are not
#: missed
SAMPLES = 4


class Watch:
    """Looks for the first crossing, step by step.

    Args:
        events: the events.
        layout: of the state.
        args: further arguments of the event functions.
        until_event: the solve has no other end.
    """

    def __init__(
        self,
        events: Sequence[Event],
        layout: Layout,
        args: tuple[Any, ...],
        until_event: bool,
        time: Callable[[float], Tensor],
    ) -> None:
        self.events = list(events)
        self.layout = layout
        self.args = args
        self.until_event = until_event
        self._time = time
        self._signs: list[list[float]] | None = None

    def values(self, t: float, y: Tensor) -> list[list[float]]:
        """The event functions' elements at (t, y), per event."""
        with torch.no_grad():
            state = self.layout.unpack(y)
            time = self._time(t)
            return [
                torch.as_tensor(event.fn(time, state, *self.args))
                .detach()
                .to(torch.float64)
                .reshape(-1)
                .tolist()
                for event in self.events
            ]

    def start(self, t: float, y: Tensor) -> None:
        """Note the signs at the first time."""
        self._signs = [[_sign(v) for v in values] for values in self.values(t, y)]

    def after_step(
        self, t: float, h: float, state: Callable[[float], Tensor], samples: int = SAMPLES
    ) -> tuple[float, int] | None:
        """(theta, index of the event) of the first crossing in the step from t to t + h, or None.

        ``state(theta)`` is the packed state within the step, looked at in ``samples`` places.
        """
        assert self._signs is not None
        low = 0.0
        for high in ((i + 1) / samples for i in range(samples)):
            values = self.values(t + high * h, state(high))
            found: tuple[float, int] | None = None
            for i, event in enumerate(self.events):
                for j, value in enumerate(values[i]):
                    before, after = self._signs[i][j], _sign(value)
                    crossed = before * after < 0 or (before != 0 and after == 0)
                    if crossed and event.direction in (0, -int(before)):
                        theta = self._root(i, j, before, t, h, state, low, high)
                        if found is None or theta < found[0]:
                            found = (theta, i)
                    if after != 0:
                        self._signs[i][j] = after
            if found is not None:
                return found
            low = high
        return None

    def _root(
        self,
        i: int,
        j: int,
        before: float,
        t: float,
        h: float,
        state: Callable[[float], Tensor],
        low: float,
        high: float,
    ) -> float:
        def value(theta: float) -> float:
            return before * self.values(t + theta * h, state(theta))[i][j]

        resolution = 4e-16 * max(1.0, abs(t / h))
        return bracketed_root(value, low, high, resolution)


def bracketed_root(
    value: Callable[[float], float], low: float, high: float, tolerance: float
) -> float:
    """Where ``value`` turns from positive to non-positive, by the ITP method (Oliveira and
    Takahashi, 2020).

    ``value(high) <= 0``; ``value(low)`` is positive or, after a departure, zero.
    """
    f_low, f_high = value(low), value(high)
    if f_low <= 0.0 and low > 0.0:
        return low
    if f_high == 0.0:
        return high
    f_low = max(f_low, 0.0) or -f_high
    half = max(0, math.ceil(math.log2(max((high - low) / (2 * tolerance), 1.0))))
    slack, scale = 1, 0.2 / (high - low)
    for count in range(half + slack + 1):
        width = high - low
        if width <= 2 * tolerance:
            break
        middle = 0.5 * (low + high)
        falsi = (f_high * low - f_low * high) / (f_high - f_low)
        shift = min(scale * width * width, abs(middle - falsi))
        truncated = falsi + math.copysign(shift, middle - falsi)
        radius = tolerance * 2.0 ** (half + slack - count) - 0.5 * width
        if abs(truncated - middle) > radius:
            truncated = middle - math.copysign(max(radius, 0.0), middle - falsi)
        f = value(truncated)
        if f > 0.0:
            low, f_low = truncated, f
        elif f < 0.0:
            high, f_high = truncated, f
        else:
            return truncated
    return 0.5 * (low + high)


def link(
    func: Callable[[Tensor, Any], Any],
    event_fn: Callable[[Tensor, Any], Tensor],
    t: Tensor,
    y: Any,
) -> tuple[Tensor, Any]:
    """Give an event's time and state their derivatives, by the implicit function theorem.

    With g(t*, y(t*)) = 0 and D = g_t + g_y f, dt* = -(g_y dy + g_p dp) / D and y(t*) moves by f
    dt*; p is whatever the event function holds.

    Args:
        func: the vector field.
        event_fn: the event function; the element nearest to zero is the one that fired.
        t: 0-dim, the event's time, without graph.
        y: the state there, differentiable at fixed t.

    Returns:
        The same values, differentiable once.
    """
    leaves, spec = pytree.tree_flatten(y)
    with torch.enable_grad():
        t_leaf = t.detach().requires_grad_(True)
        y_leaves = [leaf.detach().requires_grad_(True) for leaf in leaves]
        with torch.no_grad():
            state = pytree.tree_unflatten([x.detach() for x in leaves], spec)
            f = leaves_like(func(t.detach(), state), spec)
        g = _fired(event_fn(t_leaf, pytree.tree_unflatten(y_leaves, spec)))
        if not g.requires_grad:
            return t, y
        slopes = torch.autograd.grad(g, [t_leaf, *y_leaves], allow_unused=True)
        total = g.new_zeros(())
        if slopes[0] is not None:
            total = total + slopes[0]
        for slope, k in zip(slopes[1:], f, strict=True):
            if slope is not None:
                total = total + (slope.conj() * k).sum().real
        value = _fired(event_fn(t.detach(), y))
        moved = -(value - value.detach()) / total
        t_linked = t + moved.to(t.dtype)
        linked = [leaf + k * moved.to(leaf.dtype) for leaf, k in zip(leaves, f, strict=True)]
        t_once, *once = _Once.apply(t_linked, *linked)
    return t_once, pytree.tree_unflatten(once, spec)


def _fired(g: Tensor) -> Tensor:
    flat = torch.as_tensor(g).reshape(-1)
    flat = flat.real if flat.is_complex() else flat
    return flat[flat.detach().abs().argmin()]


class _Once(torch.autograd.Function):
    """The identity, which refuses a second derivative (the linear link above would give a wrong
    one).
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise GradientError(
                "an event's time and state can be differentiated once only (create_graph=True was"
                " asked for)."
            )
        return grads


def _sign(value: float) -> float:
    return float((value > 0) - (value < 0))
