"""What torchdiffeq's users rely on: shapes, types, options, errors of odeint and odeint_dense."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.ode import METHODS, TABLEAUS

from .problems import F64, Counted, Net, frozen, leaf, times

Y0 = torch.tensor([1.0, -0.5], dtype=F64)
T = times(0.0, 0.4, 1.0)
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def test_every_method_of_torchdiffeq_is_there() -> None:
    theirs = {
        "dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "euler", "midpoint", "heun2",
        "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver",
    }  # fmt: skip
    assert theirs <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reverse", [False, True])
def test_outputs_have_the_shape_of_the_state_after_that_of_the_times(
    method: str, reverse: bool
) -> None:
    if method == "scipy_solver":
        pytest.importorskip("scipy")
    y0 = torch.ones(2, 3, dtype=F64)
    t = torch.linspace(0, 1, 41, dtype=F64) * (-1 if reverse else 1)
    # the explicit Adams methods of high order are stable for the shortest of steps alone
    options = {"max_order": 4} if method == "explicit_adams" else None
    y = ctorch.odeint(decay, y0, t, method=method, rtol=1e-5, atol=1e-6, options=options)
    assert y.shape == (41, 2, 3)
    assert y.dtype is F64
    assert torch.equal(y[0], y0)
    loose = 0.05 if method == "euler" else 1e-3
    exact = torch.exp(-t)[:, None, None].expand_as(y)
    torch.testing.assert_close(y, exact, rtol=loose, atol=loose)


@pytest.mark.parametrize("interface", [ctorch.odeint, ctorch.odeint_adjoint])
def test_one_time_returns_the_state_without_solving(interface: Any) -> None:
    field = Counted(decay)
    how = {"adjoint_params": ()} if interface is ctorch.odeint_adjoint else {}
    y = interface(field, Y0, times(0.3), **how)
    assert torch.equal(y, Y0[None])
    assert field.nfe <= 1


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("time_dtype", [torch.float32, F64])
def test_the_state_keeps_its_dtype_and_the_field_gets_time_in_its_real_one(
    dtype: torch.dtype, time_dtype: torch.dtype
) -> None:
    seen = set()

    def field(t: Tensor, y: Tensor) -> Tensor:
        seen.add((t.dtype, t.dim(), y.dtype))
        return -y

    y = ctorch.odeint(field, Y0.to(dtype), T.to(time_dtype))
    assert y.dtype is dtype
    assert seen == {(dtype.to_real(), 0, dtype)}


def test_a_complex_state_turns() -> None:
    y = ctorch.odeint(lambda t, y: 1j * y, torch.ones(2, dtype=torch.complex128), T)
    torch.testing.assert_close(y[:, 0], torch.exp(1j * T), rtol=1e-6, atol=1e-7)


def test_a_tuple_comes_back_as_a_tuple_and_mixed_dtypes_are_promoted() -> None:
    y0 = (torch.ones(2, 3), torch.ones((), dtype=F64))
    seen = set()

    def field(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        seen.add((t.dtype, y[0].dtype, y[1].dtype, y[0].shape, y[1].shape))
        return -y[0], -y[1] * y[0].mean()

    y = ctorch.odeint(field, y0, T)
    assert isinstance(y, tuple)
    assert [x.shape for x in y] == [(3, 2, 3), (3,)]
    assert [x.dtype for x in y] == [F64, F64]
    assert seen == {(F64, F64, F64, torch.Size([2, 3]), torch.Size([]))}


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_field_sees_true_time_when_it_runs_backwards(method: str) -> None:
    field = Counted(lambda t, y: 2 * t + 0 * y)
    t = times(2.0, 1.5, 1.0)
    y = ctorch.odeint(field, Y0, t, method=method)
    assert min(field.times) > 0
    torch.testing.assert_close(y[-1], Y0 + 1.0 - 4.0, rtol=1e-9, atol=1e-9)


ERRORS: dict[str, tuple[dict[str, Any], type[BaseException], str]] = {
    "unknown method": ({"method": "ros"}, ValueError, '"dopri5"'),
    "three times with an event": ({"event_fn": lambda t, y: y}, ValueError, r"len\(t\)"),
    "two kinds of grid": (
        {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}},
        ValueError,
        "exclusive",
    ),
    "a jump that is a step": (
        {"options": {"step_t": times(0.5), "jump_t": times(0.5)}},
        ValueError,
        "repeated",
    ),
    "interp": ({"method": "rk4", "options": {"interp": "quintic"}}, ValueError, "cubic"),
    "integer times": ({"t": torch.tensor([0, 1])}, TypeError, "floating"),
    "t no tensor": ({"t": [0.0, 1.0]}, AssertionError, "t must"),
    "t two-dimensional": ({"t": T[None]}, AssertionError, "dimension"),
    "t not strictly monotone": ({"t": times(0.0, 1.0, 1.0)}, AssertionError, "strictly"),
    "t zigzag": ({"t": times(0.0, 1.0, 0.5)}, AssertionError, "strictly"),
    "y0 a list": ({"y0": [Y0]}, AssertionError, "y0"),
    "rtol with a gradient": (
        {"rtol": torch.tensor(1e-3, requires_grad=True)}, AssertionError, "rtol",
    ),
    "atol with a gradient": (
        {"atol": torch.tensor(1e-3, requires_grad=True)}, AssertionError, "atol",
    ),
    "too many steps": (
        {"options": {"max_num_steps": 2, "max_step": 0.1}}, AssertionError, "max_num_steps",
    ),
    "NaN": ({"func": lambda t, y: y * math.nan}, AssertionError, "underflow in dt"),
    "blow-up": ({"func": lambda t, y: 100 * y**2}, AssertionError, "underflow in dt"),
    "a NaN state": ({"y0": Y0 * math.nan}, AssertionError, "non-finite"),
    "no times": ({"t": T[:0]}, IndexError, "empty"),
    "event without a step": (
        {"t": T[:2], "method": "rk4", "event_fn": lambda t, y: y}, AssertionError, "step_size",
    ),
    "event that never fires, fixed": (
        {
            "t": T[:2],
            "method": "euler",
            "options": {"step_size": 0.1},
            "event_fn": lambda t, y: t + 1,
        },
        RuntimeError,
        "20000",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "match"), ERRORS.values(), ids=list(ERRORS))
def test_errors_are_of_torchdiffeqs_kinds(
    changes: dict[str, Any], kind: type[BaseException], match: str
) -> None:
    arguments: dict[str, Any] = {"func": decay, "y0": Y0, "t": T, **changes}
    func, y0, t = (arguments.pop(name) for name in ("func", "y0", "t"))
    with pytest.raises(kind, match=match):
        ctorch.odeint(func, y0, t, **arguments)


def test_unknown_options_warn() -> None:
    for method, bad in (("dopri5", "step_size"), ("rk4", "first_step"), ("rk4", "colour")):
        with pytest.warns(UserWarning, match=rf"Unexpected arguments.*{bad}"):
            ctorch.odeint(decay, Y0, T, method=method, options={bad: 1.0})


def test_known_options_do_not_warn() -> None:
    adaptive = {
        "norm": lambda x: x.abs().max(), "first_step": 0.1, "step_t": times(0.2), "jump_t": None,
        "safety": 0.8, "ifactor": 5.0, "dfactor": 0.3, "max_num_steps": 1000, "min_step": 0.0,
        "max_step": 0.5, "dtype": F64,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctorch.odeint(decay, Y0, T, options=adaptive)
        ctorch.odeint(decay, Y0, T, method="rk4", options={"perturb": True, "interp": "cubic"})
        adams = {"max_order": 5, "max_iters": 8, "step_size": 0.05}
        ctorch.odeint(decay, Y0, T, method="implicit_adams", options=adams)


class TestOptions:
    """Each option does what it says, not merely nothing."""

    def steps(self, **how: Any) -> tuple[list[tuple[float, float]], Tensor]:
        found: list[tuple[float, float]] = []
        field = Counted(lambda t, y: -y + torch.cos(5 * t))
        field.callback_accept_step = lambda t, y, dt: found.append((float(t), float(dt)))  # type: ignore[attr-defined]
        return found, ctorch.odeint(field, Y0, T, **how)

    def test_first_step_and_max_step(self) -> None:
        found, _ = self.steps(options={"first_step": 1e-3, "max_step": 0.05})
        assert found[0] == (0.0, 1e-3)
        assert max(dt for _, dt in found) == pytest.approx(0.05)

    def test_min_step_is_always_taken(self) -> None:
        found, _ = self.steps(rtol=1e-12, atol=1e-12, options={"min_step": 0.2})
        assert len(found) <= 6
        assert min(dt for _, dt in found) >= 0.2 - 1e-12

    def test_step_t_and_jump_t_end_steps(self) -> None:
        field = Counted(decay)
        times_hit = [0.123, 0.5, 0.77]
        for name in ("step_t", "jump_t"):
            for value in (times_hit, torch.tensor(times_hit, dtype=F64)):
                found, _ = self.steps(options={name: value})
                ends = [t + dt for t, dt in found]
                for hit in times_hit:
                    assert any(abs(hit - end) < 1e-12 for end in ends), (name, hit, ends)
        assert field.nfe == 0

    def test_the_factors_bound_the_change_of_steps(self) -> None:
        found, _ = self.steps(options={"first_step": 1e-6, "ifactor": 2.0})
        growth = [b[1] / a[1] for a, b in itertools.pairwise(found)]
        assert max(growth) == pytest.approx(2.0)

    def test_safety_makes_steps_shorter(self) -> None:
        many, few = (len(self.steps(options={"safety": s})[0]) for s in (0.3, 0.9))
        assert many > 1.5 * few

    def test_a_larger_norm_makes_steps_shorter(self) -> None:
        seen = []

        def norm(x: Tensor) -> Tensor:
            seen.append(x.shape)
            return 1e4 * x.abs().max()

        many = len(self.steps(options={"norm": norm})[0])
        assert many > 1.5 * len(self.steps()[0])
        assert set(seen) == {Y0.shape}

    def test_a_tuple_norm_gets_the_parts(self) -> None:
        seen = set()

        def norm(x: tuple[Tensor, ...]) -> Tensor:
            seen.add(tuple(part.shape for part in x))
            return max(part.abs().max() for part in x)

        y0 = (torch.ones(2), torch.ones(3, 1))
        ctorch.odeint(lambda t, y: (-y[0], -y[1]), y0, T, options={"norm": norm})
        assert seen == {(torch.Size([2]), torch.Size([3, 1]))}

    def test_a_jump_is_met_with_fewer_evaluations(self) -> None:
        counts = []
        for options in ({}, {"jump_t": [0.5]}):
            field = Counted(lambda t, y: torch.where(t < 0.5, 1.0, -2.0) + 0 * y)
            y = ctorch.odeint(field, Y0, times(0.0, 1.0), options=options)
            torch.testing.assert_close(y[-1], Y0 - 0.5, rtol=1e-5, atol=1e-5)
            counts.append(field.nfe)
        assert counts[1] < 0.5 * counts[0]

    def test_perturb_keeps_off_the_ends_of_steps(self) -> None:
        for method in FIXED:
            field = Counted(decay)
            grid = times(0.0, 0.5, 1.0)
            ctorch.odeint(field, Y0, grid, method=method, options={"perturb": True})
            assert not set(field.times) & set(grid.tolist())

    def test_a_step_size_and_a_grid_make_the_steps(self) -> None:
        field = Counted(decay)
        ctorch.odeint(field, Y0, T, method="euler", options={"step_size": 0.25})
        assert field.times == pytest.approx([0.0, 0.25, 0.5, 0.75])
        field = Counted(decay)
        grid = times(0.0, 0.1, 0.7, 1.0)
        options = {"grid_constructor": lambda func, y0, t: grid}
        ctorch.odeint(field, Y0, T, method="euler", options=options)
        assert field.times == pytest.approx([0.0, 0.1, 0.7])

    def test_cubic_interpolation_is_closer(self) -> None:
        errors = []
        for interp in ("linear", "cubic"):
            options = {"step_size": 0.25, "interp": interp}
            y = ctorch.odeint(decay, Y0, T, method="rk4", options=options)
            errors.append(float((y[1] - Y0 * math.exp(-0.4)).abs().max()))
        assert errors[1] < 0.05 * errors[0]


class TestDense:
    """odeint_dense: any method, both directions, any query."""

    @pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, -0.5)])
    @pytest.mark.parametrize("method", ["dopri5", "tsit5", "vern7", "bosh3", "rk4"])
    def test_it_is_the_solution(self, method: str, ends: tuple[float, float]) -> None:
        options = {"step_size": 0.05, "interp": "cubic"} if method == "rk4" else None
        y0 = torch.ones(2, 2, dtype=F64)
        f = ctorch.odeint_dense(decay, y0, *ends, method=method, options=options)
        t = torch.linspace(*ends, 14, dtype=F64).reshape(2, 7)
        exact = torch.exp(ends[0] - t)[..., None, None].expand(2, 7, 2, 2)
        torch.testing.assert_close(f(t), exact, rtol=1e-4, atol=1e-4)
        assert f(0.5).shape == (2, 2)
        assert torch.equal(f(torch.tensor(ends[0], dtype=F64)), y0)

    def test_tensors_for_ends_tuples_for_states_and_errors_outside(self) -> None:
        y0 = (torch.ones(2), torch.ones(3))
        f = ctorch.odeint_dense(
            lambda t, y: (-y[0], -y[1]), y0, torch.tensor(0.0), torch.tensor(1.0)
        )
        assert [x.shape for x in f(torch.tensor([0.1, 0.2]))] == [(2, 2), (2, 3)]
        with pytest.raises(ValueError, match="outside"):
            f(-0.5)

    def test_it_is_differentiable(self) -> None:
        net, y0 = Net(), leaf(2)
        s = times(0.31, 0.77, grad=True)
        f = ctorch.odeint_dense(net, y0, 0.0, 1.0, options=frozen(0.2))
        y = ctorch.odeint(net, y0, torch.cat([times(0.0), s]), options=frozen(0.2))[1:]
        torch.testing.assert_close(f(s), y, rtol=1e-12, atol=1e-12)
        wanted = [y0, s, *net.parameters()]
        got = torch.autograd.grad(f(s).square().sum(), wanted, allow_unused=True)
        expected = torch.autograd.grad(y.square().sum(), wanted)
        for a, b in zip(got, expected, strict=True):
            assert a is not None
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_odeint_dense_takes_numbers_in_double_precision() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.cos(t) + 0 * y

    dense = ctorch.odeint_dense(field, torch.zeros(1, dtype=F64), 0.1, 1.3, rtol=1e-10, atol=1e-10)
    for t in (0.7, 1.3):
        assert dense(t).item() == pytest.approx(math.sin(t) - math.sin(0.1), abs=1e-9)
