"""Samples that end on the brink: at a least step, or where the field has no derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.ode import Status

from .problems import COUPLED, F64, frozen, times

pytestmark = pytest.mark.usefixtures("quick_compiler")

both_forms = pytest.mark.parametrize("native", [False, True])


@both_forms
@pytest.mark.parametrize("batch", [1, 3])
def test_a_least_step_that_lands_is_taken(native: bool, batch: int) -> None:
    """Its length is the least one but for rounding, and was once refused for ever."""
    y0 = COUPLED.y0().expand(batch, 4)
    t = times(COUPLED.t0, COUPLED.t1)
    sol = ctorch.solve_ode(
        COUPLED.func, y0, t, batched=True, method="adaptive_heun", options=frozen(0.8 / 64),
        max_steps=200, native=native,
    )  # fmt: skip
    assert sol.stats.accepted.tolist() == [64] * batch
    assert sol.stats.rejected.tolist() == [0] * batch


def toward_the_edge(t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
    """The first sample ends where the root's derivative is infinite."""
    return gain * (torch.sqrt(1.5 - y) + 1)


@both_forms
@pytest.mark.parametrize("gradient", ["checkpoint", "backprop"])
def test_rows_before_a_failure_have_gradients(native: bool, gradient: str) -> None:
    def solve(y0: Tensor, gain: Tensor) -> ctorch.ode.Solution:
        return ctorch.solve_ode(
            lambda t, y: toward_the_edge(t, y, gain), y0, times(0.0, 0.1, 2.0), batched=True,
            gradient=gradient, throw=False, native=native,
        )  # fmt: skip

    y0 = torch.tensor([[1.0], [-8.0], [-6.0]], dtype=F64, requires_grad=True)
    gain = torch.tensor(1.0, dtype=F64, requires_grad=True)
    sol = solve(y0, gain)
    assert sol.status.tolist() == [Status.NONFINITE, Status.SUCCESS, Status.SUCCESS]
    loss = sol.y[:, 1].square().sum() + sol.y[1, 2].square().sum()
    got = torch.autograd.grad(loss, [y0, gain])
    one = solve(y0[1:2], gain).y.square().sum((1, 2))
    few = solve(y0[::2], gain).y[:, 1].square().sum()
    first = y0[1].square().sum()
    want = torch.autograd.grad(one.sum() - first + few, [y0, gain])
    want = (want[0], want[1])
    assert bool(got[0].isfinite().all())
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    (slope,) = torch.autograd.grad(solve(y0, gain).y[:, 1].sum(), gain, create_graph=True)
    (second,) = torch.autograd.grad(slope, gain)
    assert bool(second.isfinite())


def creeping(t: Tensor, y: Tensor) -> Tensor:
    """Falls to the edge of the root's domain, where float32 cannot tell tiny steps from none."""
    return torch.sqrt(y - 0.5) * 0 - 1


@both_forms
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_a_sample_that_creeps_at_the_edge_of_the_domain_ends(native: bool, batch: int) -> None:
    """And the others go on."""
    y0 = torch.full((batch, 1), 9.0)
    y0[0] = 1.0
    t = torch.tensor([0.0, 0.25, 2.0])
    sol = ctorch.solve_ode(
        creeping, y0, t, batched=True, gradient="none", throw=False, native=native,
        max_steps=30_000,
    )  # fmt: skip
    assert sol.status.tolist() == [Status.NONFINITE] + [Status.SUCCESS] * (batch - 1)
    assert float(sol.y[0, 1]) == pytest.approx(0.75)
    assert bool(sol.y[0, 2].isnan())
    torch.testing.assert_close(sol.y[1:, 2], y0[1:] - 2)
    assert int(sol.stats.accepted[0] + sol.stats.rejected[0]) < 10_000
    assert "sample 0: underflow in dt: the vector field (or the state) is not finite" in sol.message
