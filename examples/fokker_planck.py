"""An SDE learned from snapshots of clouds, none of whose particles was followed.

    python examples/fokker_planck.py [--quick] [--picture fokker_planck.png]

Clouds released all over a double well are seen a few times soon after. Drift and diffusion, two
hollow networks, are fitted to the Fokker-Planck equation of a density of these snapshots.
"""

import argparse
from importlib.util import find_spec

import torch
from torch import nn

import ctorch

STEP, SIZE = 0.01, 0.25  # of the simulation; of a cloud at release


def truth(x):
    a, b = x.unbind(-1)
    drift = torch.stack([2 * a - a**3 + 0.5 * b, -b - 0.5 * a], -1)
    return drift, torch.stack([torch.full_like(a, 0.7), 0.5 + 0.3 * torch.tanh(a)], -1)


def simulate(sde, x, steps):
    path = [x]
    for _ in range(steps):
        drift, diffusion = sde(path[-1])
        path.append(path[-1] + STEP * drift + STEP**0.5 * diffusion * torch.randn_like(x))
    return torch.stack(path)  # [steps + 1, particles, 2]


def fit(loss, model, steps, rate):
    adam = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    ctorch.training.train(loss, model, adam, scheduler=schedule, steps=steps)


def learn(release, seen, steps):
    first, second, last = nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 20)
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
    f, g = (ctorch.nn.HollowMLP(2, width=32, time=False) for _ in range(2))
    nn.init.ones_(g.tau_biases[-1])  # away from 0, where its sign would change

    def draw(count, first, last):
        k, i = torch.randint(first, last, (count,)), torch.randint(len(release), (count,))
        return 5 * STEP * k.unsqueeze(-1), seen[k, i], release[i]

    def log_density(t, x, release):  # of four Gaussians for each cloud, which a network moves
        made = net(torch.cat([5 * t - 1, release], -1)).unflatten(-1, (4, 5))
        mean, width = release.unsqueeze(-2) + made[..., 1:3], SIZE * made[..., 3:].exp()
        part = torch.distributions.Normal(mean, width, False).log_prob(x.unsqueeze(-2)).sum(-1)
        return torch.logsumexp(part + made[..., 0].log_softmax(-1), -1)

    def mismatch():
        t, x, place = draw(1024, 1, 8)  # rates at the first and last time are less well known
        with torch.no_grad():
            p = ctorch.autodiff.log_density_derivatives(lambda t, x: log_density(t, x, place), t, x)
        rate = ctorch.autodiff.fokker_planck(f, g, p.score, p.curvature, t, x)
        return (rate - p.rate).square().mean()

    fit(lambda: -log_density(*draw(2048, 0, 9)).mean(), net, steps, 5e-3)
    fit(mismatch, nn.ModuleList([f, g]), steps // 2, 2e-2)
    return lambda x: (f(0.0, x), g(0.0, x).abs())


def distance(a, b):  # the energy distance
    return 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--picture", help="file for a picture of clouds and drift")
    chosen = parser.parse_args()
    if chosen.picture and not find_spec("matplotlib"):
        parser.error('--picture needs matplotlib: pip install "ctorch[demo]"')
    torch.manual_seed(0), torch.set_num_threads(1)
    release = torch.cartesian_prod(*[torch.linspace(-2, 2, 8)] * 2).repeat(500, 1)
    seen = simulate(truth, release + SIZE * torch.randn_like(release), 40)[::5]
    sde = torch.no_grad()(learn(release, seen, 600 if chosen.quick else 4000))
    for name, a, b in zip(("drift", "diffusion"), sde(seen[4]), truth(seen[4]), strict=True):
        print(f"{name}: relative errors", *((a - b).norm(dim=0) / b.norm(dim=0)).numpy().round(3))
    new, times = torch.tensor([0.3, 0.7]) + SIZE * torch.randn(4000, 2), [20, 100, 400]
    true, again, learned = (simulate(s, new, 400)[times] for s in (truth, truth, sde))
    for k, a, b, c in zip(times, true, learned, again, strict=True):
        print(f"t = {k / 100}: distance {distance(a, b):.4f}, two true runs {distance(a, c):.4f}")
    if chosen.picture:
        from matplotlib.figure import Figure  # comes with the extra "demo"

        figure = Figure(figsize=(9, 5), layout="constrained")
        for k, panel in enumerate(figure.subplots(2, 3, sharex=True, sharey=True).flat):
            s, clouds, name = ((truth, true, "true"), (sde, learned, "learned"))[k // 3]
            panel.hist2d(*clouds[k % 3].T.numpy(), 60, range=[(-2.2, 2.2)] * 2, cmap="Blues")
            panel.set(title=f"{name}, t = {times[k % 3] / 100}", xlabel="$x_1$", ylabel="$x_2$")
            panel.quiver(*release[:64].T, *s(release[:64])[0].T, alpha=0.5), panel.label_outer()
        figure.savefig(chosen.picture, dpi=80)


if __name__ == "__main__":
    main()
