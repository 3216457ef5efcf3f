"""What users do off the straight way: closures over batches, gradients of gradients, odd types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ctorch
from ctorch.autodiff import stochastic_bilaplacian, stochastic_laplacian, stochastic_operator

F64 = torch.float64


def points(n: int, d: int = 3) -> torch.Tensor:
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [5, 3000])
@pytest.mark.parametrize("prefix", [False, True])
def test_functions_may_hold_data_of_each_sample(n, prefix):
    """As ``data`` itself, or ``data[: len(x)]``, which a part of the batch would get wrong."""
    x, data = points(n), points(n).flip(0)
    held = (lambda z: data[: len(z)]) if prefix else (lambda z: data)
    found = ctorch.laplacian(lambda z: (z * held(z)).sin().sum(-1), x)
    torch.testing.assert_close(found.laplacian, -((x * data).sin() * data**2).sum(-1))
    _, div = ctorch.divergence(lambda z: (z * held(z)).sin(), x)
    torch.testing.assert_close(div, ((x * data).cos() * data).sum(-1))


def test_a_chunk_size_that_data_of_a_batch_does_not_allow_is_refused():
    x = points(50)
    with pytest.raises(ValueError, match="chunk_size"):
        ctorch.laplacian(lambda z: (z * x[: len(z)].sin()).sum(-1), x, chunk_size=7)


def test_mixing_over_a_later_batch_dim_is_refused():
    x = points(20).reshape(4, 5, 3)
    with pytest.raises(ValueError, match="each sample alone"):
        ctorch.laplacian(lambda z: (z * z.mean(1, keepdim=True)).sum(-1), x)


@pytest.mark.parametrize(
    "mixing",
    ["batch_norm", pytest.param("nan alone", marks=pytest.mark.filterwarnings("ignore:std"))],
)
def test_mixing_that_fails_on_single_samples_is_refused(mixing):
    norm = nn.BatchNorm1d(3).double()
    f = norm if mixing == "batch_norm" else lambda z: z / z.std(0)
    with pytest.raises(ValueError, match="mixes samples"):
        ctorch.divergence(f, points(5))


@pytest.mark.parametrize("n", [5, 3000])
def test_functions_that_write_into_their_argument_leave_the_users_tensor_alone(n):
    x = points(n)
    before = x.clone()
    _, div = ctorch.divergence(lambda z: z.mul_(2).sin(), x)
    torch.testing.assert_close(div, (2 * (2 * x).cos()).sum(-1))
    ctorch.laplacian(lambda z: z.mul_(2).sin().sum(-1), x)
    assert x.equal(before)


def test_compact_laplacians_under_func_grad():
    def f(z):
        return z.reshape(*z.shape[:-1], 3, 2).sin().prod(-1).sum(-1).tanh()

    x = points(4, 6).requires_grad_()
    (expected,) = torch.autograd.grad(ctorch.laplacian(f, x).laplacian.sum(), x)
    found = torch.func.grad(lambda z: ctorch.laplacian(f, z).laplacian.sum())(x.detach())
    torch.testing.assert_close(found, expected)


def test_laplacian_under_autocast():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x = points(4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ctorch.laplacian(net, x).laplacian
    exact = ctorch.laplacian(net, x).laplacian
    assert not torch.equal(found.float(), exact)  # it was in force
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.05)


def test_gradients_by_zero_entries_of_a_diagonal_weight_are_refused():
    weight = torch.tensor([1.0, 0.0, 2.0], dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match="weight"):
        ctorch.laplacian(lambda z: z.sin().sum(-1), points(2), weight)


def test_high_orders_are_scaled_by_factorials_that_no_int64_holds():
    x, one = torch.tensor(0.3, dtype=F64), torch.ones((), dtype=F64)
    torch.testing.assert_close(ctorch.derivative(torch.exp, x, one, 60), x.exp())
    _, (series,) = ctorch.jet(lambda z: (z.exp(),), (x,), ([one] + [0 * x] * 29,))
    torch.testing.assert_close(series[-1], x.exp())
    torch.testing.assert_close(ctorch.derivative(torch.exp, x, one, 171), x.exp())
    with pytest.raises(ValueError, match="factorial_scaled"):
        ctorch.derivative(torch.exp, x, one, 5000)


def test_orders_of_other_types_are_named():
    x = points(2)
    with pytest.raises(TypeError, match="order: expected an int, got float"):
        ctorch.derivative(torch.sin, x, x, 2.0)


def test_fields_of_dicts_may_return_keys_in_another_order():
    x = points(2)
    state = {"a": x, "b": x}
    found = ctorch.taylor_series(
        lambda t, y: {"b": 1 + 0 * y["a"], "a": 2 + 0 * y["b"]}, 0.0, state, 1
    )
    assert found["a"][1].eq(2).all()
    assert found["b"][1].eq(1).all()
    with pytest.raises(ValueError, match="structure of y"):
        ctorch.taylor_series(lambda t, y: [y["a"], y["b"]], 0.0, state, 1)


NET = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("field", [torch.sin, NET])
def test_taylor_series_in_one_graph(field):
    def run(z):
        return ctorch.taylor_series(lambda t, y: field(y) * t, 0.5, z, 3)

    x = points(2)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), run(x))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.Softmax(-1), nn.LogSoftmax(-1)], ids=str)
def test_norms_and_softmax_of_an_empty_batch(layer, shape):
    found = ctorch.laplacian(lambda z: layer.double()(z.sin()), torch.zeros(shape, dtype=F64))
    assert found.laplacian.shape == shape
    assert found.gradient.shape == (*shape, 3)


@pytest.mark.parametrize(
    "inner",
    [
        lambda z: ctorch.divergence(torch.sin, z)[1],
        lambda z: ctorch.laplacian(torch.sin, z).laplacian.sum(-1),
        lambda z: ctorch.derivative(torch.sin, z, z, 2).sum(-1),
        lambda z: stochastic_laplacian(torch.sin, z).value,
    ],
)
def test_operators_within_operators_are_refused_as_such(inner):
    with pytest.raises(TypeError, match="do not nest"):
        ctorch.laplacian(inner, points(4))


def test_shared_rows_of_an_empty_batch_are_joined():
    def f(z):
        pairs = z.reshape(-1, 3, 2)
        return torch.cat([pairs, pairs.norm(dim=-1, keepdim=True)], -1).sum((-1, -2))

    assert ctorch.laplacian(f, points(0, 6)).gradient.shape == (0, 6)


# ---- whole numbers


def scalar(x: torch.Tensor) -> torch.Tensor:
    return x.sin().prod(-1)


def draw() -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(0)}


def taylor_solve(n: Any) -> torch.Tensor:
    times = torch.tensor([0.0, 0.5], dtype=F64)
    return ctorch.solve_ode(
        lambda t, y: -y, points(2), times, method="taylor", rtol=0.1, options={"order": n}
    ).y


def penalty(n: Any) -> torch.Tensor:
    regularizer = ctorch.ode.regularizers.taylor(n, batch_dims=n)
    times = torch.tensor([0.0, 0.5], dtype=F64)
    return regularizer.solve(lambda t, y: -y, points(6).reshape(2, 3, 3), times)[1]


WHOLE = {
    "derivative": lambda n: ctorch.derivative(torch.sin, points(2), points(2), n),
    "mixed": lambda n: ctorch.derivative(torch.sin, points(2), (points(2), points(2)), (n, 1)),
    "series": lambda n: ctorch.taylor_series(lambda t, y: y.sin(), 0.0, points(2), n),
    "laplacian": lambda n: ctorch.laplacian(scalar, points(5), chunk_size=n).laplacian,
    "divergence": lambda n: ctorch.divergence(
        torch.sin, points(2), "hutchinson", probes=n, **draw()
    )[1],
    "samples": lambda n: stochastic_laplacian(scalar, points(2), n, **draw()).estimate,
    "fourth": lambda n: stochastic_bilaplacian(scalar, points(2), n, **draw()).estimate,
    "terms": lambda n: (
        stochastic_operator(scalar, points(2), {(0, n): 1.0, (n,): 2.0}, n, **draw()).estimate
    ),
    "solver": taylor_solve,
    "penalty": penalty,
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("two", [np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_whole_numbers_of_other_libraries_are_taken(name, two):
    assert WHOLE[name](two).equal(WHOLE[name](2))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "given", [True, np.bool_(True), torch.tensor(True), 2.0, np.float64(2), "2"], ids=repr
)
def test_what_is_not_a_whole_number_is_refused(name, given):
    with pytest.raises((TypeError, ValueError), match=r"an int|coordinates|order"):
        WHOLE[name](given)


@pytest.mark.parametrize("name", sorted(WHOLE.keys() - {"laplacian"}))
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=r">= [01]|at least|coordinates|from 2"):
        WHOLE[name](np.int64(-1))


# ---- odd input


X = points(2)
ODD = {
    "no function": (lambda: ctorch.jet(3, (X,), ([X],)), TypeError, "f: expected a function"),
    "none": (lambda: ctorch.derivative(None, X, X), TypeError, "f: expected a function"),
    "no field": (lambda: ctorch.taylor_series(3, 0.0, X, 2), TypeError, "func: expected a func"),
    "draws": (lambda: stochastic_laplacian(3, X), TypeError, "f: expected a function"),
    "number": (lambda: ctorch.derivative(torch.sin, X, 1.0), TypeError, "v: expected a tensor"),
    "string": (
        lambda: ctorch.derivative(torch.sin, X, (X, "a"), (1, 1)), TypeError, r"v\[1\]: expected",
    ),
    "direction of order 0": (
        lambda: ctorch.derivative(torch.sin, X, (X, X[0]), (1, 0)), ValueError, r"v\[1\]: expected",
    ),
    "time": (
        lambda: ctorch.taylor_series(lambda t, y: y, None, X, 2), TypeError, "t: expected a number",
    ),
    "true time": (
        lambda: ctorch.taylor_series(lambda t, y: y, True, X, 2), TypeError, "t: expected a number",
    ),
    "NaN weights": (
        lambda: ctorch.laplacian(scalar, X, torch.tensor([1.0, torch.nan, 1.0], dtype=F64)),
        ValueError, "weight: expected finite",
    ),
    "NaN weight": (
        lambda: ctorch.laplacian(scalar, X, torch.full((3, 3), torch.nan, dtype=F64)),
        ValueError, "weight: expected finite",
    ),
    "signs": (lambda: ctorch.divergence(lambda x: x > 0, X), TypeError, "f: expected to return fl"),
    "sign": (
        lambda: ctorch.laplacian(lambda x: (x > 0).all(-1), X), TypeError, "f: expected to ret",
    ),
    "pair": (
        lambda: stochastic_laplacian(lambda x: (x, x), X, 2), TypeError, "f: expected to ret",
    ),
    "constant of a shape of its own": (
        lambda: stochastic_laplacian(lambda x: torch.ones(2), X, 2), ValueError, "f: expected to",
    ),
    "sum over samples": (
        lambda: stochastic_operator(lambda x: x.sin().sum(), X, {(0,): 1.0}, 2),
        ValueError, "f: expected to return",
    ),
    "values for each coordinate": (
        lambda: stochastic_operator(torch.sin, X, {(0,): 1.0}, 2), ValueError, "f: expected to",
    ),
    "NaN term": (
        lambda: stochastic_operator(scalar, X, {(0,): torch.nan}, 2), ValueError, "terms: expected",
    ),
    "list of terms": (
        lambda: stochastic_operator(scalar, X, [((0,), 1.0)], 2), TypeError, "terms: expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_input_is_refused_by_name(name):
    call, error, message = ODD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", [5, 3000])
def test_one_sample_that_is_not_finite_leaves_the_others_alone(n, bad):
    """And is not taken for mixing."""
    x = points(n)
    x[0, 0] = bad
    f = lambda z: (z + z.sin()).cumsum(-1)  # noqa: E731
    div, lap = ctorch.divergence(f, x)[1], ctorch.laplacian(scalar, x).laplacian
    assert div[0].isnan()
    assert lap[0].isnan()
    torch.testing.assert_close(div[1:], (1 + x[1:].cos()).sum(-1))
    torch.testing.assert_close(lap[1:], -3 * scalar(x[1:]))


def test_values_can_be_printed_with_a_format():
    seen = []

    def f(x):
        seen.append(f"{x.sum():.2f} {x}")
        return x * x

    ctorch.derivative(f, torch.tensor([1.0, 2.0]), torch.ones(2), 1)
    assert seen == ["3.00 Jet(shape=(2,), dtype=torch.float32)"]
