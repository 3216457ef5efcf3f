"""Native gradients of events, continuous solutions and steps that end on given times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch

from . import native_fields as fields
from .test_native_observed import kicked, pendulums

pytestmark = pytest.mark.usefixtures("quick_compiler")

F64 = torch.float64
T = torch.tensor([0.0, 0.0, 0.4, 0.7, 1.3, 2.0], dtype=F64)


def leaves(count: int) -> tuple[Tensor, Tensor]:
    y0, stiffness = pendulums(count)
    return y0.requires_grad_(), stiffness.requires_grad_()


def weighted(y: Tensor) -> Tensor:
    return (torch.linspace(-1, 1, y.numel(), dtype=F64).reshape(y.shape) * y).sum()


def compare(gradient: Callable[[bool], Sequence[Tensor]], close: float = 1e-6) -> None:
    """Steps hang on rounding where errors are small, and gradients a little on the steps."""
    mine, eager = gradient(True), gradient(False)
    assert all(float(x.abs().max()) > 0 for x in eager)
    torch.testing.assert_close(mine, eager, rtol=close, atol=close)


@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("method", ["dopri5", "vern7"])
def test_slopes_on_both_sides_of_a_jump(method: str, batch: int) -> None:
    y0, stiffness = leaves(batch)
    options = {"step_t": [0.31, -0.31, 1.3001, 5.0], "jump_t": [0.7, -0.7]}
    for sign in (1, -1):
        t = (sign * T).requires_grad_()

        def gradient(native: bool, t: Tensor = t) -> Sequence[Tensor]:
            sol = ctorch.solve_ode(
                kicked, y0, t, args=(stiffness,), options=options, native=native, method=method
            )
            return torch.autograd.grad(weighted(sol.y), [y0, stiffness, t])

        compare(gradient)


#: steps that do not hang on rounding
FROZEN: dict[str, Any] = {
    "rtol": 1e3, "atol": 1e3, "dt0": 0.21, "options": {"max_step": 0.21, "jump_t": [0.7]},
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "dopri5": FROZEN,
    "vern7": {"method": "vern7", **FROZEN},
    "rk4": {"method": "rk4", "dt0": 0.11},
}


@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("how", DENSE.values(), ids=list(DENSE))
def test_the_continuous_solution(how: dict[str, Any], batch: int) -> None:
    """In the times of the solve and those at which it is asked, too."""
    y0, stiffness = leaves(batch)
    for sign in (1, -1):
        query = (sign * torch.linspace(0.0, 2.0, 11, dtype=F64)).requires_grad_()
        t = (sign * T).requires_grad_()

        def gradient(
            native: bool, twice: bool = False, given: Sequence[Tensor] = (t, query)
        ) -> Sequence[Tensor]:
            inputs = [y0, stiffness, *given]
            sol = ctorch.solve_ode(
                kicked, y0, given[0], args=(stiffness,), dense=True, native=native, **how
            )
            loss = weighted(sol(given[-1])) + sol.y[2].square().sum()
            found = torch.autograd.grad(loss, inputs, create_graph=twice)
            if not twice:
                return found
            return torch.autograd.grad(sum(x.square().sum() for x in found), inputs)

        compare(gradient)
        compare(lambda native, again=gradient: again(native, twice=True))


def test_odeint_dense_is_differentiable() -> None:
    y0, stiffness = leaves(3)
    ends = torch.tensor([1.5, 0.25], dtype=F64)
    query = torch.linspace(0.25, 1.5, 11, dtype=F64)

    def gradient(native: bool) -> Sequence[Tensor]:
        dense = ctorch.odeint_dense(
            lambda t, y: fields.forced(t, y, stiffness), y0, *ends, options={"native": native}
        )
        return torch.autograd.grad(weighted(dense(query)), [y0, stiffness])

    compare(gradient)


def test_odeint_dense_is_differentiable_in_its_ends() -> None:
    y0, stiffness = leaves(3)
    query = torch.linspace(0.3, 1.4, 11, dtype=F64)

    def gradient(native: bool) -> Sequence[Tensor]:
        ends = torch.tensor([1.5, 0.25], dtype=F64, requires_grad=True)
        dense = ctorch.odeint_dense(
            lambda t, y: fields.forced(t, y, stiffness), y0, *ends, options={"native": native}
        )
        return torch.autograd.grad(weighted(dense(query)), [y0, stiffness, ends])

    compare(gradient)


def test_it_is_the_derivative_in_the_times() -> None:
    y0, stiffness = leaves(3)
    query = torch.tensor([0.2, 1.0, 1.9], dtype=F64)

    def loss(t: Tensor) -> Tensor:
        sol = ctorch.solve_ode(
            fields.forced, y0, t, args=(stiffness,), dense=True, native=True, rtol=1e-11, atol=1e-11
        )
        return weighted(sol(query))

    t = torch.tensor([0.1, 0.7, 2.0], dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(t), [t])
    shift = torch.tensor([1e-4, 0.0, 0.0], dtype=F64)
    slope = (loss(t + shift) - loss(t - shift)).detach() / 2e-4
    assert abs(float(slope)) > 0.01
    torch.testing.assert_close(found[0], slope, rtol=1e-5, atol=1e-7)
    assert float(found[1:].abs().max()) < 1e-6  # where it is looked at, and how far it goes


def test_what_a_failed_solve_reached_behind_its_last_row() -> None:
    y0 = torch.tensor([[0.5], [0.9]], dtype=F64, requires_grad=True)
    t, query = torch.tensor([0.0, 0.5, 2.0], dtype=F64), torch.tensor([0.75], dtype=F64)

    def gradient(native: bool) -> Sequence[Tensor]:
        sol = ctorch.solve_ode(
            lambda t, y: y * y, y0, t, dense=True, throw=False, native=native, max_steps=40,
            options={"max_step": 0.02}, rtol=1e-4, atol=1e-4,
        )  # fmt: skip
        assert sol.status is not ctorch.ode.Status.SUCCESS
        return torch.autograd.grad(sol(query).sum(), [y0])

    compare(gradient)


EVENTS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "bosh3 with a jump": {"method": "bosh3", "options": {"jump_t": [0.3]}},
    "rk4": {"method": "rk4", "dt0": 0.07},
}


@pytest.mark.parametrize("how", EVENTS.values(), ids=list(EVENTS))
def test_events_in_the_times_too(how: dict[str, Any]) -> None:
    """An event comes between the user's times, on which the steps before it may end."""
    y0, stiffness = leaves(5)
    level = torch.tensor(-0.5, dtype=F64, requires_grad=True)
    t = torch.tensor([0.1, 0.4, 0.9, 1.5, 3.0], dtype=F64, requires_grad=True)

    def field(t: Tensor, y: Tensor, k: Tensor, level: Tensor) -> Tensor:
        return fields.forced(t, y, k)

    def event(t: Tensor, y: Tensor, k: Tensor, level: Tensor) -> Tensor:
        return y[1, 0] - level

    def gradient(native: bool) -> Sequence[Tensor]:
        sol = ctorch.solve_ode(
            field, y0, t, args=(stiffness, level), events=event, native=native, **how
        )
        assert sol.event is not None
        assert 2 < len(sol.t) < 5
        return torch.autograd.grad(weighted(sol.y) + 3 * sol.event.t, [y0, stiffness, level, t])

    compare(gradient)


