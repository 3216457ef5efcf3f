"""An SDE learned from snapshots of clouds, none of whose particles was followed.

    python examples/fokker_planck.py [--quick] [--picture fokker_planck.png]

Clouds are released all over a double well, and seen a few times soon after. A density of time and
place of release is fitted to the snapshots; then drift and diffusion, two hollow networks, to its
Fokker-Planck equation. The learned SDE moves a new cloud far beyond the last snapshot.
"""

import argparse

import torch
from torch import distributions, nn

import ctorch

TIMES, SIZE = torch.linspace(0, 0.4, 9), 0.25  # of the snapshots; of a cloud at release


def drift(t, x):
    return torch.stack([2 * x[:, 0] - x[:, 0] ** 3 + 0.5 * x[:, 1], -x[:, 1] - 0.5 * x[:, 0]], -1)


def diffusion(t, x):
    return torch.stack([torch.full_like(x[:, 0], 0.7), 0.5 + 0.3 * torch.tanh(x[:, 0])], -1)


@torch.no_grad()
def simulate(f, g, x, times, dt=0.01):
    places = [x]
    for span in torch.diff(torch.as_tensor(times)):
        for _ in range(round(span.item() / dt)):
            x = x + dt * f(0.0, x) + dt**0.5 * g(0.0, x) * torch.randn_like(x)
        places.append(x)
    return torch.stack(places)  # [times, particles, 2]


class Density(nn.Sequential):  # log p(t, x): four Gaussians for each cloud, which a network moves
    def forward(self, t, x, release):
        made = super().forward(torch.cat([5 * t - 1, release], -1)).unflatten(-1, (4, 5))
        mean, width = release.unsqueeze(-2) + made[..., 1:3], SIZE * made[..., 3:].exp()
        part = distributions.Normal(mean, width, validate_args=False).log_prob(x.unsqueeze(-2))
        return torch.logsumexp(part.sum(-1) + made[..., 0].log_softmax(-1), -1)


class Positive(ctorch.nn.HollowMLP):
    def forward(self, t, x):
        return super().forward(t, x).exp()

    def __ctorch_hollow__(self):
        tau, transform = self.transformer(), ctorch.ops.hollow.transform
        return ctorch.autodiff.Hollow(self.conditioner, lambda t, x, h: transform(x, h, tau)[0].exp())


def fit(loss, model, steps, rate):
    adam = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    ctorch.training.train(loss, model, optimizer=adam, scheduler=schedule, steps=steps)


def learn(steps):
    """Drift, diffusion, and points where particles were seen."""
    grid = torch.cartesian_prod(torch.linspace(-2, 2, 8), torch.linspace(-1.5, 1.5, 8))
    release = grid.repeat_interleave(500, 0)
    seen = simulate(drift, diffusion, release + SIZE * torch.randn_like(release), TIMES)

    def draw(count, first, last):
        k, i = torch.randint(first, last, (count,)), torch.randint(len(release), (count,))
        return TIMES[k, None], seen[k, i], release[i]

    tanh, first, second, last = nn.Tanh(), nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 20)
    density = Density(first, tanh, second, tanh, last)
    fit(lambda: -density(*draw(2048, 0, 9)).mean(), density, steps, 5e-3)
    t, x, place = draw(40_000, 1, 8)  # the rate is not well known at the ends of the record
    with torch.no_grad():
        p = ctorch.sde.log_density_derivatives(lambda t, x: density(t, x, place), t, x)
    f, g = (kind(2, width=32, time=False) for kind in (ctorch.nn.HollowMLP, Positive))

    def mismatch():
        i = torch.randint(len(x), (1024,))
        rate = ctorch.sde.fokker_planck(f, g, p.score[i], p.curvature[i], t[i], x[i])
        return (rate - p.rate[i]).square().mean()

    fit(mismatch, nn.ModuleList([f, g]), steps // 2, 2e-2)
    return f, g, x


def energy_distance(a, b):
    return 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--picture", help="file for a picture of the true and the learned clouds")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of tensors as small as these, threads make more work than they do
    f, g, x = learn(700 if chosen.quick else 4000)
    for name, net, true in (("drift", f, drift), ("diffusion", g, diffusion)):
        error = (net(0.0, x) - true(0.0, x)).norm(dim=0) / true(0.0, x).norm(dim=0)
        print(f"{name}: relative error {error[0]:.2f} and {error[1]:.2f} where particles were seen")
    start, times = torch.tensor([0.3, 0.7]) + SIZE * torch.randn(4000, 2), [0.0, 0.2, 1.0, 4.0]
    sdes = (drift, diffusion), (f, g), (drift, diffusion)
    true, learned, again = (simulate(*sde, start, times) for sde in sdes)
    for k, time in enumerate(times[1:], 1):
        off, noise = energy_distance(learned[k], true[k]), energy_distance(again[k], true[k])
        print(f"t = {time}: energy distance {off:.4f}; of two true runs {noise:.4f}")
    if chosen.picture:
        paint(true, learned, times, chosen.picture)


if __name__ == "__main__":
    main()
