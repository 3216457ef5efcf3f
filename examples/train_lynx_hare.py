"""A model of one's own, trained with the loop that saves, stops and resumes.

    python examples/train_lynx_hare.py [--quick]

A plain neural ODE (no biology in it) learns the growth rates of both species from 21 years of
pelts. The gradients of its vector field are checked first; the training keeps checkpoints, is
broken off half-way and goes on as if nothing had happened.
"""

import argparse
import tempfile

import torch
from torch import nn

from ctorch.demo.data import record
from ctorch.nn import NeuralODE
from ctorch.testing import check_gradients
from ctorch.training import train


class Growth(nn.Module):
    """Rates of change of the (centered) logarithms of both counts, and where they start."""

    def __init__(self, start):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 2)).double()
        self.start = nn.Parameter(start.clone())

    def forward(self, t, y):
        return self.net(y)


def setup():
    """Everything that a run needs, fresh."""
    torch.manual_seed(0)
    t, pelts = record()
    logs = pelts.log() - pelts.log().mean(0)
    model = NeuralODE(Growth(logs[0]), t, rtol=1e-5, atol=1e-5, gradient="backprop")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def loss():
        horizon = 11  # the first ten years are easier to learn than all twenty
        sol = model.solve(model.func.start, t[:horizon])
        return (sol.y - logs[:horizon]).square().mean(), {"nfe": sol.stats.nfe}

    return {"loss_fn": loss, "model": model, "optimizer": optimizer, "clip": 1.0}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer iterations")
    steps = 40 if parser.parse_args().quick else 400

    check_gradients(setup()["model"].func, (0.0, torch.zeros(2)), order=2, examples=5)
    print("the gradients of the vector field are right")

    whole = train(**setup(), steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        train(**setup(), steps=steps // 2, checkpoint=folder, progress=False)
        resumed = train(**setup(), steps=steps, checkpoint=folder, resume=True, progress=False)
    print(f"loss {whole.loss[0]:.3f} -> {whole.loss[-1]:.3f}")
    print(f"broken off and resumed: the same to the last bit: {resumed.loss == whole.loss}")
    assert resumed.loss == whole.loss
    assert whole.loss[-1] < whole.loss[0]


if __name__ == "__main__":
    main()
