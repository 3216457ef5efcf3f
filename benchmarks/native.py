"""Native solves: the whole integration compiled, beside diffrax and torchdiffeq.

    python benchmarks/native.py                     everything, some minutes
    python benchmarks/native.py --quick             a taste
    python benchmarks/native.py lv mlp --rounds 31  these sections, more rounds

Measured as in benchmarks/ode.py, whose columns and options these are; compilers run before anything
is timed. Where diffrax has a faster form (one step for all samples, or each its own under vmap;
Dopri5 or Tsit5), the faster one counts, and so it does for native solves of a batch.
"""

from __future__ import annotations

import _native as native
import _peers as peers
import numpy as np
import torch
from _bench import Bench, run
from _measure import Case, Ratio
from _problems import (
    Problem,
    lorenz,
    lotka_volterra,
    narrow_mlp,
    small_mlp,
    van_der_pol,
    wide_mlp,
)
from _reference import reference_gradients, reference_solution
from _table import Floor, Goal, show

DTYPES = (torch.float32, torch.float64)
HANDLE, OWN = "ctorch: native dopri5", "ctorch: native dopri5, each sample its own steps"
KERNEL, CALL = "ctorch: native dopri5, kernel alone", "ctorch: solve_ode(native=True)"


def fastest(cases: dict[str, Case], package: str) -> Case | None:
    """Of the cases of a package."""
    found = [case for name, case in cases.items() if name.startswith(package)]
    return min(found, key=lambda case: case.median, default=None)


def goal(bench: Bench, text: str, fast: Case | None, slow: Case | None, bound: float) -> None:
    known = fast is not None and slow is not None
    ratio = Ratio.of(slow, fast) if known else None  # type: ignore[arg-type]
    value = None if ratio is None else ratio.value
    bench.goals.append(Goal(text, value, bound, ratio=ratio))


def table(
    bench: Bench, title: str, problem: Problem, cases: dict[str, Case], floor: Floor, every: int = 1
) -> None:
    reference = reference_solution(problem, every)
    bench.rows += show(title, list(cases.values()), floor, reference, every=every)


def diffrax_forms(bench: Bench, problem: Problem, batch: int) -> list[Case | None]:
    forms = [{"method": method, "each": False} for method in ("Dopri5", "Tsit5")]
    if batch > 1:
        forms += [{**form, "each": True} for form in forms]
    return [bench.diffrax("diffrax_forward", problem, **form) for form in forms]


def lv(bench: Bench, quick: bool) -> None:
    for dtype in DTYPES[1:] if quick else DTYPES:
        problem = lotka_volterra(1, dtype)
        solvers = [
            native.kernel_alone(problem),
            peers.native_forward(problem),
            native.native_call(problem),
            bench.peer("torchdiffeq", peers.torchdiffeq_forward, problem),
            *diffrax_forms(bench, problem, 1),
        ]
        cases, floor = bench.measure(problem, solvers)
        table(bench, problem.name, problem, cases, floor)
        theirs, name = fastest(cases, "diffrax"), problem.name
        goal(bench, f"{name}: kernel alone against diffrax", cases[KERNEL], theirs, 3)
        bound = 1.5 if dtype == torch.float64 else 1
        goal(bench, f"{name}: handle against diffrax", cases[HANDLE], theirs, bound)
        eager = cases.get("torchdiffeq: dopri5")
        goal(bench, f"{name}: handle against torchdiffeq", cases[HANDLE], eager, 2000)
        added = (cases[CALL].median - cases[KERNEL].median) * 1e6
        bench.at_most(f"{name}: solve_ode(native=True) adds", added, 60, " us")
    for dtype in [] if quick else DTYPES:
        problem = lotka_volterra(256, dtype)
        solvers = [
            peers.native_forward(problem),
            peers.native_forward(problem, batched=True),
            bench.peer("torchdiffeq", peers.torchdiffeq_forward, problem),
            *diffrax_forms(bench, problem, 256),
        ]
        cases, floor = bench.measure(problem, solvers)
        table(bench, problem.name, problem, cases, floor)
        text = f"{problem.name}: own steps against diffrax's fastest"
        goal(bench, text, cases[OWN], fastest(cases, "diffrax"), 2)
        text = f"{problem.name}: joint steps against diffrax's fastest"
        goal(bench, text, cases[HANDLE], fastest(cases, "diffrax"), 2)


def vdp(bench: Bench, quick: bool) -> None:
    for dtype in DTYPES[1:] if quick else DTYPES:
        problem = van_der_pol(256, dtype, end=2.0 if quick else 20.0)
        solvers = [
            peers.native_forward(problem, batched=True),
            *diffrax_forms(bench, problem, 256),
        ]
        cases, floor = bench.measure(problem, solvers, slow=True)
        table(bench, problem.name, problem, cases, floor, every=16)
        bound = 10 if dtype == torch.float64 else 5
        text = f"{problem.name}: own steps against diffrax's fastest"
        goal(bench, text, cases[OWN], fastest(cases, "diffrax"), bound)


def mlp(bench: Bench, quick: bool) -> None:
    bounds = {1: (10, 3), 256: (1.15, 1.2)}
    for batch in [1] if quick else [1, 256]:
        for dtype in DTYPES[:1] if quick else DTYPES:
            problem = small_mlp(batch, dtype)
            forward, both = bounds[batch]
            network(bench, problem, batch, quick, forward, both)


