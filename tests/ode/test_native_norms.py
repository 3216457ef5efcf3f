"""A norm of the user's own, in a native solve, chooses the eager solver's steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.ode import Solution

from . import native_fields as fields
from .test_native_observed import pendulums

pytestmark = pytest.mark.usefixtures("quick_compiler")

F32, F64 = torch.float32, torch.float64
T = torch.tensor([0.0, 0.4, 1.3, 2.0], dtype=F64)
WEIGHTS = torch.tensor([1.0, 7.0], dtype=F64)


def of_all(ratio: Tensor) -> Tensor:
    return -(ratio * WEIGHTS.to(ratio)).square().sum().sqrt()  # its absolute value counts


def of_each(ratio: Tensor) -> Tensor:
    return (ratio * WEIGHTS.to(ratio)).abs().amax(-1) + 0.1 * ratio.norm(dim=-1)


def solved(norm: Callable[..., Tensor] | None, count: int, dtype: torch.dtype, **how: Any) -> Any:
    y0, stiffness = pendulums(count, dtype)
    options = {} if norm is None else {"norm": norm}
    how = {"rtol": 1e-4, "atol": 1e-4, "args": (stiffness,), "options": options, **how}
    return ctorch.solve_ode(fields.forced, y0, T.to(dtype), gradient="none", **how)


def same(mine: Solution, eager: Solution, close: float) -> None:
    torch.testing.assert_close(mine.y, eager.y, rtol=close, atol=close)
    for name in ("accepted", "rejected"):
        expected = torch.as_tensor(getattr(eager.stats, name))
        assert torch.equal(torch.as_tensor(getattr(mine.stats, name)), expected)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("count", [1, 11])
@pytest.mark.parametrize("batched", [True, False])
def test_steps_are_chosen_by_it(batched: bool, count: int, dtype: torch.dtype) -> None:
    norm = of_each if batched else of_all
    mine, eager = (solved(norm, count, dtype, batched=batched, native=x) for x in (True, False))
    if dtype is F64:
        same(mine, eager, 1e-9)
    else:  # the rounding of float32 shows in the error estimates, and so in the steps
        torch.testing.assert_close(mine.y, eager.y, rtol=2e-4, atol=2e-4)
    plain = solved(None, count, dtype, batched=batched)
    assert int(torch.as_tensor(plain.stats.accepted).sum()) < int(
        torch.as_tensor(mine.stats.accepted).sum()
    )


def test_it_goes_with_what_else_steps_are_looked_at_for() -> None:
    mine, eager = (solved(of_all, 11, F64, native=x, dense=True) for x in (True, False))
    same(mine, eager, 1e-9)
    query = torch.linspace(0.0, 2.0, 13, dtype=F64)
    torch.testing.assert_close(mine(query), eager(query), rtol=1e-9, atol=1e-9)


def test_it_is_never_stale() -> None:
    weights = torch.ones(2, dtype=F64)
    scale = {"by": 1.0}

    def norm(ratio: Tensor) -> Tensor:
        return scale["by"] * (weights * ratio).abs().amax()

    steps = []
    for by, weight in ((1.0, 1.0), (30.0, 1.0), (30.0, 100.0)):
        scale["by"] = by
        weights.fill_(weight)
        mine, eager = (solved(norm, 3, F64, native=x) for x in (True, False))
        same(mine, eager, 1e-9)
        steps.append(mine.stats.accepted)
    assert steps[0] < steps[1] < steps[2]


def test_what_cannot_be_compiled_is_named_or_solved_eagerly() -> None:
    def by_value(ratio: Tensor) -> Tensor:
        return torch.tensor(float(ratio.abs().max()))

    with pytest.raises(NotImplementedError, match=r'options\["norm"\] cannot be native'):
        solved(by_value, 3, F64, native=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sol = solved(by_value, 3, F64, native="try")
    assert "norm" in str(caught[0].message)
    assert torch.equal(sol.y, solved(by_value, 3, F64).y)
    with pytest.raises(NotImplementedError, match="norm"):
        solved(of_all, 3, F64, native=True, batched=True)
    with pytest.raises(NotImplementedError, match="one number"):
        solved(of_each, 3, F64, native=True)


def test_a_norm_has_no_part_in_fixed_steps() -> None:
    y0 = torch.ones(3, 2, dtype=F64)
    y = [
        ctorch.odeint(
            fields.lotka_volterra, y0, T, method="rk4",
            options={"norm": lambda x: float(x), "step_size": 0.1, "native": native},
        )
        for native in (True, False)
    ]  # fmt: skip
    torch.testing.assert_close(y[0], y[1], rtol=1e-12, atol=1e-12)
