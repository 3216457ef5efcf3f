"""What event functions may return, and which of their elements is the one that fired."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch._exceptions import GradientError

from .problems import F64, leaf, times

T = times(0.0, 2.0)
both = pytest.mark.parametrize("native", [False, True])


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


NO_NUMBERS: dict[str, Callable[..., Any]] = {
    "bool": lambda t, y: y[0] > 0.5,
    "int": lambda t, y: (y[0] > 0.5).int() * 2 - 1,
    "complex": lambda t, y: torch.complex(y[0] - 0.5, y[0]),
    "None": lambda t, y: None,
    "a flag": lambda t, y: bool(y[0] > 0.5),
}


@pytest.mark.parametrize("event", NO_NUMBERS.values(), ids=list(NO_NUMBERS))
@pytest.mark.parametrize("native", [False, "try"])
@pytest.mark.filterwarnings("ignore:native")
def test_an_event_returns_real_numbers(event: Callable[..., Any], native: bool | str) -> None:
    with pytest.raises(TypeError, match="event 0 must return a real floating point tensor"):
        ctorch.solve_ode(decay, torch.ones(2, dtype=F64), T, events=event, native=native)


def test_an_event_has_elements() -> None:
    with pytest.raises(ValueError, match="event 1 returned no elements"):
        events = [lambda t, y: y, lambda t, y: y[:0]]
        ctorch.solve_ode(decay, torch.ones(2, dtype=F64), T, events=events)


def test_an_event_may_return_a_number() -> None:
    y0 = torch.ones(2, dtype=F64)
    sol = ctorch.solve_ode(decay, y0, T, events=lambda t, y: t.item() - 0.75)
    assert sol.event is not None
    assert float(sol.event.t) == pytest.approx(0.75)


@both
@pytest.mark.parametrize("how", [{}, {"method": "rk4", "dt0": 0.1}], ids=["adaptive", "fixed"])
def test_an_event_that_is_nan_is_an_error(native: bool, how: dict[str, Any]) -> None:
    """It has no sign: neither "no event" nor "an event here" would be true."""
    events = [lambda t, y: y - 10, lambda t, y: torch.log(y - 0.5)]
    with pytest.raises(ValueError, match=r"event 1 is NaN at t=(0\.\d|1\.\d).*defined wherever"):
        ctorch.solve_ode(
            decay, torch.ones(2, dtype=F64), T, events=events, native=native, throw=False, **how
        )
    with pytest.raises(ValueError, match="event 1 is NaN at t=0:"):
        y0 = torch.full((2,), 0.2, dtype=F64)
        ctorch.solve_ode(decay, y0, T, events=events, native=native, **how)


@both
def test_the_element_that_fired_is_the_one_nearest_in_time(native: bool) -> None:
    """Not the one nearest to zero: others may be zero for good, or of another scale."""
    y0 = leaf(2)
    with torch.no_grad():
        y0.copy_(torch.tensor([1.0, 2.0]))
    level = torch.tensor(0.511, dtype=F64, requires_grad=True)

    def event(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([1e6 * (y[0] - level), 0 * y[1], 1e-25 * (y[1] - 0.3), y[0] - 0.2])

    sol = ctorch.solve_ode(decay, y0, T, events=event, native=native, rtol=1e-9, atol=1e-9)
    assert sol.event is not None
    by_state, by_level = torch.autograd.grad(sol.event.t, [y0, level])
    torch.testing.assert_close(by_state, torch.tensor([1.0, 0.0], dtype=F64))
    assert by_level.item() == pytest.approx(-1 / 0.511)


@both
def test_a_step_has_a_time_but_no_derivative(native: bool) -> None:
    y0 = torch.ones(1, dtype=F64, requires_grad=True)
    sol = ctorch.solve_ode(
        decay, y0, T, events=lambda t, y: torch.sign(y - 0.5), native=native, rtol=1e-9
    )
    assert sol.event is not None
    assert sol.event.t.item() == pytest.approx(0.693147, abs=1e-5)
    with pytest.raises(GradientError, match="no derivative"):
        sol.event.t.backward()


def event_by_item(t: Tensor, y: Tensor) -> Tensor:
    return y - 0.5 * (1 if y.sum().item() > -1e9 else 2)


def norm_by_item(y: Tensor) -> Tensor:
    return y.abs().max() if y.sum().item() > -1e9 else y.sum()


@pytest.mark.parametrize("how", [{"events": event_by_item}, {"options": {"norm": norm_by_item}}])
def test_try_warns_once_of_a_function_that_cannot_be_traced(how: dict[str, Any]) -> None:
    y0 = torch.ones(2, dtype=F64)
    with pytest.warns(UserWarning, match="native: solving eagerly"):
        first = ctorch.solve_ode(decay, y0, T, native="try", **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = ctorch.solve_ode(decay, y0, T, native="try", **how)
    assert torch.equal(first.y, second.y)
