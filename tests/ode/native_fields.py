"""Vector fields for native solves, pointwise in the samples, as ``func(t, y, *args)``; and solving
them natively and eagerly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ctorch
from ctorch.ode import Solution


def both(func: Any, y0: Tensor, t: Tensor, **how: Any) -> tuple[Solution, Solution]:
    """The native solution and the eager one."""
    how = {"gradient": "none", "throw": False, "rtol": 1e-5, "atol": 1e-5, **how}
    return (
        ctorch.solve_ode(func, y0, t, native=True, **how),
        ctorch.solve_ode(func, y0, t, **how),
    )


def start(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """States [B, 2] and gains [B, 1] of samples that differ, both with gradients."""
    generator = torch.Generator().manual_seed(3)
    y0 = torch.randn(batch, 2, dtype=dtype, generator=generator)
    gain = 1 + torch.rand(batch, 1, dtype=dtype, generator=generator)
    return y0.requires_grad_(), gain.requires_grad_()


def loss_of(y: Tensor) -> Tensor:
    """A number that every element of a solution has its own share in."""
    return (torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) * y).sum()


def lotka_volterra(t: Tensor, y: Tensor) -> Tensor:
    hare, lynx = y[..., 0], y[..., 1]
    eaten = hare * lynx
    return torch.stack([1.5 * hare - eaten, eaten - 3 * lynx], -1)


def forced(t: Tensor, y: Tensor, stiffness: Tensor) -> Tensor:
    """A pendulum that is pushed in time; stiffness [B, 1]."""
    push = -stiffness * torch.sin(y[..., :1]) + torch.cos(3 * t)
    return torch.cat([y[..., 1:], push], -1)


def root(t: Tensor, y: Tensor) -> Tensor:
    """Is not defined below zero."""
    return -torch.sqrt(y)


def blow_up(t: Tensor, y: Tensor) -> Tensor:
    return y * y


class Net(nn.Module):
    """A tanh network of the state, with a gain [B, 1] where one is given."""

    def __init__(self, dtype: torch.dtype, width: int = 24) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 2)]
        for layer in layers:
            layer.weight.data.mul_(2.0)
        self.net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).to(dtype)

    def forward(self, t: Tensor, y: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return gain * self.net(y) + 0.1 * torch.cos(t)
