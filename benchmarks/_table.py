"""Results as text: one table a problem, and the table of what was to be reached."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from _measure import Case, Ratio

#: calls of the field in one run of a case of ``Floor``: as many as a solve of the wide network
#: makes, for then graphs leave the caches as those of a solve do
BARE_CALLS = 32


@dataclass(frozen=True)
class Floor:
    """What the vector field alone costs, timed in the same rounds as the solvers.

    Attributes:
        evaluations: ``BARE_CALLS`` of them, in eager torch.
        recorded: the same with their graphs (None: forward only).
        vjps: vector-Jacobian products of these.
    """

    evaluations: Case
    recorded: Case | None = None
    vjps: Case | None = None

    @property
    def cases(self) -> list[Case]:
        """What is to be timed."""
        return [case for case in (self.evaluations, self.recorded, self.vjps) if case is not None]

    @property
    def call(self) -> float:
        """Seconds of one evaluation."""
        return self.evaluations.median / BARE_CALLS

    @property
    def call_vjp(self) -> tuple[float, float] | None:
        """Seconds of one evaluation with its graph, and of its VJP."""
        if self.recorded is None or self.vjps is None:
            return None
        return self.recorded.median / BARE_CALLS, self.vjps.median / BARE_CALLS

    def seconds(self, case: Case) -> float | None:
        """The calls that a solver made, at the price of the field: all its evaluations, and where
        there are gradients the VJPs of accepted steps, or of the backward solve.
        """
        report = case.report
        if report.nfe is None:
            return None
        if self.call_vjp is None or not case.differentiates:
            return report.nfe * self.call
        recorded, vjp = self.call_vjp
        again, vjps = report.nfe_backward or 0, report.vjps
        if vjps is None:  # evaluations of rejected steps have none
            if not again and report.accepted is None:
                return None
            steps = (report.accepted or 0) + (report.rejected or 0)
            vjps = again or round(report.nfe * (report.accepted or 0) / max(steps, 1))
        first = report.nfe * (self.call if again else recorded)
        return first + again * recorded + vjps * vjp

    def overhead(self, case: Case) -> float | None:
        """Seconds per accepted step beyond the evaluations."""
        report = case.report
        if self.call_vjp is not None or not report.accepted or report.nfe is None:
            return None
        return (case.median - report.nfe * self.call) / report.accepted


@dataclass(frozen=True)
class Goal:
    """A figure to reach: at least, or at most, a bound.

    Attributes:
        text: what is compared.
        reached: the figure.
        bound: of it.
        at_least: or at most.
        unit: of both.
        ratio: the figure with its quartiles.
        alone: what a solver would reach that costs nothing beyond the field's calls, made one by
            one in eager torch.
    """

    text: str
    reached: float | None
    bound: float
    at_least: bool = True
    unit: str = "x"
    ratio: Ratio | None = None
    alone: float | None = None

    @property
    def passed(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.bound if self.at_least else self.reached <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def relative_error(value: np.ndarray | None, reference: np.ndarray | None) -> float | None:
    """Of the worst sample."""
    if value is None or reference is None:
        return None
    difference = np.linalg.norm(value - reference, axis=-1)
    return float((difference / (np.linalg.norm(reference, axis=-1) + 1e-12)).max())


def gradient_error(
    value: list[np.ndarray] | None, reference: list[np.ndarray] | None
) -> float | None:
    """Relative, in the norm of all gradients together."""
    if value is None or reference is None:
        return None
    squares = sum(float(((a - b) ** 2).sum()) for a, b in zip(value, reference, strict=True))
    return float(np.sqrt(squares / sum(float((b**2).sum()) for b in reference)))


HEADER = (
    f"{'solver':40s}{'ms':>10s}{'iqr %':>7s}{'x tdeq':>8s}{'nfe':>7s}{'bwd':>6s}{'acc':>6s}"
    f"{'rej':>5s}{'us/step':>9s}{'x floor':>8s}{'error':>9s}{'g error':>9s}{'first s':>8s}"
)


def show(
    title: str,
    cases: Sequence[Case],
    floor: Floor,
    reference: np.ndarray | None = None,
    gradients: list[np.ndarray] | None = None,
    every: int = 1,
) -> list[dict[str, Any]]:
    """Print the table of one problem and return its rows.

    Args:
        title: of the table.
        cases: measured cases.
        floor: price of the field.
        reference: tight solution of every ``every``-th sample.
        gradients: tight gradients.
        every: stride of the samples that the reference has.
    """
    field = f"one evaluation {floor.call * 1e6:.1f} us"
    if floor.call_vjp is not None:
        recorded, vjp = floor.call_vjp
        field += f", with its graph {recorded * 1e6:.1f} us, its VJP {vjp * 1e6:.1f} us"
    print(f"\n{title}   ({field}; load {os.getloadavg()[0]:.1f})\n{HEADER}")
    base = next((case for case in cases if case.name.startswith("torchdiffeq: dopri5")), None)
    rows = []
    for case in cases:
        report, least = case.report, floor.seconds(case)
        overhead = floor.overhead(case)
        y = None if report.y is None else report.y[::every]
        row = {
            "problem": title,
            "solver": case.name,
            "ms": case.median * 1e3,
            "spread": case.spread,
            "times_torchdiffeq": None if base is None else base.median / case.median,
            "nfe": report.nfe,
            "nfe_backward": report.nfe_backward,
            "accepted": report.accepted,
            "rejected": report.rejected,
            "overhead_us": None if overhead is None else overhead * 1e6,
            "times_floor": None if least is None else case.median / least,
            "error": relative_error(y, reference),
            "gradient_error": gradient_error(report.gradients, gradients),
            "first_s": case.first,
        }
        if case.name.startswith(("diffrax", "scipy")):  # their field is not torch's
            row["overhead_us"] = row["times_floor"] = None
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    def cell(key: str, form: str, width: int) -> str:
        value = row[key]
        return f"{'-' if value is None else format(value, form):>{width}s}"

    return (
        f"{row['solver']:40s}{row['ms']:10.3f}{row['spread'] * 100:7.1f}"
        + cell("times_torchdiffeq", ".2f", 8)
        + cell("nfe", "d", 7)
        + cell("nfe_backward", "d", 6)
        + cell("accepted", "d", 6)
        + cell("rejected", "d", 5)
        + cell("overhead_us", ".1f", 9)
        + cell("times_floor", ".2f", 8)
        + cell("error", ".1e", 9)
        + cell("gradient_error", ".1e", 9)
        + cell("first_s", ".2f", 8)
    )


def show_goals(goals: Sequence[Goal]) -> None:
    print(
        f"\n{'to reach':86s}{'target':>10s}{'reached':>10s}  {'quartiles':15s}{'calls alone':>12s}"
    )
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        target = f"{sign} {goal.bound:g}{goal.unit}"
        reached = "-" if goal.reached is None else f"{goal.reached:.3g}{goal.unit}"
        ratio = goal.ratio
        quartiles = "" if ratio is None else f"{ratio.low:.2f} .. {ratio.high:.2f}"
        alone = "" if goal.alone is None else f"{goal.alone:.3g}{goal.unit}"
        verdict = {True: "pass", False: "FAIL", None: "not measured"}[goal.passed]
        print(f"{goal.text:86s}{target:>10s}{reached:>10s}  {quartiles:15s}{alone:>12s} {verdict}")
