"""Sortlets beside determinants: the antisymmetric functions of N particles.

    python benchmarks/sortlet.py             everything, about two minutes
    python benchmarks/sortlet.py --quick     a taste in under 20 s

Float32, one thread unless --threads says otherwise; all cases of one N in shuffled rounds in one
process; figures are medians in microseconds for one list of scores. "composed" is the sortlet as a
composition of torch's own functions (sort, parity, log), "slogdet" is torch.linalg.slogdet of a
matrix N x N. In the forward Laplacian both are given the value, 3 N Jacobian rows and the Laplacian
of what they act on, and give those of log|psi|.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _command_line import command_line
from _measure import Case, Ratio, Report, interleave
from _table import Goal, show_goals
from torch import Tensor

import ctorch
from ctorch.ops import _sortlet_reference as reference
from ctorch.ops import sortlet as ops

FORWARD = {8: 5.0, 64: 15.0, 512: 100.0}
BACKWARD = {8: 10.0, 64: 25.0, 512: 300.0}
LAPLACIAN = {10: 20.0, 40: 80.0}


def composed(scores: Tensor) -> tuple[Tensor, Tensor]:
    """A sortlet of torch's own functions, in the dtype of the scores."""
    sorted_scores, order = scores.sort(-1)
    return reference.parity(order), sorted_scores.diff(dim=-1).log().sum(-1)


def backward(f: Callable[[Tensor], Any], x: Tensor) -> Callable[[], None]:
    leaf = x.detach().requires_grad_()

    def run() -> None:
        torch.autograd.grad(f(leaf)[1].sum(), leaf)

    return run


def determinant_laplacian(a: Tensor, rows: Tensor, lap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``log|det a|``: the closed form, with one inverse."""
    _, logabs = torch.linalg.slogdet(a)
    inverse = torch.linalg.inv(a)
    changes = inverse @ rows
    slopes = changes.diagonal(dim1=-2, dim2=-1).sum(-1)
    second = (inverse.mT * lap).sum((-2, -1)) - (changes * changes.mT).sum((-2, -1)).sum(0)
    return logabs, slopes, second


def case(name: str, run: Callable[[], Any]) -> Case:
    return Case(name, run, lambda result: Report())


def measure(title: str, lists: int, cases: list[Case], chosen: argparse.Namespace) -> list[Case]:
    rounds, shortest = (3, 0.002) if chosen.quick else (chosen.rounds, 0.02)
    done = interleave(cases, rounds, shortest=shortest, clock=chosen.clock)
    parts = [f"{c.name} {c.median / lists * 1e6:10.3f} ({100 * c.spread:3.0f}%)" for c in done]
    print(f"{title:34s}" + "   ".join(parts), flush=True)
    return done


def against(cases: list[Case], text: str, bound: float) -> Goal:
    """The goal that the first case is so many times faster than the last one."""
    ratio = Ratio.of(cases[-1], cases[0])
    return Goal(text, ratio.value, bound, ratio=ratio)


def values(chosen: argparse.Namespace) -> list[Goal]:
    goals = []
    for n in (8, 64, 512) if chosen.quick else (4, 8, 16, 32, 64, 128, 256, 512):
        lists = max(32, 16384 // n)
        x, matrix = torch.randn(lists, n), torch.randn(lists, n, n) / n**0.5
        functions = [("sortlet", ctorch.sortlet, x), ("composed", composed, x)]
        functions.append(("slogdet", torch.linalg.slogdet, matrix))
        plain = [case(name, lambda f=f, x=x: f(x)) for name, f, x in functions]
        done = measure(f"N = {n}, {lists} lists", lists, plain, chosen)
        if n >= 8:
            goals.append(against(done, f"forward, N = {n}: over slogdet", FORWARD.get(n, 1.0)))
        both = [case(name, backward(f, x)) for name, f, x in functions]
        done = measure(f"N = {n}, with gradient", lists, both, chosen)
        if n >= 8:
            text = f"forward and backward, N = {n}: over slogdet"
            goals.append(against(done, text, BACKWARD.get(n, 1.0)))
    return goals


def laplacians(chosen: argparse.Namespace) -> list[Goal]:
    goals = []
    for n in LAPLACIAN:
        lists, rows = (8 if n > 20 else 64), 3 * n
        x, of_x, lap = torch.randn(lists, n), torch.randn(rows, lists, n), torch.randn(lists, n)
        a, of_a = torch.randn(lists, n, n), torch.randn(rows, lists, n, n)
        lap_a = torch.randn(lists, n, n)
        cases = [
            case(
                "sortlet",
                lambda x=x, of_x=of_x, lap=lap: (
                    ctorch.sortlet(x),
                    ops.sortlet_laplacian(x, of_x, lap, 0),
                ),
            ),
            case("slogdet", lambda a=a, r=of_a, lap=lap_a: determinant_laplacian(a, r, lap)),
        ]
        with torch.no_grad():
            done = measure(f"Laplacian, N = {n}, {lists} lists", lists, cases, chosen)
        goals.append(against(done, f"forward Laplacian, N = {n}: over slogdet", LAPLACIAN[n]))
    return goals


def growth(chosen: argparse.Namespace) -> None:
    """Time and bandwidth up to lists of 65,536."""
    print("\nlong lists: microseconds for one; nanoseconds a score; gigabytes of scores a second")
    for n in (1024, 4096, 16384, 65536):
        lists = max(1, 65536 // n)
        x = torch.randn(lists, n)
        cases = [
            case("sortlet", lambda x=x: ctorch.sortlet(x)),
            case("with gradient", backward(ctorch.sortlet, x)),
            case("torch.sort", lambda x=x: x.sort(-1)),
            case("copy", lambda x=x: x.clone()),
        ]
        done = measure(f"N = {n}, {lists} lists", lists, cases, chosen)
        parts = [f"{c.name} {c.median / x.numel() * 1e9:.2f} ns" for c in done]
        parts += [f"{c.name} {4e-9 * x.numel() / c.median:.2f} GB/s" for c in (done[0], done[-1])]
        print(" " * 34 + ", ".join(parts))


def main() -> None:
    chosen = command_line(__doc__, rounds=11)
    print("medians in microseconds for one list (interquartile range)")
    goals = values(chosen) + laplacians(chosen)
    growth(chosen)
    show_goals(goals)


if __name__ == "__main__":
    main()
