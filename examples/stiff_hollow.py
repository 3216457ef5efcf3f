"""A stiff neural ODE, solved by an implicit method that knows the diagonal of its Jacobian.

    python examples/stiff_hollow.py [--quick] [--picture FILE.png]

x' = -rates (x - net(x)) relaxes towards a net, in some dimensions up to 1000 times as fast as in
others. An explicit solver has to follow the fastest with its steps, long after that has come to
rest, and so does an implicit one that solves its equations by plain iteration. A hollow net's
diagonal of the Jacobian costs next to nothing: Newton's method with this diagonal alone (Jacobi-
Newton; Chen and Duvenaud, 2019) converges where plain iteration diverges.
"""

import argparse
import math
import time
from importlib.util import find_spec

import torch
from torch import nn

import ctorch


class Relaxation(nn.Module):
    """x' = -rates (x - net(x)), [B, d], with rates from 1 to ``stiffness``."""

    def __init__(self, dim, stiffness):
        super().__init__()
        self.net = ctorch.nn.HollowMLP(dim, width=64, context=8, hidden=(16,), time=False)
        self.register_buffer("rates", torch.logspace(0, math.log10(stiffness), dim))

    def forward(self, t, x):
        return -self.rates * (x - self.net(t, x))

    def with_diagonal(self, t, x):
        """Slope and diagonal of its Jacobian in x, in one pass."""
        value, slopes = ctorch.dimwise_derivative(self.net, x, t=t)
        return -self.rates * (x - value), -self.rates * (1 - slopes[0])


def methods(field):
    """How the problem is to be solved, by the name of the way."""
    jacobi = {"root_finder": "jacobi_newton", "diagonal": field.with_diagonal}
    return {
        "dopri5": {"method": "dopri5"},
        "BDF2, plain iteration": {"method": "bdf2", "options": {"root_finder": "functional"}},
        "BDF2, Jacobi-Newton": {"method": "bdf2", "options": jacobi},
    }


@torch.no_grad()
def compare(stiffness, tolerances, dim=32):
    """(evaluations, error, CPU seconds) of every way at every tolerance."""
    torch.manual_seed(2)
    field, x, ends = Relaxation(dim, stiffness), torch.randn(4, dim), torch.tensor([0.0, 2.0])
    exact = ctorch.solve_ode(field, x, ends, method="dopri8", rtol=1e-10, atol=1e-10).y[-1]
    rows = {}
    for name, how in methods(field).items():
        for tol in tolerances:
            start = time.process_time()
            sol = ctorch.solve_ode(field, x, ends, rtol=tol, atol=tol / 10, **how)
            seconds, error = time.process_time() - start, (sol.y[-1] - exact).abs().max().item()
            rows.setdefault(name, []).append((sol.stats.nfe, error, seconds))
            print(f"{stiffness:9g} {name:22} {tol:9g} {sol.stats.nfe:11d} {error:9.1e}"
                  f" {seconds:8.2f} s", flush=True)  # fmt: skip
    return rows


def draw(results, file):
    """Error against evaluations, for every stiffness."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(results), figsize=(10, 3.4), layout="constrained", sharex=True, sharey=True
    )
    for axes, (stiffness, rows) in zip(panels, results.items(), strict=True):
        for name, points in rows.items():
            nfe, errors, _ = zip(*points, strict=True)
            axes.loglog(nfe, errors, "o-", label=name)
        axes.set(title=f"rates from 1 to {stiffness:g}", xlabel="evaluations of the field")
    panels[0].set_ylabel("error at the end")
    panels[0].legend(loc="upper right")
    figure.savefig(file, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less stiffness, one tolerance")
    parser.add_argument("--picture", help="where to draw (needs matplotlib)")
    given = parser.parse_args()
    if given.picture and not find_spec("matplotlib"):
        parser.error('--picture needs matplotlib: pip install "ctorch[demo]"')
    torch.set_default_dtype(torch.float64)
    quick = ((10.0, 100.0), (1e-3,))
    stiffness, tolerances = quick if given.quick else ((10.0, 100.0, 1000.0), (1e-2, 1e-3, 1e-4))
    print("stiffness way                    tolerance evaluations     error     time")
    results = {value: compare(value, tolerances) for value in stiffness}
    if given.picture:
        draw(results, given.picture)


if __name__ == "__main__":
    main()
