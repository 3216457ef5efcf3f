"""How far ahead can weather be forecast? A million forecasts that start almost alike.

    python examples/lorenz_ensemble.py [--quick] [--picture lorenz_ensemble.png]

Lorenz (1963) found that his model of convection forgets where it started. Here an ensemble starts
from one state known to a thousandth, and spreads until it says no more than the climate does. The
states are drawn in chunks, by index, and of every chunk only a histogram and sums are kept: memory
does not grow with the ensemble. Where there is a C++ compiler the solves are native. Under

    torchrun --nproc-per-node 4 examples/lorenz_ensemble.py

each process solves a quarter of the same ensemble.
"""

import argparse
import os
import time
from importlib.util import find_spec

import torch

import ctorch

TIMES = torch.tensor([0.0, 6.0, 9.0, 12.0, 15.0, 24.0], dtype=torch.float64)
CENTER = torch.tensor([-5.0, -6.0, 22.0], dtype=torch.float64)
BINS, REACH = 240, 25.0  # of x and of z - 25, from -REACH to REACH


def lorenz(t, state):
    x, y, z = state.unbind(-1)
    return torch.stack((10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z), -1)


def start(indices, draws):
    return CENTER + 1e-3 * draws.normal(3)


def summary(sol, indices):
    """Histograms of (z, x) and sums over a chunk, for every time."""
    x, z = sol.y[..., 0], sol.y[..., 2] - 25
    column, row = (((c / REACH + 1) / 2 * BINS).long().clamp(0, BINS - 1) for c in (x, z))
    places = row * BINS + column  # [n, T]
    density = torch.stack([torch.bincount(p, minlength=BINS**2) for p in places.T])
    return {"density": density, "sum": sol.y.sum(0), "squares": (sol.y - CENTER).square().sum(0)}


def draw(density, path):
    """The densities after the start, logarithmic, in a row."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # comes with the extra "demo"

    figure = Figure(figsize=(12, 2.8), layout="constrained")
    shown = range(1, len(TIMES))
    for axes, k in zip(figure.subplots(1, len(shown)), shown, strict=True):
        image = density[k].view(BINS, BINS)
        axes.imshow(image, origin="lower", cmap="magma", norm=LogNorm(1, image.max() + 1))
        axes.set(title=f"t = {TIMES[k]:.0f}", xticks=[], yticks=[], facecolor="black")
        axes.set(xlabel="x", ylabel="z" if k == 1 else "")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller ensemble")
    parser.add_argument("--picture", help="file for a picture of the densities")
    chosen = parser.parse_args()
    if chosen.picture and not find_spec("matplotlib"):
        parser.error('--picture needs matplotlib: pip install "ctorch[demo]"')
    size = 20_000 if chosen.quick else 1_000_000
    if "RANK" in os.environ:  # started by torchrun
        torch.distributed.init_process_group("gloo")

    began = time.perf_counter()
    sol = ctorch.ensemble(
        lorenz, start, TIMES, size=size, seed=1, rtol=1e-6, atol=1e-6, reduce=summary, merge="sum",
        group="world", progress=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    steps = int(sol.stats.accepted.sum())
    print(
        f"{size} forecasts in {seconds:.1f} s, {steps / seconds / 1e6:.2f} million steps a second"
    )

    mean = sol.reduced["sum"] / size
    spread = (sol.reduced["squares"] / size - (mean - CENTER).square()).clamp_min(0).sqrt()
    for t, m, s in zip(TIMES.tolist(), mean[:, 0].tolist(), spread[:, 0].tolist(), strict=True):
        print(f"t = {t:4.0f}   x = {m:8.4f} +- {s:.4f}")
    assert (sol.reduced["density"].sum(1) == size).all()
    assert 8e-4 < spread[0, 0] < 1.2e-3  # known at first
    assert 7 < spread[-1, 0] < 9  # and lost in the end: the climate's is 7.9
    if chosen.picture:
        draw(sol.reduced["density"], chosen.picture)


if __name__ == "__main__":
    main()
