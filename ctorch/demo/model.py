"""The two models: Lotka-Volterra, and Lotka-Volterra with a small network on top.

Both describe the logarithms of the counts: counts stay positive, and errors of observation are
relative to the count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LotkaVolterra(nn.Module):
    """d log(hare)/dt = birth - predation * lynx; d log(lynx)/dt = growth * hare - death.

    Attributes:
        log_rates: [4] logarithms of birth, predation, death and growth, so that the rates stay
            positive.
        start: [2] logarithms of the counts in the first year; fitted, as that count is as uncertain
            as the others.
    """

    def __init__(self, log_counts: Tensor) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(_first_guess(log_counts).log())
        self.start = nn.Parameter(log_counts[0].clone())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Rates of change [..., 2] at log-counts ``y`` [..., 2]."""
        birth, predation, death, growth = self.log_rates.exp().unbind()
        counts = y.exp()
        hare = birth - predation * counts[..., 1]
        lynx = growth * counts[..., 0] - death
        return torch.stack((hare, lynx), -1)

    def penalty(self, y: Tensor) -> Tensor:
        """What a fit adds to its loss for the path ``y`` [T, 2]: nothing."""
        return y.new_zeros(())


class UniversalODE(LotkaVolterra):
    """Lotka-Volterra plus a network of the log-counts, which is punished for what it adds.

    Args:
        known: the fitted Lotka-Volterra model to start from.
        log_counts: [T, 2] what is fitted; its mean and spread scale the network's input.
        width: hidden units.
        weight: of the penalty. It was chosen on the training years alone: of 0.03, 0.3, 3 and 10,
            fitted up to each of 1909-1914 and judged by the years from there to 1915, it forecast
            best in total.
    """

    center: Tensor
    spread: Tensor
    observed: Tensor

    def __init__(
        self, known: LotkaVolterra, log_counts: Tensor, width: int = 16, weight: float = 0.03
    ) -> None:
        super().__init__(log_counts)
        self.load_state_dict(known.state_dict())
        self.weight = weight
        last = nn.Linear(width, 2)
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.zero_()
        self.network = nn.Sequential(nn.Linear(2, width), nn.Tanh(), last).double()
        self.register_buffer("center", log_counts.mean(0))
        self.register_buffer("spread", log_counts.std(0))
        self.register_buffer("observed", log_counts.clone())

    def correction(self, y: Tensor) -> Tensor:
        """What the network adds to the rates of change at log-counts ``y`` [..., 2]."""
        result: Tensor = self.network((y - self.center) / self.spread)
        return result

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) + self.correction(y)

    def penalty(self, y: Tensor) -> Tensor:
        """Mean square of the correction, along the path and at the observations."""
        along = self.correction(y.detach()).square().mean()
        return self.weight * (along + self.correction(self.observed).square().mean())


def _first_guess(log_counts: Tensor) -> Tensor:
    """Rates [4] by regression of the yearly changes on the other species' count, kept positive.

    Written out in sums: a LAPACK least-squares solve is not the same to the last bit in every run.
    """
    change = (log_counts[2:] - log_counts[:-2]) / 2
    other = log_counts[1:-1].exp().flip(1)
    centered = other - other.mean(0)
    slope = (centered * change).sum(0) / (centered * centered).sum(0)
    level = change.mean(0) - slope * other.mean(0)
    birth, death = level[0], -level[1]
    predation, growth = -slope[0], slope[1]
    return torch.stack((birth, predation, death, growth)).clamp(min=1e-3)
