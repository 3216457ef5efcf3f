"""How well does a small network with sortlets represent fermions, whose exact state is known?

    python examples/fermions.py [--quick] [--picture fermions.png]

Three fermions of one spin in a two-dimensional harmonic trap do not interact: their ground state is
a Slater determinant. A network gives each particle K scores, and a sum of K sortlets makes of them
an antisymmetric function. It is fitted to the determinant; the fidelity |<net|exact>|^2 is measured
on new samples. The picture: where both vanish as one particle moves and the others stay.
"""

import argparse
from importlib.util import find_spec

import torch
from torch import nn

import ctorch


def exact(r):
    """Sign and log magnitude of the determinant of the lowest orbitals; r is [..., 3, 2]."""
    orbitals = torch.cat([torch.ones_like(r[..., :1]), r], -1)
    sign, logabs = torch.linalg.slogdet(orbitals)
    return sign, logabs - 0.5 * (r**2).sum((-2, -1))


class Net(nn.Module):
    """Scores from each particle and the mean over all: what is equivariant under exchange."""

    def __init__(self, terms, width=32):
        super().__init__()
        self.first, self.mean = nn.Linear(2, width), nn.Linear(width, width)
        self.second, self.scores = nn.Linear(width, width), nn.Linear(width, terms)
        self.coeff = nn.Linear(width, terms)
        self.sign = (-1.0) ** torch.arange(terms)

    def forward(self, r):
        h = torch.tanh(self.first(r))
        pooled = torch.tanh(self.mean(h.mean(-2, keepdim=True)))
        h = h + torch.tanh(self.second(h) + pooled)
        log_coeff = self.coeff(pooled.squeeze(-2)) - 0.5 * (r**2).sum((-2, -1)).unsqueeze(-1)
        return ctorch.sum_of_sortlets(self.scores(h).mT, log_coeff, self.sign)


def log_fidelity(net, samples):
    """By importance sampling from a Gaussian that is wider than the trap's ground state."""
    r = 0.95 * torch.randn(samples, 3, 2)
    weight = 0.25 * (r**2).sum((-2, -1)) / 0.95**2  # of 1 / sqrt(density)
    (sign, a), (s, b) = net(r), exact(r)
    a, b = a + weight - (a + weight).detach().max(), b + weight - (b + weight).max()
    overlap = (sign * s * (a + b).exp()).mean()
    return 2 * overlap.abs().log() - (2 * a).exp().mean().log() - (2 * b).exp().mean().log()


def draw(net, path):
    """Both states over the place (x, y) of the first particle; the others are dots."""
    from matplotlib.figure import Figure  # comes with the extra "demo"

    line = torch.linspace(-2.5, 2.5, 200)
    others = torch.randn(2, 2, generator=torch.Generator().manual_seed(2))
    first = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).unsqueeze(-2)
    r = torch.cat([first, others.expand(200, 200, 2, 2)], -2)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    for axes, f in zip(figure.subplots(1, 2), (exact, net), strict=True):
        sign, size = (part.detach() for part in f(r))
        psi = sign * (size - size.max()).exp()
        axes.imshow(psi, extent=(-2.5, 2.5) * 2, origin="lower", cmap="RdBu", vmin=-1, vmax=1)
        axes.contour(line, line, psi, levels=[0], colors="k")
        axes.plot(*others.T, "ko")
        axes.set(title="exact" if f is exact else "sortlets", xlabel="x", ylabel="y")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--picture", help="file for a picture of the nodal surface")
    chosen = parser.parse_args()
    if chosen.picture and not find_spec("matplotlib"):
        parser.error('--picture needs matplotlib: pip install "ctorch[demo]"')
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of tensors as small as these, threads make more work than they do
    steps, net = 300 if chosen.quick else 1500, Net(terms=16)
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps + 1):
        adam.zero_grad()
        loss = -log_fidelity(net, 1024)
        loss.backward()
        adam.step(), schedule.step()
        if step % (steps // 6) == 0:
            print(f"step {step:5d}   fidelity {(-loss).exp().item():.5f}")
    with torch.no_grad():
        fidelity = log_fidelity(net, 100_000).exp().item()
    print(f"fidelity {fidelity:.5f} on new samples")
    assert fidelity > 0.9
    if chosen.picture:
        draw(net, chosen.picture)


if __name__ == "__main__":
    main()
