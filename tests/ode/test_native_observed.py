"""Native solves whose steps are looked at take the eager solver's steps and find what it finds."""

from __future__ import annotations

import math
import warnings
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor, nn

import ctorch
from ctorch.ode import Event, Solution, Status

from . import native_fields as fields
from .native_fields import both

pytestmark = pytest.mark.usefixtures("quick_compiler")

F32, F64 = torch.float32, torch.float64
T = torch.tensor([0.0, 0.0, 0.4, 1.3, 2.0], dtype=F64)
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def same(mine: Solution, eager: Solution, close: float = 1e-9) -> None:
    torch.testing.assert_close(mine.y, eager.y, rtol=close, atol=close, equal_nan=True)
    torch.testing.assert_close(mine.t, eager.t, rtol=close, atol=close)
    assert (mine.stats, mine.status) == (eager.stats, eager.status)
    assert (mine.event is None) == (eager.event is None)
    if mine.event is not None and eager.event is not None:
        assert mine.event.index == eager.event.index
        torch.testing.assert_close(mine.event.t, eager.event.t, rtol=close, atol=close)
        torch.testing.assert_close(mine.event.y, eager.event.y, rtol=close, atol=close)


def pendulums(count: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """States and stiffness."""
    spread = torch.linspace(0.0, 1.0, count, dtype=dtype)[:, None]
    return torch.cat([0.2 + spread, 1 - 2 * spread], 1), 1 + 20 * spread


def kicked(t: Tensor, y: Tensor, stiffness: Tensor) -> Tensor:
    """A pendulum whose force jumps at 0.7 and -0.7."""
    return fields.forced(t, y, stiffness) * torch.where(t.abs() < 0.7, 1.0, -3.0)


# -- steps that end on given times
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 11])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "vern7"])
def test_steps_end_on_given_times_and_begin_anew_where_the_field_jumps(
    method: str, batch: int
) -> None:
    y0, stiffness = pendulums(batch)
    options: dict[str, Any] = {"step_t": [0.31, -0.31, 1.3, 5.0], "jump_t": [0.7, -0.7, 0.0, -4.0]}
    for t in (T, -T):
        how = {"args": (stiffness,), "method": method, "options": options}
        mine, eager = both(kicked, y0, t, **how)
        same(mine, eager)
        without, _ = both(kicked, y0, t, **how, max_steps=3)
        assert without.status is Status.MAX_STEPS
        y = [
            ctorch.odeint(
                kicked_with(stiffness), y0, t[1:], method=method, rtol=1e-5, atol=1e-5,
                options={**options, "native": native},
            )
            for native in (True, False)
        ]  # fmt: skip
        torch.testing.assert_close(y[0], y[1], rtol=1e-9, atol=1e-9)


def kicked_with(stiffness: Tensor) -> Any:
    return lambda t, y: kicked(t, y, stiffness)


def test_a_step_that_all_but_reaches_a_given_time_lands_on_it() -> None:
    y0, stiffness = pendulums(3)
    for gap in (1e-4, 1e-2):
        options = {"step_t": [0.25 * (1 + gap), 0.5], "max_step": 0.25}
        same(*both(fields.forced, y0, T, args=(stiffness,), dt0=0.25, options=options))


# -- the continuous solution
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("batch", [1, 11])
@pytest.mark.parametrize(
    "how",
    [{}, {"method": "vern7"}, {"method": "rk4", "dt0": 0.17}, {"method": "midpoint"}],
    ids=lambda how: how.get("method", "dopri5"),
)
def test_the_continuous_solution_is_the_eager_one(
    how: dict[str, Any], batch: int, dtype: torch.dtype
) -> None:
    y0, stiffness = pendulums(batch, dtype)
    close = 1e-9 if dtype is F64 else 1e-4
    query = torch.linspace(0.0, 2.0, 21, dtype=F64).reshape(3, 7)
    for sign in (1, -1):
        mine, eager = both(
            fields.forced, y0, sign * T.to(dtype), args=(stiffness,), dense=True, **how
        )
        if dtype is F64:
            same(mine, eager)
        torch.testing.assert_close(mine(sign * query), eager(sign * query), rtol=close, atol=close)
        assert mine.dense.interval == eager.dense.interval
        with pytest.raises(ValueError, match="outside"):
            mine(-sign * query)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_odeint_dense(method: str) -> None:
    y0 = torch.tensor([[10.0, 5.0], [1.0, 2.0]], dtype=F64)
    options: dict[str, Any] = {"step_size": 0.05} if method == "rk4" else {}
    query = torch.linspace(1.5, 0.25, 31, dtype=F64)
    found = [
        ctorch.odeint_dense(
            fields.lotka_volterra, y0, 1.5, 0.25, method=method,
            options={**options, "native": native},
        )(query)
        for native in (True, False)
    ]  # fmt: skip
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


