"""Exact gradients against finite differences, each other, and a textbook loop under autograd.

Steps are frozen in all of them: that is what the gradients are the derivative of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.ode import TABLEAUS

from .problems import F64, Net, differences, frozen, leaf, same, times

STEP = {"options": {"step_size": 0.13}}
HOWS: dict[str, dict[str, Any]] = {
    **{
        name: {"method": name, "options": frozen(0.13)}
        for name, tableau in TABLEAUS.items()
        if tableau.adaptive
    },
    **{
        name: {"method": name, **STEP} for name, tableau in TABLEAUS.items() if not tableau.adaptive
    },
    "rk4 on the grid": {"method": "rk4"},
    "midpoint, perturbed": {"method": "midpoint", "options": {"perturb": True, "step_size": 0.2}},
    "explicit_adams": {"method": "explicit_adams", **STEP},
    "implicit_adams": {"method": "implicit_adams", "options": {"step_size": 0.13, "max_iters": 30}},
    "jumps": {
        "method": "dopri5",
        "options": {**frozen(0.13), "jump_t": [0.5], "step_t": [0.31, 0.7]},
    },
    "an early end": {"method": "tsit5", "options": frozen(5.0)},
}
every_how = pytest.mark.parametrize("how", HOWS.values(), ids=list(HOWS))
both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
ENDS = (0.0, 0.33, 0.41, 0.92)

Solve = Callable[[Any, Any, Tensor], Any]


def by_solve_ode(gradient: Any, how: dict[str, Any]) -> Solve:
    return lambda f, y, t: ctorch.solve_ode(f, y, t, gradient=gradient, **how).y


def by_odeint(how: dict[str, Any]) -> Solve:
    return lambda f, y, t: ctorch.odeint(f, y, t, **how)


INTERFACES: dict[str, Callable[[dict[str, Any]], Solve]] = {
    "backprop": lambda how: by_solve_ode("backprop", how),
    "checkpoint": lambda how: by_solve_ode("checkpoint", how),
    "odeint": by_odeint,
}


def loss_of(rows: Tensor) -> Tensor:
    weights = torch.cos(torch.arange(rows.numel(), dtype=F64)).reshape(rows.shape)
    return (weights * rows).sum() + 0.5 * rows[-1].square().sum()


def setting(reverse: bool = False) -> tuple[Net, Tensor, Tensor]:
    ends = [-x for x in ENDS] if reverse else list(ENDS)
    return Net(hidden=3), leaf(2), times(*ends, grad=True)


@both_ways
@pytest.mark.parametrize("interface", INTERFACES)
@every_how
def test_gradients_are_finite_differences(
    how: dict[str, Any], interface: str, reverse: bool
) -> None:
    net, y0, t = setting(reverse)
    if reverse and "jump_t" in how.get("options", {}):
        how = {**how, "options": {**how["options"], "jump_t": [-0.5], "step_t": [-0.31, -0.7]}}
    solve = INTERFACES[interface](how)
    gradients = torch.autograd.grad(loss_of(solve(net, y0, t)), [y0, t, net.inner.weight])
    direction = leaf(*net.inner.weight.shape, seed=5).detach()

    def loss() -> Tensor:
        return loss_of(solve(net, y0.detach(), t.detach()))

    def moved() -> Tensor:
        kept = net.inner.weight.detach().clone()
        net.inner.weight.copy_(kept + along * direction)
        value = loss()
        net.inner.weight.copy_(kept)
        return value

    along = torch.zeros((), dtype=F64)
    same(
        [gradients[0], gradients[1], (gradients[2] * direction).sum()],
        [
            differences(loss, y0, 1e-4),
            differences(loss, t, 1e-4),
            differences(moved, along, 1e-4),
        ],
        1e-8,
    )


@both_ways
@every_how
def test_backprop_checkpoint_and_the_plain_path_agree_to_rounding(
    how: dict[str, Any], reverse: bool
) -> None:
    """The plain path, that of torch.func, is ordinary autograd through the same steps."""
    net, y0, t = setting(reverse)
    if reverse and "jump_t" in how.get("options", {}):
        how = {**how, "options": {**how["options"], "jump_t": [-0.5], "step_t": [-0.31, -0.7]}}
    wanted = [y0, t, *net.parameters()]
    results = [
        torch.autograd.grad(loss_of(by_solve_ode(mode, how)(net, y0, t)), wanted)
        for mode in ("backprop", "checkpoint")
    ]
    same(results[0], results[1], 1e-13)

    def plain(y0: Tensor, t: Tensor, params: dict[str, Tensor]) -> Tensor:
        def field(t: Tensor, y: Tensor) -> Tensor:
            return torch.func.functional_call(net, params, (t, y))

        return loss_of(by_solve_ode("none", how)(field, y0, t))

    parameters = {k: p.detach() for k, p in net.named_parameters()}
    y_bar, t_bar, p_bar = torch.func.grad(plain, argnums=(0, 1, 2))(
        y0.detach(), t.detach(), parameters
    )
    same(results[0], [y_bar, t_bar, *p_bar.values()], 1e-12)


def reference(net: Net, y0: Tensor, steps: list[tuple[float, float]], method: str) -> Tensor:
    """A Runge-Kutta method as the textbook writes it, on the given steps."""
    tableau, y = TABLEAUS[method], y0
    for t, h in steps:
        slopes: list[Tensor] = []
        for c, row in zip(tableau.c, tableau.a, strict=True):
            stage = y
            for a, k in zip(row, slopes, strict=False):
                stage = stage + h * a * k
            slopes.append(net(torch.tensor(t + c * h, dtype=F64), stage))
        for b, k in zip(tableau.b, slopes, strict=True):
            y = y + h * b * k
    return y


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("method", [n for n, tableau in TABLEAUS.items() if tableau.adaptive])
def test_the_gradient_is_that_of_the_accepted_steps(method: str, gradient: str) -> None:
    """Rejected steps leave nothing, accepted ones all: against a textbook loop under autograd."""
    net, y0 = Net(), leaf(2, scale=3.0)
    steps: list[tuple[float, float]] = []
    net.callback_accept_step = lambda t, y, h: steps.append((float(t), float(h)))  # type: ignore[assignment]
    tol = {2: 1e-4, 3: 1e-4, 5: 1e-6, 7: 1e-9, 8: 1e-11}[TABLEAUS[method].order]
    sol = ctorch.solve_ode(
        net, y0, times(0.0, 4.0), method=method, gradient=gradient, rtol=tol, atol=tol, dt0=2.0
    )
    assert sol.stats.rejected > 0
    wanted = [y0, *net.parameters()]
    got = torch.autograd.grad(sol.y[-1].square().sum(), wanted)
    expected_y = reference(net, y0, steps, method)
    torch.testing.assert_close(sol.y[-1], expected_y, rtol=1e-12, atol=1e-12)
    same(got, torch.autograd.grad(expected_y.square().sum(), wanted), 1e-12)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_the_times_of_interpolated_fixed_grids_have_their_derivatives(interp: str) -> None:
    net, y0, t = setting()
    options = {"step_size": 0.25, "interp": interp}
    solve = by_odeint({"method": "heun3", "options": options})
    (t_bar,) = torch.autograd.grad(loss_of(solve(net, y0, t)), [t])
    same([t_bar], [differences(lambda: loss_of(solve(net, y0, t)), t, 1e-4)], 1e-8)


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_grid_that_hangs_on_the_times_and_on_a_tensor_is_differentiated(interface: str) -> None:
    net, y0, t = setting()
    bend = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        s = torch.linspace(0, 1, 8, dtype=F64)
        return t[0] + (t[-1] - t[0]) * ((1 - bend) * s + bend * s**2)

    solve = INTERFACES[interface]({"method": "rk4", "options": {"grid_constructor": grid}})
    got = torch.autograd.grad(loss_of(solve(net, y0, t)), [y0, t, bend])

    def loss() -> Tensor:
        return loss_of(solve(net, y0, t))

    same(got, [differences(loss, x, 1e-4) for x in (y0, t, bend)], 1e-8)


def test_the_derivative_in_the_last_time_of_solve_ode_is_the_slope_of_the_last_step() -> None:
    """And at any tolerance nearly f(t1, y1); odeint's is that of its interpolant."""
    net, y0, t = setting()
    sol = ctorch.solve_ode(net, y0, t, rtol=1e-10, atol=1e-10)
    (t_bar,) = torch.autograd.grad(sol.y[-1].sum(), [t])
    torch.testing.assert_close(t_bar[-1], net(t[-1], sol.y[-1]).sum(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(t_bar[1:-1], torch.zeros(2, dtype=F64), rtol=0, atol=1e-7)


def test_repeated_and_coinciding_times_share_their_derivative() -> None:
    net, y0, _ = setting()
    t = times(0.0, 0.0, 0.4, 0.4, 0.9, 0.9, grad=True)
    sol = ctorch.solve_ode(net, y0, t, rtol=1e-9, atol=1e-9)
    assert torch.equal(sol.y[0], sol.y[1])
    torch.testing.assert_close(sol.y[4], sol.y[5], rtol=1e-14, atol=1e-14)
    weights = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0], dtype=F64)
    got = torch.autograd.grad((weights[:, None] * sol.y).sum(), [t])[0]
    slope = [net(s, y).sum().item() for s, y in zip(t, sol.y, strict=True)]
    for i in range(2, 6):
        assert float(got[i]) == pytest.approx(float(weights[i]) * slope[i], abs=1e-6)
    moving_start = got[:2].sum()
    shifted = torch.autograd.grad(
        (weights[2:, None] * ctorch.solve_ode(net, y0, t[1:], rtol=1e-9, atol=1e-9).y[1:]).sum(),
        [t],
    )[0]
    assert float(moving_start) == pytest.approx(float(shifted[1]), abs=1e-5)