@pytest.mark.parametrize("how", [{}, {"method": "rk4", "options": {"step_size": 0.05}}])
def test_odeint_event_in_its_first_time(how: dict[str, Any]) -> None:
    y0, stiffness = leaves(5)
    t0 = torch.tensor(0.1, dtype=F64, requires_grad=True)

    def gradient(native: bool) -> Sequence[Tensor]:
        given = {**how, "options": {**how.get("options", {}), "native": native}}
        t, y = ctorch.odeint_event(
            lambda t, y: fields.forced(t, y, stiffness), y0, t0,
            event_fn=lambda t, y: y[:, 0] - 1.3, **given,
        )  # fmt: skip
        return torch.autograd.grad(2 * t + y.square().sum(), [y0, stiffness, t0])

    compare(gradient)


def test_several_tensors_and_complex_ones() -> None:
    x = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    z = torch.tensor([1.0 + 0.2j, 0.5 - 1j], dtype=torch.complex128, requires_grad=True)

    def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -y[0] * y[1].sum(), torch.ones_like(y[1])

    def largest(y: tuple[Tensor, Tensor]) -> Tensor:
        return torch.maximum(y[0].abs().amax(), 2 * y[1].abs().amax())

    def of_pair(native: bool) -> Sequence[Tensor]:
        t, (a, _) = ctorch.odeint_event(
            pair, (x, torch.zeros(1, dtype=F64)), torch.tensor(0.0, dtype=F64),
            event_fn=lambda t, y: y[0][0] - 0.4, options={"native": native, "norm": largest},
        )  # fmt: skip
        return torch.autograd.grad(a[-1].sum() + t, [x])

    def spin(t: Tensor, z: Tensor) -> Tensor:
        return 1j * z * (1 + 0.1 * z.abs())

    def of_complex(native: bool) -> Sequence[Tensor]:
        sol = ctorch.solve_ode(
            spin, z, T, events=lambda t, z: z[0].real + 0.1, dense=True, native=native,
            options={"norm": lambda z: z.abs().amax()},
        )  # fmt: skip
        assert sol.event is not None
        loss = sol.y.abs().sum() + sol.event.t + sol(T[2:4]).real.square().sum()
        return [torch.view_as_real(x) for x in torch.autograd.grad(loss, [z])]

    compare(of_pair)
    compare(of_complex)
