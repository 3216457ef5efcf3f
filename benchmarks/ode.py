"""Ordinary differential equations: ctorch beside torchdiffeq, torchode, scipy and diffrax.

    python benchmarks/ode.py                        everything, some minutes
    python benchmarks/ode.py --quick                a taste in under 20 s
    python benchmarks/ode.py lv mlp --rounds 31     these sections, more rounds

All solvers run in one process and in shuffled rounds, so that a busy machine is busy for all;
figures are medians, ratios are of medians, with the quartiles of the ratio over the rounds.
Columns: milliseconds, interquartile range, times faster than torchdiffeq's dopri5, evaluations of
the field (forward, backward), accepted and rejected steps, microseconds per accepted step beyond
the evaluations, time over the floor (the solver's evaluations, and VJPs where there are gradients,
at the field's own price), error of the worst sample and of the gradient against a tight solution,
seconds of the first call. Beside a goal: what a solver would reach that makes ctorch's calls of the
field one by one, and does nothing else. (ctorch takes the products of linear layers' parameters
together, and may be faster than that.)
"""

from __future__ import annotations

from typing import Any

import _peers as peers
import torch
from _bench import Bench, run
from _measure import Case, held_bytes
from _native import native_gradient
from _problems import Problem, ffjord, lotka_volterra, small_mlp, van_der_pol, wide_mlp
from _reference import reference_gradients, reference_solution
from _table import Floor, show


def forward_cases(bench: Bench, problem: Problem) -> list[Case | None]:
    plain = not isinstance(problem.y0, tuple)
    return [
        peers.ours_forward(problem),
        *([peers.native_forward(problem)] if plain and not problem.args else []),
        peers.ours_odeint(problem),
        bench.peer("torchdiffeq", peers.torchdiffeq_forward, problem),
        bench.peer("torchode", peers.torchode_forward, problem),
        bench.peer("scipy", peers.scipy_forward, problem),
        bench.diffrax("diffrax_forward", problem),
    ]


def gradient_cases(bench: Bench, problem: Problem, quick: bool) -> list[Case | None]:
    cases = [peers.ours_gradient(problem, g) for g in ("backprop", "checkpoint", "adjoint")]
    if not isinstance(problem.y0, tuple):
        cases.append(native_gradient(problem))
    for variant in ("backprop", "adjoint") if quick else ("backprop", "adjoint", "seminorm"):
        cases.append(bench.peer("torchdiffeq", peers.torchdiffeq_gradient, problem, variant))
    if not quick and not isinstance(problem.y0, tuple):
        cases.append(bench.peer("torchode", peers.torchode_gradient, problem))
    for variant in ("checkpoint", "backsolve"):
        cases.append(bench.diffrax("diffrax_gradient", problem, variant))
    return cases


OURS, OURS_BATCHED = "ctorch: dopri5", "ctorch: dopri5, each sample its own steps"
TORCHDIFFEQ, TORCHODE = "torchdiffeq: dopri5", "torchode: dopri5"


def lv(bench: Bench, quick: bool) -> None:
    sizes = [1] if quick else [1, 256]
    dtypes = [torch.float32] if quick else [torch.float32, torch.float64]
    for batch in sizes:
        for dtype in dtypes:
            problem = lotka_volterra(batch, dtype)
            cases, floor = bench.measure(problem, forward_cases(bench, problem))
            bench.rows += show(
                problem.name, list(cases.values()), floor, reference_solution(problem)
            )
            for peer in (TORCHDIFFEQ, TORCHODE):
                bench.faster(problem.name, cases, OURS, peer, 4, floor)
            bench.at_most(
                f"{problem.name}: overhead per step over torchdiffeq's",
                overhead_ratio(floor, cases),
                1 / 8,
            )


def overhead_ratio(floor: Floor, cases: dict[str, Case]) -> float | None:
    if OURS not in cases or TORCHDIFFEQ not in cases:
        return None
    ours, theirs = floor.overhead(cases[OURS]), floor.overhead(cases[TORCHDIFFEQ])
    return None if ours is None or theirs is None else ours / theirs


def vdp(bench: Bench, quick: bool) -> None:
    for dtype in [torch.float64] if quick else [torch.float32, torch.float64]:
        problem = van_der_pol(256, dtype, end=2.0 if quick else 20.0)
        solvers = [
            peers.ours_forward(problem, batched=True),
            peers.native_forward(problem, batched=True),
            *forward_cases(bench, problem),
        ]
        cases, floor = bench.measure(problem, solvers, slow=True)
        every = 16
        reference = reference_solution(problem, every)
        bench.rows += show(problem.name, list(cases.values()), floor, reference, every=every)
        bench.faster(problem.name, cases, OURS_BATCHED, TORCHODE, 4, floor)
        bench.faster(problem.name, cases, OURS_BATCHED, TORCHDIFFEQ, 8, floor)
        ours, theirs = cases.get(OURS_BATCHED), cases.get(TORCHODE)
        known = ours is not None and theirs is not None
        more = ours.report.nfe / theirs.report.nfe if known else None  # type: ignore[union-attr]
        bench.at_most(f"{problem.name}: evaluations over torchode's", more, 1)


