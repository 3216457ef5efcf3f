"""An SDE learned from snapshots of a crowd, none of whose members was followed.

    python examples/fokker_planck.py [--quick] [--picture fokker_planck.png]

Particles move in a double well with a noise that depends on where they are; at some times the
places of some of them are seen. A mixture density is fitted to these snapshots. Then the drift and
the diffusion, two hollow networks, are fitted to the Fokker-Planck equation of that density: its
derivatives are dimension-wise ones, which cost one small Taylor pass. The learned SDE is
run from the first snapshot, also beyond the last one, and compared with the true one.
"""

import argparse
import math

import torch
from torch import nn

import ctorch


def drift(t, x):
    return torch.stack([2 * x[:, 0] - x[:, 0] ** 3 + 0.5 * x[:, 1], -x[:, 1] - 0.5 * x[:, 0]], -1)


def diffusion(t, x):
    return torch.stack([0.7 + 0 * x[:, 0], 0.5 + 0.3 * torch.tanh(x[:, 0])], -1)


@torch.no_grad()
def simulate(drift, diffusion, x, times, dt=0.01):
    """Euler-Maruyama: the particles' places at the times, which are whole multiples of dt apart."""
    places = [x]
    for start, end in zip(times[:-1], times[1:], strict=True):
        for step in range(round((end - start) / dt)):
            t = x.new_full((len(x), 1), start + step * dt)
            x = x + dt * drift(t, x) + dt**0.5 * diffusion(t, x) * torch.randn_like(x)
        places.append(x)
    return torch.stack(places)


class Mixture(nn.Module):
    """A density of Gaussians whose weights, means and shapes move with time."""

    def __init__(self, parts=12, width=64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, 6 * parts),
        )  # fmt: skip
        self.spread = nn.Parameter(torch.randn(parts, 2))

    def forward(self, t, x):
        weight, mean, scale, lean = self.net(t - 1).unflatten(-1, (-1, 6)).split([1, 2, 2, 1], -1)
        z = (x.unsqueeze(-2) - mean - self.spread) * scale.exp()
        z = torch.stack([z[..., 0], z[..., 1] + lean[..., 0] * z[..., 0]], -1)
        log_normal = scale.sum(-1) - 0.5 * (z**2).sum(-1) - math.log(2 * math.pi)
        return torch.logsumexp(weight.squeeze(-1).log_softmax(-1) + log_normal, -1)


def train(parameters, loss, steps, what):
    adam = torch.optim.Adam(parameters, 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps + 1):
        adam.zero_grad()
        value = loss()
        value.backward()
        adam.step(), schedule.step()
        if step % max(1, steps // 4) == 0:
            print(f"{what}: step {step:5d}   loss {value.item():8.4f}", flush=True)
