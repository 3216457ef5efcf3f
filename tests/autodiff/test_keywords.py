"""Arguments of torch's functions may be given by the names that torch documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ctorch
from ctorch.autodiff import Jet
from ctorch.autodiff._keywords import arranged

F64 = torch.float64
PAIR = torch.tensor([[0, 2], [1, 1], [3, 0]])

# by name, and the same by position
CALLS = {
    "sum": (lambda x: torch.sum(input=x, dim=1), lambda x: torch.sum(x, 1)),
    "axis, keepdims": (
        lambda x: torch.sum(x, axis=1, keepdims=True),
        lambda x: torch.sum(x, 1, True),
    ),
    "max, axis": (lambda x: torch.max(input=x, axis=1).values, lambda x: torch.max(x, 1).values),
    "softmax": (lambda x: torch.softmax(input=x, dim=1), lambda x: torch.softmax(x, 1)),
    "method, axis": (lambda x: x.cumsum(axis=1), lambda x: x.cumsum(1)),
    "exp": (lambda x: torch.exp(input=x), torch.exp),
    "add": (lambda x: torch.add(input=x, other=x, alpha=2), lambda x: torch.add(x, x, alpha=2)),
    "other": (lambda x: torch.mul(torch.ones(4, dtype=F64), other=x), lambda x: 1 * x),
    "matmul": (lambda x: torch.matmul(input=x, other=x.mT), lambda x: x @ x.mT),
    "method, other": (lambda x: x.matmul(other=x.mT), lambda x: x @ x.mT),
    "pow": (lambda x: torch.pow(input=x, exponent=3), lambda x: x**3),
    "method, exponent": (lambda x: x.pow(exponent=3), lambda x: x**3),
    "where": (
        lambda x: torch.where(condition=x > 0.5, input=x, other=x * x),
        lambda x: torch.where(x > 0.5, x, x * x),
    ),
    "clamp": (lambda x: torch.clamp(input=x, max=0.5), lambda x: x.clamp(max=0.5)),
    "transpose": (
        lambda x: torch.transpose(input=x, dim0=0, dim1=1),
        lambda x: torch.transpose(x, 0, 1),
    ),
    "reshape": (lambda x: torch.reshape(input=x, shape=(4, 3)), lambda x: x.reshape(4, 3)),
    "var": (lambda x: torch.var(input=x, dim=1, correction=0), lambda x: x.var(1, correction=0)),
    "gather": (
        lambda x: torch.gather(input=x, dim=1, index=PAIR),
        lambda x: torch.gather(x, 1, PAIR),
    ),
    "masked_fill": (
        lambda x: torch.masked_fill(input=x, mask=x > 0.5, value=1.0),
        lambda x: x.masked_fill(x > 0.5, 1.0),
    ),
    "repeat_interleave": (
        lambda x: torch.repeat_interleave(input=x, repeats=2, dim=0),
        lambda x: x.repeat_interleave(2, 0),
    ),
    "dot": (lambda x: torch.dot(input=x[0], tensor=x[1]), lambda x: x[0] @ x[1]),
    "linear": (lambda x: F.linear(input=x, weight=x), lambda x: F.linear(x, x)),
    "gelu": (
        lambda x: F.gelu(input=x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "relu": (lambda x: F.relu(input=x, inplace=False), F.relu),
    "conv1d": (
        lambda x: F.conv1d(input=x[None], weight=x[None, :, :2], padding=1),
        lambda x: F.conv1d(x[None], x[None, :, :2], None, 1, 1),
    ),
    "fft": (lambda x: torch.fft.fft(input=x, dim=0).real, lambda x: torch.fft.fft(x, dim=0).real),
    "solve": (
        lambda x: torch.linalg.solve(A=x[:, :3] @ x[:, :3].mT + 1, B=x),
        lambda x: torch.linalg.solve(x[:, :3] @ x[:, :3].mT + 1, x),
    ),
    "vector_norm": (
        lambda x: torch.linalg.vector_norm(x=x, dim=1),
        lambda x: torch.linalg.vector_norm(x, dim=1),
    ),
    "in place": (lambda x: torch.sin_(input=x.clone()), torch.sin),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_by_name_are_those_by_position(name: str) -> None:
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    v = torch.ones_like(x)
    by_name, by_position = CALLS[name]
    torch.testing.assert_close(by_name(x), by_position(x))  # as torch takes them
    for f in (
        ctorch.derivative(by_name, x, v, k) - ctorch.derivative(by_position, x, v, k)
        for k in (0, 2)
    ):
        assert not f.any()

    def flat(f):
        return lambda z: f(z.reshape(3, 4)).reshape(-1)

    for a, b in zip(
        ctorch.laplacian(flat(by_name), x.reshape(-1)),
        ctorch.laplacian(flat(by_position), x.reshape(-1)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_name_that_no_one_knows_is_named() -> None:
    with pytest.raises(TypeError, match=r"torch\.exp: unknown among its arguments .*: scale"):
        arranged(lambda x: x, torch.exp, (1,), {"scale": 2})


def test_names_under_compile() -> None:
    def f(c: Tensor) -> Tensor:
        return torch.softmax(input=Jet(c, 2), dim=-1).coefficients

    c = torch.rand(3, 4)
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(c), f(c))
