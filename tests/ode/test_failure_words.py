"""Native and batched solves that fail say what the eager solver says: where, why, and what of."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.ode import Solution, Status

from .problems import F64, times

pytestmark = pytest.mark.usefixtures("quick_compiler")


def growing(t: Tensor, y: Tensor) -> Tensor:
    """The second of three numbers blows up."""
    a, b, c = y.unbind(-1)
    return torch.stack([-a, b * b, -c], -1)


def leaving(t: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(1.5 - y) + 1


START = torch.ones(3, dtype=F64)
HARSH = {"rtol": 1e-14, "atol": 1e-14}
#: field, times, settings, the status that is to come
CASES: dict[str, tuple[Any, Tensor, dict[str, Any], set[Status]]] = {
    "blow-up": (growing, times(0.0, 2.0), {}, {Status.STEP_UNDERFLOW, Status.NONFINITE}),
    "a jump": (
        lambda t, y: torch.where(t < 0.5, y, -1e9 * y.square()),
        times(0.0, 1.0), HARSH, {Status.STEP_UNDERFLOW},
    ),
    "beyond the domain": (leaving, times(0.0, 2.0), {}, {Status.NONFINITE}),
    "no number at the start": (lambda t, y: y * math.nan, times(0.0, 1.0), {}, {Status.NONFINITE}),
    "too many steps": (
        growing, times(0.0, 0.5), {"max_steps": 3, "options": {"max_step": 1e-3}},
        {Status.MAX_STEPS},
    ),
    "too late": (growing, times(1e16, 1e16 + 4), {}, {Status.STEP_UNDERFLOW}),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)
NUMBER = re.compile(r"-?\b(\d[\d.]*(e[-+]?\d+)?|nan|inf)\b")


def failed(case: str, y0: Tensor, **how: Any) -> Solution:
    field, t, settings, statuses = CASES[case]
    sol = ctorch.solve_ode(field, y0, t, throw=False, gradient="none", **settings, **how)
    status = sol.status if isinstance(sol.status, Status) else Status(int(sol.status[0]))
    assert status in statuses
    return sol


def words(message: str) -> str:
    """Without what hangs on rounding."""
    return NUMBER.sub("#", message)


def element(message: str) -> str:
    found = re.search(r"in element (\d+)", message)
    return found.group(1) if found else ""


@every_case
@pytest.mark.parametrize("shape", [(3,), (5, 3)], ids=str)
def test_natively_as_eagerly(case: str, shape: tuple[int, ...]) -> None:
    y0 = START.expand(shape).clone()
    y0[..., 1] *= torch.linspace(1, 0.7, y0[..., 1].numel(), dtype=F64).reshape(shape[:-1])
    mine, eager = (failed(case, y0, native=native) for native in (True, False))
    assert mine.status is eager.status
    assert words(mine.message) == words(eager.message)
    assert element(mine.message) == element(eager.message)
    if case == "blow-up":
        assert element(mine.message) == "1"
    t = [float(re.search(r"t=(\S+?)[:;,.]?\s", s.message).group(1)) for s in (mine, eager)]  # type: ignore[union-attr]
    assert t[0] == pytest.approx(t[1], rel=1e-4)


@every_case
@pytest.mark.parametrize("native", [True, False])
def test_a_sample_as_alone(case: str, native: bool) -> None:
    """Of a batch the first sample that failed is named; each has its status."""
    alone = failed(case, START, native=native)
    many = failed(case, START.expand(3, 3), native=native, batched=True)
    assert many.status.tolist() == [alone.status] * 3
    said = words(alone.message)
    if not native or case != "too many steps":
        said = re.sub("; the largest error is in element #[^)]*", "", said)
    found = re.sub("; the largest error is in element #[^)]*", "", words(many.message))
    assert found.startswith(f"sample #: {said}")
    assert "3 of 3 samples failed" in many.message
    if native and case == "blow-up":
        assert element(many.message) == "1"


@pytest.mark.parametrize("native", [True, False])
def test_the_samples_that_can_go_on_do(native: bool) -> None:
    """Below the resolution of time from the start, and after steps that were accepted."""
    edge = 2.0**53  # up to here a step of 0.7 is one of 1, from here on it is none
    t = torch.tensor([[0.0, 2.0], [1e16, 1e16 + 50], [edge - 10, edge + 50]], dtype=F64)
    y0 = torch.ones(3, 1, dtype=F64)
    sol = ctorch.solve_ode(
        lambda t, y: -0.01 * y, y0, t, batched=True, native=native, throw=False, max_steps=1000,
        dt0=0.7, options={"max_step": 0.7},
    )  # fmt: skip
    assert sol.status.tolist() == [0, Status.STEP_UNDERFLOW, Status.STEP_UNDERFLOW]
    assert sol.stats.accepted.tolist() == [3, 0, 10]
    assert sol.stats.rejected.tolist() == [0, 0, 0]
    assert "sample 1: underflow in dt: at t=1e+16 a first step of" in sol.message
    alone = ctorch.solve_ode(
        lambda t, y: -0.01 * y, y0[2], t[2], native=native, throw=False, dt0=0.7,
        options={"max_step": 0.7},
    )  # fmt: skip
    assert (alone.status, alone.stats.accepted) == (Status.STEP_UNDERFLOW, 10)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_time_is_kept_in_double_precision(native: bool, batched: bool) -> None:
    """Whatever the state: in single precision ten seconds would be 1024 steps of this length."""
    y0 = torch.ones(2, 1)
    t = torch.tensor([1e4, 1e4 + 10], dtype=F64)
    sol = ctorch.solve_ode(
        lambda t, y: -0.1 * y, y0, t, batched=batched, native=native, rtol=1e-3, dt0=0.01,
        options={"max_step": 0.01},
    )  # fmt: skip
    assert torch.as_tensor(sol.stats.accepted).eq(1000).all()
    torch.testing.assert_close(sol.y[..., -1, :].reshape(-1)[-1:], torch.tensor([math.exp(-1)]))


def test_long_native_solves_in_single_precision_lose_no_steps() -> None:
    y0, t = torch.ones(3, 1), torch.tensor([0.0, 1e4], dtype=F64)
    for batched in (True, False):
        sol = ctorch.solve_ode(
            lambda t, y: 0 * y, y0, t, batched=batched, native=True, dt0=0.01,
            options={"max_step": 0.01}, method="bosh3",
        )  # fmt: skip
        steps = torch.as_tensor(sol.stats.accepted)
        assert int((steps - 1_000_000).abs().max()) <= 1
