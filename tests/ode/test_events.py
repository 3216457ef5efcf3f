"""Events: where they are found, what they return, and the derivatives of their times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch.ode import Event, Status

from .problems import F64, Counted, Net, differences, leaf, same, times

TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
METHODS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "tsit5": {"method": "tsit5"},
    "vern7": {"method": "vern7"},
    "dopri8": {"method": "dopri8"},
    "bosh3": {"method": "bosh3"},
    "rk4": {"method": "rk4", "options": {"step_size": 0.01}},
}
every_method = pytest.mark.parametrize("how", METHODS.values(), ids=list(METHODS))


def fall(t: Tensor, y: Tensor) -> Tensor:
    """A ball: height and speed."""
    return torch.stack([y[1], torch.full_like(y[1], -9.81)])


def turn(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]])


UP = torch.tensor([1.0, 0.0], dtype=F64)


@every_method
def test_a_ball_hits_the_floor(how: dict[str, Any]) -> None:
    y0 = torch.tensor([10.0, 0.0], dtype=F64)
    sol = ctorch.solve_ode(fall, y0, times(0.0, 0.5, 5.0), events=lambda t, y: y[0], **how, **TIGHT)
    hit = math.sqrt(20 / 9.81)
    assert sol.status is Status.EVENT
    assert sol.event is not None
    assert sol.event.index == 0
    assert float(sol.event.t) == pytest.approx(hit, abs=1e-9)
    assert sol.t.tolist() == pytest.approx([0.0, 0.5, hit])
    assert sol.y.shape == (3, 2)
    assert float(sol.y[-1, 0]) == pytest.approx(0.0, abs=1e-8)
    assert float(sol.y[-1, 1]) == pytest.approx(-9.81 * hit, abs=1e-6)
    assert torch.equal(sol.y[-1], sol.event.y)


def test_a_bouncing_ball() -> None:
    """Solve on from each event: the floor is at zero there, and must not fire at once."""
    t, y, found = 0.0, torch.tensor([1.0, 0.0], dtype=F64), []
    for _ in range(4):
        sol = ctorch.solve_ode(fall, y, times(t, t + 10.0), events=lambda t, y: y[0], **TIGHT)
        t = float(sol.event.t)
        found.append(t)
        y = torch.stack([torch.zeros((), dtype=F64), -0.8 * sol.event.y[1]])
    flight = math.sqrt(2 / 9.81)
    expected = [flight * (1 + 2 * sum(0.8**k for k in range(1, n + 1))) for n in range(4)]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@every_method
def test_odeint_event_runs_in_both_directions(how: dict[str, Any], reverse: bool) -> None:
    t, y = ctorch.odeint_event(
        turn, UP, torch.tensor(0.0, dtype=F64), event_fn=lambda t, y: y[0], reverse_time=reverse,
        **how, **TIGHT,
    )  # fmt: skip
    # odeint interpolates as torchdiffeq does: fixed steps in straight lines, dopri8 by a quartic
    tol = 1e-5 if how.get("method") in ("rk4", "dopri8") else 1e-7
    sign = -1 if reverse else 1
    assert y.shape == (2, 2)
    assert torch.equal(y[0], UP)
    assert float(t) == pytest.approx(sign * math.pi / 2, abs=tol)
    torch.testing.assert_close(y[1], torch.tensor([0.0, -sign], dtype=F64), rtol=0, atol=tol)


def test_odeint_with_an_event_uses_the_direction_of_t_alone() -> None:
    for end in (0.001, 100.0):
        t, y = ctorch.odeint(turn, UP, times(0.0, end), event_fn=lambda t, y: y[0], **TIGHT)
        assert float(t) == pytest.approx(math.pi / 2, abs=1e-7)
        assert y.shape == (2, 2)


def test_direction() -> None:
    starts = {0: math.pi / 2, -1: math.pi / 2, 1: 3 * math.pi / 2}
    for direction, expected in starts.items():
        event = Event(lambda t, y: y[0], direction=direction)
        sol = ctorch.solve_ode(turn, UP, times(0.0, 9.0), events=event, **TIGHT)
        assert float(sol.event.t) == pytest.approx(expected, abs=1e-7)


def test_the_first_of_several_events_ends_the_solve_and_is_named() -> None:
    events = [lambda t, y: y[0] + 0.5, lambda t, y: y[1] + 0.3, Event(lambda t, y: t - 3.0)]
    sol = ctorch.solve_ode(turn, UP, times(0.0, 9.0), events=events, **TIGHT)
    assert sol.event.index == 1
    assert float(sol.event.t) == pytest.approx(math.asin(0.3), abs=1e-7)
    both = ctorch.solve_ode(
        turn, UP, times(0.0, 9.0), events=lambda t, y: y + 0.3, **TIGHT
    )  # one function with several elements
    assert float(both.event.t) == pytest.approx(math.asin(0.3), abs=1e-7)


def test_two_crossings_within_one_step_are_not_missed() -> None:
    """A parabola that dips below zero in the midst of the only step."""
    field = Counted(lambda t, y: torch.ones_like(y))
    sol = ctorch.solve_ode(
        field, torch.zeros(1, dtype=F64), times(0.0, 10.0), dt0=10.0,
        events=lambda t, y: (y - 4.0) * (y - 6.0) + 0.5, **TIGHT,
    )  # fmt: skip
    assert sol.stats.accepted == 1
    assert float(sol.event.t) == pytest.approx(5 - math.sqrt(0.5), abs=1e-9)


@pytest.mark.parametrize("how", [{}, {"method": "rk4", "options": {"step_size": 0.05}}])
def test_an_event_that_is_zero_at_the_start_fires_when_it_returns(how: dict[str, Any]) -> None:
    y0 = torch.tensor([0.0, 1.0], dtype=F64)
    t, _ = ctorch.odeint_event(
        turn, y0, torch.tensor(0.0, dtype=F64), event_fn=lambda t, y: y[0], **how
    )
    assert float(t) == pytest.approx(math.pi, abs=1e-5)
    sol = ctorch.solve_ode(turn, y0, times(0.0, 9.0), events=lambda t, y: y[0], **how)
    assert float(sol.event.t) == pytest.approx(math.pi, abs=1e-5)


def test_an_event_that_never_fires() -> None:
    sol = ctorch.solve_ode(turn, UP, times(0.0, 2.0), events=lambda t, y: y[0] + 2)
    assert sol.event is None
    assert sol.status is Status.SUCCESS
    assert sol.y.shape == (2, 2)
    with pytest.raises(RuntimeError, match="event"):
        ctorch.odeint_event(
            lambda t, y: -y, UP, torch.tensor(0.0, dtype=F64), event_fn=lambda t, y: y[0] + 1,
            options={"max_num_steps": 200},
        )  # fmt: skip


def test_a_field_that_lets_steps_grow_without_bound_ends_too() -> None:
    with pytest.raises(RuntimeError, match="event"):
        ctorch.odeint_event(
            lambda t, y: 0 * y, UP, torch.tensor(0.0, dtype=F64), event_fn=lambda t, y: y[0] + 1
        )


@pytest.mark.parametrize("tolerances", [{"atol": (1e-7, 1e-8)}, {"rtol": (1e-6, 1e-7)}])
@pytest.mark.parametrize("interface", [ctorch.odeint, ctorch.odeint_adjoint])
def test_tuple_tolerances_go_with_events_and_the_adjoint(
    tolerances: dict[str, Any], interface: Callable[..., Any]
) -> None:
    class Pair(nn.Module):
        def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return -y[0] * y[1].sum(), torch.ones_like(y[1])

    a, b = leaf(2), torch.zeros(1, dtype=F64)
    t, (last, _) = ctorch.odeint_event(
        Pair(), (a, b), torch.tensor(0.0, dtype=F64), event_fn=lambda t, y: y[1] - 1.5,
        odeint_interface=interface, **tolerances,
    )  # fmt: skip
    assert float(t.detach()) == pytest.approx(1.5, abs=1e-5)
    (g,) = torch.autograd.grad(last[-1].sum(), a)
    same([g], [torch.full((2,), math.exp(-(1.5**2) / 2), dtype=F64)], 1e-4)
    solution = interface(Pair(), (a, b), times(0.0, 1.5), **tolerances)
    (g,) = torch.autograd.grad(solution[0][-1].sum(), a)
    same([g], [torch.full((2,), math.exp(-(1.5**2) / 2), dtype=F64)], 1e-4)
    tensor = ctorch.odeint_event(
        lambda t, y: -y, torch.ones(2, dtype=F64), torch.tensor(0.0, dtype=F64),
        event_fn=lambda t, y: y[0] - 0.5, atol=torch.tensor([1e-8, 1e-9]),
    )  # fmt: skip
    assert float(tensor[0]) == pytest.approx(math.log(2), abs=1e-6)


class Line(nn.Module):
    """An event function with parameters: where the state crosses a line."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.Parameter(torch.tensor([0.9, 0.4], dtype=F64))
        self.offset = nn.Parameter(torch.tensor(0.3, dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return (self.normal * y).sum() - self.offset - 0.1 * t


@pytest.mark.parametrize(
    "interface",
    ["odeint", "odeint_adjoint", "backprop", "checkpoint", "adjoint", "rk4"],
)
def test_derivatives_of_an_event_are_finite_differences(interface: str) -> None:
    """In y0, t0, the parameters of func and those of the event function."""
    net, line = Net(), Line()
    y0 = torch.tensor([1.2, -0.3], dtype=F64, requires_grad=True)
    t0 = torch.tensor(0.2, dtype=F64, requires_grad=True)

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.3 * self.net(t, y) - y

    def loss() -> Tensor:
        tight = {"rtol": 1e-11, "atol": 1e-11}
        if interface in ("backprop", "checkpoint", "adjoint"):
            t = torch.stack([t0, t0.detach() + 9])
            sol = ctorch.solve_ode(Field(), y0, t, events=line, gradient=interface, **tight)
            assert sol.event is not None
            when, last = sol.event.t, sol.event.y
        else:
            how: dict[str, Any] = {}
            if interface == "odeint_adjoint":
                how = {"odeint_interface": ctorch.odeint_adjoint}
            elif interface == "rk4":
                how = {"method": "rk4", "options": {"step_size": 0.02, "interp": "cubic"}}
            when, rows = ctorch.odeint_event(Field(), y0, t0, event_fn=line, **how, **tight)
            last = rows[-1]
        assert 0.3 < float(when.detach()) < 5
        return 1.7 * when + (last * torch.tensor([0.3, -2.0], dtype=F64)).sum()

    wanted = [y0, t0, net.outer.bias, line.normal, line.offset]
    got = torch.autograd.grad(loss(), wanted)
    assert all(float(g.abs().max()) > 1e-3 for g in got)
    same(got, [differences(loss, x, 1e-4) for x in wanted], 2e-6)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_second_derivatives_of_an_event_are_refused(gradient: str) -> None:
    y0 = leaf(2)
    sol = ctorch.solve_ode(
        turn, y0 + UP, times(0.0, 9.0), events=lambda t, y: y[0], gradient=gradient
    )
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(sol.event.t, y0, create_graph=True)
        torch.autograd.grad(g.sum(), y0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("solve", ["odeint", "solve_ode"])
@pytest.mark.parametrize("name", ["step_t", "jump_t"])
def test_given_times_that_natural_steps_meet_exactly_do_not_hide_later_ones(
    name: str, solve: str, reverse: bool
) -> None:
    """With steps of 0.25: 0.5 is met by itself, and 0.6 must not be missed; as a list too."""
    sign = -1.0 if reverse else 1.0
    ends: list[float] = []
    field = Counted(lambda t, y: -y)
    field.callback_accept_step = lambda t, y, dt: ends.append(float(t) + sign * float(dt))  # type: ignore[attr-defined]
    given = [sign * 0.5, sign * 0.6]
    for value in (given, torch.tensor(given, dtype=F64)):
        ends.clear()
        options = {name: value, "first_step": 0.25, "max_step": 0.25, "min_step": 0.25}
        getattr(ctorch, solve)(field, UP, times(0.0, sign * 1.0), options=options)
        for goal in given:
            assert min(abs(goal - end) for end in ends) == 0.0, ends


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
def test_jumps_are_met_in_the_backward_solve(gradient: str) -> None:
    """The adjoint runs backwards: a list of jumps must be mirrored there as well."""
    net, y0 = Net(), leaf(2)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return net(t, y) * torch.where(t < 0.5, 1.0, -4.0)

    how: dict[str, Any] = {"options": {"jump_t": [0.5]}, **TIGHT}
    sol = ctorch.solve_ode(field, y0, times(0.0, 1.0), gradient=gradient, **how)
    wanted = [y0, *net.parameters()]
    got = torch.autograd.grad(sol.y[-1].sum(), wanted)
    exact = ctorch.solve_ode(field, y0, times(0.0, 1.0), **how).y[-1].sum()
    same(got, torch.autograd.grad(exact, wanted), 1e-6)
    if gradient == "adjoint":
        smooth = ctorch.solve_ode(net, y0, times(0.0, 1.0), gradient=gradient, **TIGHT)
        torch.autograd.grad(smooth.y[-1].sum(), wanted)
        assert sol.stats.nfe_backward < 6 * smooth.stats.nfe_backward


@pytest.mark.parametrize("interface", ["odeint_event", "solve_ode"])
def test_a_second_derivative_through_an_event_is_refused(interface: str) -> None:
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    t0 = torch.tensor(0.0, dtype=torch.float64)

    def fall(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -9.81 - y[1] ** 3])

    def floor(t: Tensor, y: Tensor) -> Tensor:
        return y[0]

    if interface == "odeint_event":
        t, _ = ctorch.odeint_event(fall, y0, t0, event_fn=floor)
    else:
        event = ctorch.solve_ode(fall, y0, torch.stack([t0, t0 + 5]), events=floor).event
        assert event is not None
        t = event.t
    with pytest.raises(ctorch.GradientError, match="once only"):
        torch.autograd.grad(t, y0, create_graph=True)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize(
    "how",
    [
        {"method": "rk4", "dt0": 0.05},
        {"method": "taylor"},
        {"method": "explicit_adams", "dt0": 0.02},
        {"method": "implicit_adams", "dt0": 0.02},
        {"method": "implicit_adams", "dt0": 0.02, "options": {"root_finder": "newton"}},
        {"method": "bdf2", "rtol": 1e-5, "atol": 1e-5},
    ],
    ids=str,
)
def test_an_event_moves_with_the_first_time_in_every_method(
    how: dict[str, Any], gradient: str
) -> None:
    """And not with the times around it, on which the steps that lead to it end."""
    t = times(0.0, 0.37, 0.8, 1.23, 3.0, 4.0).requires_grad_()

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1] * torch.cos(0.2 * t), -y[0]])

    def grads(**how: Any) -> list[Tensor]:
        event = Event(lambda t, y: y[0] - 0.1)
        sol = ctorch.solve_ode(field, UP, t, events=event, **how)
        return [
            torch.autograd.grad(x, t, retain_graph=True)[0] for x in (sol.event.t, sol.y[-1, 1])
        ]

    for actual, expected in zip(
        grads(gradient=gradient, **{**TIGHT, **how}), grads(**TIGHT), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-3)
