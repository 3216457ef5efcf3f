"""Code written for torchdiffeq runs as it is: change the import.

    python examples/torchdiffeq_migration.py [--quick]

The field below is a plain module; `odeint` and `odeint_adjoint` take the arguments that
torchdiffeq's take. What comes on top: exact gradients in the memory of the accepted states
(`gradient="checkpoint"`), statistics, and a field whose parameters need not be listed.
"""

import argparse

import torch
from torch import nn

# from torchdiffeq import odeint, odeint_adjoint
from ctorch import odeint, odeint_adjoint, solve_ode


class Spiral(nn.Module):
    """The vector field that is learned."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, t, y):
        return self.net(y**3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer iterations")
    steps = 40 if parser.parse_args().quick else 400

    torch.manual_seed(0)
    t = torch.linspace(0.0, 5.0, 50)
    y0 = torch.tensor([[2.0, 0.0]])
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    with torch.no_grad():
        truth = odeint(lambda t, y: y**3 @ matrix, y0, t, method="dopri5")

    func = Spiral()
    optimizer = torch.optim.Adam(func.parameters(), lr=1e-2)
    first = None
    for step in range(steps):
        optimizer.zero_grad()
        path = odeint(func, y0, t, rtol=1e-4, atol=1e-5)
        loss = (path - truth).abs().mean()
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
        if step % max(1, steps // 10) == 0:
            print(f"{step:4d}  loss {loss.item():.4f}")
    print(f"loss {first:.4f} -> {loss.item():.4f}")
    assert loss.item() < first

    def gradient(solve):
        grads = torch.autograd.grad((solve() - truth).abs().mean(), list(func.parameters()))
        return torch.cat([g.reshape(-1) for g in grads])

    exact = gradient(lambda: odeint(func, y0, t, rtol=1e-6, atol=1e-7))
    adjoint = gradient(lambda: odeint_adjoint(func, y0, t, rtol=1e-6, atol=1e-7))
    tight = {"rtol": 1e-6, "atol": 1e-7}
    backprop, checkpoint = (
        gradient(lambda g=g: solve_ode(func, y0, t, gradient=g, **tight).y)
        for g in ("backprop", "checkpoint")
    )
    print(f"odeint_adjoint against odeint: {(adjoint - exact).norm() / exact.norm():.1e}")
    print(f"checkpoint against backprop:   {(checkpoint - backprop).norm() / exact.norm():.1e}")
    sol = solve_ode(func, y0, t, **tight)
    print(f"{sol.stats.nfe} evaluations, {sol.stats.accepted} steps, {sol.stats.rejected} rejected")


if __name__ == "__main__":
    main()
