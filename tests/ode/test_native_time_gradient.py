"""The gradient of a native solve in its times is the eager one's: a row moves with its time, and a
step that ends on a time is as long as that says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ctorch

from . import native_fields as fields

pytestmark = pytest.mark.usefixtures("quick_compiler")

F32, F64 = torch.float32, torch.float64
T = torch.tensor([0.0, 0.0, 0.3, 1.0, 2.0, 2.0], dtype=F64)


class Driven(nn.Module):
    """A network whose slope changes fast in time."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.net = fields.Net(dtype, width=8)

    def forward(self, t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        return gain * torch.cos(3 * t) * self.net(t, y)


def gradients(field: nn.Module, y0: Tensor, gain: Tensor, t: Tensor, **how: Any) -> list[Tensor]:
    t = t.clone().requires_grad_()
    sol = ctorch.solve_ode(field, y0, t, args=(gain,), **how)
    inputs = [t, y0, gain, *field.parameters()]
    return list(torch.autograd.grad(fields.loss_of(sol.y), inputs, materialize_grads=True))


def agree(mine: list[Tensor], eager: list[Tensor], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(mine, eager, rtol=tolerance, atol=tolerance)


def drawn_grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
    """Ends of steps that move with the times."""
    return t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, 9, dtype=F64)


CASES: dict[str, dict[str, Any]] = {
    "batched": {"batched": True},
    "joint": {},
    "late and further stages": {"method": "vern7", "batched": True},
    "further stages, joint": {"method": "dopri8"},
    "without further stages": {"method": "bosh3", "batched": True},
    "rk4": {"method": "rk4", "dt0": 0.11},
    "steps from time to time": {"method": "rk4"},
    "perturbed": {"method": "midpoint", "dt0": 0.11, "options": {"perturb": True}},
    "a grid of constants": {
        "method": "rk4",
        "options": {"grid_constructor": lambda f, y, t: drawn_grid(f, y, t.detach())},
    },
    "a grid that moves": {"method": "rk4", "options": {"grid_constructor": drawn_grid}},
}


@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("how", CASES.values(), ids=list(CASES))
def test_it_is_the_eager_gradient(how: dict[str, Any], batch: int) -> None:
    field, (y0, gain) = Driven(), fields.start(batch)
    for t in (T, T.flip(0)):
        for gradient in ("checkpoint", "backprop"):
            mine = gradients(field, y0, gain, t, native=True, gradient=gradient, **how)
            agree(mine, gradients(field, y0, gain, t, gradient=gradient, **how))


def test_every_sample_has_the_gradient_of_its_own_times() -> None:
    field, (y0, gain) = Driven(), fields.start(19)
    t = T * torch.linspace(-1, 2, 19, dtype=F64)[:, None]  # back and forth; one stands still
    mine = gradients(field, y0, gain, t, native=True, batched=True)
    assert mine[0].shape == t.shape
    agree(mine, gradients(field, y0, gain, t, batched=True))


def test_in_float32_with_times_in_float64() -> None:
    field, (y0, gain) = Driven(F32), fields.start(5, F32)
    for how in ({"batched": True}, {"method": "rk4", "dt0": 0.1}):
        mine = gradients(field, y0, gain, T, native=True, **how)
        assert mine[0].dtype is F64
        agree(mine, gradients(field, y0, gain, T, **how), 1e-4)


@pytest.mark.parametrize("batched", [True, False])
def test_it_is_the_derivative(batched: bool) -> None:
    field, (y0, gain) = Driven(), fields.start(3)
    how: dict[str, Any] = {"native": True, "batched": batched, "rtol": 1e-11, "atol": 1e-11}
    t = torch.tensor([0.0, 0.4, 1.3, 2.0], dtype=F64)
    (found, *_) = gradients(field, y0, gain, t, **how)
    for i in range(len(t)):
        moved = torch.eye(len(t), dtype=F64)[i] * 1e-4
        high, low = (
            fields.loss_of(ctorch.solve_ode(field, y0, t + way * moved, args=(gain,), **how).y)
            for way in (1, -1)
        )
        torch.testing.assert_close(found[i], ((high - low) / 2e-4).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{}, CASES["a grid that moves"]], ids=["adaptive", "grid"])
def test_double_backward_has_the_eager_values(how: dict[str, Any]) -> None:
    field, (y0, gain) = Driven(), fields.start(3)
    found = []
    for native in (True, False):
        t = T[1:-1].clone().requires_grad_()
        sol = ctorch.solve_ode(field, y0, t, args=(gain,), native=native, **how)
        first = torch.autograd.grad(sol.y.square().sum(), [t, y0], create_graph=True)
        total = sum(x.square().sum() for x in first)
        found.append([*first, *torch.autograd.grad(total, [t, y0, gain, *field.parameters()])])
    agree(*found, tolerance=1e-8)


def test_only_the_times_require_a_gradient() -> None:
    y0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.5, 1.0, 1.2], dtype=F64)
    t.requires_grad_()
    sol = ctorch.solve_ode(lambda t, y: -t * y, y0, t, native=True, rtol=1e-10, atol=1e-10)
    (found,) = torch.autograd.grad(sol.y[1].sum(), [t])
    value = 3 * torch.exp(torch.tensor(-0.375, dtype=F64))  # y = y0 exp((t_0^2 - t^2) / 2)
    exact = value * torch.tensor([0.5, -1.0, 0.0], dtype=F64)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Any], Tensor]:
    """A method, and times with repetitions, back or forth, for all or for each of 5 samples."""
    method = draw(st.sampled_from(["tsit5", "vern7", "rk4"]))
    how: dict[str, Any] = {"method": method}
    if method == "rk4":
        how["dt0"] = draw(st.sampled_from([None, 0.23]))
    else:
        how["batched"] = draw(st.booleans())
        how["options"] = {"max_step": draw(st.sampled_from([0.25, 10.0]))}
    own = how.get("batched", False) and draw(st.booleans())
    gap = st.sampled_from([0.0, 0.25, 0.3, 0.8])  # some end where a step does
    rows = st.lists(gap, min_size=3, max_size=3)
    gaps = draw(st.lists(rows, min_size=5, max_size=5)) if own else draw(rows)
    t = torch.tensor(gaps, dtype=F64).cumsum(-1) - 0.5
    t = torch.cat([torch.full_like(t[..., :1], -0.5), t], -1)
    return how, -t if draw(st.booleans()) else t


@settings(deadline=None, max_examples=40)
@given(problems())
def test_drawn_problems(problem: tuple[dict[str, Any], Tensor]) -> None:
    how, t = problem
    field, (y0, gain) = Driven(), fields.start(5)
    mine = gradients(field, y0, gain, t, native=True, **how)
    agree(mine, gradients(field, y0, gain, t, **how))
