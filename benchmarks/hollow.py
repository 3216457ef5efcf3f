"""Hollow nets: a function together with its diagonal derivatives, against the function alone.

    python benchmarks/hollow.py             everything, some minutes
    python benchmarks/hollow.py --quick     a taste in under 20 s

Float32, one thread unless --threads says otherwise; all cases of one d in shuffled rounds in one
process; figures are medians in microseconds for a batch of 128. "f" is a net alone, "div" f and its
divergence, "k <= 4" f and all d^k f_i / d x_i^k to k = 4. The general net is an MLP d-256-256-d;
"vmap(vjp)", "vmap(jvp)" and "jacrev" are torch's own ways to its exact divergence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _command_line import command_line
from _measure import Case, Ratio, Report, interleave
from _table import Goal, show_goals
from torch import Tensor, nn

import ctorch
from ctorch.nn import HollowAttention, HollowMLP, HollowSum

BATCH = 128
MADE: dict[str, Callable[..., nn.Module]] = {
    "MLP": lambda d: HollowMLP(d, width=128),
    "MLP, own tau": lambda d: HollowMLP(d, width=128, shared=False),
    "Sum": HollowSum,
    "Attention": HollowAttention,
}
Task = Callable[[], Any]


def divergence(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return ctorch.divergence(net, x, method="hollow", t=0.5)


def reverse(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and divergence: all rows of the Jacobian by one batched backward pass."""
    value, pull = torch.func.vjp(f, x)
    seeds = torch.eye(x.shape[-1]).unsqueeze(1).expand(-1, *x.shape)
    rows = torch.func.vmap(lambda v: pull(v)[0])(seeds)
    return value, rows.diagonal(dim1=0, dim2=-1).sum(-1)


def forward(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    seeds = torch.eye(x.shape[-1]).unsqueeze(1).expand(-1, *x.shape)
    value, columns = torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,)), out_dims=(None, 0))(
        seeds
    )
    return value, columns.diagonal(dim1=0, dim2=-1).sum(-1)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    rows, value = torch.func.vmap(torch.func.jacrev(lambda x: (f(x),) * 2, has_aux=True))(x)
    return value, rows.diagonal(dim1=-2, dim2=-1).sum(-1)


TORCH = {"vmap(vjp)": reverse, "vmap(jvp)": forward, "jacrev": jacobian}


def training(f: Callable[[Tensor], tuple[Tensor, Tensor]], net: nn.Module, x: Tensor) -> Task:
    """Gradients in all parameters of a function of value and divergence."""
    parameters = list(net.parameters())

    def run() -> None:
        value, div = f(x)
        torch.autograd.grad(value.square().mean() + div.square().mean(), parameters)

    return run


def untracked(run: Task) -> Task:
    def quiet() -> Any:
        with torch.no_grad():
            return run()

    return quiet


def case(name: str, run: Task) -> Case:
    return Case(name, run, lambda result: Report())


def measure(title: str, cases: list[Case], chosen: argparse.Namespace) -> dict[str, Case]:
    rounds, shortest = (5, 0.002) if chosen.quick else (chosen.rounds, 0.005)
    done = interleave(cases, rounds, shortest=shortest, clock=chosen.clock)
    parts = [f"{c.name} {c.median * 1e6:8.0f} ({100 * c.spread:3.0f}%)" for c in done]
    print(f"{title:28s}" + "   ".join(parts), flush=True)
    return {c.name: c for c in done}


def overheads(chosen: argparse.Namespace) -> list[Goal]:
    """What derivatives cost beyond the function."""
    goals = []
    for d in (2, 64) if chosen.quick else (2, 16, 64):
        for name, make in MADE.items():
            net, x = make(d), torch.randn(BATCH, d)
            runs = {
                "f": lambda net=net, x=x: net(0.5, x),
                "div": lambda net=net, x=x: divergence(net, x),
                "k <= 4": lambda net=net, x=x: ctorch.dimwise_derivative(net, x, 4, 0.5),
            }
            done = measure(
                f"{name}, d = {d}", [case(n, untracked(run)) for n, run in runs.items()], chosen
            )
            for other, bound in (("div", 1.3), ("k <= 4", 2.0)):
                ratio = Ratio.of(done[other], done["f"])
                text = f"{name}, d = {d}: {other}, over f"
                goals.append(Goal(text, ratio.value, bound, at_least=False, ratio=ratio))
    return goals


def against_torch(chosen: argparse.Namespace) -> list[Goal]:
    """Exact divergence of an equally large general net, by torch's means."""
    d = 64
    x = torch.randn(BATCH, d)
    general = nn.Sequential(
        nn.Linear(d, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, d)
    )
    nets = {name: make(d) for name, make in MADE.items() if name != "Attention"}  # that is O(d^2)
    print(f"\nd = {d}: exact divergence, and with gradients in all parameters")
    values = [case(n, untracked(lambda f=f: f(general, x))) for n, f in TORCH.items()]
    values += [case(n, untracked(lambda net=net: divergence(net, x))) for n, net in nets.items()]
    done = measure("value and divergence", values, chosen)
    best = min((done[name] for name in TORCH), key=lambda c: c.median)
    goals = []
    for name in nets:
        ratio = Ratio.of(best, done[name])
        text = f"{name}, d = 64: divergence, best of torch ({best.name}) over it"
        goals.append(Goal(text, ratio.value, 6.0, ratio=ratio))
    trained = [
        case(n, training(lambda x, net=net: divergence(net, x), net, x)) for n, net in nets.items()
    ]
    trained.append(case("vmap(vjp)", training(lambda x: reverse(general, x), general, x)))
    done = measure("with parameter gradients", trained, chosen)
    for name in nets:
        ratio = Ratio.of(done["vmap(vjp)"], done[name])
        text = f"{name}, d = 64: with parameter gradients, vmap(vjp) over it"
        goals.append(Goal(text, ratio.value, 10.0, ratio=ratio))
    return goals


def growth(chosen: argparse.Namespace) -> list[Goal]:
    """Time of f and divergence at a fixed width."""
    sizes = (64, 1024) if chosen.quick else (64, 128, 256, 512, 1024)
    goals = []
    print("\ngrowth in d at a fixed width: f and divergence, microseconds a dimension")
    for name in ("MLP", "Sum"):
        cases = []
        for d in sizes:
            net, x = MADE[name](d), torch.randn(BATCH, d)
            cases.append(case(f"d = {d}", untracked(lambda net=net, x=x: divergence(net, x))))
        done = measure(name, cases, chosen)
        each = {d: done[f"d = {d}"].median / d for d in sizes}
        print(" " * 28 + "   ".join(f"d = {d}: {1e6 * s:6.1f}" for d, s in each.items()))
        text = f"{name}: a dimension's time at d = 1024 over that at d = 64"
        goals.append(Goal(text, each[1024] / each[64], 1.5, at_least=False))
    return goals


def main() -> None:
    chosen = command_line(__doc__, rounds=41)
    print(f"medians in microseconds for a batch of {BATCH} (interquartile range)")
    goals = overheads(chosen) + against_torch(chosen) + growth(chosen)
    show_goals(goals)


if __name__ == "__main__":
    main()
