"""Threads share a native solve with one step for all, and do not show in its results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch

from . import native_fields as fields

F32, F64 = torch.float32, torch.float64
T = torch.tensor([0.0, 0.3, 0.31, 1.1, 1.5], dtype=F64)
TASKS = Path("/proc/self/task")


@pytest.fixture(scope="module", autouse=True)
def threads_for_anything(quick_compiler: None) -> Iterator[None]:
    """Also for solves that are too small for it to pay; its fields are no other test's."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        flags = os.environ["CTORCH_NATIVE_FLAGS"]
        patch.setenv("CTORCH_NATIVE_FLAGS", f"{flags} -DCT_ALL_THREADS")
        yield
    torch.set_num_threads(before)


class Drift(fields.Net):
    """Of other constants than the network of other tests, so that it is compiled here."""

    def forward(self, t: Tensor, y: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return super().forward(t, y, gain) - 0.0625 * y


def starts(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype)


def on(threads: int, solve: Callable[[], Any]) -> Any:
    torch.set_num_threads(threads)
    return solve()


def weighted(ratio: Tensor) -> Tensor:
    return (ratio * torch.tensor([1.0, 3.0]).to(ratio)).square().mean().sqrt()


def falls(t: Tensor, y: Tensor) -> Tensor:
    return y[:, 0].amin() + 1.5


WAYS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "a late stage": {"method": "dopri8"},
    "steps given": {"method": "rk4", "options": {"step_size": 0.0625}},
    "a norm of one's own": {"options": {"norm": weighted}},
    "a jump": {"options": {"jump_t": [0.5]}},
    "events, dense": {"events": falls, "dense": True},
    "steps given, dense": {"method": "rk4", "options": {"step_size": 0.0625}, "dense": True},
}


@pytest.mark.parametrize(
    ("way", "count", "dtype"),
    [("adaptive", 37, F32), ("adaptive", 37, F64), *[(way, 300, F64) for way in WAYS]],
)
def test_they_do_not_change_a_bit(way: str, count: int, dtype: torch.dtype) -> None:
    drift, y0 = Drift(dtype), starts(count, dtype)

    def solve() -> Any:
        settings = {"native": True, "rtol": 1e-4, "atol": 1e-4, "gradient": "none", **WAYS[way]}
        return ctorch.solve_ode(drift, y0, T.to(dtype), **settings)

    alone, two, four = (on(threads, solve) for threads in (1, 2, 4))
    for shared in (two, four):
        assert torch.equal(shared.y, alone.y)
        assert shared.stats == alone.stats
        if "dense" in WAYS[way]:
            places = torch.linspace(0, float(alone.t[-1]), 7, dtype=dtype)
            assert torch.equal(shared.dense(places), alone.dense(places))


def test_every_one_of_many_parts_is_made() -> None:
    """Of more samples than there are pieces of work for a step, in tiles."""
    drift, y0 = Drift(F64), starts(1500, F64)
    how: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "gradient": "none"}
    mine = on(2, lambda: ctorch.solve_ode(drift, y0, T, native=True, **how))
    eager = ctorch.solve_ode(drift, y0, T, **how)
    assert mine.stats == eager.stats
    torch.testing.assert_close(mine.y, eager.y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "dtype"), [("tsit5", F32), ("tsit5", F64), ("rk4", F64)])
def test_they_do_not_change_a_bit_of_the_gradient(method: str, dtype: torch.dtype) -> None:
    drift = Drift(dtype)

    def solve() -> list[Tensor]:
        y0 = starts(300, dtype).requires_grad_()
        t = T.to(dtype, copy=True).requires_grad_()
        how = {"options": {"step_size": 0.125}} if method == "rk4" else {"rtol": 1e-4, "atol": 1e-4}
        sol = ctorch.solve_ode(drift, y0, t, method=method, native=True, **how)
        return list(torch.autograd.grad(sol.y.square().sum(), [y0, t, *drift.parameters()]))

    alone, two, four = (on(threads, solve) for threads in (1, 2, 4))
    assert all(map(torch.equal, alone, two))
    assert all(map(torch.equal, alone, four))


def tasks() -> int:
    return len(list(TASKS.iterdir())) if TASKS.is_dir() else 0


FAILURES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "no number": (lambda t, y: torch.log(1.0625 - t) * y, {}),
    "blow-up": (lambda t, y: 1.0625 * y * y + 1, {}),
    "too many steps": (lambda t, y: torch.sin(50.0625 * t) * y, {"max_steps": 5}),
    "a start that is none": (lambda t, y: -1.0625 * y / y, {}),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_told_and_ends_them(kind: str) -> None:
    func, settings = FAILURES[kind]
    y0 = starts(150, F64)
    if kind == "a start that is none":
        y0[77, 1] = torch.nan
    how = {"native": True, "throw": False, "gradient": "none", **settings}

    def solve() -> Any:
        return ctorch.solve_ode(func, y0, T, **how)

    alone, before = on(1, solve), tasks()
    shared = on(4, solve)
    assert tasks() == before
    assert (shared.status, shared.message) == (alone.status, alone.message)
    assert shared.status != 0
    torch.testing.assert_close(shared.y, alone.y, rtol=0, atol=0, equal_nan=True)


def test_they_end_with_every_solve() -> None:
    drift, y0 = Drift(F64).requires_grad_(False), starts(64, F64)
    solve = ctorch.ode.compile(drift, rtol=1e-3, atol=1e-3)
    expected = on(1, lambda: solve(y0, T).y)
    torch.set_num_threads(3)
    solve(y0, T)
    before = tasks()
    for _ in range(100):
        assert torch.equal(solve(y0, T).y, expected)
    assert tasks() == before


def test_solves_of_several_callers_do_not_mix() -> None:
    drift = Drift(F64).requires_grad_(False)
    solve = ctorch.ode.compile(drift, rtol=1e-5, atol=1e-5)
    given = [starts(40 + i, F64) for i in range(8)]
    expected = [on(1, lambda y0=y0: solve(y0, T).y) for y0 in given]
    torch.set_num_threads(2)

    def caller(i: int) -> bool:
        torch.set_num_threads(2)
        results = [solve(given[i], T).y for _ in range(10)]
        return all(torch.equal(y, expected[i]) for y in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(caller, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_its_own() -> None:
    drift, y0 = Drift(F64).requires_grad_(False), starts(64, F64)
    solve = ctorch.ode.compile(drift, rtol=1e-3, atol=1e-3)
    torch.set_num_threads(2)
    expected = solve(y0, T).y
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(solve(y0, T).y, expected) else 1)
    deadline = time.monotonic() + 60
    done, status = 0, 1
    while done == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if done == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert (done, status) == (child, 0)
