"""Derivative operators: ctorch beside nested torch.func, torch-jet, JAX and folx.

    python benchmarks/operators.py                           everything, some minutes
    python benchmarks/operators.py --quick                   a taste
    python benchmarks/operators.py jet laplacian --rounds 15 these sections, more rounds
    python benchmarks/operators.py jet --only "jax" "nested" ctorch beside these peers alone
    python benchmarks/operators.py --dtype float64 --threads 2

All methods run in one process and in shuffled rounds. With one thread the clock is the processor
time of the process, which other users of the machine do not lengthen; with more it is the wall's.
Figures are medians, ratios are of medians. "Times the products" is the distance to the bare matrix
products that no method can do without; the error is the largest difference from a float64 reference
relative to its largest entry (for wavefunctions: the relative error of the median sample, for some
lie near a node). The tables are Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import _operator_torch as tp
import _psiformer
from _measure import Case
from _operator_bench import Bench, middle, products, torch_case
from _operator_torch import Mlp

from tests.autodiff.references import circle

SECTIONS = ("jet", "series", "laplacian", "divergence", "psiformer", "coverage", "first-call")
PEERS = {
    "jet": "pip install jet-for-pytorch (Python 3.12 or later)",
    "jax": "pip install jax",
    "folx": "pip install folx",
}
BATCH = 128


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="few rounds, few sizes")
    parser.add_argument("--rounds", type=int, default=9, help="least timings of each method")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="rounds of a table go on for so long"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and XLA")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--only", nargs="*", default=[], help="ctorch and peers so named alone")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--json", type=Path, help="write rows and goals to this file")
    chosen = parser.parse_args()
    if unknown := set(chosen.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return chosen


def present(without: list[str]) -> set[str]:
    """Which peers can be imported; says of the others why not and how to get them."""
    found = set()
    for name, cure in PEERS.items():
        if name in without:
            continue
        try:
            importlib.import_module(name)
        except (ImportError, SyntaxError) as failure:
            print(f"{name}: absent, left out ({cure}): {failure}")
        else:
            found.add(name)
    return found


def jax_cases(bench: Bench, function: str, *args: object, **options: object) -> list[Case]:
    if "jax" not in bench.installed:
        return []
    import _operator_jax

    _operator_jax.setup(bench.dtype == torch.float64)
    cases = getattr(_operator_jax, function)(*args, **options)
    return [case for case in cases if "folx" in bench.installed or "folx" not in case.name]


# ---------------------------------------------------------------- sections


def jet(bench: Bench) -> None:
    """The K-th derivative along a line."""
    import ctorch

    problem = Mlp.of((64, 256, 256, 64), bench.dtype, BATCH)
    x, v = problem.x, problem.v
    bounds = {3: (35, 3), 6: (350, 8)}
    for order in (3,) if bench.quick else (3, 6):
        rows = (order + 1) * BATCH
        shapes = [(2 * BATCH, 64, 256), (rows, 256, 256), (BATCH, 256, 64)]
        floor = products("products, lean ends", shapes, bench.dtype)
        cases = [
            torch_case(
                "ctorch, a plain net", lambda k=order: ctorch.derivative(problem.net, x, v, k)
            ),
            torch_case(
                "ctorch, any module", lambda k=order: ctorch.derivative(problem.opaque, x, v, k)
            ),
            torch_case("ctorch.jet, any module", lambda k=order: whole_jet(problem, k)),
            torch_case("forward pass", lambda: problem.net(x), judged=False),
            torch_case("torch, nested jvp", lambda k=order: tp.nested_directional(problem, k)),
        ]
        if "jet" in bench.installed:
            cases += tp.torch_jet_directional(problem, order)
        cases += jax_cases(bench, "directional", problem, order)
        line = circle(lambda z: problem.exact(x.double() + z * v.double()), order)[order].numpy()
        title = f"d^{order}/ds^{order} f(x + s v), 64-256-256-64"
        found = bench.table(title, cases, line, floor)
        ours, text, (nested, peer) = "ctorch, a plain net", f"y_{order}", bounds[order]
        bench.at_most(f"{text}, plain net over products", found, ours, floor, 1.25)
        bench.at_most(f"{text}, any module over products", found, "ctorch, any module", floor, 2.5)
        for name, rivals, bound in (
            ("nested jvp", ["torch, nested jvp"], nested),
            ("torch-jet", ["torch-jet"], peer),
            ("torch-jet's graph", ["torch-jet, graph"], peer),
            ("JAX", ["jax, nested jvp", "jax.jet"], 1.3),
        ):
            bench.faster(f"{text} against {name}", found, ours, rivals, bound, floor)
        if order == 6 and bench.dtype == torch.float32 and ours in found:
            error = next(r["error"] for r in bench.rows[::-1] if r["method"] == ours)
            bench.figure(f"{text}, relative error", error, 5e-7, least=False)


def whole_jet(problem: Mlp, order: int) -> torch.Tensor:
    """All derivatives to the order, of which the last is judged."""
    import ctorch

    series = ([problem.v] + [torch.zeros_like(problem.v)] * (order - 1),)
    return ctorch.jet(problem.opaque, (problem.x,), series)[1][-1]


def series(bench: Bench) -> None:
    """The K-th derivative of an ODE's solution, and the gradient of its square."""
    problem = Mlp.of((64, 256, 256, 64), bench.dtype, BATCH)
    net, opaque, x = problem.net, problem.opaque, problem.x
    for order in (3,) if bench.quick else (3, 6):
        exact = solution_derivative(problem, order)
        forward = [(BATCH, 64, 256), (BATCH, 256, 256), (BATCH, 256, 64)] * order
        cases = [
            torch_case("ctorch, a plain net", lambda k=order: tp.ours_series(net, x, k)),
            torch_case("ctorch, any module", lambda k=order: tp.ours_series(opaque, x, k)),
            torch_case("torch, nested jvp", lambda k=order: tp.nested_series(net, x, k)),
        ]
        if "jet" in bench.installed:
            cases.append(torch_case("torch-jet", tp.torch_jet_series(problem, order)))
        cases += jax_cases(bench, "series", problem, order, gradient=False)
        floor = products("products, one sweep an order", forward, bench.dtype)
        bench.table(f"d^{order}x/dt^{order} of x' = f(x)", cases, exact.numpy(), floor)
        series_gradient(bench, problem, order)


