"""A compiled solve is called again with other addresses, and never with old ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch

pytestmark = pytest.mark.usefixtures("quick_compiler")

F64 = torch.float64
T = torch.linspace(0.0, 2.0, 5, dtype=F64)
Y0 = torch.tensor([1.0, 0.5, -0.3], dtype=F64)


class Turning(nn.Module):
    """y' = W y, of which W is found anew at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.tensor([[0.0, 1, 2], [-1, 0.2, 0], [0.3, 0.4, -1]]).double()
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.weight.T


def same(mine: Any, field: Any, y0: Tensor, t: Tensor, *args: Tensor) -> None:
    eager = ctorch.solve_ode(field, y0, t, args=args, gradient="none")
    torch.testing.assert_close(mine.y, eager.y, rtol=1e-10, atol=1e-10)
    assert mine.stats == eager.stats


@torch.no_grad()
def test_every_call_reads_the_tensors_as_they_are() -> None:
    field = Turning()
    solve = ctorch.ode.compile(field)
    for change in (
        lambda: None,
        lambda: field.weight.mul_(0.5),
        lambda: setattr(field.weight, "data", field.weight.data.t()),  # the same memory and shape
        lambda: setattr(field.weight, "data", torch.eye(6, dtype=F64)[::2, ::2]),
        lambda: setattr(field, "weight", nn.Parameter(torch.ones(3, 3, dtype=F64))),
    ):
        change()
        same(solve(Y0, T), field, Y0, T)
    spread = torch.stack((Y0, Y0), 1)[:, 0]
    same(solve(spread, T), field, spread, T)
    kept = solve(Y0, T).y
    copy = kept.clone()
    solve(2 * Y0, T)
    assert torch.equal(kept, copy)  # results have memory of their own


@torch.no_grad()
def test_every_call_is_of_the_type_of_its_state() -> None:
    """float32 after float64, and back, of one shape; nothing else tells them apart."""

    def decay(t: Tensor, y: Tensor) -> Tensor:
        return -0.7 * y

    solve = ctorch.ode.compile(decay, rtol=1e-4, atol=1e-4)
    for dtype in (F64, torch.float32, F64, torch.float32):
        y0 = Y0.to(dtype)
        mine = solve(y0, T)
        eager = ctorch.solve_ode(decay, y0, T, rtol=1e-4, atol=1e-4, gradient="none")
        assert mine.y.dtype is dtype
        torch.testing.assert_close(mine.y, eager.y, rtol=1e-5, atol=1e-5)


def test_every_call_asks_what_requires_a_gradient_now() -> None:
    field = Turning()
    field.weight.requires_grad_(False)
    solve = ctorch.ode.compile(field)
    for _ in range(2):  # the second one differs by addresses alone
        assert not solve(Y0, T).y.requires_grad
    for y0, there in ((Y0.clone().requires_grad_(), False), (Y0, True)):
        field.weight.requires_grad_(there)
        with pytest.raises(NotImplementedError, match="gradients"):
            solve(y0, T)
        with torch.no_grad():
            same(solve(y0, T), field, y0, T)
    field.weight.requires_grad_(False)
    same(solve(Y0, T), field, Y0, T)


def test_threads_share_a_handle() -> None:
    def decay(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return -rate * y

    # (some milliseconds for a call, so that calls overlap)
    solve = ctorch.ode.compile(decay, options={"max_step": 2e-5})
    rates = [torch.tensor(0.1 * k, dtype=F64) for k in range(8)]
    want = [solve(Y0, T, rate).y for rate in rates]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            got = list(pool.map(lambda rate: solve(Y0, T, rate).y, rates))
            assert all(map(torch.equal, got, want))


@torch.no_grad()
def test_every_call_reads_what_belongs_to_its_sample() -> None:
    """One sample of a batch, whose row of args is its own, as it is now."""

    def decay(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return -rate * y

    y0, t = torch.ones(1, 2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    solve = ctorch.ode.compile(decay)
    kept = [torch.tensor([[0.5 * k]], dtype=F64) for k in range(4)]  # alive: other addresses
    for rate in kept:
        same(solve(y0, t, rate), decay, y0, t, rate)
        spread = rate.expand(1, 2)[:, ::2]
        same(solve(y0, t, spread), decay, y0, t, spread)
    with pytest.raises(ctorch.codegen.Untraceable, match="float32"):
        solve(y0, t, kept[0].float())
    same(solve(y0, t, kept[1]), decay, y0, t, kept[1])


def test_a_call_that_fails_says_why_and_the_next_one_is_made() -> None:
    def blow_up(t: Tensor, y: Tensor) -> Tensor:
        return y * y

    solve = ctorch.ode.compile(blow_up, max_steps=200)
    y0 = torch.tensor([0.4], dtype=F64)
    same(solve(y0, T), blow_up, y0, T)
    with pytest.raises(ctorch.SolveError) as mine:
        solve(torch.ones(1, dtype=F64), T)
    with pytest.raises(ctorch.SolveError) as eager:
        ctorch.solve_ode(blow_up, torch.ones(1, dtype=F64), T, max_steps=200)
    assert str(mine.value).split()[:4] == str(eager.value).split()[:4]
    same(solve(y0, T), blow_up, y0, T)


def test_complex_states_and_many_times() -> None:
    def spin(t: Tensor, y: Tensor) -> Tensor:
        return 1j * t * y

    solve = ctorch.ode.compile(spin)
    for count in (1, 2, 40):
        t, y0 = torch.linspace(0, 1, 40, dtype=F64)[:count], torch.ones(2, dtype=torch.complex128)
        same(solve(y0, t), spin, y0, t)
