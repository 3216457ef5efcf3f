"""Every operator of the two lists, under every derivative operator, against nested reverse mode.

The references differentiate the operators' elementary forms; that these are the operators is what
the stencil shows. ``python -m tests.autodiff.test_coverage`` writes docs/coverage.md.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ctorch

from .operator_list import F64, PEER_LIST, SHARED, TORCH_LIST, Operator
from .references import error, nested_reverse, stencil

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
BOTH = [("peer", op) for op in PEER_LIST] + [("torch", op) for op in TORCH_LIST]
MIXES = "batch_norm (train)"
SMOOTH = 3  # the seed at which no point of a stencil crosses a kink
DEAR = ("solve", "cholesky", "eigvalsh", "LSTM")  # references of theirs beyond order 4 take long


def every_operator(function: Callable[..., None]) -> Callable[..., None]:
    names = [f"{which}: {op.name}" for which, op in BOTH]
    return pytest.mark.parametrize("op", [op for _, op in BOTH], ids=names)(function)


# ---------------------------------------------------------------- what is measured


def along(op: Operator, x: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda s: op.reference(x + s * v)


@functools.cache
def jet_errors(op: Operator, order: int, seed: int = 0) -> list[float]:
    """Of the derivatives 0 to ``order`` along one direction."""
    x, v = op.inputs(seed)
    zero = torch.zeros_like(x)
    value, series = ctorch.jet(op.fn, (x,), ([v] + [zero] * (order - 1),))
    truth = nested_reverse(along(op, x, v), order)
    return [error(got, want) for got, want in zip([value, *series], truth, strict=True)]


def scalar(op: Operator) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """The operator as a function [d] -> [], its elementary form, and a point [d]."""
    x, _ = op.inputs()
    out = op.reference(x)
    w = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=F64)

    def of(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda z: (fn(z.reshape(op.shape)) * w).sum()

    return of(op.fn), of(op.reference), x.reshape(-1)


@functools.cache
def laplacian_errors(op: Operator) -> list[float]:
    """Of value, gradient and Laplacian of a random projection of the operator."""
    fn, reference, x = scalar(op)
    value, gradient, laplacian = ctorch.laplacian(fn, x)
    x = x.clone().requires_grad_()
    expected = reference(x)
    (slope,) = torch.autograd.grad(expected, x, create_graph=True)
    trace = torch.zeros((), dtype=F64)
    for i in range(x.numel()):
        (row,) = torch.autograd.grad(slope[i] + 0 * x[i], x, retain_graph=True)
        trace = trace + row[i]
    pairs = ((value, expected.detach()), (gradient, slope.detach()), (laplacian, trace))
    return [error(got, want) for got, want in pairs]


@functools.cache
def divergence_errors(op: Operator) -> list[float]:
    """Of value and divergence of the operator, mapped back to its input's shape by a matrix."""
    x, _ = op.inputs()
    size, outputs = x.numel(), op.reference(x).numel()
    mix = torch.randn(outputs, size, generator=torch.Generator().manual_seed(4), dtype=F64)

    def field(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda z: fn(z.reshape(op.shape)).reshape(-1) @ mix

    with warnings.catch_warnings():  # it falls back on reverse mode with a warning: not here
        warnings.filterwarnings("error", message="divergence in reverse mode")
        value, divergence = ctorch.divergence(field(op.fn), x.reshape(-1))
    z = x.reshape(-1).requires_grad_()
    expected = field(op.reference)(z)
    rows = [torch.autograd.grad(expected[i], z, retain_graph=True)[0][i] for i in range(size)]
    truth = torch.stack(rows).sum()
    return [error(value, expected.detach()), error(divergence, truth)]


@functools.cache
def series_errors(op: Operator, order: int) -> list[float]:
    """Of the Taylor coefficients of the solution of ``y' = tanh(mixed op(y))``."""
    x, _ = op.inputs()
    size, outputs = x.numel(), op.reference(x).numel()
    mix = torch.randn(outputs, size, generator=torch.Generator().manual_seed(4), dtype=F64)
    mix = mix / outputs

    def field(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda y: torch.tanh(fn(y).reshape(-1) @ mix).reshape(op.shape)

    got = ctorch.taylor_series(lambda t, y: field(op.fn)(y), torch.zeros((), dtype=F64), x, order)
    truth = [x]
    for k in range(order):
        known = list(truth)

        def curve(s: Tensor, known: list[Tensor] = known) -> Tensor:
            return field(op.reference)(sum(c * s**j for j, c in enumerate(known)))

        truth.append(nested_reverse(curve, k)[k] / math.factorial(k + 1))
    return [error(a, b) for a, b in zip(got, truth, strict=True)]


# ---------------------------------------------------------------- tests


@every_operator
def test_the_elementary_form_is_the_operator(op: Operator) -> None:
    x, v = op.inputs(SMOOTH)
    truth = nested_reverse(along(op, x, v), 3)
    differences = stencil(lambda s: op.fn(x + s * v), 3)
    bounds = (1e-14, 1e-11, 1e-7, 1e-5)
    for got, want, bound in zip(differences, truth, bounds, strict=True):
        assert error(got, want) < bound


@every_operator
def test_derivatives_to_order_four(op: Operator) -> None:
    assert max(jet_errors(op, 4)) < 1e-10


@pytest.mark.parametrize("name", SHARED)
def test_float32_stays_float32(name: str) -> None:
    """Constants of rules must not raise the dtype, nor be rounded to the default one."""
    op = next(op for op in PEER_LIST if op.name == name)
    x, v = op.inputs()
    zero = torch.zeros_like(v)
    exact, derivatives = ctorch.jet(op.fn, (x,), ([v, zero, zero],))
    x, v, zero = x.float(), v.float(), zero.float()
    value, series = ctorch.jet(op.fn, (x,), ([v, zero, zero],))
    for got, want in zip([value, *series], [exact, *derivatives], strict=True):
        assert got.dtype == torch.float32
        assert error(got.double(), want) < 1e-4


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    op=st.sampled_from([op for _, op in BOTH if op.name not in DEAR]),
    seed=st.integers(2, 10**6),
    order=st.integers(1, 6),
)
def test_derivatives_to_order_six_at_drawn_points(op: Operator, seed: int, order: int) -> None:
    assert max(jet_errors(op, order, seed)) < 1e-9


def every_operator_of_samples(function: Callable[..., None]) -> Callable[..., None]:
    """Without batch statistics: these mix samples, and are refused."""
    rest = [(which, op) for which, op in BOTH if op.name != MIXES]
    names = [f"{which}: {op.name}" for which, op in rest]
    return pytest.mark.parametrize("op", [op for _, op in rest], ids=names)(function)


@every_operator_of_samples
def test_laplacian(op: Operator) -> None:
    assert max(laplacian_errors(op)) < 1e-10


@every_operator
def test_divergence(op: Operator) -> None:
    assert max(divergence_errors(op)) < 1e-10


@every_operator
def test_taylor_series_of_an_ode(op: Operator) -> None:
    assert max(series_errors(op, 4)) < 1e-10


@every_operator
def test_coefficients_are_differentiable_twice(op: Operator) -> None:
    x, v = op.inputs(SMOOTH)

    def coefficients(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        value, series = ctorch.jet(op.fn, (x,), ([v, x * v, v],), factorial_scaled=False)
        return (value, *series)

    inputs = (x.requires_grad_(), v.requires_grad_())
    torch.autograd.gradcheck(coefficients, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(coefficients, inputs, fast_mode=True, atol=1e-4)


@every_operator_of_samples
def test_the_laplacian_is_differentiable(op: Operator) -> None:
    fn, _, _ = scalar(op)
    x = op.inputs(SMOOTH)[0].reshape(-1).requires_grad_()
    torch.autograd.gradcheck(lambda x: ctorch.laplacian(fn, x), (x,), fast_mode=True)


def test_at_least_44_of_the_peers_list_and_all_of_torchs_list_are_right() -> None:
    right = sum(_verdict(lambda op=op: jet_errors(op, 4)) == "right" for op in PEER_LIST)
    assert right >= 44
    assert all(_verdict(lambda op=op: jet_errors(op, 4)) == "right" for op in TORCH_LIST)


# ---------------------------------------------------------------- the page

COLUMNS: dict[str, Callable[[Operator], list[float]]] = {
    "`jet`, orders 0 to 4": lambda op: jet_errors(op, 4),
    "`taylor_series`, orders 0 to 4": lambda op: series_errors(op, 4),
    "`laplacian`": laplacian_errors,
    "`divergence`": divergence_errors,
}
INTRODUCTION = """# What has been checked

Operators, small compositions and modules, under each derivative operator, in float64, beside
reverse mode over reverse mode of the same functions in elementary operations. "right": relative
error below 1e-10 at every order; "no rule": refused with an error that names the operator
(`divergence` warns, and goes by reverse mode); "refused": with an error that says why not. A wrong
number would stand here as "**wrong**".

This page is written by `python -m tests.autodiff.test_coverage` from measurements, and a test
compares it with the measurements. What PyTorch's own nested derivatives give for the second list is
on [the page about them](taylor_mode_and_torch.md).
"""

FOOTNOTE = """[^mixes]: In training, batch norm takes mean and variance from the batch: the value of
    a sample depends on all others. `laplacian` and `divergence` give one number for each sample, by
    this sample's own coordinates; where samples mix there is no such number. So both refuse such a
    function on a batch of samples (`ValueError`, with the remedy `eval()`, which takes the running
    statistics). In the column of `divergence` the whole batch is *one* sample, flattened, where the
    divergence is defined, and right. `jet`, `derivative` and `taylor_series` differentiate along a
    curve of whole batches, where samples may mix.
"""


def _verdict(measure: Callable[[], list[float]]) -> str:
    try:
        worst = max(measure())
    except (NotImplementedError, UserWarning):
        return "no rule"
    except ValueError:
        return "refused"
    return "right" if worst < 1e-10 else "**wrong**"


def table(operators: tuple[Operator, ...]) -> list[str]:
    lines = ["| operator | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    rights = dict.fromkeys(COLUMNS, 0)
    for op in operators:
        verdicts = {name: _verdict(lambda f=f, op=op: f(op)) for name, f in COLUMNS.items()}
        for name, verdict in verdicts.items():
            rights[name] += verdict == "right"
        note = "[^mixes]" if op.name == MIXES else ""
        lines.append(f"| `{op.name}`{note} | " + " | ".join(verdicts.values()) + " |")
    total = [f"**{n} of {len(operators)}**" for n in rights.values()]
    return [*lines, "| right | " + " | ".join(total) + " |"]


def page() -> str:
    parts = [INTRODUCTION, "## The list of 46 on which other tools were judged", ""]
    parts += table(PEER_LIST)
    parts += [
        "",
        "## The list of 58 on which PyTorch was judged",
        "",
        *table(TORCH_LIST),
        "",
        FOOTNOTE,
    ]
    return "\n".join(parts)


def test_the_page_in_the_docs_is_what_is_measured() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.autodiff.test_coverage"


if __name__ == "__main__":
    PAGE.write_text(page())