def mlp(bench: Bench, quick: bool) -> None:
    bounds = {1: (3.8, 2.0, 9.0), 256: (2.6, 1.6, 7.5)}
    for batch in [1] if quick else [1, 256]:
        problem = small_mlp(batch, torch.float32)
        forward, backprop, adjoint = bounds[batch]
        cases, floor = network_forward(bench, problem)
        bench.faster(f"{problem.name} forward", cases, OURS, TORCHDIFFEQ, forward, floor)
        cases, floor = network_gradient(bench, problem, quick)
        text, ours = f"{problem.name} forward+backward", "ctorch: dopri5, backprop"
        bench.faster(text, cases, ours, "torchdiffeq: dopri5, backprop", backprop, floor)
        bench.faster(text, cases, ours, "torchdiffeq: dopri5, adjoint", adjoint, floor)
        checkpoint = cases.get("ctorch: dopri5, checkpoint")
        more = checkpoint.median / cases[ours].median if checkpoint and ours in cases else None
        bench.at_most(f"{text}: checkpoint over backprop", more, 1.4)


def wide(bench: Bench, quick: bool) -> None:
    problem = wide_mlp(torch.float32, batch=64 if quick else 512)
    cases, floor = network_forward(bench, problem)
    bench.at_most(f"{problem.name} forward over its evaluations", over(floor, cases, OURS), 1.1)
    cases, floor = network_gradient(bench, problem, quick)
    text, ours = f"{problem.name} forward+backward", "ctorch: dopri5, backprop"
    bench.at_most(f"{text} over evaluations with VJPs", over(floor, cases, ours), 1.1)
    bench.faster(text, cases, ours, "torchdiffeq: dopri5, backprop", 1.5, floor)
    bench.faster(text, cases, ours, "torchdiffeq: dopri5, adjoint", 4.5, floor)
    bench.faster(text, cases, ours, "diffrax: Dopri5, checkpoint", 1.8, floor)


def flow(bench: Bench, quick: bool) -> None:
    problem = ffjord(torch.float32, batch=64 if quick else 512)
    cases, floor = network_gradient(bench, problem, quick)
    text, ours = f"{problem.name} forward+backward", "ctorch: dopri5, backprop"
    bench.at_most(f"{text} over evaluations with VJPs", over(floor, cases, ours), 1.15)
    bench.faster(text, cases, ours, "torchdiffeq: dopri5, adjoint", 2, floor)


def over(floor: Floor, cases: dict[str, Case], name: str) -> float | None:
    """Time over the floor."""
    least = floor.seconds(cases[name]) if name in cases else None
    return None if least is None else cases[name].median / least


def network_forward(bench: Bench, problem: Problem) -> tuple[dict[str, Case], Floor]:
    cases, floor = bench.measure(problem, forward_cases(bench, problem))
    reference = reference_solution(problem)
    bench.rows += show(f"{problem.name}, forward", list(cases.values()), floor, reference)
    return cases, floor


def network_gradient(bench: Bench, problem: Problem, quick: bool) -> tuple[dict[str, Case], Floor]:
    cases, floor = bench.measure(problem, gradient_cases(bench, problem, quick), slow=True)
    tight, gradients = (None, None) if quick else reference_gradients(problem)
    title = f"{problem.name}, forward+backward"
    bench.rows += show(title, list(cases.values()), floor, tight, gradients)
    return cases, floor


def memory(bench: Bench, quick: bool) -> None:
    """What a solve holds between forward and backward: its result, saved tensors, graphs."""
    print("\nheld between forward and backward, MB")
    problems = [small_mlp(256, torch.float32), wide_mlp(torch.float32)]
    for problem in problems[:1] if quick else problems:
        state = sum(x.numel() * x.element_size() for x in problem.leaves)
        print(f"{problem.name} (one state {state / 1e6:.3f})")
        held = {name: held_bytes(build) / 1e6 for name, build in holders(bench, problem)}
        for name, size in held.items():
            print(f"  {name:40s}{size:10.3f}", flush=True)
            bench.rows.append({"problem": problem.name, "solver": name, "held_mb": size})
        if problem is problems[0]:
            text = f"{problem.name}: checkpoint holds"
            bench.at_most(text, held.get("ctorch: checkpoint"), 0.3, " MB")


def holders(bench: Bench, problem: Problem) -> list[tuple[str, Any]]:
    import ctorch

    options = {"rtol": problem.tolerance, "atol": problem.tolerance}
    # The leaves stay alive outside, for what they weigh is not the solver's doing.
    y0, times, field_ = problem.fresh_y0(), problem.times(), problem.field

    def ours(gradient: str) -> Any:
        return lambda: ctorch.solve_ode(field_, y0, times, gradient=gradient, **options)

    found = [(f"ctorch: {g}", ours(g)) for g in ("backprop", "checkpoint", "adjoint")]
    if "torchdiffeq" in bench.installed:
        import torchdiffeq

        for name in ("odeint", "odeint_adjoint"):
            solve = getattr(torchdiffeq, name)
            found.append((f"torchdiffeq: {name}", lambda f=solve: f(field_, y0, times, **options)))
    return found


RUN = {"lv": lv, "vdp": vdp, "mlp": mlp, "wide": wide, "ffjord": flow, "memory": memory}


if __name__ == "__main__":
    run(__doc__, RUN, ("lv", "mlp", "memory"), ("torchdiffeq", "torchode", "scipy", "diffrax"))
