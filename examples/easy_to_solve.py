"""A neural ODE that classifies digits, taught to be easy to solve.

    python examples/easy_to_solve.py [--quick] [--picture FILE.png]

An adaptive solver takes as many steps as the path that a neural ODE learned has bends. Kelly et al.
(2020) punish the third derivative of the state along the path, R_3: the classifier stays as good,
and solves take a fraction of the evaluations. Needs scikit-learn, whose handwritten digits it uses.
"""

import argparse
import sys
from importlib.util import find_spec

import torch
from torch import nn

import ctorch

try:
    from sklearn.datasets import load_digits
except ImportError:
    sys.exit("this example takes its digits from scikit-learn: pip install scikit-learn")

TIMES, penalty_of = torch.tensor([0.0, 1.0]), ctorch.ode.regularizers.taylor(order=3)


class Field(nn.Module):
    """dy/dt of an image that is on its way to be told apart; [B, 64]."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(65, 64), nn.Linear(65, 64)

    def forward(self, t, y):
        t = t.expand(len(y), 1)
        hidden = self.inner(torch.cat([y.tanh(), t], 1)).tanh()
        return self.outer(torch.cat([hidden, t], 1))


def digits():
    """Images [B, 64] in 0..1 and labels, to learn from and to test on."""
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def train(weight, epochs, images, labels):
    """A field and a readout, trained with the penalty times ``weight``."""
    torch.manual_seed(0)
    field, readout = Field(), nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*field.parameters(), *readout.parameters()], lr=5e-3)
    how = {"rtol": 1e-3, "atol": 1e-3, "gradient": "backprop"}
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(200):
            sol, penalty = penalty_of.solve(field, images[batch], TIMES, **how)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(readout(sol.y[-1]), labels[batch])
            (loss + weight * penalty.mean()).backward()
            optimizer.step()
    return field, readout


@torch.no_grad()
def examine(field, readout, images, labels):
    """Accuracy on images, R_3, the evaluations that a solve of them takes, and one's path."""
    sol, penalty = penalty_of.solve(field, images, TIMES, rtol=1e-6, atol=1e-6)
    right = readout(sol.y[-1]).argmax(-1) == labels
    path = ctorch.solve_ode(field, images[:1], torch.linspace(0, 1, 101)).y[:, 0]
    return right.float().mean().item(), penalty.mean().item(), sol.stats.nfe, path


def draw(rows, file):
    """The path of one image's state, for every weight."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(rows), figsize=(12, 3), layout="constrained")
    for axes, (weight, (accuracy, _, nfe, path)) in zip(panels, rows.items(), strict=True):
        axes.plot(torch.linspace(0, 1, 101), path[:, ::5], linewidth=1)
        axes.set(title=f"weight {weight:g}: {nfe} evaluations", xlabel=f"t ({accuracy:.1%} right)")
    panels[0].set_ylabel("components of the state")
    figure.savefig(file, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--picture", help="where to draw paths (needs matplotlib)")
    given = parser.parse_args()
    if given.picture and not find_spec("matplotlib"):
        parser.error('--picture needs matplotlib: pip install "ctorch[demo]"')
    weights, epochs = ((0.0, 1.0), 4) if given.quick else ((0.0, 0.1, 1.0, 10.0), 40)
    (learn, test), rows = digits(), {}
    print(" weight  test accuracy      R_3  evaluations")
    for weight in weights:
        rows[weight] = accuracy, penalty, nfe, _ = examine(*train(weight, epochs, *learn), *test)
        print(f"{weight:7g} {accuracy:14.1%} {penalty:8.3f} {nfe:12d}", flush=True)
    if given.picture:
        draw(rows, given.picture)


if __name__ == "__main__":
    main()
