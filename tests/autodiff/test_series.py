"""``taylor_series``: coefficients of an ODE's solution, at the cost of one sweep an order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ctorch.autodiff import Autonomous, Jet, MissingRuleError, jet, taylor_series
from ctorch.autodiff._propagated import RULES

F64 = torch.float64


def _net(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).double()


def by_nested_autograd(func: Any, t: Tensor, y: Tensor, order: int) -> Tensor:
    """The coefficients by repeated total derivatives, nested reverse mode."""

    def total(g: Any) -> Any:
        def along(t: Tensor, y: Tensor) -> Tensor:
            tangents = (torch.ones_like(t), func(t, y))
            return torch.autograd.functional.jvp(g, (t, y), tangents, create_graph=True)[1]

        return along

    terms, current = [y], func
    for k in range(1, order + 1):
        terms.append(current(t, y) / math.factorial(k))
        current = total(current)
    return torch.stack(terms)


def by_jets(func: Any, t: Tensor, y: Tensor, order: int) -> Tensor:
    """The coefficients by propagating a jet from the start anew for every order."""
    terms = [y, func(t, y)]
    for k in range(1, order):
        time = [torch.ones_like(t)] + [torch.zeros_like(t)] * (k - 1)
        _, series = jet(func, (t, y), (time, terms[1:]), factorial_scaled=False)
        terms.append(series[-1] / (k + 1))
    return torch.stack(terms[: order + 1])


M = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.4, -0.3], [-0.6, 0.2, 0.1]], dtype=F64)

ELEMENTARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autonomous": lambda t, y: torch.tanh(y @ M) * y.sin(),
    "time alone": lambda t, y: torch.exp(t) + 0 * y,
    "polynomial in time": lambda t, y: t**3 - y * t,
    "quotient": lambda t, y: (1 + y.sin()) / (2 + t + y * y),
    "constant quotient": lambda t, y: y / (1 + t) + 1 / (2 + y.cos()),
    "time joins": lambda t, y: torch.cat([y[..., 1:] * t, t.expand(y.shape[0], 1).cos()], -1) @ M,
    "both factors": lambda t, y: torch.einsum("bi,bj->bij", y, y.exp()).sum(-1) - t,
    "shift up": lambda t, y: (y.mean(0) + torch.ones(2, 3, dtype=F64)) * y,
    "where": lambda t, y: torch.where(y > 0, y * y, y.sin()),
    "in place": lambda t, y: y.clone().mul_(t).add_(y),
    "integrated": lambda t, y: torch.atan(y) + torch.atan(t * y),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", ELEMENTARY)
def test_coefficients_are_those_of_nested_reverse_mode(name: str, grad: bool) -> None:
    func = ELEMENTARY[name]
    t, y = torch.tensor(0.7, dtype=F64), torch.randn(2, 3, dtype=F64)
    expected = by_nested_autograd(func, t, y, 5).detach()
    with torch.set_grad_enabled(grad):  # coefficients lie in buffers, or in a graph
        found = taylor_series(func, t, y, 5)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", range(8))
def test_every_order_holds_the_lower_ones(order: int) -> None:
    y = torch.tensor([0.0], dtype=F64)  # y' = 1 + y^2: the tangent
    exact = torch.tensor([0, 1, 0, 1 / 3, 0, 2 / 15, 0, 17 / 315], dtype=F64)
    found = taylor_series(lambda t, y: 1 + y * y, 0.0, y, order)
    torch.testing.assert_close(found[:, 0], exact[: order + 1])


class Attention(nn.Module):
    """A block with everything that a transformer layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(y)).chunk(3, -1)
        weights = torch.softmax(q @ k.mT / 2 + t, -1)
        return F.gelu(self.out(weights @ v)) + t * y


def _nets() -> dict[str, Any]:
    torch.manual_seed(1)
    gru = nn.GRUCell(4, 4).double()
    silu = _net(5, 8, 4, activation=nn.SiLU)
    conv = nn.Conv1d(3, 3, 3, padding=1).double()
    return {
        "attention": Attention().double(),
        "gru": lambda t, y: gru((y * t).flatten(0, 1), y.flatten(0, 1)).reshape(y.shape),
        "time as input": lambda t, y: silu(torch.cat([y, t.expand(*y.shape[:-1], 1)], -1)),
        "convolution": lambda t, y: torch.tanh(conv(y)) * t,
        "determinant": lambda t, y: (
            torch.linalg.det(y @ y.mT + t * torch.eye(3, dtype=F64))[:, None, None] * y
        ),
        "solve": lambda t, y: torch.linalg.solve(y @ y.mT + torch.eye(3, dtype=F64), y) * t,
        "solve with time": lambda t, y: torch.linalg.solve(M + 2 * t * torch.eye(3, dtype=F64), y),
        "inverse": lambda t, y: torch.linalg.inv(y @ y.mT + torch.eye(3, dtype=F64)) @ y,
    }


