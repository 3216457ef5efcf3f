"""Vector fields as people write them, lowered, compiled, and compared with eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctorch.codegen import trace

from .checks import check

F64 = torch.float64


def state(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


def lotka_volterra(t: Tensor, y: Tensor) -> Tensor:
    a, b = y[:, 0], y[:, 1]
    return torch.stack([1.5 * a - a * b, -3 * b + a * b], 1)


def van_der_pol(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y[..., :1], y[..., 1:]
    return torch.cat([v, mu * (1 - x**2) * v - x], -1)


def lorenz(t: Tensor, y: Tensor, sigma: float, rho: Tensor, beta: float) -> Tensor:
    a, b, c = y.unbind(-1)
    return torch.stack([sigma * (b - a), a * (rho - c) - b, a * b - beta * c], -1)


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[:, 1], -torch.sin(y[:, 0]) - 0.1 * y[:, 1] + torch.cos(t[:, 0])], 1)


def kuramoto(t: Tensor, y: Tensor, omega: Tensor) -> Tensor:
    return omega + torch.sin(y[:, None, :] - y[:, :, None]).mean(-1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("width", [1, 4])
def test_small_systems(dtype: torch.dtype, width: int) -> None:
    y = state(5, 2, dtype=dtype)
    check(lotka_volterra, y, width=width)
    check(pendulum, y, width=width)
    check(van_der_pol, y, args=(state(5, 1, dtype=dtype),), width=width)
    rho = torch.tensor(28.0, dtype=dtype)
    traced = check(lorenz, state(5, 3, dtype=dtype), args=(10.0, rho, 8 / 3), width=width)
    assert "sweep" not in traced.source
    assert "work = 0" in traced.source
    check(kuramoto, state(3, 20, dtype=dtype), args=(state(20, dtype=dtype),), width=width)


def mlp(d: int, hidden: int, act: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(
        nn.Linear(d, hidden), act(), nn.Linear(hidden, hidden), act(), nn.Linear(hidden, d)
    ).to(F64)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        x = self.norm(y)
        x = y + self.heads(x, x, x, need_weights=False)[0]
        return x + self.feed(x)


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(1, 6)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.cell(torch.sin(t), y) - y


class Timed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, t.expand(len(y), 1)], -1))[:, : y.shape[1]]


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("act", [nn.Tanh, nn.SiLU, nn.ELU])
def test_mlp(width: int, act: type[nn.Module]) -> None:
    net = mlp(3, 20, act)
    check(lambda t, y: net(y), state(5, 3), width=width)


@pytest.mark.parametrize("width", [1, 4])
def test_modules(width: int) -> None:
    check(Timed(mlp(4, 12)), state(5, 3), width=width)
    check(Gru().to(F64), state(5, 6), width=width)
    check(Attention().to(F64), state(3, 4, 8), width=width)


@pytest.mark.parametrize("width", [1, 4])
def test_irregular_places(width: int) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    rate = state(40).requires_grad_(True)
    mixed = state(40, 40).requires_grad_(True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(y[:, order]) * rate[order] + y[:, order.flip(0)] * y
        return x @ (mixed * mixed.tril())[order].T + mixed[order, order] * x

    check(func, state(5, 40), width=width)


@pytest.mark.parametrize("width", [1, 4])
def test_products_of_what_all_samples_share(width: int) -> None:
    """They are made with numbers, not lanes, beside others of the same matrix."""
    for n in (6, 24):
        matrix = state(n, n).requires_grad_(True)
        check(lambda t, y, a=matrix: torch.tanh(y @ (a @ a) @ a.T) @ a, state(5, n), width=width)


@pytest.mark.parametrize("width", [1, 4])
def test_weights_that_are_computed_from_parameters(width: int) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(state(30, 30))
            self.register_buffer("mask", torch.ones(30, 30, dtype=F64).tril())

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            weight = nn.functional.softplus(self.weight) * self.mask
            return torch.tanh(y @ weight.T) @ weight / weight.norm()

    traced = check(Masked(), state(5, 30), width=width)
    assert "linear<30, 30" in traced.source
    assert sum(traced.field.differentiated) == 1


def test_a_field_of_torch_compile_is_traced_as_it_is_written() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    net = nn.Linear(2, 2)
    field = torch.compile(lambda t, y: net(y).tanh(), backend=backend)
    trace(field, torch.ones(3, 2), torch.tensor([0.0, 1.0]), (), batched=True)
    # for calls with batches of three sizes, to compare; the trace itself is none of the compiler's
    assert len(compiled) <= 3