# -- events
# ------------------------------------------------------------------------------------------


def turn(t: Tensor, y: Tensor, *_: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]])


def falls_below(t: Tensor, y: Tensor, level: Tensor) -> Tensor:
    return y[0] - level


def either(t: Tensor, y: Tensor, level: Tensor) -> Tensor:
    return torch.stack([t - 3 * level.abs(), y[0] + y[1] - 2 * level])


METHODS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "vern7": {"method": "vern7"},
    "rk4": {"method": "rk4", "dt0": 0.21},
}


@pytest.mark.parametrize("direction", [-1, 0, 1])
@pytest.mark.parametrize("how", METHODS.values(), ids=list(METHODS))
@hypothesis.given(
    start=strategies.tuples(*[strategies.floats(-2, 2)] * 2),
    level=strategies.floats(-1, 1),
    ends=strategies.lists(strategies.floats(0.01, 3), min_size=1, max_size=5),
    sign=strategies.sampled_from([-1, 1]),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_the_first_event_is_the_eager_one(
    how: dict[str, Any],
    direction: int,
    start: tuple[float, float],
    level: float,
    ends: list[float],
    sign: int,
) -> None:
    y0 = torch.tensor(start, dtype=F64)
    t = sign * torch.tensor([0.0, *ends], dtype=F64).cumsum(0)
    events = [Event(falls_below, direction), Event(either, -direction)]
    levels = torch.tensor(level, dtype=F64)
    mine, eager = both(turn, y0, t, events=events, args=(levels,), **how)
    grazes = eager.event is not None and mine.event is None
    hypothesis.assume(not grazes or abs(float(eager.event.t - t[-1])) > 1e-9)
    same(mine, eager, 1e-7)  # where a function is flat, its root is as unsure


def test_events_of_a_batch_are_those_of_any_sample() -> None:
    """Of samples that step together, in several registers."""
    y0, stiffness = pendulums(37)
    for level in (0.9, 1.1, 1.15, 3.0):
        args = (stiffness, torch.tensor(level, dtype=F64))

        def field(t: Tensor, y: Tensor, k: Tensor, level: Tensor) -> Tensor:
            return fields.forced(t, y, k)

        def high(t: Tensor, y: Tensor, k: Tensor, level: Tensor) -> Tensor:
            return y[:, 0] - level

        mine, eager = both(field, y0, T, args=args, events=high, dense=True)
        same(mine, eager)
        if eager.event is not None:
            assert 0 < float(eager.event.t) < 2
            when = eager.event.t
            torch.testing.assert_close(mine(when), eager(when), rtol=1e-9, atol=1e-9)
    assert eager.event is None


def test_two_crossings_within_one_step_are_not_missed() -> None:
    def steady(t: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(y)

    t = torch.tensor([0.0, 10.0], dtype=F64)
    mine, eager = both(
        steady, torch.zeros(1, dtype=F64), t, dt0=10.0, events=lambda t, y: (y - 4) * (y - 6) + 0.5
    )
    same(mine, eager)
    assert mine.status is Status.EVENT
    assert mine.stats.accepted == 1


def test_rows_up_to_the_event_are_kept_and_further_ones_left_out() -> None:
    t = torch.linspace(0.0, 4.0, 401, dtype=F64)
    y0 = torch.tensor([1.0, 0.0], dtype=F64)
    mine, eager = both(turn, y0, t, events=lambda t, y: y[0], **TIGHT)
    same(mine, eager)
    assert len(mine.t) == 159
    assert float(mine.t[-1]) == pytest.approx(math.pi / 2, abs=1e-8)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("how", [{}, {"method": "rk4", "options": {"step_size": 0.01}}])
def test_odeint_event_with_its_derivatives(how: dict[str, Any], reverse: bool) -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normal = nn.Parameter(torch.tensor([0.9, 0.4], dtype=F64))
            self.offset = nn.Parameter(torch.tensor(0.3, dtype=F64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return (self.normal * y).sum() - self.offset - 0.1 * t

    net, line = fields.Net(F64), Line()
    y0 = torch.tensor([1.2, -0.3], dtype=F64, requires_grad=True)
    wanted = [y0, *net.parameters(), line.normal, line.offset]

    def field(t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * net(t, y[None])[0] + torch.stack([y[1], -y[0]])

    found = []
    for native in (True, False):
        given = {**how, "options": {**how.get("options", {}), "native": native}}
        t, y = ctorch.odeint_event(
            field, y0, torch.tensor(0.2, dtype=F64), event_fn=line, reverse_time=reverse,
            **given, **TIGHT,
        )  # fmt: skip
        loss = 1.7 * t + (y[-1] * torch.tensor([0.3, -2.0], dtype=F64)).sum() + y[0].sum()
        found.append([t, y, *torch.autograd.grad(loss, wanted)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-8)
    assert (float(found[0][0].detach()) < 0) == reverse


@pytest.mark.parametrize("gradient", ["checkpoint", "backprop"])
def test_rows_and_event_have_the_eager_gradient(gradient: str) -> None:
    y0, stiffness = pendulums(5)
    y0, stiffness = y0.requires_grad_(), stiffness.requires_grad_()
    level = torch.tensor(1.1, dtype=F64, requires_grad=True)

    def field(t: Tensor, y: Tensor, k: Tensor, level: Tensor) -> Tensor:
        return fields.forced(t, y, k)

    def high(t: Tensor, y: Tensor, k: Tensor, level: Tensor) -> Tensor:
        return y[:, 0] - level

    for t in (T, -T):
        found = []
        for native in (True, False):
            sol = ctorch.solve_ode(
                field, y0, t, args=(stiffness, level), events=high, native=native,
                gradient=gradient, **TIGHT,
            )  # fmt: skip
            assert sol.event is not None
            weights = torch.linspace(-1, 1, sol.y.numel(), dtype=F64).reshape(sol.y.shape)
            loss = (weights * sol.y).sum() + 2 * sol.event.t + sol.event.y.square().sum()
            found.append(torch.autograd.grad(loss, [y0, stiffness, level]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)


def test_events_that_never_fire_end_as_eagerly() -> None:
    y0, t0 = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor(0.0, dtype=F64)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (lambda t, y: -y, {"options": {"max_num_steps": 50}}),
        (lambda t, y: 0 * y, {}),
        (lambda t, y: y * y, {}),
        (lambda t, y: -y, {"method": "euler", "options": {"step_size": 0.1, "max_num_steps": 9}}),
    ]
    for func, how in cases:
        messages = []
        for native in (True, False):
            given = {**how, "options": {**how.get("options", {}), "native": native}}
            with pytest.raises(RuntimeError) as error:
                ctorch.odeint_event(func, y0, t0, event_fn=lambda t, y: y[0] + 1, **given)
            messages.append((error.value.status, str(error.value)[:20]))
        assert messages[0] == messages[1]


def test_an_event_function_is_traced_anew_where_a_value_of_it_changes() -> None:
    class Floor:
        height = 0.5
        low: Any = torch.tensor(0.0, dtype=F64)

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return y[0] - self.height - self.low

    floor, y0 = Floor(), torch.tensor([1.0, 0.0], dtype=F64)
    for height, low in ((0.5, 0.0), (0.25, 0.0), (0.25, 0.5)):
        floor.height, floor.low = height, torch.tensor(low, dtype=F64)
        mine, eager = both(turn, y0, T, events=floor)
        same(mine, eager)
        assert float(mine.event.t) == pytest.approx(math.acos(height + low), abs=1e-4)


# -- what is refused
# ------------------------------------------------------------------------------------------


def test_what_is_not_native_is_named_or_solved_eagerly() -> None:
    y0 = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)

    def branches(t: Tensor, y: Tensor) -> Tensor:
        return y[0] if y[1] > 3 else y[0] - 0.1

    def counts(t: Tensor, y: Tensor) -> Tensor:
        return (y[0] > 0).sum() - 1

    for what, events in (("events", branches), ("int64", counts)):
        with pytest.raises(NotImplementedError, match=what):
            ctorch.solve_ode(turn, y0, T, native=True, events=events)
    for warned in (True, False):  # once for each function
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sol = ctorch.solve_ode(turn, y0, T, native="try", events=branches)
        assert ["events" in str(w.message) for w in caught] == [True] * warned
        assert torch.equal(sol.y, ctorch.solve_ode(turn, y0, T, events=branches).y)
    with pytest.raises(TypeError, match="int64"):  # nor is it solved eagerly
        ctorch.solve_ode(turn, y0, T, native="try", events=counts)
    assert ctorch.solve_ode(turn, y0, T, native=True).status is Status.SUCCESS


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("events", {"events": lambda t, y: y[..., 0]}),
        ("dense", {"dense": True}),
        ("step_t", {"options": {"step_t": [0.5]}}),
        ("rk4", {"method": "rk4", "dt0": 0.1}),
    ],
)
def test_what_eager_batches_refuse_native_ones_refuse_too(what: str, how: dict[str, Any]) -> None:
    y0 = torch.ones(3, 2, dtype=F64)
    for native in (True, False):
        with pytest.raises(NotImplementedError, match=what):
            ctorch.solve_ode(fields.lotka_volterra, y0, T, batched=True, native=native, **how)


def test_a_compiled_handle_refuses_given_times() -> None:
    solve = ctorch.ode.compile(fields.lotka_volterra, options={"step_t": [0.5]})
    with pytest.raises(NotImplementedError, match="step_t"):
        solve(torch.ones(3, 2, dtype=F64), T)
