"""Arguments for the tests of the Taylor operators, and nested reverse mode to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from ctorch.ops import jet

F64 = torch.float64
PARAM = 1.7  # an exponent that is not whole, a beta that is not one

# Small, around a row of the kernels in either dtype, and what has no elements at all.
SHAPES = [(), (1,), (3,), (0,), (0, 3), (3, 0), (5, 2), (2, 3, 4), (31,), (33,), (63,), (65,)]
SHAPES += [(3, 43), (2, 200)]

# In elementary operations of torch, whose nested reverse mode is right.
ELEMENTARY: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": lambda x: torch.log1p(torch.exp(PARAM * x)) / PARAM,
    "pow": lambda x: x**PARAM,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x * torch.sigmoid(x),
    "logsigmoid": lambda x: -torch.log1p(torch.exp(-x)),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
}
for _name in jet.UNARY:
    if _name not in ELEMENTARY:
        ELEMENTARY[_name] = getattr(torch, _name)


def rand(shape: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(shape, generator=generator, dtype=F64) - 1).to(device)


def series(shape: tuple[int, ...], seed: int, name: str = "", device: str = "cpu") -> Tensor:
    """A stack whose value is where the function is defined, with coefficients that shrink."""
    x = rand(shape, seed, device)
    x = x * 0.5 ** torch.arange(shape[0], device=device).reshape(-1, *[1] * (x.dim() - 1))
    x[0] = 0.5 + 0.25 * x[0] + (1.0 if name == "acosh" else 0.0)
    return x


def nested(f: Callable[[Tensor], Tensor], x: Tensor, order: int, level: int = 0) -> Tensor:
    """Taylor coefficients of the level-th derivative of f along the series, by autograd alone."""
    t = torch.zeros(x.shape[1:], dtype=x.dtype, requires_grad=True)
    y = sum((c * t**k for k, c in enumerate(x)), torch.zeros_like(t))
    for _ in range(level):
        f = _derivative(f)
    y = f(y)
    coefficients = [y.detach()]
    for k in range(1, order + 1):
        (y,) = torch.autograd.grad(y.sum(), t, create_graph=True)
        coefficients.append(y.detach() / math.factorial(k))
    return torch.stack(coefficients)


def _derivative(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def slope(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        return g

    return slope


class Drawn:
    """A shape, a seed and orders of a drawn problem."""

    def __init__(self, data: st.DataObject) -> None:
        self.shape = data.draw(st.sampled_from(SHAPES), "shape")
        self.seed = data.draw(st.integers(0, 1000), "seed")
        self.degree = data.draw(st.sampled_from([0, 1, 2, 3, 5, 8, 11]), "degree")
        self.order = self.degree + data.draw(st.integers(0, 4), "order beyond it")

    def partner(self, data: st.DataObject) -> tuple[int, ...]:
        """A shape that broadcasts against the first one."""
        ones = data.draw(
            st.lists(st.booleans(), min_size=len(self.shape), max_size=len(self.shape)), "ones"
        )
        shape = tuple(1 if one else size for one, size in zip(ones, self.shape, strict=True))
        return shape[data.draw(st.integers(0, len(shape)), "dimensions left out") :]
