"""The continuous solution: the interpolants of all steps, evaluated at any time in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ctorch.ops import runge_kutta


class DenseOutput:
    """The state at any time of a solved interval.

    Args:
        starts: [P] float64, start of every step in tau = direction * t, increasing.
        lengths: [P] float64, lengths (positive).
        y: [P, *shape], packed state at the starts.
        k: [stages, P, *shape], slopes.
        p: the interpolant's polynomials.
        direction: +1 or -1.
        unpack: packed state [*S, *shape] and S to the user's state.
    """

    def __init__(self, starts, lengths, y, k, p, direction, unpack) -> None:  # type: ignore[no-untyped-def]
        self.starts, self.lengths = starts, lengths
        self.y, self.k, self.p = y, k, p
        self.direction = direction
        self._unpack = unpack

    @property
    def interval(self) -> tuple[float, float]:
        """The times between which it is defined, in the order of the solve."""
        first = float(self.starts[0])
        last = float(self.starts[-1] + self.lengths[-1])
        return self.direction * first, self.direction * last

    def __call__(self, t: Tensor) -> object:
        """The state at ``t``: [*S] -> [*S, *shape], differentiable."""
        starts = self.starts.detach()
        tau = self.direction * t.to(starts.device, torch.float64).reshape(-1)
        self._check(tau.detach(), t)
        place = torch.searchsorted(starts, tau.detach(), right=True).clamp_(1, len(starts)) - 1
        theta = (tau - self.starts[place]) / self.lengths[place]
        signed = self.direction * self.lengths
        device = self.y.device
        flat = runge_kutta.interpolate(
            self.y, self.k, self.p, theta.to(device), signed.to(device), place.to(device)
        )
        shape = tuple(t.shape)
        return self._unpack(flat.reshape(*shape, *self.y.shape[1:]), shape)

    def _check(self, tau: Tensor, t: Tensor) -> None:
        low = float(self.starts[0])
        high = float(self.starts[-1] + self.lengths[-1])
        slack = 1e-12 * max(abs(low), abs(high), 1e-300)
        if tau.numel() and bool(((tau < low - slack) | (tau > high + slack) | tau.isnan()).any()):
            first, last = self.interval
            raise ValueError(
                f"t lies outside the solved interval [{first:.6g}, {last:.6g}]: it ranges from"
                f" {float(t.min()):.6g} to {float(t.max()):.6g}."
            )
