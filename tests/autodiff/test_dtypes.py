"""Half precision and complex values: right numbers, in the dtype given, by every operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch.autodiff import stochastic_laplacian

HALF = [torch.float16, torch.bfloat16]
F64, C128 = torch.float64, torch.complex128


def field(y: Tensor) -> Tensor:
    return torch.tanh(y) * y.flip(-1) / (1 + y * y) + torch.sinh(y) - torch.exp(-y) ** 2


def scalar(y: Tensor) -> Tensor:
    return field(y).sum(-1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def divergence(method: str, f=field):
    def of(x: Tensor) -> Tensor:
        noise = None
        if method != "exact":
            noise = torch.randn(2, *x.shape, generator=draw()).bfloat16().to(x.dtype)
        return ctorch.divergence(f, x, method, noise=noise)[1]

    return of


OPERATORS = {
    "series": lambda x: ctorch.taylor_series(lambda t, y: field(y) + torch.sin(t * y), 0.5, x, 4),
    "jet": lambda x: torch.stack(ctorch.jet(field, (x,), ([x.sin(), x, x],))[1]),
    "derivative": lambda x: ctorch.derivative(field, x, x.cos(), 3),
    "laplacian": lambda x: ctorch.laplacian(scalar, x).laplacian,
    "gradient": lambda x: ctorch.laplacian(scalar, x).gradient,
    "weighted": lambda x: (
        ctorch.laplacian(
            scalar, x, torch.diag(torch.arange(1, 4)).to(x.dtype) + torch.ones(3, 3).to(x.dtype)
        ).laplacian
    ),
    "indefinite": lambda x: (
        ctorch.laplacian(scalar, x, torch.diag(torch.arange(-1, 2)).to(x.dtype)).laplacian
    ),
    "exact": divergence("exact"),
    "hutchinson": divergence("hutchinson"),
    "hutch++": divergence("hutch++"),
    "xtrace": divergence("xtrace"),
    "sparse": lambda x: stochastic_laplacian(scalar, x, 2, generator=draw()).estimate,
    "a module": lambda x: ctorch.derivative(net().to(x.dtype), x, x, 2),
    "a module's series": lambda x: ctorch.taylor_series(
        ctorch.autodiff.Autonomous(net().to(x.dtype)), 0.0, x, 3
    ),
    "a module's divergence": lambda x: divergence("exact", net().to(x.dtype))(x),
    "a module's laplacian": lambda x: ctorch.laplacian(net().to(x.dtype), x).laplacian,
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision_agrees_with_double(name, dtype):
    width = 8 if name in ("hutch++", "xtrace") else 3
    x = (torch.rand(6, width, generator=draw()) - 0.5).to(dtype)
    found, exact = OPERATORS[name](x), OPERATORS[name](x.double())
    assert found.dtype is dtype
    # each operation rounds to half; of about 20 of them, errors are a few eps of the largest term
    error = (found.double() - exact).abs().max()
    assert error < 30 * torch.finfo(dtype).eps * (1 + exact.abs().max())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_trains(dtype):
    x = torch.full((2, 3), 0.3, dtype=dtype, requires_grad=True)
    series = ctorch.taylor_series(lambda t, y: torch.tanh(y) * y, 0.0, x, 3)
    (grad,) = torch.autograd.grad(series[3].sum(), x)
    wide = torch.full((2, 3), 0.3, dtype=F64, requires_grad=True)
    series = ctorch.taylor_series(lambda t, y: torch.tanh(y) * y, 0.0, wide, 3)
    (exact,) = torch.autograd.grad(series[3].sum(), wide)
    assert (grad.double() - exact).abs().max() < 30 * torch.finfo(dtype).eps * exact.abs().max()


# ---- complex values

ANALYTIC = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
    "exp": torch.exp,
    "log": torch.log,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "exp2": torch.exp2,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "pow": lambda z: z**2.5,
    "complex pow": lambda z: z ** (0.5 + 1j),
    "cube": lambda z: z**3,
    "quotient": lambda z: torch.sin(z) / (2 + z * z),
    "atan": torch.atan,
    "asin": torch.asin,
    "acos": torch.acos,
    "asinh": torch.asinh,
    "acosh": torch.acosh,
    "atanh": torch.atanh,
}
# off the branch cuts, in all quadrants
POINTS = torch.tensor([0.6 + 0.4j, -0.7 + 0.5j, -0.5 - 0.6j, 0.3 - 0.8j], dtype=C128)
PLAIN = {  # what torch computes for real values alone
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu_tanh": lambda z: z * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)),
    "log2": lambda z: torch.log(z) / math.log(2),
    "exp2": lambda z: torch.exp(z * math.log(2)),
}


def on_circle(f, z: Tensor, v: Tensor, order: int) -> Tensor:
    """The derivative along v by Cauchy's formula, from 64 points of the domain."""
    radius = 0.2
    turn = torch.exp(2j * torch.pi * torch.arange(64, dtype=F64) / 64).reshape(-1, 1)
    values = f(z + radius * turn * v)
    return (values * turn**-order).mean(0) * (math.factorial(order) / radius**order)


