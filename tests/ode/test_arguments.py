"""Bad arguments of solve_ode, one by one: what kind of error, and that it names what is wrong."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

import ctorch
from ctorch._exceptions import ArgumentError, ArgumentTypeError
from ctorch.ode import ContinuousAdjoint, Event, StepController

from .problems import F64, Net, leaf, times

Y0 = torch.ones(2, dtype=F64)
T = times(0.0, 1.0)


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"func": lambda t, y: -y, "y0": Y0, "t": T, **changes}
    func, y0, t = (arguments.pop(name) for name in ("func", "y0", "t"))
    return ctorch.solve_ode(func, y0, t, **arguments)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "func": ({"func": 3}, TypeError, "func"),
    "y0 integers": ({"y0": torch.ones(2, dtype=torch.int64)}, TypeError, "int64"),
    "y0 a float": ({"y0": 1.0}, TypeError, "y0"),
    "y0 empty tuple": ({"y0": ()}, ValueError, "y0"),
    "y0 holds a number": ({"y0": (Y0, 1.0)}, TypeError, "float"),
    "t a list": ({"t": [0.0, 1.0]}, TypeError, "torch.tensor"),
    "t integers": ({"t": torch.tensor([0, 1])}, TypeError, "floating"),
    "t 2-D": ({"t": T[None]}, ValueError, r"\[1, 2\]"),
    "t 0-D": ({"t": T[0]}, ValueError, r"\[\]"),
    "t empty": ({"t": T[:0]}, IndexError, "empty"),
    "t zigzag": ({"t": times(0.0, 1.0, 0.5)}, ValueError, "monotone"),
    "t NaN": ({"t": times(0.0, math.nan)}, ValueError, "finite"),
    "t infinite": ({"t": times(0.0, math.inf)}, ValueError, "finite"),
    "method": ({"method": "rk5"}, ValueError, '"dopri5".*"tsit5"'),
    "method kind": ({"method": 4}, ValueError, "dopri5"),
    "rtol negative": ({"rtol": -1.0}, ValueError, "rtol"),
    "atol NaN": ({"atol": math.nan}, ValueError, "atol"),
    "both zero": ({"rtol": 0.0, "atol": 0.0}, ValueError, "rtol and atol"),
    "rtol shape": ({"rtol": torch.ones(3)}, ValueError, r"rtol.*\[3\].*\[2\]"),
    "rtol grad": ({"rtol": torch.tensor(0.1, requires_grad=True)}, ValueError, "gradient"),
    "parts": ({"y0": (Y0, Y0), "func": lambda t, y: y, "atol": (1, 1, 1)}, ValueError, "3 parts"),
    "gradient": ({"gradient": "magic"}, ValueError, "checkpoint"),
    "gradient kind": ({"gradient": 1}, ValueError, "checkpoint"),
    "reversible": ({"gradient": "reversible"}, NotImplementedError, "reversible"),
    "native": ({"native": True, "method": "bdf2"}, NotImplementedError, "native"),
    "native kind": ({"native": "please"}, ValueError, "native"),
    "save": ({"save": "steps"}, NotImplementedError, "steps"),
    "controller": ({"controller": "pd"}, ValueError, '"pid"'),
    "dt0": ({"dt0": -0.1}, ValueError, "dt0"),
    "dt0 zero": ({"dt0": 0.0}, ValueError, "dt0"),
    "max_steps": ({"max_steps": 0}, ValueError, "max_steps"),
    "option": ({"options": {"stepsize": 1}}, ValueError, "stepsize"),
    "option of others": ({"options": {"step_size": 1}}, ValueError, "step_size"),
    "fixed": ({"method": "rk4", "options": {"first_step": 1}}, ValueError, "first_step"),
    "step_size": ({"method": "rk4", "options": {"step_size": -1.0}}, ValueError, "step_size"),
    "min_step": ({"options": {"min_step": -1.0}}, ValueError, "min_step"),
    "max_step": ({"options": {"max_step": 0.0}}, ValueError, "max_step"),
    "norm": ({"options": {"norm": "l7"}}, TypeError, "norm"),
    "safety": ({"options": {"safety": 2.0}}, ValueError, "safety"),
    "twice": ({"options": {"step_t": [0.5], "jump_t": [0.5]}}, ValueError, "step_t"),
    "grid": (
        {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t[:1]}},
        ValueError,
        "grid_constructor",
    ),
    "grid kind": (
        {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: [0.0, 1.0]}},
        TypeError,
        "grid_constructor.*list",
    ),
    "norm's shape": ({"options": {"norm": lambda y: y}}, ValueError, r"norm.*\[2\]"),
    "dt0 endless": ({"dt0": math.inf}, ValueError, "dt0.*finite"),
    "first_step": ({"options": {"first_step": math.inf}}, ValueError, "first_step.*finite"),
    "safety kind": ({"options": {"safety": "high"}}, TypeError, "safety"),
    "step_t NaN": ({"options": {"step_t": [math.nan, 0.5]}}, ValueError, "step_t.*NaN"),
    "slope of integers": (
        {"func": lambda t, y: torch.ones(2, dtype=torch.int64)},
        TypeError,
        r"int64.*to\(y.dtype\)`\)\.$",
    ),
    "args": ({"args": torch.ones(2)}, TypeError, r"args=\(value,\)"),
    "options": ({"options": [1]}, TypeError, "options must be a dict"),
    "dt0 kind": ({"dt0": "short"}, TypeError, "dt0"),
    "max_steps kind": ({"max_steps": 10.5}, ValueError, "max_steps"),
    "max_steps flag": ({"max_steps": True}, ValueError, "max_steps"),
    "rtol kind": ({"rtol": "small"}, TypeError, "rtol"),
    "option kind": ({"options": {"max_step": "long"}}, TypeError, "max_step"),
    "half": ({"y0": Y0.half()}, TypeError, r"dopri5.*float16.*y0\.float"),
    "half, batched": ({"y0": Y0.bfloat16(), "batched": True}, TypeError, "bfloat16"),
    "half, implicit": ({"y0": Y0.half(), "method": "bdf2"}, TypeError, "float16"),
    "half, native": ({"y0": Y0.half(), "native": True}, TypeError, "float16"),
    "events": ({"events": [3]}, TypeError, "fn"),
    "scipy solver": ({"method": "scipy_solver", "options": {"solver": "X"}}, ValueError, "LSODA"),
}


@pytest.mark.parametrize(("changes", "kind", "match"), BAD.values(), ids=list(BAD))
def test_a_bad_argument_is_named(
    changes: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        call(**changes)


def test_native_try_solves_and_warns_once() -> None:
    with pytest.warns(UserWarning, match="native"):
        sol = call(native="try", method="bdf2")
    torch.testing.assert_close(sol.y, call(method="bdf2").y)


ADAMS: dict[str, tuple[dict[str, Any], str]] = {
    "interp": ({"interp": "quintic"}, "interpolation.*quintic.*cubic"),
    "max_order": ({"max_order": 13}, "max_order.*at most 12.*13"),
    "max_order fraction": ({"max_order": 4.5}, "max_order.*4.5"),
    "max_iters": ({"max_iters": 0}, "max_iters.*at least 1"),
}


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
@pytest.mark.parametrize(("options", "match"), ADAMS.values(), ids=list(ADAMS))
def test_a_bad_option_of_adams_methods_is_named(
    options: dict[str, Any], match: str, method: str
) -> None:
    with pytest.raises(ValueError, match=match):
        call(method=method, options=options)


def test_no_option_is_none_and_no_limit_infinite() -> None:
    options = dict.fromkeys(("safety", "ifactor", "dfactor", "first_step", "step_t"))
    sol = call(options={**options, "max_num_steps": math.inf})
    assert torch.equal(sol.y, call().y)


def test_the_settings_of_an_adjoint_are_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match=r'rk5.*"dopri5"'):
        ContinuousAdjoint(method="rk5")
    for params in (Y0, ("w",), {"w": Y0}):
        with pytest.raises(TypeError, match="params"):
            ContinuousAdjoint(params=params)  # type: ignore[arg-type]


def test_events_and_controllers_check_their_settings() -> None:
    with pytest.raises(ValueError, match="direction"):
        Event(lambda t, y: y, direction=2)
    with pytest.raises(ValueError, match="min_factor"):
        StepController(min_factor=2.0)
    with pytest.raises(ValueError, match="positive"):
        StepController(p=0.0, i=0.0, d=0.0)


def test_steps_of_given_length_take_narrow_states() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        y = call(y0=Y0.to(dtype), method="rk4", dt0=0.25).y
        assert y.dtype is dtype
        torch.testing.assert_close(y[-1].double(), Y0 * math.exp(-1), rtol=1e-2, atol=0.0)


def test_args_are_checked_on_the_short_way_to_a_native_solve_too() -> None:
    rates = torch.ones(2, dtype=F64)
    for _ in range(2):
        call(func=lambda t, y, a: -a * y, args=(rates,), native=True)
    with pytest.raises(TypeError, match="args"):
        call(func=lambda t, y, a: -a * y, args=rates, native=True)


def test_max_steps_may_be_written_as_a_float() -> None:
    assert call(max_steps=1e5).status == 0


@pytest.mark.parametrize("method", ["dopri5", "rk4", "taylor", "bdf2"])
def test_where_no_step_is_made_the_continuous_solution_is_the_start(method: str) -> None:
    y0 = Y0.clone().requires_grad_()
    for t in (T[:1], T[:1].expand(3)):
        sol = call(y0=y0, t=t, dense=True, method=method)
        assert sol(torch.zeros(2, 3, dtype=F64)).shape == (2, 3, 2)
        (g,) = torch.autograd.grad(sol(0.0).sum(), y0)
        assert torch.equal(g, torch.ones_like(y0))
        with pytest.raises(ValueError, match="outside"):
            sol(0.5)
    failed = call(func=lambda t, y: y * math.nan, dense=True, method=method, throw=False)
    assert failed.status != 0
    assert failed.dense.interval[0] == 0.0


def test_where_no_step_is_made_natively_the_continuous_solution_is_the_start() -> None:
    sol = call(t=T[:1], dense=True, native=True)
    assert torch.equal(sol(0.0), Y0)
    failed = call(func=lambda t, y: y * math.nan, dense=True, throw=False, native=True)
    assert failed.dense.interval == (0.0, 0.0)


def test_a_solution_without_dense_output_says_so() -> None:
    with pytest.raises(ValueError, match="dense=True"):
        call()(0.5)
    sol = call(dense=True)
    for outside in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="outside"):
            sol(outside)
    assert sol(torch.tensor([[0.1, 0.2, 1.0]])).shape == (1, 3, 2)


def test_scipy_refuses_an_exact_gradient_and_takes_the_adjoint() -> None:
    pytest.importorskip("scipy")
    net = Net()
    y0 = leaf(2)
    with pytest.raises(NotImplementedError, match="adjoint"):
        ctorch.solve_ode(net, y0, T, method="scipy_solver").y.sum().backward()
    tight = {"rtol": 1e-8, "atol": 1e-8}
    y = ctorch.solve_ode(net, y0, T, method="scipy_solver", gradient="adjoint", **tight).y
    expected = ctorch.solve_ode(net, y0, T, **tight).y
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(y.sum(), [y0, *net.parameters()])
    want = torch.autograd.grad(expected.sum(), [y0, *net.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_one_time_and_repeated_first_times_return_the_initial_state(count: int) -> None:
    sol = call(t=torch.zeros(count, dtype=F64))
    assert sol.y.shape == (count, 2)
    assert torch.equal(sol.y, Y0.expand(count, 2))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 1)])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "vern7", "implicit_adams"])
def test_states_of_any_shape(shape: tuple[int, ...], method: str) -> None:
    y0 = torch.ones(shape, dtype=F64)
    y = call(y0=y0, method=method, t=torch.linspace(0, 1, 21, dtype=F64)).y
    assert y.shape == (21, *shape)
    torch.testing.assert_close(y[-1], y0 * math.exp(-1), rtol=1e-5, atol=1e-5)


def test_strided_and_expanded_states_are_taken() -> None:
    y0 = torch.arange(12, dtype=F64).reshape(3, 4)
    for state in (y0.T, y0[:, ::2], y0[:1].expand(5, 4), y0[1:2, 1]):
        got = call(y0=state).y
        torch.testing.assert_close(got[-1], state * math.exp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [False, "try", True])
def test_a_fixed_step_method_for_a_batch_is_refused_with_a_remedy_that_works(native: Any) -> None:
    y0 = torch.ones(2, 3, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotImplementedError, match=r"'rk4'.* need no batched=True"):
            call(func=lambda t, y: -y, y0=y0, method="rk4", batched=True, native=native)


@pytest.mark.parametrize("method", ["dopri5", "taylor"])
@pytest.mark.parametrize(
    ("norm", "error", "text"),
    [
        (lambda e: e.abs().amax(), ArgumentError, r"each sample, \[2\], but returned shape \[\]"),
        (lambda e: e.abs(), ArgumentError, r"returned shape \[2, 3\]"),
        (lambda e: "big", ArgumentTypeError, r"each sample, \[2\], but returned 'big'"),
    ],
)
def test_a_norm_of_a_batch_returns_one_number_for_each_sample(
    norm: Any, error: Any, text: str, method: str
) -> None:
    y0, options = torch.ones(2, 3, dtype=F64), {"norm": norm}
    with pytest.raises(error, match=text):
        ctorch.solve_ode(lambda t, y: -y, y0, T, method=method, batched=True, options=options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
@pytest.mark.parametrize("solver", [ctorch.solve_ode, ctorch.odeint, ctorch.odeint_adjoint])
def test_recording_a_solve_is_refused_by_name(solver: Any) -> None:
    class Solved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.func, self.t = torch.nn.Linear(2, 2), torch.linspace(0, 1, 3)

        def forward(self, y: torch.Tensor) -> Any:
            field = Field(self.func)
            result = solver(field, y, self.t)
            return result if isinstance(result, torch.Tensor) else result.y

    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace of a solve is not built"):
        torch.jit.trace(Solved(), torch.ones(2))
    with pytest.raises(NotImplementedError, match=r"torch\.export of a solve is not built"):
        torch.export.export(Solved(), (torch.ones(2),))


class Field(torch.nn.Module):
    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(y)
