"""What benchmarks/native.py times of ctorch beyond the forward solves of _peers.py."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import Case, Report
from _peers import arrays, backward, final, most, native_forward, tolerances
from _problems import Problem
from torch import Tensor, nn


def kernel_alone(problem: Problem) -> Case:
    """The compiled function on a task made ready: no Python between the calls but ctypes' own."""
    import ctorch
    from ctorch.ode import native
    from ctorch.ode.native_task import Task

    handle = ctorch.ode.compile(problem.field, **tolerances(problem))
    times = problem.times().double()
    with torch.no_grad():
        handle(problem.y0, times)
    (prepared,) = handle._known.values()
    addresses = [x.data_ptr() for x in prepared.traced.shared]
    shared = (ctypes.c_uint64 * len(addresses))(*addresses)
    task, held = Task.from_buffer_copy(prepared.task), []

    def keep(task: Any) -> int:
        held.append(task)
        return 0

    y0 = problem.y0
    shape = (len(times), *y0.shape)
    outcome = native.execute(keep, task, (1, y0.numel()), shape, y0, times, None, [], True)
    task.shared = ctypes.addressof(shared)
    pointer = ctypes.byref(task)
    return Case(
        "ctorch: native dopri5, kernel alone",
        lambda _held=shared: prepared.function(pointer),
        lambda _: Report(
            y=outcome.rows[-1].double().numpy(),
            nfe=outcome.numbers[0],
            accepted=outcome.numbers[1],
            rejected=outcome.numbers[2],
        ),
    )


def native_call(problem: Problem) -> Case:
    """Through ``solve_ode(native=True)``."""
    import ctorch

    times = problem.times()

    @torch.no_grad()
    def call() -> Any:
        return ctorch.solve_ode(
            problem.field, problem.y0, times, native=True, **tolerances(problem)
        )

    def describe(solution: Any) -> Report:
        stats = solution.stats
        return Report(
            y=final(solution.y).double().numpy(),
            nfe=most(stats.nfe),
            accepted=most(stats.accepted),
            rejected=most(stats.rejected),
        )

    return Case("ctorch: solve_ode(native=True)", call, describe)


def native_gradient(problem: Problem, *, batched: bool = False) -> Case:
    """Forward and exact gradient, through ``solve_ode(native=True)``."""
    import ctorch

    times = problem.times()

    def solve() -> tuple[Any, list[Tensor], Any]:
        y0 = problem.fresh_y0()
        solution = ctorch.solve_ode(
            problem.field, y0, times, native=True, batched=batched, **tolerances(problem)
        )
        end = solution.y[:, -1] if batched else final(solution.y)
        return *backward(problem, y0, end), solution.stats

    def describe(result: tuple[Any, list[Tensor], Any]) -> Report:
        y, gradients, stats = result
        return Report(
            y=y.double().numpy(),
            gradients=arrays(gradients),
            nfe=most(stats.nfe),
            accepted=most(stats.accepted),
            rejected=most(stats.rejected),
        )

    name = "ctorch: native dopri5" + ", each sample its own steps" * batched
    return Case(name, solve, describe, True)


# ---------------------------------------------------------------------------------- matrix products


def products(problem: Problem, *, gradient: bool) -> Case:
    """The matrix products of one evaluation of a network; with those of its gradient, if asked."""
    weights = [p.detach() for p in problem.parameters if p.dim() == 2]
    batch = problem.leaves[0].shape[0]
    inputs = [torch.ones(batch, w.shape[1], dtype=w.dtype) for w in weights]
    outputs = [x @ w.T for w, x in zip(weights, inputs, strict=True)]
    into = [torch.empty_like(w) for w in weights]

    def call() -> None:
        for w, x, y, g in zip(weights, inputs, outputs, into, strict=True):
            torch.mm(x, w.T, out=y)
            if gradient:
                torch.mm(y, w, out=x)
                torch.mm(y.T, x, out=g)
        for x in inputs:
            x.fill_(1)

    return Case("matrix products of one evaluation", call, lambda _: Report())


# ------------------------------------------------------------------------------------------- lorenz