def series_gradient(bench: Bench, problem: Mlp, order: int) -> None:
    net, x, parameters = problem.net, problem.x, problem.parameters

    def gradient(fn: Callable[[], torch.Tensor], name: str) -> Case:
        return torch_case(name, tp.trained(fn, parameters), no_grad=False)

    opaque = problem.opaque
    cases = [
        gradient(lambda: tp.ours_series(net, x, order), "ctorch, a plain net"),
        gradient(lambda: tp.ours_series(opaque, x, order), "ctorch, any module"),
        gradient(lambda: tp.nested_series(net, x, order), "torch, nested jvp"),
    ]
    if "jet" in bench.installed:
        cases.append(gradient(tp.torch_jet_series(problem, order), "torch-jet"))
    cases += jax_cases(bench, "series", problem, order, gradient=True)
    forward = [(BATCH, 64, 256), (BATCH, 256, 256), (BATCH, 256, 64)] * order
    rows = order * BATCH
    weights = [(64, rows, 256), (256, rows, 256), (256, rows, 64)]
    floor = products("products, there and back", [*forward, *forward, *weights], bench.dtype)
    reference = series_gradient_reference(problem, order) if order <= 3 else None
    found = bench.table(f"gradient of mean(x_{order}^2), R_{order}", cases, reference, floor)
    best = [name for name in found if name.startswith("jax")]
    over_jax, over_nested = {3: (1.3, 5), 6: (2.5, 40)}[order]
    ours, text = "ctorch, a plain net", f"gradient of R_{order}"
    bench.faster(f"{text} against the best of JAX", found, ours, best, over_jax, floor)
    nested = ["torch, nested jvp"]
    bench.faster(f"{text} against nested jvp", found, ours, nested, over_nested, floor)


