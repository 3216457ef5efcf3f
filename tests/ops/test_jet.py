"""The Taylor operators meet their obligations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ctorch.ops import _jet_reference as reference
from ctorch.ops import _kernels, jet
from tests.ops.jet_problems import ELEMENTARY, F64, PARAM, Drawn, nested, rand, series
from tests.ops.obligations import Obligations, Problem, needs_cuda

BadCalls = list[tuple[Callable[[], Any], type[Exception], str]]


def of_kernels(*calls: Any) -> BadCalls:
    """Wrong calls of bare operators: their kernels refuse them, a reference takes what it can."""
    return list(calls) if _kernels.HAS_KERNELS else []


class TaylorObligations(Obligations):
    def test_bits_do_not_depend_on_threads(self) -> None:
        if not _kernels.HAS_KERNELS:
            pytest.skip("torch's own functions round by where a thread begins")
        super().test_bits_do_not_depend_on_threads()


class TestUnary(TaylorObligations):
    def draw(self, data: st.DataObject) -> Problem:
        drawn = Drawn(data)
        name = data.draw(st.sampled_from(jet.UNARY), "name")
        last = data.draw(st.booleans(), "last")
        x = series((drawn.degree + 1, *drawn.shape), drawn.seed, name, self.device)
        param = data.draw(st.sampled_from([PARAM, 3.0, -2.0, -0.5, 0.5, 2.5]), "param")
        if name == "softplus":
            param = abs(param)
        level = data.draw(st.sampled_from([0, 0, 1, 1, 2, 3]), "level")
        if level > 1:
            drawn.order = min(drawn.order, 6)
            x = x[: drawn.order + 1]
        return self.problem(x, name, drawn.order, param, level, last)

    def problem(
        self,
        x: Tensor,
        name: str,
        order: int,
        param: float = 0.0,
        level: int = 0,
        last: bool = False,
    ) -> Problem:
        args = (jet.NUMBER[name], order, param, level, last)
        return Problem(
            lambda x: jet.jet_unary(x, *args),
            lambda x: reference.unary(x, *args),
            (x,),
            name=f"{name}, order {order}, level {level}, last {last}",
            slack=4.0**level,
        )

    def problems(self) -> list[Problem]:
        return [
            self.problem(series((2, 2), 1, device=self.device), "tanh", 3),
            self.problem(series((3, 2, 1), 2, device=self.device), "gelu", 2, last=True),
            self.problem(series((2, 2), 3, device=self.device), "log", 2, level=1),
        ]

    def huge(self) -> Problem:
        return self.problem(series((3, 1009, 499), 1, device=self.device), "tanh", 3)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        op = torch.ops.ctorch.jet_unary.default
        x = series((2, 3), 1, device=self.device).requires_grad_()
        return [
            (op, (x, jet.NUMBER["silu"], 2, 0.0, 0, False)),
            (op, (x, jet.NUMBER["pow"], 1, 2.0, 1, True)),
        ]

    def bad_calls(self) -> BadCalls:
        x, op = torch.ones(3, 2), torch.ops.ctorch.jet_unary.default
        return [
            (lambda: jet.unary(x, "relu"), ValueError, "name must be one of .*'relu'"),
            (lambda: jet.unary(x, "tanh", 1), ValueError, "order must be at least 2.*got 1"),
            (lambda: jet.unary(x.int(), "tanh"), TypeError, "x must .*float32 or float64"),
            (lambda: jet.unary(x[0, 0], "tanh"), ValueError, "x must be a stack"),
            (lambda: jet.unary_last(x[:0], "tanh"), ValueError, "x must be a stack"),
        ] + of_kernels(
            (lambda: op(x, 99, 3, 0.0, 0, False), RuntimeError, "number 99"),
            (lambda: op(x, 0, 1, 0.0, 0, False), RuntimeError, "x has more coefficients"),
        )

    def test_law(self) -> None:
        """sin^2 + cos^2 = 1 as series; log undoes exp."""
        x = series((9, 7), 1, device=self.device)
        s, c = jet.unary(x, "sin"), jet.unary(x, "cos")
        one = torch.zeros_like(x)
        one[0] = 1
        assert_close(jet.mul(s, s) + jet.mul(c, c), one)
        assert_close(jet.unary(jet.unary(x, "exp"), "log"), x)

    @pytest.mark.parametrize("name", jet.UNARY)
    def test_equals_nested_reverse_mode(self, name: str) -> None:
        for degree, order, levels in ((0, 0, 4), (6, 6, 2), (1, 5, 2), (3, 4, 3), (2, 3, 4)):
            x = series((degree + 1, 5), order, name)
            for level in range(levels):
                expected = nested(ELEMENTARY[name], x, order, level)
                args = (jet.NUMBER[name], order, PARAM, level)
                actual = jet.jet_unary(x.to(self.device), *args, False).cpu()
                assert_close(actual, expected, rtol=1e-10, atol=1e-11)
                last = jet.jet_unary(x.to(self.device), *args, True).cpu()
                assert torch.equal(last, actual[-1])

    @pytest.mark.parametrize("exponent", [0, 1, 2, 3, 7, 64])
    def test_whole_powers_of_zero(self, exponent: int) -> None:
        x = torch.tensor([[0.0, -1.5], [1.0, 0.5]], dtype=F64, device=self.device)
        for level in range(3):
            y = jet.jet_unary(x, jet.NUMBER["pow"], 4, float(exponent), level, False)
            e = nested(lambda z: z**exponent + 0 * z**9, x.cpu(), 4, level)
            assert_close(y.cpu(), e, rtol=1e-12, atol=1e-12)

    def test_high_orders_equal_known_series(self) -> None:
        order, at = 24, 0.3
        x = torch.tensor([[at], [1.0]], dtype=F64, device=self.device)
        functions = {"tanh": mpmath.tanh, "exp": mpmath.exp, "log": mpmath.log, "erf": mpmath.erf}
        for name, f in functions.items():
            with mpmath.workdps(50):
                expected = [float(c) for c in mpmath.taylor(f, at, order)]
            y = jet.unary(x, name, order)[:, 0].cpu()
            assert_close(y, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=1e-12)

    def test_a_missing_coefficient_is_zero(self) -> None:
        x = series((2, 5), 1, device=self.device)
        padded = torch.cat([x, torch.zeros_like(x), torch.zeros_like(x)])
        for name in jet.UNARY:
            at = x + (1.0 if name == "acosh" else 0.0) * torch.tensor([[1.0], [0]]).to(x)
            full = padded.clone()
            full[:2] = at
            assert_close(jet.unary(at, name, 5, PARAM), jet.unary(full, name, None, PARAM))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_nan_stays_in_its_element_and_above_its_order(self, dtype: torch.dtype) -> None:
        x = torch.full((4, 130), 0.5, dtype=dtype, device=self.device)
        x[2, 77] = math.nan
        for name in jet.UNARY:
            y = jet.unary(x + (name == "acosh"), name, None, PARAM)
            expected = torch.zeros_like(y, dtype=torch.bool)
            expected[2:, 77] = True
            assert torch.equal(y.isnan(), expected), name


class TestUnaryBackward(TaylorObligations):
    def draw(self, data: st.DataObject) -> Problem:
        drawn = Drawn(data)
        name = data.draw(st.sampled_from(jet.UNARY), "name")
        last = data.draw(st.booleans(), "last")
        level = data.draw(st.sampled_from([1, 1, 2]), "level")
        order = min(drawn.order, 6) if level > 1 else drawn.order
        x = series((drawn.degree + 1, *drawn.shape), drawn.seed, name, self.device)[: order + 1]
        g = rand(drawn.shape if last else (order + 1, *drawn.shape), drawn.seed + 1, self.device)
        return self.problem(g, x, name, order, level, last)

    def problem(
        self, g: Tensor, x: Tensor, name: str, order: int, level: int, last: bool
    ) -> Problem:
        args = (jet.NUMBER[name], order, PARAM, level, last)
        return Problem(
            lambda g, x: jet.jet_unary_backward(g, x, *args),
            lambda g, x: reference.unary_backward(g, x, *args),
            (g, x),
            name=f"{name}, order {order}, level {level}, last {last}",
        )

    def problems(self) -> list[Problem]:
        x = series((2, 2), 1, device=self.device)
        return [
            self.problem(rand((3, 2), 2, self.device), x, "sigmoid", 2, 1, False),
            self.problem(rand((2,), 3, self.device), x, "exp", 2, 1, True),
        ]

    def huge(self) -> Problem:
        x = series((3, 1009, 499), 1, device=self.device)
        return self.problem(rand((4, 1009, 499), 2, self.device), x, "tanh", 3, 1, False)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        op = torch.ops.ctorch.jet_unary_backward.default
        inputs = [(p.inputs, last) for p, last in zip(self.problems(), (False, True), strict=True)]
        return [
            (op, (*(x.requires_grad_() for x in xs), jet.NUMBER["tanh"], 2, 0.0, 1, last))
            for xs, last in inputs
        ]

    def bad_calls(self) -> BadCalls:
        x, op = torch.ones(3, 2), torch.ops.ctorch.jet_unary_backward.default
        return of_kernels(
            (lambda: op(x.double(), x, 0, 2, 0.0, 1, False), RuntimeError, "g must have dtype"),
            (lambda: op(x[:, :1], x, 0, 2, 0.0, 1, False), RuntimeError, "g does not have"),
        )

    def test_law(self) -> None:
        """The transpose of the tangent map: <g, J v> = <J^T g, v>."""
        x, v = series((3, 7), 1, device=self.device), rand((3, 7), 2, self.device)
        g = rand((5, 7), 3, self.device)
        for name in ("tanh", "gelu", "sqrt", "sin"):
            number = jet.NUMBER[name]
            tangent = jet.mul(jet.jet_unary(x, number, 4, 0.0, 1, False), v, 4)
            transposed = jet.jet_unary_backward(g, x, number, 4, 0.0, 1, False)
            assert_close((g * tangent).sum(), (transposed * v).sum())


class Pairs(TaylorObligations):
    """What mul, div and correlate share."""

    operator: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    overload: str

    def draw(self, data: st.DataObject) -> Problem:
        drawn = Drawn(data)
        other = data.draw(st.sampled_from([0, 1, 4, 9]), "degree of the other")
        shapes = [(drawn.degree + 1, *drawn.shape), (other + 1, *drawn.partner(data))]
        a, b = (series(s, drawn.seed + i, device=self.device) for i, s in enumerate(shapes))
        order = data.draw(st.integers(0, 12), "order")
        if data.draw(st.booleans(), "swapped"):
            a, b = b, a
        return self.problem(a, b, order)

    def problem(self, a: Tensor, b: Tensor, order: int) -> Problem:
        operator, expected = type(self).operator, type(self).reference
        return Problem(
            lambda a, b: operator(a, b, order), lambda a, b: expected(a, b, order), (a, b)
        )

    def problems(self) -> list[Problem]:
        a, b = series((3, 2, 2), 1, device=self.device), series((2, 2, 1), 2, device=self.device)
        return [
            self.problem(a, b, 3),
            self.problem(b[:, 0], a, 0),
            self.problem(a[..., 0], a[..., 0] + 1, 2),
        ]

    def huge(self) -> Problem:
        a = series((3, 1009, 499), 1, device=self.device)
        return self.problem(a, series((2, 1009, 1), 2, device=self.device), 3)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        op = getattr(torch.ops.ctorch, self.overload).default
        a, b = (x.requires_grad_() for x in self.problems()[0].inputs)
        return [(op, (a, b, 3)), (op, (b, a, 0))]

    def bad_calls(self) -> BadCalls:
        f, x = type(self).operator, torch.ones(2, 3)
        return [
            (lambda: f(x, torch.ones(2, 4)), ValueError, r"broadcast.*\(2, 3\) and \(2, 4\)"),
            (lambda: f(x, x.double()), TypeError, "must have the dtype of"),
            (lambda: f(x.half(), x.half()), TypeError, "float32 or float64"),
            (lambda: f(x, x, -1), ValueError, "order must not be negative"),
            (lambda: f(x, x[0, 0]), ValueError, "must be a stack"),
        ]

    def test_nan_stays_in_its_element(self) -> None:
        a = torch.ones(2, 3, 50, device=self.device)
        b = torch.ones(2, 3, 1, device=self.device)
        b[0, 1] = math.nan
        y = type(self).operator(a, b)
        assert torch.equal(y.isnan().any(0).any(-1).cpu(), torch.tensor([False, True, False]))


class TestMul(Pairs):
    operator, reference, overload = jet.mul, reference.mul, "jet_mul"

    def test_law(self) -> None:
        """Coefficients of a product of polynomials, and the default order."""
        a, b = (
            torch.tensor(c, dtype=F64, device=self.device) for c in ([[1.0], [2]], [[3.0], [5]])
        )
        assert jet.mul(a, b, 3).flatten().tolist() == [3, 11, 10, 0]
        assert jet.mul(a, b[:1]).flatten().tolist() == [3, 6]


class TestDiv(Pairs):
    operator, reference, overload = jet.div, reference.div, "jet_div"

    def test_law(self) -> None:
        """A quotient times its denominator; 1 / (1 - t) is the geometric series."""
        a, b = series((4, 9), 1, device=self.device), series((3, 9), 2, device=self.device)
        padded = torch.cat([a, torch.zeros(3, 9).to(a)])
        assert_close(jet.mul(jet.div(a, b, 6), b, 6), padded)
        b = torch.tensor([[1.0], [-1]], device=self.device)
        assert (jet.div(torch.ones_like(b[:1]), b, 7) == 1).all()


class TestCorrelate(Pairs):
    operator, reference, overload = jet.correlate, reference.correlate, "jet_correlate"

    def test_law(self) -> None:
        """The transpose of a product: <g x, y> = <x, correlate(g, y)>."""
        g, x = series((3, 9), 1, device=self.device), series((4, 9), 2, device=self.device)
        y = rand((6, 9), 3, self.device)
        left = (jet.mul(g, x, 5) * y).sum()
        assert_close(left, (x * jet.correlate(g, y, 3)).sum())
        assert jet.correlate(g, y).shape == y.shape


class TestLaplacian(TaylorObligations):
    def draw(self, data: st.DataObject) -> Problem:
        shape = data.draw(st.sampled_from([(), (3,), (0, 2), (5, 2), (4, 31), (3, 700)]), "shape")
        shared = data.draw(st.integers(0, len(shape)), "shared dimensions")
        count = data.draw(st.sampled_from([1, 2, 7]), "rows")
        name = data.draw(st.sampled_from(jet.UNARY), "name")
        seed = data.draw(st.integers(0, 1000), "seed")
        x = series((1, *shape), seed, name, self.device)[0]
        rows = rand((count, *[1] * shared, *shape[shared:]), seed + 1, self.device)
        if shape and data.draw(st.booleans(), "shared over the last"):
            rows = rows[..., :1]
        lap = rand(shape, seed + 2, self.device) if data.draw(st.booleans(), "lap") else None
        return self.problem(x, rows, lap, name, data.draw(st.booleans(), "last"))

    def problem(
        self, x: Tensor, rows: Tensor, lap: Tensor | None, name: str, last: bool = False
    ) -> Problem:
        operator = jet.laplacian_unary_last if last else jet.laplacian_unary
        expected = reference.laplacian_last if last else reference.laplacian
        inputs = (x, rows) if lap is None else (x, rows, lap)

        def call(x: Tensor, rows: Tensor, lap: Tensor | None = None) -> Any:
            return operator(x, rows, lap, name, PARAM)

        def plain(x: Tensor, rows: Tensor, lap: Tensor | None = None) -> Any:
            out = expected(x, rows, lap, jet.NUMBER[name], PARAM)
            return tuple(y.contiguous() for y in out)

        return Problem(call, plain, inputs, name=f"{name}, last {last}, lap {lap is not None}")

    def problems(self) -> list[Problem]:
        x = 0.5 + 0.2 * rand((3, 2), 1, self.device)
        rows, lap = rand((2, 3, 2), 2, self.device), rand((3, 2), 3, self.device)
        return [
            self.problem(x, rows, lap, "tanh"),
            self.problem(x, rows[:, :1], None, "silu"),
            self.problem(x, rows[:, :, :1], lap, "log", last=True),
        ]

    def huge(self) -> Problem:
        x = 0.5 + 0.2 * rand((1009, 399), 1, self.device)
        rows, lap = rand((2, 1009, 399), 2, self.device), rand((1009, 399), 3, self.device)
        return self.problem(x, rows, lap, "tanh")

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        x, rows, lap = (z.requires_grad_() for z in self.problems()[0].inputs)
        plain = [z.detach() for z in (x, rows, lap)]
        ops, number = torch.ops.ctorch, jet.NUMBER["tanh"]
        return [
            (ops.jet_laplacian.default, (x, rows, lap, number, 0.0)),
            (ops.jet_laplacian.default, (plain[0], plain[1][:, :1], None, number, 0.0)),
            (ops.jet_laplacian_last.default, (x, rows, None, number, 0.0)),
            (ops.jet_laplacian_backward.default, (*plain, *plain, number, 0.0)),
        ]

    def bad_calls(self) -> BadCalls:
        x, rows = torch.ones(3, 2), torch.ones(4, 3, 2)
        return [
            (lambda: jet.laplacian_unary(x, rows, None, "abs"), ValueError, "name must be one of"),
            (lambda: jet.laplacian_unary(x, rows[:, :2], None, "sin"), ValueError, "rows must be"),
            (lambda: jet.laplacian_unary(x, rows[0], None, "sin"), ValueError, "rows must be"),
            (
                lambda: jet.laplacian_unary(x, rows, x[:1], "sin"),
                ValueError,
                r"lap must .*\(3, 2\)",
            ),
            (
                lambda: jet.laplacian_unary(x, rows.double(), None, "sin"),
                TypeError,
                "rows must have",
            ),
            (
                lambda: jet.laplacian_unary_last(x.int(), rows, None, "sin"),
                TypeError,
                "x must have",
            ),
        ]

    def test_law(self) -> None:
        """The Laplacian of a composition: log after exp gives back what went in."""
        x, rows, lap = self.problems()[0].inputs
        once = jet.laplacian_unary(x, rows, lap, "exp")
        for actual, expected in zip(jet.laplacian_unary(*once, "log"), (x, rows, lap), strict=True):
            assert_close(actual, expected)

    @pytest.mark.parametrize("name", jet.UNARY)
    def test_fused_backward_equals_autograd_of_the_formula(self, name: str) -> None:
        x = series((1, 3, 171), 1, name, self.device)[0]
        lap = rand((3, 171), 3, self.device)
        for shape in ((4, 3, 171), (4, 1, 171), (4, 1, 1)):
            leaves = [z.clone().requires_grad_() for z in (x, rand(shape, 2, self.device), lap)]
            problem = self.problem(*leaves, name)
            for used in ((0, 1, 2), (0,), (1,), (2,)):
                grads = []
                for f in (problem.operator, problem.reference):
                    out = f(*leaves)
                    scalar = sum(out[i].sin().sum() for i in used)
                    grads.append(torch.autograd.grad(scalar, leaves, materialize_grads=True))
                for g, e in zip(*grads, strict=True):
                    assert_close(g, e, rtol=1e-9, atol=1e-9)


class TestUnaryCUDA(TestUnary):
    device, pytestmark = "cuda", needs_cuda


class TestUnaryBackwardCUDA(TestUnaryBackward):
    device, pytestmark = "cuda", needs_cuda


class TestMulCUDA(TestMul):
    device, pytestmark = "cuda", needs_cuda


class TestDivCUDA(TestDiv):
    device, pytestmark = "cuda", needs_cuda


class TestCorrelateCUDA(TestCorrelate):
    device, pytestmark = "cuda", needs_cuda


class TestLaplacianCUDA(TestLaplacian):
    device, pytestmark = "cuda", needs_cuda
