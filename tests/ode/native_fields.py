"""Vector fields written twice: in PyTorch, and in the C++ that a tracer should make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass
class Twin:
    """A vector field and its C++; what ``ctorch.codegen.trace`` returns has the same attributes."""

    func: Callable[..., Tensor]
    source: str
    dim: int
    own: int = 0
    independent: bool = True
    parameters: tuple[Tensor, ...] = ()

    def valid(self) -> bool:
        return True

    def shared(self, args: tuple[Any, ...]) -> list[Tensor]:
        return list(self.parameters)

    def of_samples(self, args: tuple[Any, ...], batch: int) -> Tensor | None:
        return args[0].reshape(batch, self.own) if self.own else None


def source(dtype: torch.dtype, body: str, **constants: int) -> str:
    numbers = {"own": 0, "shared": 0, "work": 0, **constants}
    named = ", ".join(f"{name} = {value}" for name, value in numbers.items())
    real = "double" if dtype is torch.float64 else "float"
    return f"""struct Field {{
  using real = {real};
  static constexpr long {named};
  template <class V>
  CT_LANES static void eval(V t, const V* y, const V* own, const real* const* shared, V* work,
                            V* dy) {{
    {body}
  }}
}};"""


def lotka_volterra(dtype: torch.dtype) -> Twin:
    def func(t: Tensor, y: Tensor) -> Tensor:
        hare, lynx = y[..., 0], y[..., 1]
        eaten = hare * lynx
        return torch.stack([1.5 * hare - eaten, eaten - 3 * lynx], -1)

    body = (
        "const V eaten = y[0] * y[1]; dy[0] = real(1.5) * y[0] - eaten; dy[1] = eaten - 3 * y[1];"
    )
    return Twin(func, source(dtype, body, dim=2), 2)


def forced(dtype: torch.dtype) -> Twin:
    """Depends on time; ``own`` is a stiffness."""

    def func(t: Tensor, y: Tensor, stiffness: Tensor) -> Tensor:
        push = -stiffness * torch.sin(y[..., :1]) + torch.cos(3 * t)
        return torch.cat([y[..., 1:], push], -1)

    body = "dy[0] = y[1]; dy[1] = -own[0] * ct::native::sin(y[0]) + ct::native::cos(real(3) * t);"
    return Twin(func, source(dtype, body, dim=2, own=1), 2, own=1)


def van_der_pol(dtype: torch.dtype) -> Twin:
    def func(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        x, v = y[..., :1], y[..., 1:]
        return torch.cat([v, mu * ((1 - x * x) * v) - x], -1)

    body = "dy[0] = y[1]; dy[1] = own[0] * ((1 - y[0] * y[0]) * y[1]) - y[0];"
    return Twin(func, source(dtype, body, dim=2, own=1), 2, own=1)


def lorenz(dtype: torch.dtype) -> Twin:
    def func(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - (8 / 3) * c], -1)

    body = (
        "dy[0] = 10 * (y[1] - y[0]); dy[1] = y[0] * (28 - y[2]) - y[1];"
        " dy[2] = y[0] * y[1] - real(8.0 / 3) * y[2];"
    )
    return Twin(func, source(dtype, body, dim=3), 3)


def root(dtype: torch.dtype) -> Twin:
    """Is not defined below zero."""
    body = "for (int i = 0; i < 2; ++i) dy[i] = -ct::native::sqrt(y[i]);"
    return Twin(lambda t, y: -torch.sqrt(y), source(dtype, body, dim=2), 2)


def blow_up(dtype: torch.dtype) -> Twin:
    body = "for (int i = 0; i < 2; ++i) dy[i] = y[i] * y[i];"
    return Twin(lambda t, y: y * y, source(dtype, body, dim=2), 2)


def mlp(dtype: torch.dtype, width: int = 64) -> Twin:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
    ).to(dtype)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=2.2 / layer.in_features**0.5)
            nn.init.constant_(layer.bias, 0.1)
    body = f"""V *a = work, *b = work + {width};
    const auto tanh = [](auto x) {{ return ct::native::tanh(x); }};
    ct::native::linear<{width}, 2, 2, 1>(shared[0], shared[1], y, a);
    ct::native::map({width}, a, tanh, a);
    ct::native::linear<{width}, {width}, {width}, 1>(shared[2], shared[3], a, b);
    ct::native::map({width}, b, tanh, b);
    ct::native::linear<2, {width}, {width}, 1>(shared[4], shared[5], b, dy);"""
    text = source(dtype, body, dim=2, shared=6, work=2 * width)
    return Twin(lambda t, y: net(y), text, 2, parameters=tuple(net.parameters()))
