"""States that are dicts: entries go by their keys, in whatever order a function makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch._trees import leaves_like

from .problems import F64, times

T = times(0.0, 0.5, 1.0)
WAYS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "native": {"native": True},
    "batched": {"batched": True},
    "batched, native": {"batched": True, "native": True},
    "fixed": {"method": "rk4", "dt0": 0.05},
    "taylor": {"method": "taylor"},
    "taylor, batched": {"method": "taylor", "batched": True},
    "bdf": {"method": "bdf2"},
    "adams": {"method": "implicit_adams", "dt0": 0.05},
    "adjoint": {"gradient": "adjoint"},
    "tolerances": {"rtol": {"hunters": 1e-6, "prey": 1e-3}, "atol": {"hunters": 1e-8, "prey": 1.0}},
}


def state(rows: int = 2) -> dict[str, Tensor]:
    return {
        "prey": torch.linspace(1.0, 2.0, rows, dtype=F64),
        "hunters": torch.linspace(0.5, 1.5, rows, dtype=F64),
    }


def slopes(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
    prey, hunters = y["prey"], y["hunters"]
    return {"prey": prey * (1.5 - hunters), "hunters": hunters * (prey - 3)}


def turned(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(reversed(slopes(t, y).items()))


def forget(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"prey": y["prey"], "hunted": y["hunters"]}


@pytest.mark.parametrize("how", WAYS.values(), ids=list(WAYS))
def test_slopes_are_those_of_their_keys(how: dict[str, Any]) -> None:
    results = []
    for func in (slopes, turned):
        y0 = {key: y.requires_grad_() for key, y in state().items()}
        y = ctorch.solve_ode(func, y0, T, **how).y
        assert list(y) == ["prey", "hunters"]
        grads = torch.autograd.grad(y["prey"][..., -1].sum(), list(y0.values()))
        results.append([*y.values(), *grads])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("native", [False, True])
def test_an_event_moves_with_the_slopes_of_its_keys(native: bool) -> None:
    def found(func: Any) -> tuple[Tensor, ...]:
        y0 = {key: y.requires_grad_() for key, y in state(1).items()}
        sol = ctorch.solve_ode(
            func, y0, T, events=lambda t, y: y["prey"] - 1.3, native=native, rtol=1e-8
        )
        assert sol.event is not None
        return sol.event.t, *torch.autograd.grad(sol.event.t, list(y0.values()))

    torch.testing.assert_close(found(slopes), found(turned), rtol=1e-9, atol=1e-9)


def test_a_penalty_is_that_of_the_same_keys() -> None:
    def penalty(func: Any) -> Tensor:
        torch.manual_seed(0)
        y0 = {"prey": torch.ones(2, dtype=F64), "hunters": torch.ones(3, dtype=F64)}

        def field(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
            made = {"prey": y["hunters"][:2] * y["prey"], "hunters": -y["hunters"]}
            return made if func is slopes else dict(reversed(made.items()))

        regularizer = ctorch.ode.regularizers.jacobian(batch_dims=0)
        return regularizer.solve(field, y0, T)[1]

    torch.testing.assert_close(penalty(slopes), penalty(turned))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("func", [forget, lambda t, y: tuple(y.values())])
def test_other_keys_are_refused(func: Any, native: bool) -> None:
    with pytest.raises(TypeError, match=r"keys \['prey', 'hunters'\]"):
        ctorch.solve_ode(func, state(), T, native=native)


def test_tolerances_of_other_keys_are_refused() -> None:
    with pytest.raises(TypeError, match=r"atol.*keys \['prey', 'hunters'\]"):
        ctorch.solve_ode(slopes, state(), T, atol={"prey": 1e-3})


def test_dicts_deep_inside_are_matched_too() -> None:
    like = ({"a": 0, "b": [0, {"c": 0, "d": 0}]}, 0)
    given = [{"b": ([2, {"d": 4, "c": 3}]), "a": 1}, 5]
    spec = torch.utils._pytree.tree_structure(like)
    assert leaves_like(given, spec) == [1, 2, 3, 4, 5]
