"""Initial value problems with known solutions, and small helpers that several tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

F64 = torch.float64


@dataclasses.dataclass(frozen=True)
class Known:
    """y' = func(t, y) on [t0, t1], whose solution is ``exact(t)``: [T] -> [T, *shape]."""

    func: Callable[[Tensor, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    t0: float
    t1: float

    def y0(self, t0: float | None = None) -> Tensor:
        """The state at ``t0`` (default: where the interval begins)."""
        return self.exact(torch.tensor([self.t0 if t0 is None else t0], dtype=F64))[0]


def _coupled(t: Tensor, y: Tensor) -> Tensor:
    a, b, c, d = y.unbind(-1)
    slopes = (b**0.5 * d, 2 * torch.exp(2 * (c - 1)) * d, d, -torch.log(a))
    return 2 * t * torch.stack(slopes, -1)


def _coupled_exact(t: Tensor) -> Tensor:
    s, c = torch.sin(t**2), torch.cos(t**2)
    return torch.stack([torch.exp(s), torch.exp(2 * s), s + 1, c], -1)


#: nonlinear, nonautonomous, four equations coupled: shows every kind of order condition
COUPLED = Known(_coupled, _coupled_exact, 0.3, 1.1)

LOGISTIC = Known(
    lambda t, y: y * (1 - y),
    lambda t: 1 / (1 + torch.tensor([3.0, 1.0, 0.4], dtype=F64) * torch.exp(-t)[:, None]),
    0.0,
    2.0,
)

OSCILLATOR = Known(
    lambda t, y: torch.stack([y[1], -4 * y[0] + 3 * torch.cos(t)]),
    lambda t: torch.stack(
        [torch.cos(t) + torch.sin(2 * t), -torch.sin(t) + 2 * torch.cos(2 * t)], -1
    ),
    0.0,
    3.0,
)

ALL = {"coupled": COUPLED, "logistic": LOGISTIC, "oscillator": OSCILLATOR}


class Counted:
    """A vector field that notes the times at which it is called."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.times: list[float] = []

    def __call__(self, t: Tensor, y: Any, *args: Any) -> Any:
        self.times.append(float(t))
        return self.func(t, y, *args)

    @property
    def nfe(self) -> int:
        """How often it was called."""
        return len(self.times)


class Net(nn.Module):
    """A small tanh network of (t, y), float64, with fixed weights."""

    def __init__(self, size: int = 2, hidden: int = 5, seed: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Linear(size + 1, hidden, dtype=F64)
        self.outer = nn.Linear(hidden, size, dtype=F64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope at (t, y)."""
        time = t.expand(*y.shape[:-1], 1).to(y.dtype)
        return self.outer(torch.tanh(self.inner(torch.cat([y, time], -1))))


def times(*values: float, grad: bool = False) -> Tensor:
    """Float64 times."""
    return torch.tensor(values, dtype=F64, requires_grad=grad)


def frozen(h: float) -> dict[str, float]:
    """Options that make an adaptive method step by ``h`` throughout."""
    return {"first_step": h, "min_step": h, "max_step": h}


def leaf(*shape: int, seed: int = 0, scale: float = 0.5) -> Tensor:
    """A random float64 leaf that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    value = scale * torch.randn(shape, generator=generator, dtype=F64)
    return value.requires_grad_()


def differences(loss: Callable[[], Tensor], x: Tensor, eps: float = 1e-5) -> Tensor:
    """Central differences of ``loss()``, of fourth order, in every element of ``x``."""
    gradient = torch.zeros_like(x)
    weights = ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0))
    with torch.no_grad():
        flat, out = x.view(-1), gradient.view(-1)
        for i in range(flat.numel()):
            kept = flat[i].clone()
            total = 0.0
            for shift, weight in weights:
                flat[i] = kept + shift * eps
                total += weight * float(loss())
            flat[i] = kept
            out[i] = total / (12 * eps)
    return gradient


def same(actual: Sequence[Tensor], expected: Sequence[Tensor], tol: float = 1e-12) -> None:
    """Tensors agree to ``tol``, relative to the largest element of each."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        size = max(1.0, e.abs().max().item() if e.numel() else 1.0)
        torch.testing.assert_close(a, e, rtol=tol, atol=tol * size)