@pytest.mark.parametrize("name", _nets())
def test_networks_agree_with_jets_propagated_anew(name: str) -> None:
    func = _nets()[name]
    t, y = torch.tensor(0.4, dtype=F64), torch.randn(2, 3, 4, dtype=F64)
    torch.testing.assert_close(
        taylor_series(func, t, y, 5), by_jets(func, t, y, 5), rtol=1e-10, atol=1e-12
    )


def test_a_rule_for_jets_alone_is_run_on_the_coefficients_so_far(monkeypatch: Any) -> None:
    def pair(x: Any) -> tuple[Any, Any]:
        return x.sin() * x, x.exp()

    def function(x: Any) -> Any:
        if torch.overrides.has_torch_function((x,)):
            return torch.overrides.handle_torch_function(function, (x,), x)
        return pair(x)

    monkeypatch.setitem(RULES, (Jet, function), pair)
    y = torch.randn(3, dtype=F64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        first, second = function(y * t)
        return first - second * t

    expected = by_nested_autograd(func, torch.tensor(0.3, dtype=F64), y, 5)
    torch.testing.assert_close(taylor_series(func, 0.3, y, 5), expected.detach())


# ---- cost


@pytest.mark.parametrize("order", [1, 2, 6])
def test_each_order_costs_one_evaluation(order: int) -> None:
    net = _net(3, 16, 16, 3)
    y = torch.randn(5, 3, dtype=F64)

    def flops(run: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())

    once = flops(lambda: net(y))
    assert once > 0
    assert flops(lambda: taylor_series(lambda t, y: net(y), 0.0, y, order)) == order * once


def test_the_field_runs_once_and_what_its_result_does_not_need_is_skipped() -> None:
    calls: list[int] = []
    swept: list[int] = []

    def func(t: Any, y: Any) -> Any:
        calls.append(1)
        y.linear(lambda s: swept.append(1) or s)  # a by-product
        return y.sin()

    taylor_series(func, 0.0, torch.ones(2, dtype=F64), 6)
    assert len(calls) == 1
    assert len(swept) == 1


# ---- time, pytrees


@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=F64)], ids=repr)
def test_time_may_be_a_number_or_a_tensor(t: Any) -> None:
    y = torch.ones(2, dtype=F64)
    found = taylor_series(lambda t, y: t * y, t, y, 3)
    expected = by_nested_autograd(lambda t, y: t * y, torch.as_tensor(t, dtype=F64), y, 3)
    torch.testing.assert_close(found, expected)