def solution_derivative(problem: Mlp, order: int) -> torch.Tensor:
    """By Cauchy's formula, one order after the other, in float64."""
    coefficients = [problem.x.double()]
    for k in range(order):
        known = list(coefficients)
        path = lambda z, known=known: sum(c * z**j for j, c in enumerate(known))  # noqa: E731
        slope = circle(lambda z, path=path: problem.exact(path(z)), k)[k]
        coefficients.append(slope / math.factorial(k + 1))
    return coefficients[order] * math.factorial(order)


def series_gradient_reference(problem: Mlp, order: int) -> np.ndarray:
    net = problem.double()
    y = tp.nested_series(net, problem.x.double(), order)
    return torch.autograd.grad((y**2).mean(), net[0].weight)[0].numpy()


def laplacian(bench: Bench) -> None:
    """The Laplacian of a scalar net."""
    import ctorch

    bounds = {10: 1.0, 50: 1.2, 100: 1.2}
    for d in (10,) if bench.quick else (10, 50, 100):
        problem = Mlp.of((d, 256, 256, 64, 1), bench.dtype, BATCH)
        net, opaque, x = problem.net, problem.opaque, problem.x
        scalar = lambda y, f=opaque: f(y).squeeze(-1)  # noqa: E731
        rows = BATCH * (d + 2)
        shapes = [(BATCH, d, 256), (rows, 256, 256), (rows, 256, 64), (2 * BATCH, 64, 1)]
        floor = products("products, lean ends", shapes, bench.dtype)
        ours = {
            "ctorch, a plain net": lambda n=net, x=x: ctorch.laplacian(n, x)[2].reshape(len(x)),
            "ctorch, any module": lambda f=scalar, x=x: ctorch.laplacian(f, x)[2],
        }
        cases = [torch_case(name, fn) for name, fn in ours.items()]
        cases += [
            torch_case("forward pass", lambda n=net, x=x: n(x), judged=False),
            torch_case("torch.func.hessian", lambda n=net, x=x: tp.hessian_trace(n, x)),
            torch_case("torch, loop of HVPs", lambda f=scalar, x=x: tp.hvp_loop(f, x)),
        ]
        if "jet" in bench.installed:
            cases.append(torch_case("torch-jet, collapsed", tp.torch_jet_laplacian(problem)))
        cases += jax_cases(bench, "laplacian", problem, gradient=False)
        exact = tp.hessian_trace(problem.double(), x.double()).detach().numpy()
        found = bench.table(f"Laplacian, {d}-256-256-64-1", cases, exact, floor)
        plain, text = "ctorch, a plain net", f"Laplacian, d = {d}"
        bench.at_most(f"{text}, over products", found, plain, floor, 1.3)
        bench.faster(f"{text} against hessian", found, plain, ["torch.func.hessian"], 4.5, floor)
        bench.faster(
            f"{text} against torch-jet", found, plain, ["torch-jet, collapsed"], 2.3, floor
        )
        bench.faster(f"{text} against folx", found, plain, ["folx"], bounds[d], floor)
        laplacian_gradient(bench, problem, ours, d)


def laplacian_gradient(
    bench: Bench, problem: Mlp, ours: dict[str, Callable[[], torch.Tensor]], d: int
) -> None:
    parameters = problem.parameters[:-1]  # a Laplacian does not depend on the last bias
    ways = dict(ours)
    if "jet" in bench.installed:
        ways["torch-jet, collapsed"] = tp.torch_jet_laplacian(problem)
    ways["torch.func.hessian"] = lambda: tp.hessian_trace(problem.net, problem.x)
    cases = [torch_case(n, tp.trained(f, parameters), no_grad=False) for n, f in ways.items()]
    cases += jax_cases(bench, "laplacian", problem, gradient=True)
    n = BATCH * (d + 2)
    shapes = [(BATCH, d, 256), (n, 256, 256), (n, 256, 64), (n, 256, 256), (256, n, 256)]
    shapes += [(n, 64, 256), (64, n, 256), (d, BATCH, 256)]
    floor = products("products, there and back", shapes, bench.dtype)
    net = problem.double()
    loss = (tp.hessian_trace(net, problem.x.double()) ** 2).mean()
    exact = torch.autograd.grad(loss, net[0].weight)[0].numpy()
    found = bench.table(f"gradient of mean(Laplacian^2), d = {d}", cases, exact, floor)
    bench.faster(
        f"Laplacian with gradient, d = {d}, against torch-jet",
        found,
        "ctorch, a plain net",
        ["torch-jet, collapsed"],
        2,
        floor,
    )


