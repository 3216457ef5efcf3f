"""Native solves of random settings: the eager solver's numbers, statistics, fates and gradients.

The gate runs these under sanitizers too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ctorch

from . import native_fields as fields

pytestmark = pytest.mark.usefixtures("quick_compiler")

F32, F64 = torch.float32, torch.float64


def edge(t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
    """Is not defined below zero, and blows up above one."""
    return gain * torch.sqrt(y.flip(-1)) * torch.cos(t) + y * y - 1


NET = fields.Net(F64, width=7)
#: field, method, whether a gradient is asked for
CASES: dict[str, tuple[Callable[..., Tensor], str, bool]] = {
    "adaptive": (fields.forced, "dopri5", False),
    "adaptive, gradient": (fields.forced, "dopri5", True),
    "late stages": (fields.forced, "vern7", True),
    "fixed": (NET, "rk4", True),
    "failing": (edge, "bosh3", True),
}


@st.composite
def solves(draw: Callable[..., Any], fixed: bool) -> tuple[int, bool, Tensor, dict[str, Any]]:
    """Batch size, whether it is solved sample by sample, times and settings."""
    batch = draw(st.sampled_from([1, 2, 5, 9, 21]))
    batched = not fixed and draw(st.booleans())
    gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.3, 0.5, 1.1]), max_size=5))
    start = draw(st.sampled_from([0.0, -0.7, 0.4]))
    t = start + torch.tensor([0.0, *gaps], dtype=F64).cumsum(0) * draw(st.sampled_from([1, -1]))
    if batched and draw(st.booleans()):  # each sample has its own, one of them none
        t = start + (t - start) * torch.linspace(-1, 1.5, 21, dtype=F64)[-batch:, None].round(
            decimals=1
        )
    how: dict[str, Any] = {"max_steps": draw(st.sampled_from([None, None, 1, 7]))}
    if fixed:
        how["dt0"] = draw(st.sampled_from([None, 0.07, 0.4]))
        how["options"] = {"perturb": draw(st.booleans())}
        return batch, batched, t, how
    how["rtol"] = how["atol"] = draw(st.sampled_from([1e-3, 1e-5, 1e-7]))
    how["controller"] = draw(st.sampled_from(["i", "pi", "pid"]))
    how["dt0"] = draw(st.sampled_from([None, None, 0.3, 5.0]))
    limits = [{}, {"min_step": 0.02}, {"max_step": 0.07}, {"norm": "max"}]
    how["options"] = draw(st.sampled_from(limits))
    return batch, batched, t, how


def solve(case: str, batch: int, native: bool, t: Tensor, **how: Any) -> dict[str, Any]:
    func, method, gradient = CASES[case]
    spread = torch.linspace(0.0, 1.0, 21, dtype=F64)[:batch, None]
    y0 = torch.cat([0.2 + spread, 1 - 2 * spread], 1)
    y0 = (y0.square() + 0.1 if func is edge else y0).requires_grad_(gradient)
    gain = (1 + (20 if func is fields.forced else 1) * spread).requires_grad_(gradient)
    how.setdefault("rtol", 1e-5)
    sol = ctorch.solve_ode(
        func, y0, t, args=(gain,), method=method, throw=False, native=native, **how
    )
    found: dict[str, Any] = {
        "y": sol.y.detach(),
        "accepted": torch.as_tensor(sol.stats.accepted),
        "rejected": torch.as_tensor(sol.stats.rejected),
        "status": torch.as_tensor(sol.status),
    }
    if not how["batched"] and sol.status == 0:  # failing on the brink, evaluations may differ
        found["nfe"] = torch.as_tensor(sol.stats.nfe)
    if gradient:
        weights = torch.linspace(-1, 1, sol.y.numel(), dtype=F64).reshape(sol.y.shape)
        inputs = [y0, gain, *(NET.parameters() if func is NET else ())]
        loss = (weights * sol.y)[sol.y.isfinite()].sum()
        found["gradient"] = torch.autograd.grad(loss, inputs, allow_unused=True)
    return found


def same(mine: Any, eager: Any, name: str) -> None:
    if name == "gradient":
        for a, b in zip(mine, eager, strict=True):
            if a is None or b is None:  # nothing hangs on it
                assert all(x is None or not x.any() for x in (a, b))
                continue
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * (1 + float(b.abs().max())))
    elif name == "y":
        torch.testing.assert_close(mine, eager, rtol=1e-7, atol=1e-9, equal_nan=True)
    else:
        assert torch.equal(mine, eager), name


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data())
def test_a_native_solve_is_the_eager_one(case: str, data: Any) -> None:
    batch, batched, t, how = data.draw(solves(fixed=case == "fixed"))
    if case == "failing":  # toward the edge steps grow tiny
        how["max_steps"] = how["max_steps"] or 150
    mine, eager = (
        solve(case, batch, native, t, batched=batched, **how) for native in (True, False)
    )
    for name, value in eager.items():
        same(mine[name], value, name)
