"""Rules where torch's functions have corners: no dims, empty, NaN, arguments of which few carry."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ctorch
from ctorch.autodiff import MissingRuleError

from .rule_checks import Case, check

F64 = torch.float64


def constant(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


LONG = torch.tensor(0)
SCALARS = {
    "sum": lambda x: x.sum(0),
    "sum of all": lambda x: x.sum(),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "nansum": lambda x: x.nansum(0),
    "prod": lambda x: x.prod(0),
    "cumsum": lambda x: x.cumsum(0),
    "amax": lambda x: x.amax(0),
    "aminmax": lambda x: torch.aminmax(x, dim=0),
    "logsumexp": lambda x: x.logsumexp(0),
    "softmax": lambda x: x * x.softmax(0),
    "log_softmax": lambda x: x * x.log_softmax(0),
    "flip": lambda x: x.flip(0),
    "permute": lambda x: x.permute(()),
    "tensordot": lambda x: torch.tensordot(x, x, 0),
    "unfold": lambda x: x.unfold(0, 1, 1),
    "norm of order 3": lambda x: torch.linalg.vector_norm(x, 3, dim=0),
    "norm of order 0": lambda x: x * torch.linalg.vector_norm(x, 0),
    "normalize": lambda x: x * F.normalize(x, 1.2, 0),
    "cosine_similarity": lambda x: x * torch.cosine_similarity(x, x * x, 0),
    "quantile": lambda x: torch.quantile(x, 0.5, 0),
    "repeat": lambda x: x.repeat(()) * x.tile(()),
    "gather": lambda x: x.gather(0, LONG),
    "take_along_dim": lambda x: x.take_along_dim(LONG),
    "index_select": lambda x: x.index_select(0, LONG),
    "index_add": lambda x: (x * x).index_add(0, LONG, x),
    "index_copy": lambda x: (x * x).index_copy(0, LONG, x),
    "index_fill": lambda x: x * x.index_fill(0, LONG, 2.0),
    "scatter": lambda x: (x * x).scatter(0, LONG, x),
    "scatter_add": lambda x: (x * x).scatter_add(0, LONG, x),
}


@pytest.mark.parametrize("name", SCALARS)
def test_values_without_dims_count_as_vectors_of_one_along_dim_zero(name: str) -> None:
    f = lambda x: SCALARS[name](torch.sin(x))  # noqa: E731
    check(Case(name, f, ((),), reference=f, orders=4))
    x = torch.tensor([0.7], dtype=F64)

    def at(x: Tensor) -> Tensor:
        y = f(x[..., 0])
        return (y[0] if isinstance(y, tuple) else y).reshape(())

    value, gradient, lap = ctorch.laplacian(at, x)
    _, (first, second) = ctorch.jet(at, (x,), ([torch.ones_like(x), torch.zeros_like(x)],))
    torch.testing.assert_close(value, at(x))
    torch.testing.assert_close(gradient[0], first)
    torch.testing.assert_close(lap, second)


C, M, N = constant(3), constant(3, 4), constant(4, 3, seed=4)
ONE_CARRIES = {
    "addmm": (lambda x: torch.addmm(x, M, N), (3, 3)),
    "addmv": (lambda x: torch.addmv(x, M, C.new_ones(4)), (3,)),
    "addbmm": (lambda x: torch.addbmm(x, M[None], N[None]), (3, 3)),
    "addr": (lambda x: torch.addr(x, C, C), (3, 3)),
    "baddbmm": (lambda x: torch.baddbmm(x, M[None], N[None]), (1, 3, 3)),
    "linear": (lambda x: F.linear(M, N.mT, x), (3,)),
    "expand_as": (lambda x: C.expand_as(x) * x, (2, 3)),
    "reshape_as": (lambda x: M.reshape_as(x) * x, (4, 3)),
    "to": (lambda x: C.float().to(x) * x, (3,)),
    "cat with nothing": (lambda x: torch.cat([x[:0], C]) * x.sum(), (2,)),
    "diff with ends": (lambda x: torch.diff(C, 1, 0, x, x), (2,)),
    "diff of order zero": (lambda x: x * torch.diff(x, 0, 0, C, C), (3,)),
    "cosine_similarity": (lambda x: torch.cosine_similarity(x, M[:1], -2), (2, 3, 4)),
    "tensordot": (lambda x: torch.tensordot(x, M, ([0], [0])), (1, 2)),
    "index_put": (
        lambda x: x.index_put((torch.tensor([True, False, True]),), x[1], accumulate=True),
        (3, 2),
    ),
    "memory_format": (lambda x: x.to(F64, memory_format=torch.channels_last), (1, 2, 2, 2)),
    "pixel_unshuffle": (lambda x: torch.pixel_unshuffle(x, downscale_factor=2), (1, 1, 2, 4)),
    "gradient": (lambda x: torch.gradient(x, spacing=None, dim=0)[0], (4,)),
    "instance_norm": (lambda x: F.instance_norm(constant(2, 3, 4), weight=x, bias=x), (3,)),
    "squeeze of no dims": (lambda x: x.squeeze(()), (1, 2)),
    "cov": (lambda x: torch.cov(x.expand(1, 3)), (3,)),
    "corrcoef": (lambda x: torch.corrcoef(x) * x.sum(), (1, 3)),
}


@pytest.mark.parametrize("name", ONE_CARRIES)
def test_any_of_the_arguments_may_carry_derivatives(name: str) -> None:
    f, shape = ONE_CARRIES[name]
    check(Case(name, f, (shape,), reference=f, orders=4))


def test_a_factor_beta_of_zero_hides_what_is_not_a_number() -> None:
    x, nan = constant(3), torch.full((3, 3), float("nan"), dtype=F64)
    value, (first,) = ctorch.jet(lambda x: torch.addr(nan, x, x, beta=0), (x,), ([x],))
    torch.testing.assert_close(value, torch.outer(x, x))
    torch.testing.assert_close(first, 2 * torch.outer(x, x))


# ---- powers


def test_powers_by_a_tensor_of_whole_numbers_hold_below_zero_and_at_it() -> None:
    x = torch.tensor([-1.5, 0.0, 2.0], dtype=F64)
    for exponent in (torch.arange(4), torch.arange(4.0, dtype=F64)):
        f = lambda x, p=exponent: x.unsqueeze(-1) ** p  # noqa: E731
        _, (first, second) = ctorch.jet(f, (x,), ([torch.ones_like(x), 0 * x],))
        n = torch.arange(4.0, dtype=F64)
        expected = n * x.unsqueeze(-1) ** (n - 1).clamp_min(0)
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(second, n * (n - 1) * x.unsqueeze(-1) ** (n - 2).clamp_min(0))
        lap = ctorch.laplacian(lambda x, f=f: f(x).sum((-2, -1)), x).laplacian
        torch.testing.assert_close(lap, second.sum())


def test_a_learned_exponent_has_its_gradient() -> None:
    x, p = constant(3), torch.tensor(1.7, dtype=F64, requires_grad=True)
    second = ctorch.derivative(lambda x: x**p, x, torch.ones_like(x), 2)
    (got,) = torch.autograd.grad(second.sum(), p)
    (expected,) = torch.autograd.grad((p * (p - 1) * x ** (p - 2)).sum(), p)
    torch.testing.assert_close(got, expected)


# ---- matrices


@pytest.mark.parametrize("upper", [False, True])
def test_a_cholesky_factor_depends_on_one_triangle(upper: bool) -> None:
    x = constant(3, 3) + 3 * torch.eye(3, dtype=F64)  # not symmetric, nor its change
    f = lambda x: torch.linalg.cholesky(x, upper=upper)  # noqa: E731
    v = constant(3, 3, seed=5)
    value, (first,) = ctorch.jet(f, (x,), ([v],))
    torch.testing.assert_close(value, f(x))
    h = 1e-5
    torch.testing.assert_close(first, (f(x + h * v) - f(x - h * v)) / (2 * h), rtol=1e-7, atol=1e-9)


def test_matrix_exp_has_as_many_orders_as_are_asked_for() -> None:
    a, t = constant(3, 3), torch.zeros((), dtype=F64)
    order = 24
    terms = [torch.ones_like(t), *[0 * t] * (order - 1)]
    _, series = ctorch.jet(lambda t: torch.matrix_exp(t * a), (t,), (terms,))
    for k in (6, 18, 19, order):
        torch.testing.assert_close(series[k - 1], torch.linalg.matrix_power(a, k))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.linalg.pinv(x, rtol=0.5),
        lambda x: torch.pinverse(x, 0.5),
        lambda x: torch.linalg.pinv(x @ torch.ones(2, 2, dtype=F64)),
    ],
)
def test_a_pseudoinverse_below_full_rank_is_refused(f: object) -> None:
    with pytest.raises(NotImplementedError, match="full rank"):
        ctorch.derivative(f, constant(3, 2), constant(3, 2, seed=4), 1)


def test_a_hermitian_pseudoinverse_looks_at_the_lower_triangle() -> None:
    x = constant(3, 3) + 2 * torch.eye(3, dtype=F64)
    f = lambda x: torch.linalg.pinv(x, hermitian=True)  # noqa: E731
    value, _ = ctorch.jet(f, (x,), ([x],))
    torch.testing.assert_close(value, f(x))


def test_least_squares_have_their_residuals_and_ranks() -> None:
    b = constant(5, 2, seed=6)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        found = torch.linalg.lstsq(x, b)
        return found.solution, found.residuals

    check(Case("lstsq", f, ((5, 3),), reference="none"))
    x, ranks = constant(5, 3), []
    ctorch.derivative(lambda x: ranks.append(torch.linalg.lstsq(x, b).rank) or x, x, x, 1)
    assert ranks[0] == torch.linalg.lstsq(x, b).rank == 3


# ---- what must not be lost


@pytest.mark.parametrize("function", [torch.remainder, torch.fmod])
def test_rests_of_a_division_are_exact(function: Any) -> None:
    x = torch.tensor([1e6, -3.7, 5.0], dtype=torch.float32)
    y = torch.tensor([0.1, 0.7, 1.3], dtype=torch.float32)
    f = lambda x, y: function(x, y)  # noqa: E731
    value, (first,) = ctorch.jet(f, (x, y), ([torch.ones_like(x)], [torch.ones_like(y)]))
    assert torch.equal(value, function(x, y))
    turns = torch.div(
        x.double(), y.double(), rounding_mode="floor" if function is torch.remainder else "trunc"
    )
    torch.testing.assert_close(first, (1 - turns).float())


def test_unique_values_carry_derivatives() -> None:
    at = torch.tensor([2, 0, 1, 0, 2])
    f = lambda x: torch.unique(x[at])  # noqa: E731
    check(Case("unique", lambda x: f(torch.sin(x)), ((3,),), reference="none"))
    x = constant(3)
    got = []
    value, (first,) = ctorch.jet(
        lambda x: (
            got.extend(torch.unique(x[at], return_inverse=True, return_counts=True)) or got[0]
        ),
        (x,),
        ([x],),
    )
    expected = torch.unique(x[at], return_inverse=True, return_counts=True)
    torch.testing.assert_close((value, *got[1:]), expected)
    torch.testing.assert_close(first, value)  # along x itself
    rows = ctorch.derivative(
        lambda x: torch.unique_consecutive(x[at[:2]], dim=0),
        constant(3, 2),
        constant(3, 2, seed=4),
        1,
    )
    torch.testing.assert_close(rows, constant(3, 2, seed=4)[at[:2]])


def test_the_sign_of_complex_values_turns() -> None:
    x = torch.complex(constant(3), constant(3, seed=5))
    v = torch.complex(constant(3, seed=6), constant(3, seed=7))
    _, (first,) = ctorch.jet(torch.sgn, (x,), ([v],))
    h = 1e-6
    expected = (torch.sgn(x + h * v) - torch.sgn(x - h * v)) / (2 * h)
    torch.testing.assert_close(first, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: torch.bincount(torch.tensor([0, 1, 1]), weights=x), "bincount"),
        (lambda x: torch.stft(constant(8), 3, window=x, return_complex=True), "stft"),
        (lambda x: torch.gradient(constant(3), spacing=(x,), dim=0)[0], "gradient"),
        (lambda x: torch.quantile(constant(3), x), "quantile"),
        (lambda x: F.batch_norm(constant(2, 3), x, x.exp()), "batch_norm"),
        (lambda x: F.batch_norm(x.expand(2, 3), x, x.exp()), "batch_norm"),
    ],
)
def test_what_has_no_rule_in_this_argument_is_refused_by_name(f: object, name: str) -> None:
    with pytest.raises((MissingRuleError, NotImplementedError), match=name):
        ctorch.derivative(f, constant(3), constant(3), 1)


@pytest.mark.parametrize(
    "f", [F.relu, F.relu6, F.hardshrink, F.softshrink, F.elu, lambda x: F.threshold(x, 0.5, 0.1)]
)
def test_activations_of_what_is_not_a_number_are_none(f: Any) -> None:
    x = torch.tensor([1.0, float("nan"), -1.0], dtype=F64)
    torch.testing.assert_close(ctorch.jet(f, (x,), ([x],))[0], f(x), equal_nan=True)
    value = ctorch.laplacian(lambda x: f(x) * 1, x).value
    torch.testing.assert_close(value, f(x), equal_nan=True)


def test_a_matrix_that_is_not_finite_leaves_the_others_of_a_batch_alone() -> None:
    for bad in (float("nan"), float("inf")):
        x = 9 * torch.stack([constant(3, 3), constant(3, 3, seed=4)])
        x[0, 0, 0] = bad
        value, _ = ctorch.jet(torch.matrix_exp, (x,), ([x],))
        torch.testing.assert_close(value[1], torch.matrix_exp(x[1]))
        assert not value[0].isfinite().all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_norms_of_what_is_not_a_number_are_none(order: int) -> None:
    x = torch.tensor([1.0, float("nan")], dtype=F64)
    f = lambda x: torch.linalg.vector_norm(x, order, -1)  # noqa: E731
    assert ctorch.jet(f, (x,), ([x],))[0].isnan()
    assert ctorch.laplacian(f, x).value.isnan()


def test_quantiles_of_what_is_not_a_number_are_none() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 4.0]], dtype=F64)
    value, (first,) = ctorch.jet(lambda x: torch.quantile(x, 0.5, -1), (x,), ([x],))
    torch.testing.assert_close(value, torch.quantile(x, 0.5, -1), equal_nan=True)
    assert first[1] == 2.0


def test_a_quotient_by_the_number_zero_is_infinite_in_every_operator() -> None:
    x = constant(2)
    assert ctorch.laplacian(lambda x: (x / 0).sum(-1), x).value.isinf()
    assert ctorch.jet(lambda x: x / 0, (x,), ([x],))[0].isinf().all()


# ---- nothing in it


EMPTY = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(1),
    "reflected": lambda x: F.pad(x[None], (1, 1), mode="reflect"),
    "conv": lambda x: F.conv1d(x[:, None], constant(2, 1, 1)),
    "pool": lambda x: F.avg_pool1d(x[:, None], 1) if x.shape[1] else x,
}


@pytest.mark.parametrize(("name", "shape"), [*itertools.product(EMPTY, [(0, 3), (2, 0)])])
def test_empty_values_pass(name: str, shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, dtype=F64)
    try:
        expected = EMPTY[name](x)
    except RuntimeError:
        pytest.skip("torch refuses it")
    value, (first,) = ctorch.jet(EMPTY[name], (x,), ([x],))
    assert value.shape == first.shape == expected.shape
