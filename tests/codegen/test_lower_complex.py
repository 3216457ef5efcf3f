"""Complex numbers are computed with as pairs of real ones: value and derivative are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctorch.codegen import Untraceable, trace

from .checks import check

F32, F64, C = torch.float32, torch.float64, torch.complex128
Operator = Callable[[Tensor, Tensor], Tensor]


def into(z: Tensor, w: Tensor) -> Tensor:
    """Writes into views of a copy."""
    z = z.clone()
    z[..., 0] = w[..., 1]
    z.real[..., 1] += 2.0
    z.imag[..., 2] = w.real[..., 0]
    z *= 1j
    z[..., :2].conj_physical_()
    return z


#: z and w are [.., 3]; all results are, too
ELEMENTWISE: dict[str, Operator] = {
    "add": lambda z, w: z + w,
    "add real": lambda z, w: z + w.real,
    "add scaled": lambda z, w: torch.add(z, w, alpha=1 - 2j),
    "sub": lambda z, w: z - w,
    "rsub": lambda z, w: 2.0 - z,
    "mul": lambda z, w: z * w,
    "mul real": lambda z, w: z.real * w,
    "mul i": lambda z, w: -1j * z,
    "real times i": lambda z, w: z.real * 1j,
    "div": lambda z, w: z / w,
    "div real": lambda z, w: z / w.imag,
    "number by": lambda z, w: (2 + 1j) / z,
    "reciprocal": lambda z, w: z.reciprocal(),
    "exp": lambda z, w: z.exp(),
    "polar": lambda z, w: torch.polar(w.real.abs(), z.real),
    "phase": lambda z, w: torch.exp(1j * z.real),
    "log": lambda z, w: z.log(),
    "sqrt": lambda z, w: z.sqrt(),
    "square": lambda z, w: z**2,
    "cube": lambda z, w: z**3,
    "power": lambda z, w: z**1.7,
    "inverse power": lambda z, w: z**-2,
    "sin": lambda z, w: z.sin(),
    "cos": lambda z, w: z.cos(),
    "tan": lambda z, w: z.tan(),
    "sinh": lambda z, w: z.sinh(),
    "cosh": lambda z, w: z.cosh(),
    "tanh": lambda z, w: z.tanh(),
    "sigmoid": lambda z, w: z.sigmoid(),
    "abs": lambda z, w: z.abs() + 0j,
    "angle": lambda z, w: z.angle() * (1 + 1j),
    "sgn": lambda z, w: z.sgn(),
    "conj": lambda z, w: z.conj() * w,
    "real and imag": lambda z, w: torch.complex(z.imag, w.real),
    "imag of conj": lambda z, w: z.conj().imag * w,
    "addcmul": lambda z, w: torch.addcmul(w, z, w, value=0.5),
    "lerp": lambda z, w: torch.lerp(z, w, 0.3),
    "where": lambda z, w: torch.where(z.real > 0, z, w),
    # (PyTorch's own derivative fails for a real part)
    "where real": lambda z, w: torch.where(z.real > 0, z, w.real.detach()),
    "where number": lambda z, w: torch.where(z.real > 0, z, 1 + 2j),
    "masked": lambda z, w: w.masked_fill(z.real > 0, 0.5),
    "modulus": lambda z, w: z * z.abs() ** 2,
    "into views": into,
}

MIXING: dict[str, Operator] = {
    "mm": lambda z, w: z @ (w[..., :, None] * w[..., None, :]).mean(0),
    "mm conj": lambda z, w: z @ (w[..., :, None] * w[..., None, :]).mean(0).mH,
    "mv": lambda z, w: (z[..., :, None] * w[..., None, :]) @ w[0],
    "bmm": lambda z, w: ((z[..., :, None] * w[..., None, :]) @ w[..., None]).squeeze(-1),
    "real matrix": lambda z, w: z @ (torch.eye(3, dtype=C) * w.real.mean()),
    "dot": lambda z, w: torch.vdot(z[0], w[1]) * torch.dot(z[1], w[0]) * z,
    "linear": lambda z, w: torch.nn.functional.linear(z, w[:3], w[0]),
    "sum": lambda z, w: z.sum(-1, keepdim=True) * w,
    "mean": lambda z, w: z.mean(0) - w,
    "cumsum": lambda z, w: z.cumsum(-1) * w.cumsum(0),
    "norm": lambda z, w: w / torch.linalg.vector_norm(z, dim=-1, keepdim=True),
    "cat": lambda z, w: torch.cat([z[..., :1], w[..., 1:].conj()], -1),
    "cat real": lambda z, w: torch.cat([z[..., :1], w[..., 1:].real.to(z.dtype)], -1),
    "stack": lambda z, w: torch.stack([z, w], -1)[..., 1].flip(-1),
    "roll": lambda z, w: z.roll(1, -1) * w.roll(1, 0),
    "pad": lambda z, w: torch.nn.functional.pad(z[..., :2], (1, 0), value=0.5),
    "index": lambda z, w: z[..., [2, 0, 2]] * w,
    "index_put": lambda z, w: z.index_put((torch.tensor([0, 0]),), w[:2], accumulate=True),
    "conj view": lambda z, w: z.mT.conj()[..., :3, :2].reshape(-1)[:3] * w,
}


def field(operator: Operator) -> Callable[[Tensor, Tensor], Tensor]:
    """Of a real state [B, 4, 3, 2], half z and half w."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        z, w = torch.view_as_complex(y).unbind(-2)[:2]
        value = operator(z * torch.cos(t.reshape(-1, 1) if t.dim() else t), w)
        return torch.view_as_real(torch.stack([value, w], -2).resolve_conj())

    return func


