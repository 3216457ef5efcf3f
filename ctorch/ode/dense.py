"""The continuous solution: the interpolants of all steps, evaluated at any time in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctorch.ode.layout import Layout
from ctorch.ops import runge_kutta


def as_time(t: Any) -> Tensor:
    """A time, or several, as a tensor. Of numbers torch makes float32, too coarse for times."""
    return t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)


class DenseOutput:
    """The state at any time of a solved interval.

    Args:
        pieces: starts [P] float64 of all steps in tau = direction * t, increasing, their (positive)
            lengths [P], packed states at the starts [P, *shape] and slopes [stages, P, *shape].
        p: the interpolant's polynomials.
        direction: +1 or -1.
        layout: of the state.
    """

    def __init__(self, pieces: Any, p: Tensor, direction: int, layout: Layout) -> None:
        self.starts, self.lengths, self.y, self.k = pieces
        ends = (self.starts[0], self.starts[-1] + self.lengths[-1])
        self._low, self._high = (float(end.detach()) for end in ends)
        self.p = p
        self.direction = direction
        self._unpack = layout.unpack

    @property
    def interval(self) -> tuple[float, float]:
        """The times between which it is defined, in the order of the solve."""
        return self.direction * self._low, self.direction * self._high

    def __call__(self, t: Tensor) -> Any:
        """The state at ``t``: [*S] -> [*S, *shape], differentiable."""
        starts = self.starts.detach()
        tau = self.direction * t.to(starts.device, torch.float64).reshape(-1)
        self._check(tau.detach(), t)
        place = torch.searchsorted(starts, tau.detach(), right=True).clamp_(1, len(starts)) - 1
        theta = (tau - self.starts[place]) / self.lengths[place]
        signed = self.direction * self.lengths
        device = self.y.device
        flat = runge_kutta.interpolate(
            self.y, self.k, self.p, theta.to(device), signed.to(device), sample=place.to(device)
        )
        shape = tuple(t.shape)
        return self._unpack(flat.reshape(*shape, *self.y.shape[1:]), shape)

    def _check(self, tau: Tensor, t: Tensor) -> None:
        low, high = self._low, self._high
        slack = 1e-12 * max(abs(low), abs(high), 1e-300)
        if tau.numel() and bool(((tau < low - slack) | (tau > high + slack) | tau.isnan()).any()):
            first, last = self.interval
            raise ValueError(
                f"t lies outside the solved interval [{first:.6g}, {last:.6g}]: it ranges from"
                f" {float(t.min()):.6g} to {float(t.max()):.6g}."
            )


class Start:
    """The continuous solution where no step was made: the initial state, at the initial time.

    Args:
        t: the time.
        y: packed state.
        layout: of the state.
    """

    def __init__(self, t: float, y: Tensor, layout: Layout) -> None:
        self.interval = (t, t)
        self._y, self._unpack = y, layout.unpack

    def __call__(self, t: Tensor) -> Any:
        """As ``DenseOutput``."""
        if bool((t.detach().double() != self.interval[0]).any()):
            raise ValueError(
                f"t lies outside the solved interval, which is t={self.interval[0]:.6g} alone: it"
                f" ranges from {float(t.min()):.6g} to {float(t.max()):.6g}."
            )
        shape = tuple(t.shape)
        return self._unpack(self._y.expand(*shape, *self._y.shape), shape)