def test_every_sample_may_be_at_a_time_of_its_own() -> None:
    t, y = torch.tensor([[0.1], [0.5]], dtype=F64), torch.randn(2, 3, dtype=F64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(t * y) + t

    found = taylor_series(func, t, y, 4)
    for i in range(2):
        torch.testing.assert_close(found[:, i], taylor_series(func, t[i, 0], y[i], 4))


def test_a_pytree_comes_back_as_one() -> None:
    y = {"q": torch.randn(2, dtype=F64), "p": torch.randn(2, dtype=F64)}
    flat = torch.cat([y["p"], y["q"]])
    both = taylor_series(lambda t, y: {"q": y["p"].sin(), "p": -y["q"] * t}, 0.4, y, 4)
    assert set(both) == {"q", "p"}
    expected = taylor_series(
        lambda t, y: torch.cat([-y[2:] * t, y[:2].sin()]),
        0.4,
        flat,
        4,
    )
    torch.testing.assert_close(torch.cat([both["p"], both["q"]], -1), expected)


def test_a_constant_field_has_a_straight_solution() -> None:
    found = taylor_series(lambda t, y: torch.full_like(y, 2.0), 0.0, torch.ones(2, dtype=F64), 3)
    assert found.tolist() == [[1, 1], [2, 2], [0, 0], [0, 0]]


def test_a_field_that_writes_into_its_argument_leaves_the_state_alone() -> None:
    def func(t: Any, y: Any) -> Any:
        y *= 2
        return y

    y = torch.ones(2, dtype=F64)
    expected = taylor_series(lambda t, y: 2 * y, 0.0, y, 4)
    torch.testing.assert_close(taylor_series(func, 0.0, y, 4), expected)
    assert y.tolist() == [1, 1]


# ---- derivatives and transforms


def test_first_and_second_derivatives_are_right() -> None:
    w = torch.randn(3, 3, dtype=F64, requires_grad=True)
    y = torch.randn(2, 3, dtype=F64, requires_grad=True)
    t = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def run(t: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return taylor_series(lambda t, y: torch.tanh(y @ w) * t + y / (2 + y * y), t, y, 3)

    assert torch.autograd.gradcheck(run, (t, y, w))
    assert torch.autograd.gradgradcheck(run, (t, y, w))


def test_transforms_see_through() -> None:
    net = _net(3, 8, 3)
    y = torch.randn(4, 2, 3, dtype=F64)

    def run(y: Tensor) -> Tensor:
        return taylor_series(lambda t, y: net(y) * t + y * y, 0.2, y, 4)

    mapped = torch.func.vmap(run)(y)
    torch.testing.assert_close(mapped, torch.stack([run(x) for x in y]))
    slope = torch.func.grad(lambda y: run(y)[-1].square().sum())(y[0])
    x = y[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(x)[-1].square().sum(), x)
    torch.testing.assert_close(slope, expected)
    _, tangent = torch.func.jvp(run, (y[0],), (torch.ones_like(y[0]),))
    h = 1e-6
    difference = (run(y[0] + h) - run(y[0] - h)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)


# ---- plain networks


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU, nn.Softplus])
def test_a_field_marked_as_autonomous_has_the_same_series(activation: type[nn.Module]) -> None:
    net, y = _net(3, 8, 8, 3, activation=activation), torch.randn(4, 3, dtype=F64)
    marked, plain = Autonomous(net), lambda t, y: net(y)
    assert dict(marked.named_parameters()).keys() == {f"net.{n}" for n, _ in net.named_parameters()}
    torch.testing.assert_close(
        taylor_series(marked, 0.0, y, 5), taylor_series(plain, 0.0, y, 5), rtol=1e-11, atol=1e-13
    )
    loss = taylor_series(marked, 0.0, y, 4)[-1].square().sum()
    other = taylor_series(plain, 0.0, y, 4)[-1].square().sum()
    for a, b in zip(
        *(torch.autograd.grad(x, list(net.parameters())) for x in (loss, other)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_marked_network_that_maps_to_other_sizes_is_refused_like_any_field() -> None:
    with pytest.raises(ValueError, match="func: expected shape"):
        taylor_series(Autonomous(_net(3, 4, 1)), 0.0, torch.ones(2, 3, dtype=F64), 3)


# ---- errors


def test_a_missing_rule_is_named() -> None:
    def mystery(x: Any) -> Any:
        if torch.overrides.has_torch_function((x,)):
            return torch.overrides.handle_torch_function(mystery, (x,), x)
        return x

    with pytest.raises(MissingRuleError, match="mystery"):
        taylor_series(lambda t, y: mystery(y), 0.0, torch.ones(3), 2)


def test_nesting_is_refused() -> None:
    def func(t: Any, y: Any) -> Any:
        return taylor_series(lambda t, y: y * y, t, y, 2)[-1]

    with pytest.raises(TypeError, match="do not nest"):
        taylor_series(func, 0.0, torch.ones(2), 2)


@pytest.mark.parametrize(
    ("y", "order", "error", "message"),
    [
        (torch.ones(2), -1, ValueError, "order"),
        (torch.ones(2), 1.5, TypeError, "order"),
        (torch.ones(2), True, TypeError, "order"),
        (torch.ones(2, dtype=torch.int64), 2, TypeError, "y"),
        ([1.0], 2, TypeError, "y"),
        ((), 2, ValueError, "y"),
    ],
)
def test_wrong_arguments_are_named(y: Any, order: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        taylor_series(lambda t, y: y, 0.0, y, order)


@pytest.mark.parametrize(
    ("func", "error"),
    [
        (lambda t, y: y[:1], ValueError),
        (lambda t, y: (y, y), ValueError),
        (lambda t, y: y.double(), TypeError),
        (lambda t, y: 1.0, TypeError),
    ],
)
def test_what_the_field_returns_must_fit_the_state(func: Any, error: type) -> None:
    with pytest.raises(error, match="func"):
        taylor_series(func, 0.0, torch.ones(2), 2)