def network(
    bench: Bench, problem: Problem, batch: int, quick: bool, forward: float, both: float
) -> None:
    further = peers.native_forward(problem, batched=True) if batch > 1 else None
    solvers = [
        peers.native_forward(problem),
        further or native.kernel_alone(problem),
        bench.peer("torchdiffeq", peers.torchdiffeq_forward, problem),
        *diffrax_forms(bench, problem, batch),
    ]
    cases, floor = bench.measure(problem, solvers)
    table(bench, f"{problem.name}, forward", problem, cases, floor)
    theirs = fastest(cases, "diffrax")
    if further is None:
        text = f"{problem.name}: kernel alone against diffrax's fastest"
        goal(bench, text, cases.pop(KERNEL), theirs, forward)
    ours = fastest(cases, "ctorch")
    goal(bench, f"{problem.name} forward against diffrax's fastest", ours, theirs, forward)

    own = [native.native_gradient(problem, batched=True)] if batch > 1 else []
    solvers = [
        native.native_gradient(problem),
        *own,
        bench.peer("torchdiffeq", peers.torchdiffeq_gradient, problem, "backprop"),
        bench.peer("torchdiffeq", peers.torchdiffeq_gradient, problem, "adjoint"),
        *[bench.diffrax("diffrax_gradient", problem, v) for v in ("checkpoint", "backsolve")],
    ]
    cases, floor = bench.measure(problem, solvers, slow=True)
    tight, gradients = (None, None) if quick else reference_gradients(problem)
    title = f"{problem.name}, forward+backward"
    bench.rows += show(title, list(cases.values()), floor, tight, gradients)
    ours, theirs = fastest(cases, "ctorch"), fastest(cases, "diffrax")
    goal(bench, f"{title} against diffrax's best adjoint", ours, theirs, both)


def wide(bench: Bench, quick: bool) -> None:
    for dtype in DTYPES[:1] if quick else DTYPES:
        problem = wide_mlp(dtype, batch=64 if quick else 512)
        for gradient, bound in ((False, 1.2), (True, 1.3)):
            products = native.products(problem, gradient=gradient)
            if gradient:
                solvers = [
                    native.native_gradient(problem),
                    peers.ours_gradient(problem, "backprop"),
                ]
            else:
                solvers = [peers.native_forward(problem), peers.ours_forward(problem)]
            cases, floor = bench.measure(problem, [*solvers, products], slow=True)
            title = f"{problem.name}, " + ("forward+backward" if gradient else "forward")
            table(bench, title, problem, cases, floor)
            least = cases.pop(products.name).median
            for case in cases.values():
                over = None if case.report.nfe is None else case.median / least / case.report.nfe
                bench.at_most(f"{title}: {case.name} over its matrix products", over, bound)


def many(bench: Bench, quick: bool) -> None:
    for dtype in DTYPES[1:] if quick else DTYPES:
        problem = lorenz(10**4 if quick else 10**6, dtype)
        solvers = [native.lorenz_native(problem), native.lorenz_by_hand(problem)]
        cases, floor = bench.measure(problem, solvers, slow=True)
        table(bench, problem.name, problem, cases, floor, every=len(problem.leaves[0]) // 16)
        ours, hand = fastest(cases, "ctorch"), fastest(cases, "C++")
        over = ours.median / hand.median if ours and hand else None
        bench.at_most(f"{problem.name}: time over that of C++ by hand", over, 1.5)


def training(bench: Bench, quick: bool) -> None:
    for dtype in DTYPES[:1] if quick else DTYPES:
        problem = narrow_mlp(128, dtype)
        times, target = native.observations(problem, 50)
        rate = 1e-7
        descent = (times, target, rate)
        solvers = [
            native.training(narrow_mlp(128, dtype), *descent, "native"),
            native.training(narrow_mlp(128, dtype), *descent, "ctorch"),
            *[
                bench.peer("torchdiffeq", native.training, narrow_mlp(128, dtype), *descent, name)
                for name in ("torchdiffeq", "torchdiffeq adjoint")
            ],
            bench.diffrax("diffrax_training", problem, np.asarray(times), np.asarray(target), rate),
        ]
        cases, floor = bench.measure(problem, solvers, slow=True)
        title = f"{problem.name}, training step with 50 times"
        gradients = solvers[1].report.gradients if solvers[1] else None
        bench.rows += show(title, list(cases.values()), floor, None, gradients)
        ours = fastest(cases, "ctorch")
        for variant, bound in (("adjoint", 20), ("backprop", 3)):
            theirs = cases.get(f"torchdiffeq: dopri5, {variant}")
            goal(bench, f"{title} against torchdiffeq's {variant}", ours, theirs, bound)
        goal(bench, f"{title} against diffrax", ours, fastest(cases, "diffrax"), 1)


RUN = {"lv": lv, "vdp": vdp, "mlp": mlp, "wide": wide, "lorenz": many, "training": training}


if __name__ == "__main__":
    run(__doc__, RUN, ("lv", "lorenz"), ("torchdiffeq", "scipy", "diffrax"))
