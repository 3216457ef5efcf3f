"""The same problems, drawn at random, through scipy's DOP853 and through torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ctorch

from .problems import F64, Counted, Net

few = settings(max_examples=6, deadline=None, derandomize=True)
#: peers that make the very same steps
SAME_STEPS = ["dopri5", "bosh3", "dopri8", "adaptive_heun", "fehlberg2"]
SAME_GRID = ["euler", "midpoint", "heun2", "heun3", "rk4"]
#: here torchdiffeq takes the slope of the last stage for that at the end of the step, though
#: the two are not at the same point: its steps differ a little
STEPS_ALIKE = {"fehlberg2", "adaptive_heun"}

Field = Callable[[Tensor, Tensor], Tensor]


def linear_system(seed: int, size: int) -> Field:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=F64)
    force, rate = torch.randn(2, size, generator=generator, dtype=F64)
    return lambda t, y: y @ matrix.T + force * torch.sin(rate * t)


def nonlinear_system(seed: int, size: int) -> Field:
    net = Net(size, hidden=6, seed=seed)
    fields: list[Field] = [
        lambda t, y: net(t, y).detach(),
        lambda t, y: torch.sin(y.flip(-1)) + 0.3 * torch.cos(3 * t) - 0.1 * y,
        lambda t, y: torch.tanh(2 * y) * torch.sin(2 * t) - 0.2 * y,
    ]
    return fields[seed % 3]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Field, Tensor, Tensor]:
    """A field, an initial state, and times in either direction."""
    size, seed = draw(st.integers(1, 4)), draw(st.integers(0, 10**6))
    field = draw(st.sampled_from([linear_system, nonlinear_system]))(seed, size)
    steps = draw(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4))
    t = draw(st.floats(-1.0, 1.0)) + np.cumsum([0.0, *steps])
    direction = draw(st.sampled_from([1.0, -1.0]))
    y0 = torch.linspace(-1.0, 1.4, size, dtype=F64) + 0.1
    return field, y0, torch.tensor(direction * t, dtype=F64)


@few
@given(problems(), st.sampled_from(["dopri5", "tsit5", "vern7", "dopri8"]))
def test_solutions_agree_with_scipy(problem: tuple[Field, Tensor, Tensor], method: str) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    field, y0, t = problem

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        return field(torch.tensor(t, dtype=F64), torch.from_numpy(y)).numpy()

    span = (float(t[0]), float(t[-1]))
    peer = integrate.solve_ivp(slope, span, y0.numpy(), "DOP853", t.numpy(), rtol=1e-12, atol=1e-12)
    assert peer.success
    expected = torch.from_numpy(peer.y.T)
    sol = ctorch.solve_ode(field, y0, t, method=method, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sol.y, expected, rtol=1e-6, atol=1e-7)
    y = ctorch.odeint(field, y0, t, method=method, rtol=1e-9, atol=1e-9)
    # odeint interpolates its outputs as torchdiffeq does, which costs dopri8 accuracy
    loose = 1e-4 if method in ("dopri8", "vern7") else 1e-6
    torch.testing.assert_close(y, expected, rtol=loose, atol=loose)


def both(field: Field, y0: Any, t: Tensor, **how: Any) -> tuple[Any, Any, int, int]:
    peer = pytest.importorskip("torchdiffeq")
    ours, theirs = Counted(field), Counted(field)
    y = ctorch.odeint(ours, y0, t, **how)
    expected = peer.odeint(theirs, y0, t, **how)
    return y, expected, ours.nfe, theirs.nfe


@pytest.mark.parametrize("method", SAME_STEPS)
@few
@given(problem=problems(), tol=st.sampled_from([1e-4, 1e-7]))
def test_adaptive_steps_are_torchdiffeqs(
    method: str, problem: tuple[Field, Tensor, Tensor], tol: float
) -> None:
    field, y0, t = problem
    loose = method in STEPS_ALIKE
    tol = 1e-4 if loose else tol
    # a first step given: where the interval bounds it, ours is another one (it stays inside)
    y, expected, nfe, peer_nfe = both(
        field, y0, t, method=method, rtol=tol, atol=tol, options={"first_step": 0.01}
    )
    # dopri8's estimate of a short step's error is mere rounding, and with it the next step's length
    close = 100 * tol if loose else tol if method == "dopri8" else 1e-9
    torch.testing.assert_close(y, expected, rtol=close, atol=close)
    if not loose:
        assert nfe <= peer_nfe  # a rejected step may spare its last stage
        assert nfe >= 0.8 * peer_nfe


@few
@given(problem=problems())
def test_a_dopri5_solve_evaluates_as_often_as_torchdiffeqs(
    problem: tuple[Field, Tensor, Tensor],
) -> None:
    """With the first step found by itself, too, on an interval long enough not to bound it."""
    field, y0, t = problem
    y, expected, nfe, peer_nfe = both(field, y0, t, rtol=1e-6, atol=1e-8)
    assert nfe == peer_nfe
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", SAME_GRID)
@few
@given(problem=problems(), how=st.sampled_from(["grid", "step", "cubic", "perturb"]))
def test_fixed_steps_are_torchdiffeqs(
    method: str, problem: tuple[Field, Tensor, Tensor], how: str
) -> None:
    field, y0, t = problem
    options: dict[str, Any] = {
        "grid": {},
        "step": {"step_size": 0.11},
        "cubic": {"step_size": 0.11, "interp": "cubic"},
        "perturb": {"perturb": True},
    }[how]
    y, expected, nfe, peer_nfe = both(field, y0, t, method=method, options=options)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    if how != "cubic":
        assert nfe == peer_nfe


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
def test_tuple_states_and_tolerances_step_as_torchdiffeqs(method: str) -> None:
    def field(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = y
        return b.sum() * torch.cos(t) - a, torch.sin(a.mean() + t) * torch.ones_like(b)

    y0 = (torch.tensor([1.0, -1.0], dtype=F64), torch.full((2, 3), 0.5, dtype=F64))
    t = torch.tensor([0.0, 0.7, 2.0], dtype=F64)
    for tolerances in (
        {"rtol": 1e-6, "atol": 1e-6},
        {"rtol": (1e-5, 1e-7), "atol": (1e-6, 1e-8)},
    ):
        y, expected, nfe, peer_nfe = both(
            field, y0, t, method=method, options={"first_step": 0.05}, **tolerances
        )
        assert 0.8 * peer_nfe <= nfe <= peer_nfe
        for mine, theirs in zip(y, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_are_torchdiffeqs(method: str) -> None:
    peer = pytest.importorskip("torchdiffeq")
    net = Net()
    t = torch.tensor([0.0, 0.5, 1.5], dtype=F64)
    gradients = []
    for odeint in (ctorch.odeint, peer.odeint):
        y0 = torch.tensor([0.3, -0.8], dtype=F64, requires_grad=True)
        options = {"first_step": 0.1} if method == "dopri5" else {"step_size": 0.1}
        y = odeint(net, y0, t, method=method, options=options, rtol=1e-6, atol=1e-8)
        gradients.append(torch.autograd.grad(y.square().sum(), [y0, *net.parameters()]))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reverse", [False, True])
def test_events_are_torchdiffeqs(reverse: bool) -> None:
    peer = pytest.importorskip("torchdiffeq")
    y0 = torch.tensor([1.0, 0.0], dtype=F64)
    found = []
    for module in (ctorch, peer):
        found.append(
            module.odeint_event(
                lambda t, y: torch.stack([y[1], -y[0]]),
                y0,
                torch.tensor(0.0, dtype=F64),
                event_fn=lambda t, y: y[0] + 0.5,
                reverse_time=reverse,
                atol=1e-10,
                rtol=1e-10,
            )
        )
    torch.testing.assert_close(found[0][0].to(F64), found[1][0].to(F64), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-7, atol=1e-7)
    assert float(found[0][0]) == pytest.approx((-1 if reverse else 1) * 2 * np.pi / 3, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_adams_methods_take_a_uniform_grid_for_one(method: str, dtype: torch.dtype) -> None:
    """Times of float32 are rounded."""
    t = torch.linspace(0.0, 1.0, 24, dtype=dtype.to_real())
    y0 = torch.tensor([1.0, 0.5, 2.0], dtype=dtype)
    rate = torch.tensor(2j - 1 if dtype.is_complex else -1, dtype=dtype)
    how: dict[str, Any] = {"method": method, "rtol": 1e-5, "atol": 1e-7}
    y, expected, nfe, peer_nfe = both(lambda t, y: rate * y, y0, t, **how, options={"max_order": 5})
    digits = 1e-5 if dtype.to_real() is torch.float32 else 1e-12
    torch.testing.assert_close(y, expected, rtol=digits, atol=digits)
    assert nfe == peer_nfe


def test_implicit_adams_judges_complex_numbers_by_their_size() -> None:
    """A real part near zero has no tolerance of its own."""
    t = torch.linspace(0.0, 1.0, 12, dtype=F64)
    y0 = torch.tensor([1 + 1j, 0.5j], dtype=torch.complex128)
    how: dict[str, Any] = {"method": "implicit_adams", "atol": torch.tensor([1e-9, 1e-8])}
    y, expected, nfe, peer_nfe = both(lambda t, y: (1j - 1) * y, y0, t, **how)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert nfe == peer_nfe