def lorenz_by_hand(problem: Problem) -> Case:
    """benchmarks/lorenz.cpp, with the flags of a native solve, as accurate as that one."""
    from ctorch.codegen import build

    source = Path(__file__).with_name("lorenz.cpp")
    real = {torch.float32: "float", torch.float64: "double"}[problem.dtype]
    key = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    library = Path(tempfile.mkdtemp(), f"lorenz-{key}.so")
    flags = [*build.flags(), f"-DREAL={real}"]
    subprocess.run([*build.compiler(), *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).lorenz
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_double]
    y0 = problem.leaves[0]

    def solve(y0: Tensor, tolerance: float) -> tuple[Tensor, int]:
        y = y0.clone()
        return y, function(y.data_ptr(), len(y), problem.end, tolerance)

    tolerance = _as_accurate(problem, lambda y0, tolerance: solve(y0, tolerance)[0])

    def call() -> tuple[Tensor, int]:
        return solve(y0, tolerance)

    def describe(result: tuple[Tensor, int]) -> Report:
        y, steps = result
        return Report(y=y.double().numpy(), nfe=6 * steps // len(y))

    return Case("C++ by hand: dopri5, own steps", call, describe)


def _as_accurate(problem: Problem, solve: Callable[[Tensor, float], Tensor]) -> float:
    """The tolerance with which ``solve`` has the median error of the native solve."""
    import ctorch

    y0, times = problem.leaves[0][:4096], problem.times().double()
    shared: dict[str, Any] = {"native": True, "batched": True}
    tight = ctorch.solve_ode(
        problem.field, y0.double(), times, method="dopri8", rtol=1e-10, atol=1e-10, **shared
    )
    ours = ctorch.solve_ode(problem.field, y0, times, **shared, **tolerances(problem))

    def error(y: Tensor) -> float:
        return float((y.double() - tight.y[:, -1]).abs().amax(1).median())

    wanted, tolerance = error(ours.y[:, -1]), problem.tolerance
    for _ in range(4):  # errors are nearly proportional to tolerances
        tolerance *= wanted / error(solve(y0, tolerance))
    return tolerance


def lorenz_native(problem: Problem) -> Case:
    case = native_forward(problem, batched=True)
    described = case.describe

    def describe(solution: Any) -> Report:
        report = described(solution)
        report.nfe = int(solution.stats.nfe.double().mean())
        return report

    case.describe = describe
    return case


# ----------------------------------------------------------------------------------- training steps


def training(problem: Problem, times: Tensor, target: Tensor, rate: float, variant: str) -> Case:
    """A step of gradient descent on the squared distance from ``target`` [T, B, D] at ``times``.

    Args:
        problem: field and initial states.
        times, target: observations.
        rate: of the descent; small, so that all solve the same problem throughout.
        variant: "native", "ctorch", "torchdiffeq" or "torchdiffeq adjoint".
    """
    field = problem.field
    assert isinstance(field, nn.Module)
    parameters = problem.parameters
    optimizer = torch.optim.SGD(parameters, lr=rate)
    odeint, name = _odeint(variant)

    def call() -> list[Tensor]:
        optimizer.zero_grad()
        y = odeint(field, problem.y0, times, method="dopri5", **tolerances(problem))
        (y - target).square().mean().backward()
        optimizer.step()
        return [p.grad for p in parameters if p.grad is not None]

    def describe(gradients: list[Tensor]) -> Report:
        return Report(gradients=arrays(gradients))

    return Case(name, call, describe, True)


def _odeint(variant: str) -> tuple[Callable[..., Any], str]:
    if variant.startswith("torchdiffeq"):
        import torchdiffeq

        if variant == "torchdiffeq":
            return torchdiffeq.odeint, "torchdiffeq: dopri5, backprop"
        return torchdiffeq.odeint_adjoint, "torchdiffeq: dopri5, adjoint"
    import ctorch

    if variant == "ctorch":
        return ctorch.odeint, "ctorch: odeint dopri5"

    def native(*args: Any, **settings: Any) -> Any:
        return ctorch.odeint(*args, options={"native": True}, **settings)

    return native, 'ctorch: odeint dopri5, options={"native": True}'


def observations(problem: Problem, count: int) -> tuple[Tensor, Tensor]:
    """Times and values of a spiral, which a network is to learn."""
    times = torch.linspace(0, problem.end, count, dtype=problem.dtype)
    turn = 2 * times[:, None, None]
    y0 = problem.leaves[0]
    turned = torch.stack([-y0[:, 1], y0[:, 0]], -1)
    target = torch.exp(-0.1 * times)[:, None, None] * (y0 * turn.cos() + turned * turn.sin())
    return times, target
