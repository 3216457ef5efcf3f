"""A benchmark program: its command line, its rounds, what it found, its goals."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _peers as peers
import torch
from _measure import CLOCKS, Case, Ratio, Report, interleave
from _problems import Problem
from _table import BARE_CALLS, Floor, Goal, show_goals
from torch import Tensor
from torch.autograd import Variable


def arguments(doc: str | None, sections: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(sections)}; default: all")
    parser.add_argument("--quick", action="store_true", help="few rounds, small problems")
    parser.add_argument("--rounds", type=int, default=15, help="least timings of each solver")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="rounds of a table go on for so long"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and XLA")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, fairer on a busy machine; one thread only",
    )
    parser.add_argument("--json", type=Path, help="write rows and goals to this file")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    chosen = parser.parse_args()
    if unknown := set(chosen.sections) - set(sections):
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(sections)}")
    if chosen.clock == "cpu" and chosen.threads != 1:
        parser.error("--clock cpu adds up the time of all threads: it needs --threads 1")
    return chosen


def run(
    doc: str | None,
    sections: Mapping[str, Callable[[Bench, bool], None]],
    taste: Sequence[str],
    wanted: Sequence[str],
) -> None:
    """The program: measure the sections that the command line asks for, and show the goals.

    Args:
        doc: of the program.
        sections: by name.
        taste: sections that ``--quick`` takes.
        wanted: peers to compare with; ``--quick`` does without diffrax, which compiles for long.
    """
    chosen = arguments(doc, sections)
    quick = chosen.quick
    torch.set_num_threads(chosen.threads)
    if chosen.threads == 1:  # XLA reads this when it is first imported
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    left_out = [*chosen.without, *["diffrax"] * quick]
    installed = peers.present([name for name in wanted if name not in left_out])
    versions = ", ".join(f"{p} {peers.version(p)}" for p in ["torch", *sorted(installed)])
    print(f"{versions}; {chosen.threads} thread(s), {chosen.clock} clock")
    bench = Bench(
        rounds=3 if quick else chosen.rounds,
        shortest=0.002 if quick else 0.02,
        least=0.0 if quick else chosen.seconds,
        clock=chosen.clock,
        installed=installed,
    )
    for section in chosen.sections or (taste if quick else sections):
        sections[section](bench, quick)
        if chosen.json is not None:
            found = {"rows": bench.rows, "goals": [goal.as_dict() for goal in bench.goals]}
            chosen.json.write_text(json.dumps({"versions": versions, **found}, indent=1))
    show_goals(bench.goals)


@dataclass
class Bench:
    """One run: what is installed, how long it may take, what it found."""

    rounds: int
    shortest: float
    least: float
    clock: str
    installed: set[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def measure(
        self, problem: Problem, cases: list[Case | None], *, slow: bool = False
    ) -> tuple[dict[str, Case], Floor]:
        """Time the cases, and with them the field; VJPs too if there are gradients to compare."""
        there = [case for case in cases if case is not None]
        gradients = any(case.differentiates for case in there)
        floor = Floor(*field_alone(problem, gradients))
        field_cases = floor.cases
        rounds = max(3, self.rounds // 3) if slow else self.rounds
        everyone = [*there, *field_cases]
        with torch.set_grad_enabled(gradients):
            timed = interleave(
                everyone, rounds, shortest=self.shortest, clock=self.clock, least=self.least
            )
        return {case.name: case for case in timed if case not in field_cases}, floor

    def faster(
        self,
        text: str,
        cases: dict[str, Case],
        fast: str,
        slow: str,
        bound: float,
        floor: Floor | None = None,
    ) -> None:
        """A goal: ``fast`` at least ``bound`` times faster than ``slow``; with ``floor`` also what
        the calls of the field that ``fast`` makes would reach alone.
        """
        ratio = alone = None
        if fast in cases and slow in cases:
            ratio = Ratio.of(cases[slow], cases[fast])
            least = None if floor is None else floor.seconds(cases[fast])
            alone = None if least is None else cases[slow].median / least
        reached = None if ratio is None else ratio.value
        goal = Goal(f"{text} against {slow}", reached, bound, ratio=ratio, alone=alone)
        self.goals.append(goal)

    def at_most(self, text: str, reached: float | None, bound: float, unit: str = "x") -> None:
        self.goals.append(Goal(text, reached, bound, at_least=False, unit=unit))

    def peer(self, package: str, build: Any, *args: Any) -> Case | None:
        return build(*args) if package in self.installed else None

    def diffrax(self, function: str, *args: Any, **options: Any) -> Case | None:
        if "diffrax" not in self.installed:
            return None
        import _diffrax

        return getattr(_diffrax, function)(*args, **options)


def field_alone(problem: Problem, gradients: bool) -> list[Case]:
    """The calls of a field that no solver can do without, bare: an evaluation; if there are
    gradients also one that records its graph, and its vector-Jacobian product.

    Each ``BARE_CALLS`` times, on as many graphs, as a solve has them.
    """
    time, field = torch.zeros((), dtype=problem.dtype), problem.field
    parameters = tuple(problem.parameters)
    run_backward = Variable._execution_engine.run_backward

    def evaluate() -> None:
        with torch.no_grad():
            for _ in range(BARE_CALLS):
                field(time, problem.y0)

    def record() -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        made = []
        for _ in range(BARE_CALLS):
            leaves = tuple([x.detach().requires_grad_(True) for x in problem.leaves])
            out = field(time, leaves if isinstance(problem.y0, tuple) else leaves[0])
            made.append((leaves, out if isinstance(out, tuple) else (out,)))
        return made

    cases = [Case("evaluations", evaluate, lambda _: Report())]
    if gradients:
        recorded = record()
        cotangents = tuple(x.detach() for x in recorded[0][1])

        def pull() -> None:
            for leaves, outs in recorded:
                run_backward(  # what `torch.autograd.grad` calls, for 10 microseconds more
                    outs,
                    cotangents,
                    True,
                    False,
                    leaves + parameters,
                    allow_unreachable=True,
                    accumulate_grad=False,
                )

        cases.append(Case("evaluations with graph", record, lambda _: Report()))
        cases.append(Case("VJPs", pull, lambda _: Report()))
    return cases
