"""Solves whose kernels are called by address are those that the operators make, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch.ops import _kernels

pytestmark = pytest.mark.skipif(not _kernels.HAS_KERNELS, reason="needs the compiled kernels")

METHODS = ["euler", "rk4", "bosh3", "dopri5", "tsit5", "dopri8", "vern7"]
DTYPES = [torch.float32, torch.float64]
TIMES = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(3 * t)


def both(monkeypatch: pytest.MonkeyPatch, solve: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``solve`` gives with kernels by address, and through the operators."""
    direct = solve()
    with monkeypatch.context() as patch:
        patch.setattr(_kernels, "library", None)
        return direct, solve()


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", ["none", "backprop", "checkpoint", "adjoint"])
def test_values_and_gradients_have_the_same_bits(
    method: str, dtype: torch.dtype, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field, y0 = Net(dtype), torch.tensor([[1.0, 0.5], [-0.3, 0.2]], dtype=dtype)

    def solve() -> list[Tensor]:
        y, t = y0.clone().requires_grad_(), TIMES.to(dtype).requires_grad_(gradient != "none")
        options = {"dt0": 0.1} if method in ("euler", "rk4") else {"rtol": 1e-4, "atol": 1e-5}
        rows = ctorch.solve_ode(field, y, t, method=method, gradient=gradient, **options).y
        if gradient == "none":
            return [rows]
        return [rows, *torch.autograd.grad(rows.square().sum(), [y, t, *field.parameters()])]

    assert same(*both(monkeypatch, solve))


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "vern7"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", ["none", "backprop", "checkpoint"])
def test_batched_solves_have_the_same_bits(
    method: str, dtype: torch.dtype, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = Net(dtype)
    torch.manual_seed(1)
    y0 = 3 * torch.randn(5, 2, dtype=dtype)

    def solve() -> list[Tensor]:
        y = y0.clone().requires_grad_()
        solution = ctorch.solve_ode(
            field, y, TIMES.to(dtype), method=method, gradient=gradient, batched=True, rtol=1e-4
        )
        found = [solution.y, solution.stats.accepted, solution.stats.rejected]
        if gradient != "none":
            found += torch.autograd.grad(solution.y.square().sum(), [y, *field.parameters()])
        return found

    assert same(*both(monkeypatch, solve))


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


class Labelled(Tensor):
    """A subclass of the user's."""


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda y: strided(-y),
    "transposed": lambda y: (-y).T.contiguous().T,
    "expanded": lambda y: -y.mean(-1, keepdim=True).expand_as(y),
    "negated": lambda y: torch.complex(y, y).conj().imag,
    "narrow": lambda y: (-y).to(torch.bfloat16),
    "subclass": lambda y: (-y).as_subclass(Labelled),
    "the state itself": lambda y: y,
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_fields_that_return_odd_tensors(
    kind: str, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    y0 = torch.tensor([[1.0, 0.5]], dtype=torch.float32)

    def solve() -> list[Tensor]:
        def field(t: Tensor, y: Tensor) -> Tensor:
            return ODD[kind](y)

        return [ctorch.solve_ode(field, y0, TIMES.float(), gradient="none", batched=batched).y]

    direct, operators = both(monkeypatch, solve)
    assert same(direct, operators)

    def plain(t: Tensor, y: Tensor) -> Tensor:
        return ODD[kind](y).clone().contiguous().as_subclass(Tensor).float()

    want = ctorch.solve_ode(plain, y0, TIMES.float(), gradient="none", batched=batched).y
    torch.testing.assert_close(direct[0].as_subclass(Tensor), want)


@pytest.mark.parametrize("batched", [False, True])
def test_what_the_field_keeps_stays_as_it_was(batched: bool) -> None:
    kept: list[tuple[Tensor, ...]] = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        k = -y * torch.cos(t)
        kept.append((t, y, k, t.clone(), y.clone(), k.clone()))
        return k

    ctorch.solve_ode(field, torch.randn(3, 2), TIMES.float(), gradient="none", batched=batched)
    assert len(kept) > 10
    for t, y, k, *copies in kept:
        assert same((t, y, k), copies)
    assert len({y.data_ptr() for _, y, *_ in kept[1:]}) == len(kept) - 1


@pytest.mark.parametrize("batched", [False, True])
def test_a_field_that_writes_into_its_state_is_still_refused(batched: bool) -> None:
    calls = 0

    def field(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -(y.mul_(2) if calls == 9 else y)

    with pytest.raises(RuntimeError, match="changed its argument y in place"):
        ctorch.solve_ode(field, torch.ones(3, 2), TIMES.float(), gradient="none", batched=batched)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_graphs_are_let_go_only_when_they_may_be(gradient: str) -> None:
    field = Net(torch.float64)
    y = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    solution = ctorch.solve_ode(field, y, TIMES, gradient=gradient)
    rows, inputs = solution.y, [y, *field.parameters()]
    once = torch.autograd.grad(rows.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(rows.sum(), inputs)
    assert same(once, again)
    assert (solution.stats.nfe_backward == 0) is (gradient == "backprop")
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(rows.sum(), inputs)


def test_deterministic_algorithms_change_nothing() -> None:
    def solve() -> Tensor:
        return ctorch.solve_ode(lambda t, y: -y, torch.ones(3), TIMES.float(), gradient="none").y

    usual = solve()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(solve(), usual)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_adams_methods_keep_slopes_that_a_field_writes_to_one_memory(method: str) -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return -(y**2) * (1 + 5 * torch.sin(20 * t))

    memory = torch.empty(3, dtype=torch.float64)
    y0 = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    t = torch.linspace(0, 2, 401, dtype=torch.float64)
    options = {"max_order": 4}
    expected = ctorch.solve_ode(field, y0, t, method=method, options=options)
    actual = ctorch.solve_ode(
        lambda t, y: memory.copy_(field(t, y)), y0, t, method=method, options=options
    )
    assert torch.equal(actual.y, expected.y)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_a_field_may_write_all_its_results_to_one_memory(method: str, batched: bool) -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return -(y**2) * (1 + 5 * torch.sin(20 * t))

    memory = torch.empty(3, 1, dtype=torch.float64)
    y0 = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    for dt0 in (None, 1.0):  # found by a second evaluation; too long, so that steps are rejected
        options = {"method": method, "batched": batched, "dt0": dt0, "dense": not batched}
        expected = ctorch.solve_ode(field, y0, t, **options)
        actual = ctorch.solve_ode(lambda t, y: memory.copy_(field(t, y)), y0, t, **options)
        assert torch.equal(actual.y, expected.y)
