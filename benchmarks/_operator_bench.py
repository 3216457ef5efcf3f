"""One run of benchmarks/operators.py: measures tables of methods, prints them, keeps the goals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Case, Ratio, Report, interleave
from _table import Goal
from torch import Tensor

Shape = tuple[int, int, int]  # of a product: rows, contraction, columns


def torch_case(
    name: str, fn: Callable[[], Any], *, no_grad: bool = True, judged: bool = True
) -> Case:
    """Times ``fn``; the tensor that it returns, the first of several, is judged."""

    def run() -> Any:
        with torch.set_grad_enabled(not no_grad):
            return fn()

    return Case(name, run, lambda out: Report(y=array(out) if judged else None))


def array(out: Any) -> np.ndarray:
    if isinstance(out, (tuple, list)):
        out = out[0]
    return out.detach().double().numpy() if isinstance(out, Tensor) else np.asarray(out, np.float64)


def products(name: str, shapes: Sequence[Shape], dtype: torch.dtype) -> Case:
    """The bare matrix products, into memory that is there: what cannot be avoided."""
    operands = [
        (
            torch.randn(m, k, dtype=dtype),
            torch.randn(n, k, dtype=dtype),
            torch.empty(m, n, dtype=dtype),
        )
        for m, k, n in shapes
    ]

    def run() -> None:
        for a, b, out in operands:
            torch.mm(a, b.t(), out=out)

    flops = sum(2 * m * k * n for m, k, n in shapes)
    return Case(f"{name} ({flops / 1e6:.0f} MFLOP)", run, lambda _: Report())


def worst(value: np.ndarray | None, reference: np.ndarray | None) -> float | None:
    """Largest difference relative to the largest entry."""
    if value is None or reference is None:
        return None
    if value.shape != reference.shape:
        raise ValueError(f"a result [{value.shape}] beside a reference [{reference.shape}]")
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def middle(value: np.ndarray | None, reference: np.ndarray | None) -> float | None:
    """Relative error of the median sample, where some samples lie near a singularity."""
    if value is None or reference is None:
        return None
    if value.shape != reference.shape:
        raise ValueError(f"a result [{value.shape}] beside a reference [{reference.shape}]")
    return float(np.median(np.abs(value - reference) / np.maximum(np.abs(reference), 1)))


@dataclass
class Bench:
    """What is installed, how long it may take, what was found.

    Attributes:
        rounds: timings of each method.
        clock: "cpu" or "wall".
        dtype: of all nets.
        installed: peers that can be imported.
        quick: smaller problems and fewer peers.
        least, patience: see ``interleave``.
    """

    rounds: int
    clock: str
    dtype: torch.dtype
    installed: set[str]
    quick: bool = False
    least: float = 0.0
    patience: float = 8.0
    out: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    only: tuple[str, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)

    def table(
        self,
        title: str,
        cases: Sequence[Case | None],
        reference: np.ndarray | None = None,
        floor: Case | None = None,
        error: Callable[[np.ndarray | None, np.ndarray | None], float | None] = worst,
    ) -> dict[str, Case]:
        """Time the cases in shuffled rounds, print the table in Markdown, return what ran."""
        there = [case for case in cases if case is not None]
        if self.only:
            there = [c for c in there if c.name.startswith("ctorch") or self._wanted(c.name)]
        everyone = [*there, floor] if floor is not None else there
        timed = interleave(
            everyone,
            self.rounds,
            shortest=0.01,
            clock=self.clock,
            least=self.least,
            patience=self.patience,
        )
        print(f"\n### {title}\n", flush=True)
        print("| method | ms | iqr % | times the products | relative error | first call, s |")
        print("|---|---|---|---|---|---|")
        for case in timed:
            row = {
                "table": title,
                "method": case.name,
                "ms": case.median * 1e3,
                "spread": case.spread,
                "times_floor": None if floor is None else case.median / floor.median,
                "error": error(case.report.y, reference),
                "first_s": case.first,
            }
            self.rows.append(row)
            print(_line(row), flush=True)
        self.save()
        return {case.name: case for case in timed}

    def _wanted(self, name: str) -> bool:
        return any(part in name for part in self.only)

    def faster(
        self,
        text: str,
        cases: dict[str, Case],
        ours: str,
        peers: Sequence[str],
        bound: float,
        floor: Case | None = None,
    ) -> None:
        """A goal: at least ``bound`` times faster than the fastest of the peers.

        ``floor``: the bare products, which say what can be reached at all.
        """
        there = [cases[name] for name in peers if name in cases]
        ratio = None
        if there and ours in cases:
            fastest = min(there, key=lambda case: case.median)
            ratio = Ratio.of(fastest, cases[ours])
            if floor is not None and floor.seconds:
                self.limits[text] = fastest.median / floor.median
        self.goals.append(Goal(text, None if ratio is None else ratio.value, bound, ratio=ratio))

    def at_most(
        self, text: str, cases: dict[str, Case], ours: str, base: Case | None, bound: float
    ) -> None:
        """A goal: at most ``bound`` times as long as ``base``."""
        value = None
        if ours in cases and base is not None and base.seconds:
            value = cases[ours].median / base.median
        self.goals.append(Goal(text, value, bound, at_least=False))

    def figure(
        self, text: str, value: float | None, bound: float, *, least: bool, unit: str = ""
    ) -> None:
        self.goals.append(Goal(text, value, bound, at_least=least, unit=unit))

    def save(self) -> None:
        if self.out is not None:
            found = {"rows": self.rows, "goals": [goal.as_dict() for goal in self.goals]}
            self.out.write_text(json.dumps(found, indent=1))

    def show_goals(self) -> None:
        print("\n### Goals\n\n| goal | to reach | measured | quartiles | products alone | |")
        print("|---|---|---|---|---|---|")
        for goal in self.goals:
            sign = ">=" if goal.at_least else "<="
            measured = "-" if goal.reached is None else f"{goal.reached:.3g}{goal.unit}"
            ratio = goal.ratio
            quartiles = "" if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
            verdict = {True: "reached", False: "**missed**", None: "not measured"}[goal.passed]
            target = f"{sign} {goal.bound:g}{goal.unit}"
            limit = self.limits.get(goal.text)
            most = "" if limit is None else f"{limit:.3g}x"
            print(f"| {goal.text} | {target} | {measured} | {quartiles} | {most} | {verdict} |")
        self.save()


def _line(row: dict[str, Any]) -> str:
    def cell(key: str, form: str) -> str:
        return "" if row[key] is None else format(row[key], form)

    cells = [row["method"], f"{row['ms']:.3f}", f"{row['spread'] * 100:.0f}"]
    cells += [cell("times_floor", ".2f"), cell("error", ".1e"), f"{row['first_s']:.2f}"]
    return "| " + " | ".join(cells) + " |"