def divergence(bench: Bench) -> None:
    """The exact divergence of a net of three hidden layers, and of two, where a closed form is."""
    import ctorch

    for d, hidden in ((16, 3),) if bench.quick else ((64, 3), (16, 2), (64, 2)):
        problem = Mlp.of((d, *(256,) * hidden, d), bench.dtype, BATCH)
        net, opaque, x, probe = problem.net, problem.opaque, problem.x, problem.v.sign()
        rows = (d + 1) * BATCH
        if hidden == 3:
            shapes = [(BATCH, d, 256), *[(rows, 256, 256)] * 2, (BATCH, 256, d)]
        else:
            shapes = [(BATCH, d, 256), (256, d, 256), *[(BATCH, 256, 256)] * 2, (BATCH, 256, d)]
        floor = products("products, lean", shapes, bench.dtype)
        cases = [
            torch_case("ctorch, a plain net", lambda n=net, x=x: ctorch.divergence(n, x)[1]),
            torch_case("ctorch, any module", lambda n=opaque, x=x: ctorch.divergence(n, x)[1]),
            torch_case("torch, vmap(vjp)", lambda n=net, x=x: tp.vjp_trace(n, x)),
            torch_case("torch, jacrev", lambda n=net, x=x: tp.jacrev_trace(n, x)),
            torch_case(
                "torch, Hutchinson, 1 probe",
                lambda n=net, x=x, e=probe: tp.hutchinson(n, x, e),
                judged=False,
            ),
        ]
        cases += jax_cases(bench, "divergence", problem)
        exact = tp.jacrev_trace(problem.double(), x.double()).detach().numpy()
        title = f"divergence, d = {d}, {hidden} hidden layers of 256"
        found = bench.table(title, cases, exact, floor)
        plain, ways = "ctorch, a plain net", ["torch, vmap(vjp)", "torch, jacrev"]
        if d != 64:
            continue
        least = 2 if hidden == 3 else 20
        text = f"divergence, d = 64, {hidden} hidden layers"
        bench.faster(f"{text}, against torch", found, plain, ways, least, floor)
        if hidden == 2:
            probe_case = found.get("torch, Hutchinson, 1 probe")
            bench.at_most(f"{text}, over a Hutchinson probe", found, plain, probe_case, 1.0)


