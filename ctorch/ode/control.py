"""Step-size control: the first step, and the next one from the error of the last ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class StepController:
    """PID control of the step size (Söderlind, "Digital filters in adaptive time-stepping", 2003,
    eq. 34).

    With the scaled error norms e_n, e_(n-1), e_(n-2) of the last three accepted steps and q =
    ``order``,

        h_next = h * clip(safety * e_n^(-(P+I+D)/q) * e_(n-1)^((P+2D)/q) * e_(n-2)^(-D/q)).

    ``I = 1, P = D = 0`` (the default) is the classical controller, and what torchdiffeq does. A
    proportional part damps the oscillation of step sizes where stability limits them: ``pi()`` and
    ``pid()`` give settings that the literature advises. A step is accepted where its error norm is
    at most 1.

    Args:
        p, i, d: the gains.
        safety: aim below the tolerance by this factor.
        min_factor, max_factor: limits of a change of step size.
        never_shrinks: under pure integral control an accepted step never shortens the next one:
            torchdiffeq's rule (``odeint`` keeps it), which costs rejections where steps must
            shrink.

    Example:
        >>> import torch, ctorch
        >>> calm = ctorch.ode.StepController.pi(p=0.3, i=0.4)
        >>> t = torch.tensor([0.0, 10.0])
        >>> sol = ctorch.solve_ode(lambda t, y: -20 * y, torch.ones(1), t, controller=calm)
        >>> sol.status.name
        'SUCCESS'
    """

    p: float = 0.0
    i: float = 1.0
    d: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    never_shrinks: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.safety <= 1:
            raise ValueError(f"safety must lie in (0, 1], but is {self.safety}.")
        if not 0 < self.min_factor < 1 <= self.max_factor:
            raise ValueError(
                "the limits must satisfy 0 < min_factor < 1 <= max_factor, but are "
                f"min_factor={self.min_factor}, max_factor={self.max_factor}."
            )
        if not self.p + self.i + self.d > 0:
            raise ValueError(f"p + i + d must be positive, but is {self.p + self.i + self.d}.")

    @classmethod
    def pi(cls, p: float = 0.4, i: float = 0.3) -> StepController:
        """Proportional-integral control (Hairer and Wanner II, IV.2), smoother where stability
        limits the step.
        """
        return cls(p=p, i=i)

    @classmethod
    def pid(cls, p: float = 0.3, i: float = 0.3, d: float = 0.05) -> StepController:
        """Proportional-integral-derivative control."""
        return cls(p=p, i=i, d=d)

    def factor(self, error: float, order: int, history: tuple[float, float]) -> float:
        """By how much the step changes. ``history``: the error norms of the two accepted steps
        before, newest first.
        """
        if error == 0.0:
            return self.max_factor
        if not error < math.inf:  # NaN or infinite: nothing is known but that the step was too long
            return self.min_factor
        if self.p == 0.0 and self.d == 0.0:
            lowest = 1.0 if error < 1.0 and self.never_shrinks else self.min_factor
            return min(self.max_factor, max(self.safety / error ** (self.i / order), lowest))
        factor = self.safety * error ** (-(self.p + self.i + self.d) / order)
        if (
            error <= 1.0
        ):  # the history of accepted steps says nothing on how to shorten a rejected one
            factor *= history[0] ** ((self.p + 2 * self.d) / order)
            factor *= history[1] ** (-self.d / order)
            return min(self.max_factor, max(factor, self.min_factor))
        return min(self.safety, max(factor, self.min_factor))

    def numbers(self, order: int, min_step: float, max_step: float, max_steps: int) -> Tensor:
        """Everything that step control hangs on, as ``ctorch.ops.step_control`` takes it."""
        gains = [self.p, self.i, self.d, self.safety, self.min_factor, self.max_factor]
        values = [*gains, float(self.never_shrinks), order, min_step, max_step, max_steps]
        return torch.tensor(values, dtype=torch.float64)


#: the error norm that starts a history: neutral in the product above
NEUTRAL = 1.0


def make_controller(controller: StepController | str | None) -> StepController:
    """The controller for a name ("i", "pi", "pid"), an instance, or None (integral)."""
    if controller is None:
        return StepController()
    if isinstance(controller, StepController):
        return controller
    named: dict[str, Callable[[], StepController]] = {
        "i": StepController,
        "pi": StepController.pi,
        "pid": StepController.pid,
    }
    if isinstance(controller, str) and controller.lower() in named:
        return named[controller.lower()]()
    raise ValueError(
        'controller must be "i", "pi", "pid" or a ctorch.ode.StepController, but is'
        f" {controller!r}."
    )


def initial_step(
    slope: Callable[[float, Tensor], Tensor],
    norm: Callable[[Tensor], float],
    y0: Tensor,
    k0: Tensor,
    order: int,
    direction: int,
    span: float,
) -> float:
    """First step of an adaptive solve (Hairer, Nørsett, Wanner, "Solving ODEs I", II.4): positive,
    at most ``span``.

    Args:
        slope: ``slope(h, y)``, the vector field at time t0 + direction * h.
        norm: norm of a state-shaped tensor relative to atol + rtol * abs(y0).
        y0, k0: state and slope at t0.
        order: q of the controller.
        direction: +1 or -1.
        span: length of the interval; no evaluation lies beyond it.
    """
    d0, d1 = norm(y0), norm(k0)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, span)
    if not 0.0 < h0 < math.inf:
        return min(1e-6, span)
    k1 = slope(h0, y0 + (direction * h0) * k0)
    d2 = norm(k1 - k0) / h0
    steepest = max(d1, d2)
    if not math.isfinite(steepest):
        return h0
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        h1 = (0.01 / steepest) ** (1.0 / order)
    return min(100.0 * h0, h1, span)


def initial_steps(
    d0: Tensor, d1: Tensor, slope_change: Callable[[Tensor], Tensor], order: int, span: Tensor
) -> Tensor:
    """``initial_step`` for every sample. ``slope_change(h0)``: scaled norm of the change of slope.
    All [B] float64.
    """
    tiny = (d0 < 1e-5) | (d1 < 1e-5)
    h0 = torch.minimum(torch.where(tiny, 1e-6, 0.01 * d0 / d1), span)
    safe = torch.where((h0 > 0) & (h0 < math.inf), h0, torch.clamp(span, max=1e-6))
    d2 = slope_change(safe) / safe
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(
        (d1 <= 1e-15) & (d2 <= 1e-15),
        torch.clamp(safe * 1e-3, min=1e-6),
        (0.01 / steepest) ** (1.0 / order),
    )
    h1 = torch.where(torch.isfinite(steepest), h1, safe)
    return torch.minimum(torch.minimum(100.0 * safe, h1), span)