@pytest.mark.parametrize("name", ANALYTIC)
def test_analytic_functions_of_complex_values(name):
    f, v = ANALYTIC[name], torch.tensor([1.0, 1j, 0.6 + 0.8j, -1.0], dtype=C128)
    for order in (1, 2, 3, 5):
        found = ctorch.derivative(f, POINTS, v, order)
        exact = on_circle(PLAIN.get(name, f), POINTS, v, order)
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)
    series = ctorch.taylor_series(lambda t, y: f(y), 0.0, POINTS, 3)  # y'' = f'(y) f(y)
    slope = ctorch.derivative(f, POINTS, torch.ones_like(POINTS), 1)
    torch.testing.assert_close(2 * series[2], slope * series[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ANALYTIC)
def test_real_directions_agree_with_nested_forward_mode(name):
    """Through a complex function of real values, each part of which has its derivatives."""
    f = PLAIN.get(name, ANALYTIC[name])
    x = torch.tensor([0.3, -0.4, 0.7], dtype=F64)

    def of(g):
        return lambda s: torch.view_as_real(g(torch.complex(s, s * s + 0.3)))

    nested = of(f)
    for order in (1, 2, 3):
        nested = (lambda g: lambda s: torch.func.jvp(g, (s,), (torch.ones_like(s),))[1])(nested)
        found = ctorch.derivative(of(ANALYTIC[name]), x, torch.ones_like(x), order)
        torch.testing.assert_close(found, nested(x), rtol=1e-9, atol=1e-9)
    lap = ctorch.laplacian(lambda s: of(ANALYTIC[name])(s).square().sum((-1, -2)), x[None])
    hessian = torch.func.hessian(lambda s: of(f)(s).square().sum())(x)
    torch.testing.assert_close(lap.laplacian[0], hessian.trace(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["softplus", "logsigmoid", "mish", "gelu"])
def test_what_torch_lacks_for_complex_values_is_refused_by_name(name):
    with pytest.raises(TypeError, match=f"{name}.*complex"):
        ctorch.derivative(getattr(nn.functional, name), POINTS, POINTS, 2)


def test_complex_fields_train():
    def total(z: Tensor) -> Tensor:
        return ctorch.taylor_series(lambda t, y: torch.tanh(y) * torch.sin(y), 0.0, z, 3)

    assert torch.autograd.gradcheck(total, (POINTS[:2].clone().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_no_mixing_of_samples(dtype):
    """A product of matrices sums in another order where derivatives pass beside the value."""

    def f(x):
        plain = 1 + 4 * torch.finfo(dtype).eps * isinstance(x, Tensor)
        return (x.float().square() * plain).to(dtype)

    x = torch.rand(5, 3).to(dtype) + 0.5
    assert torch.allclose(ctorch.divergence(f, x)[1], 2 * x.sum(-1), rtol=0.1)
    lap = ctorch.laplacian(lambda x: f(x).sum(-1), x).laplacian
    assert torch.allclose(lap, torch.full_like(lap, 6), rtol=0.1)
