"""Clocks of samples that step on their own, side by side: time has the digits of float64 whatever
the state has, and every sample has its own count of attempts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.ode import Status

from . import native_fields as fields
from .native_fields import both

pytestmark = pytest.mark.usefixtures("quick_compiler")

F32, F64 = torch.float32, torch.float64
SETTINGS: dict[str, Any] = {"native": True, "batched": True, "rtol": 1e-6, "atol": 1e-6}


def circle(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[..., 1], -y[..., 0]], -1)


@pytest.mark.parametrize("start", [0.0, 1e6, -3e7])
@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("rows", [2, 501])
def test_a_state_of_float32_has_times_of_float64(start: float, direction: float, rows: int) -> None:
    """Steps are some 0.1 long, rows lie 0.002 apart, and numbers of float32 there 0.06 and 2."""
    since = torch.linspace(0, 1, rows, dtype=F64)
    phase = torch.linspace(0, 3, 150)
    y0 = torch.stack([phase.sin(), phase.cos()], -1)
    found = ctorch.solve_ode(circle, y0, start + direction * since, **SETTINGS).y
    assert found.dtype == F32
    angle = phase.double()[:, None] + direction * since
    exact = torch.stack([angle.sin(), angle.cos()], -1)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-6)


def test_lengths_of_float32_do_not_make_the_clock_run_wrong() -> None:
    """Thousands of steps, of which a clock of float32 would lose a hundredth of a turn."""
    phase = torch.linspace(0, 3, 150, dtype=F64)
    y0, t = torch.stack([phase.sin(), phase.cos()], -1), torch.tensor([0.0, 3000.0], dtype=F64)
    found = [ctorch.solve_ode(circle, y0.to(dtype), t, **SETTINGS) for dtype in (F32, F64)]
    assert int(found[0].stats.accepted.min()) > 5000
    assert bool((found[0].status == Status.SUCCESS).all())
    torch.testing.assert_close(found[0].y.double(), found[1].y, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_samples_that_come_later_have_all_their_attempts(dtype: torch.dtype) -> None:
    """Of more samples than there are lanes; some need more than they may have."""
    stiffness = torch.linspace(1, 400, 200, dtype=dtype)[:, None]
    y0 = torch.cat([0.2 + stiffness / 800, 1 - stiffness / 400], 1)
    t = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    how: dict[str, Any] = {"args": (stiffness,), "batched": True, "rtol": 1e-5, "atol": 1e-5}
    whole = ctorch.solve_ode(fields.forced, y0, t, native=True, gradient="none", **how)
    attempts = whole.stats.accepted + whole.stats.rejected
    limit = int(attempts.double().median())
    assert int(attempts.min()) < limit < int(attempts.max())
    mine, eager = both(fields.forced, y0, t, max_steps=limit, **how)
    enough = attempts <= limit
    assert torch.equal(mine.status == Status.SUCCESS, enough)
    assert bool((mine.status[~enough] == Status.MAX_STEPS).all())
    assert torch.equal(mine.stats.accepted + mine.stats.rejected, attempts.clamp(max=limit))
    assert torch.equal(mine.y[enough], whole.y[enough])
    if dtype is F64:
        assert torch.equal(mine.status, eager.status)
