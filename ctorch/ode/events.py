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

from ctorch._exceptions import ArgumentError, GradientError
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
            found = [
                _checked(i, event.fn(time, state, *self.args)).to(torch.float64).reshape(-1)
                for i, event in enumerate(self.events)
            ]
            values = [x.tolist() for x in found]
        for i, given in enumerate(values):
            if any(map(math.isnan, given)):
                raise nan_event(i, t)
        return values

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


def nan_event(index: int, t: float) -> ArgumentError:
    """An event function has no sign."""
    return ArgumentError(
        f"event {index} is NaN at t={t:.9g}: an event function must be defined wherever the solve"
        " goes, on both sides of its zero (for instance y - 1 in the place of log(y))."
    )


def _checked(index: int, value: Any) -> Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value))
    if isinstance(value, Tensor) and value.is_floating_point():
        if not value.numel():
            raise ArgumentError(f"event {index} returned no elements: nothing can cross zero.")
        return value.detach()
    what = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(
        f"event {index} must return a real floating point tensor that crosses zero, such as"
        f" y[0] - 1, but returned {what}."
    )


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
        event_fn: the event function; of its elements the one nearest to its zero, in time, fired.
        t: 0-dim, the event's time, without graph.
        y: the state there, differentiable at fixed t.

    Returns:
        The same values, differentiable once; not at all (an error says so) where the event function
        does not move.
    """
    leaves, spec = pytree.tree_flatten(y)
    with torch.enable_grad():
        t_leaf = t.detach().requires_grad_(True)
        y_leaves = [leaf.detach().requires_grad_(True) for leaf in leaves]
        with torch.no_grad():
            state = pytree.tree_unflatten([x.detach() for x in leaves], spec)
            f = leaves_like(func(t.detach(), state), spec)
        g = torch.as_tensor(event_fn(t_leaf, pytree.tree_unflatten(y_leaves, spec))).reshape(-1)
        if not g.requires_grad:
            return t, y
        rates = _rates(g, [t_leaf, *y_leaves], [torch.ones_like(t_leaf), *f])
        # an element that stays at zero is no event
        away = torch.where(rates != 0, g.detach().abs() / rates.abs(), math.inf)
        fired = int(away.argmin())
        total = rates[fired]
        stays = not bool(total.abs() > 0)
        value = torch.as_tensor(event_fn(t.detach(), y)).reshape(-1)[fired]
        moved = -(value - value.detach()) / (torch.ones_like(total) if stays else total)
        t_linked = t + moved.to(t.dtype)
        linked = [leaf + k * moved.to(leaf.dtype) for leaf, k in zip(leaves, f, strict=True)]
        t_once, *once = _Once.apply(stays, t_linked, *linked)
    return t_once, pytree.tree_unflatten(once, spec)


def _rates(g: Tensor, inputs: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """How the elements of ``g`` [n] change as its inputs move along the tangents: [n]."""
    if g.numel() == 1:
        slopes = torch.autograd.grad(g, inputs, torch.ones_like(g), allow_unused=True)
        return _along(slopes, tangents, g).reshape(1)
    # the derivative of the vector-Jacobian product, which is linear in the vector
    weights = torch.zeros_like(g).requires_grad_(True)
    slopes = torch.autograd.grad(g, inputs, weights, create_graph=True, allow_unused=True)
    along = _along(slopes, tangents, g)
    if not along.requires_grad:
        return torch.zeros_like(g)
    return torch.autograd.grad(along, weights)[0]


def _along(slopes: Sequence[Tensor | None], tangents: list[Tensor], like: Tensor) -> Tensor:
    total = like.new_zeros(())
    for slope, tangent in zip(slopes, tangents, strict=True):
        if slope is not None:
            total = total + (slope.conj() * tangent).sum().real
    return total


class _Once(torch.autograd.Function):
    """The identity, which refuses a second derivative (the linear link above would give a wrong
    one).
    """

    @staticmethod
    def forward(ctx: Any, stays: bool, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.stays = stays
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.stays:
            raise GradientError(
                "the event's time has no derivative: the event function does not change there with"
                " time and state (is it a step, such as torch.sign?)."
            )
        if torch.is_grad_enabled():
            raise GradientError(
                "an event's time and state can be differentiated once only (create_graph=True was"
                " asked for)."
            )
        return None, *grads


def _sign(value: float) -> float:
    return float((value > 0) - (value < 0))