def psiformer(bench: Bench) -> None:
    """The Laplacian of a wavefunction."""
    import ctorch

    for n in (4, 10) if bench.quick else (4, 10, 20, 40):
        batch = 16 if bench.quick else 64
        net = _psiformer.PsiFormer(n, bench.dtype)
        x = net.walkers(batch)
        cases = [
            torch_case("ctorch", lambda f=net, x=x: ctorch.laplacian(f, x)[2]),
            torch_case("forward pass", lambda f=net, x=x: f(x), judged=False),
            torch_case("torch, loop of HVPs", lambda f=net, x=x: tp.hvp_loop(f, x)),
        ]
        if {"folx", "jax"} <= bench.installed:
            import _operator_jax

            _operator_jax.setup(bench.dtype == torch.float64)
            for threshold in (0, 6) if n <= 10 else (6,):
                name = f"folx, threshold {threshold}"
                cases.append(_psiformer.folx_case(name, net, x, threshold))
        chunk = _psiformer.products(n, min(batch, 8))
        floor = products("products", chunk * (batch // min(batch, 8)), bench.dtype)
        double = _psiformer.PsiFormer(n, torch.float64)
        double.load_state_dict({k: p.double() for k, p in net.state_dict().items()})
        exact = tp.hvp_loop(double, x.double()).numpy()
        title = f"PsiFormer-like net, {n} electrons, {batch} walkers: Laplacian"
        found = bench.table(title, cases, exact, floor, error=middle)
        text = f"PsiFormer, N = {n}"
        bench.faster(f"{text}, against HVPs", found, "ctorch", ["torch, loop of HVPs"], 2.5, floor)
        rivals = [name for name in found if name.startswith("folx")]
        if n >= 10:
            bound = 1.5 if n >= 20 else 1
            bench.faster(f"{text}, against folx", found, "ctorch", rivals, bound, floor)


def coverage(bench: Bench) -> None:
    from _operator_coverage import coverage as run

    run(bench)


FIRST = """
import time, torch, ctorch
torch.set_num_threads(1)
net = torch.nn.Sequential(
    torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256), torch.nn.Tanh(),
    torch.nn.Linear(256, {out}))
x, v = torch.randn(128, 64), torch.randn(128, 64)
torch.tanh(x @ x.T)
start = time.perf_counter()
{call}
print(time.perf_counter() - start)
"""


def first_call(bench: Bench) -> None:
    """The first call in a new process, after the imports."""
    calls = {
        "derivative, K = 6": (64, "ctorch.derivative(net, x, v, 6)"),
        "taylor_series, K = 6": (
            64,
            "ctorch.taylor_series(lambda t, y: net(y), torch.zeros(()), x, 6)",
        ),
        "laplacian": (1, "ctorch.laplacian(net, x)"),
        "laplacian of any module": (1, "ctorch.laplacian(lambda y: net(y).squeeze(-1), x)"),
        "divergence": (64, "ctorch.divergence(net, x)"),
    }
    print("\n### First call in a new process\n\n| call | s |\n|---|---|")
    for name, (out, call) in calls.items():
        seconds = []
        for _ in range(1 if bench.quick else 3):
            script = FIRST.format(out=out, call=call)
            root = Path(__file__).parents[1]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", script],
                capture_output=True,
                text=True,
                cwd=root,
                env={**os.environ, "PYTHONPATH": str(root)},
            )
            if done.returncode:
                print(f"  {name}: FAILED, {done.stderr.strip().splitlines()[-1]}")
                break
            seconds.append(float(done.stdout))
        value = sorted(seconds)[len(seconds) // 2] if seconds else None
        if value is not None:
            print(f"| {name} | {value:.3f} |", flush=True)
        bench.figure(f"first call, {name}", value, 0.3, least=False, unit=" s")


RUN = {
    "jet": jet,
    "series": series,
    "laplacian": laplacian,
    "divergence": divergence,
    "psiformer": psiformer,
    "coverage": coverage,
    "first-call": first_call,
}


def main() -> None:
    chosen = arguments()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(chosen.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if chosen.threads == 1:  # XLA reads this when it is first imported
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    installed = present(chosen.without)
    clock = "cpu" if chosen.threads == 1 else "wall"
    bench = Bench(
        rounds=3 if chosen.quick else chosen.rounds,
        clock=clock,
        dtype=getattr(torch, chosen.dtype),
        installed=installed,
        quick=chosen.quick,
        least=0.0 if chosen.quick else chosen.seconds,
        out=chosen.json,
        only=tuple(chosen.only),
    )
    versions = ", ".join([f"torch {torch.__version__}", *map(version, sorted(installed))])
    print(f"{versions}; {chosen.dtype}, {chosen.threads} thread(s), {clock} clock")
    start = time.perf_counter()
    for section in chosen.sections or SECTIONS:
        RUN[section](bench)
    bench.show_goals()
    print(f"\n{time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}")


def version(name: str) -> str:
    from importlib.metadata import version as installed

    package = {"jet": "jet-for-pytorch"}.get(name, name)
    return f"{package} {installed(package)}"


if __name__ == "__main__":
    main()