def states(batch: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 2, 3, 2, generator=generator, dtype=F64).to(dtype)


@pytest.mark.parametrize("first", range(0, len(ELEMENTWISE), 11))
def test_elementwise(first: int) -> None:
    """Many at once, each on a state of its own."""
    chosen = list(ELEMENTWISE.values())[first : first + 11]
    funcs = [field(operator) for operator in chosen]

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([f(t, x) for f, x in zip(funcs, y.unbind(1), strict=True)], 1)

    y = torch.stack([states(3) for _ in funcs], 1)
    check(func, y, factor=20)
    check(func, y.to(F32), factor=50)


@pytest.mark.parametrize("name", MIXING)
def test_products_reductions_and_movements(name: str) -> None:
    y = states(4)
    operator = field(MIXING[name])
    check(lambda t, y: operator(t, y), y, batched=False, width=1, factor=10)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(ELEMENTWISE)), min_size=2, max_size=6))
def test_chains(names: list[str]) -> None:
    def chain(z: Tensor, w: Tensor) -> Tensor:
        for name in names:
            # of moderate size, away from the branches of the next one
            value = ELEMENTWISE[name](z, w)
            z, w = value / (2 + value.abs()) + 0.3j * w, z
        return z

    operator = field(chain)
    check(lambda t, y: operator(t, y), states(3), factor=1e3)


def test_zero_and_numbers_whose_squares_are_not_finite() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        z = torch.view_as_complex(y)
        parts = [z.sqrt(), z.sgn(), z.abs() + 0j, z**0.5, (z + 1e-300) / (z + 1e-300), 1e200 * z]
        return torch.view_as_real(torch.stack([*parts[:5], parts[5] / (parts[5] + 1e200)], -1)).sum(
            -2
        )

    y = torch.tensor([[0.0, 0.0], [-2.0, 0.0], [-2.0, -0.5], [0.0, 3.0], [1e-3, -4.0]], dtype=F64)
    check(func, y, vjp=False)


def test_what_has_no_rule_is_refused_by_name() -> None:
    for func, name in (
        (lambda t, y: torch.complex(y, y).acos().real, "acos"),
        (lambda t, y: (torch.complex(y, y) ** torch.complex(y, y)).real, "pow"),
        (lambda t, y: torch.complex(y, y).prod(-1, keepdim=True).real * y, "prod"),
    ):
        with pytest.raises(Untraceable, match=f"{name}.*complex|{name}.*no real number"):
            trace(func, states(3).flatten(1), 0.0, batched=True)