@pytest.mark.parametrize("kind", ["tuple", "complex", "complex tuple", "dict"])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_states_of_every_kind_have_gradients(kind: str, gradient: str) -> None:
    matrix = leaf(2, 2, seed=1)
    a, b = leaf(2), leaf(3, seed=2)
    if "complex" in kind:
        turn = matrix + 1j * matrix.T

        def field(t: Tensor, y: Any) -> Any:
            if kind == "complex":
                return y @ (matrix + 1j * matrix.T) * torch.cos(t)
            return y[0] @ (matrix + 1j * matrix.T), y[1] * y[0].abs().sum()

        y0: Any = (a + 0.3j) if kind == "complex" else (a + 0.3j, b)
        assert turn.is_complex()
    elif kind == "tuple":

        def field(t: Tensor, y: Any) -> Any:
            return y[1].sum() * (y[0] @ matrix), torch.sin(y[1] + t) * y[0].mean()

        y0 = (a, b)
    else:

        def field(t: Tensor, y: Any) -> Any:
            return {"p": -(y["q"] @ matrix), "q": y["p"]}

        y0 = {"p": a, "q": a * 2}

    def loss() -> Tensor:
        y = ctorch.solve_ode(
            field, y0 if kind != "dict" else {"p": a, "q": a * 2}, times(0.0, 0.6, 1.0),
            gradient=gradient, rtol=1e-9, atol=1e-9,
        ).y  # fmt: skip
        leaves = torch.utils._pytree.tree_leaves(y)
        return torch.stack([(x.abs() ** 2).sum() + x.real.sum() for x in leaves]).sum()

    got = torch.autograd.grad(loss(), [a, matrix])

    def again() -> Tensor:
        nonlocal y0
        if kind == "complex":
            y0 = a + 0.3j
        elif kind == "complex tuple":
            y0 = (a + 0.3j, b)
        return loss()

    same(got, [differences(again, x) for x in (a, matrix)], 2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seminorm", [False, True])
def test_the_continuous_adjoint_is_close(reverse: bool, seminorm: bool) -> None:
    net, y0, t = setting(reverse)
    wanted = [y0, t, *net.parameters()]
    tight = {"rtol": 1e-10, "atol": 1e-10}
    exact = torch.autograd.grad(loss_of(ctorch.solve_ode(net, y0, t, **tight).y), wanted)
    options = {"norm": "seminorm"} if seminorm else None
    y = ctorch.odeint_adjoint(net, y0, t, adjoint_options=options, **tight)
    same(torch.autograd.grad(loss_of(y), wanted), exact, 1e-7)
    adjoint = ctorch.ode.ContinuousAdjoint(norm="seminorm" if seminorm else None)
    y = ctorch.solve_ode(net, y0, t, gradient=adjoint, **tight).y
    same(torch.autograd.grad(loss_of(y), wanted), exact, 1e-7)
