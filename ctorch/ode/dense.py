"""The continuous solution: the interpolants of all steps, evaluated at any time in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctorch.ode.layout import Layout
from ctorch.ops import runge_kutta


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
