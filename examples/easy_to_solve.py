"""A neural ODE that classifies digits, taught to be easy to solve.

    python examples/easy_to_solve.py [--quick] [--picture FILE.png]

What a network does in its depth, a neural ODE does in time; an adaptive solver takes as many steps
as the path that it learned has bends. Kelly et al. (2020) punish the third derivative of the state
along the path, R_3, in training: the classifier stays as good, and later solves take a fraction of
the evaluations. The task is scikit-learn's handwritten digits (pip install scikit-learn).
"""

import argparse
import sys

import torch
from torch import nn

import ctorch

try:
    from sklearn.datasets import load_digits
except ImportError:
    sys.exit("this example takes its digits from scikit-learn: pip install scikit-learn")

TIMES = torch.tensor([0.0, 1.0])
penalty_of = ctorch.ode.regularizers.taylor(order=3)


class Field(nn.Module):
    """dy/dt of an image that is on its way to be told apart; [B, 64]."""

    def __init__(self, width=64):
        super().__init__()
        self.inner, self.outer = nn.Linear(65, width), nn.Linear(width + 1, 64)

    def forward(self, t, y):
        def beside(y):
            return torch.cat([y, t.expand(len(y), 1)], 1)

        return self.outer(beside(torch.tanh(self.inner(beside(torch.tanh(y))))))


def digits():
    """Images [1797, 64] in 0..1 and labels: the first 1400 to learn from, the others to test on."""
    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data / 16, dtype=torch.float32)[order]
    labels = torch.tensor(data.target)[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def train(weight, epochs, images, labels):
    """A field and a readout, trained with the penalty times ``weight``."""
    torch.manual_seed(0)
    field, readout = Field(), nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*field.parameters(), *readout.parameters()], lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(140):
            options = {"rtol": 1e-4, "atol": 1e-4, "gradient": "backprop"}
            if weight:
                sol, penalty = penalty_of.solve(field, images[batch], TIMES, **options)
            else:
                sol, penalty = ctorch.solve_ode(field, images[batch], TIMES, **options), torch.zeros(1)
            loss = nn.functional.cross_entropy(readout(sol.y[-1]), labels[batch])
            optimizer.zero_grad()
            (loss + weight * penalty.mean()).backward()
            optimizer.step()
    return field, readout


@torch.no_grad()
def examine(field, readout, images, labels):
    """Accuracy on images, and evaluations of the field that an adaptive solve of them takes."""
    sol = ctorch.solve_ode(field, images, TIMES, rtol=1e-6, atol=1e-6)
    right = readout(sol.y[-1]).argmax(-1) == labels
    return right.float().mean().item(), sol.stats.nfe


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--picture", help="write a picture (needs matplotlib)")
    given, _ = parser.parse_known_args()
    learn, test = digits()
    for weight in (0.0, 1e-3) if given.quick else (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        import time; s=time.time()
        model = train(weight, 3 if given.quick else int(sys.argv[-1]) if sys.argv[-1].isdigit() else 40, *learn)
        print(weight, examine(*model, *learn), examine(*model, *test), time.time()-s, flush=True)


if __name__ == "__main__":
    main()
