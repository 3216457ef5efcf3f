"""The sortlet operators meet their obligations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import ctorch
from ctorch.ops import _sortlet_reference as reference
from ctorch.ops import sortlet as ops
from tests.ops.obligations import Obligations, Problem, needs_cuda

F64 = torch.float64


def rand(shape: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(device)


def spaced(shape: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    """Scores in random order, with gaps from 0.2 to 1.8, so that no sum is all rounding."""
    x = rand(shape, seed, device)
    return x.argsort(-1).argsort(-1) - 0.5 * shape[-1] + 0.4 * rand(shape, seed + 1, device).tanh()


def drawn(data: st.DataObject, device: str) -> tuple[Tensor, int]:
    """Scores, some with ties, and a kind of gap; lengths on both sides of what a network takes."""
    lead = data.draw(st.lists(st.integers(0, 5), max_size=2), "leading dims")
    if data.draw(st.booleans(), "many"):
        lead = [*lead, 37]
    n = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 13, 31, 32, 33, 63, 64, 65, 100, 300]), "N")
    x = spaced((*lead, n), data.draw(st.integers(0, 1000), "seed"), device)
    if data.draw(st.booleans(), "ties"):
        x = (x / 2).round()
    return x, data.draw(st.sampled_from([0, 1]), "gap")


class OfOperator(Obligations):
    """Obligations of a bare operator whose tensors come first, and then the kind of gap."""

    operator: Callable[..., Any]
    overload: Any
    reference: Callable[..., Any]

    def inputs(self, scores: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def problem(self, scores: Tensor, gap: int, name: str = "") -> Problem:
        operator, plain = type(self).operator, type(self).reference
        return Problem(
            lambda *xs: operator(*xs, gap),
            lambda *xs: plain(*xs, gap),
            self.inputs(scores),
            name=name,
        )

    def draw(self, data: st.DataObject) -> Problem:
        return self.problem(*drawn(data, self.device))

    def problems(self) -> list[Problem]:
        x = spaced((2, 4), 1, self.device)
        return [self.problem(x, 0, "linear"), self.problem(x[0], 1, "tanh, one list")]

    def huge(self) -> Problem:
        return self.problem(rand((50_021, 20), 1, self.device), 0)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        problem = self.problems()[0]
        return [(type(self).overload, (*(x.requires_grad_() for x in problem.inputs), 0))]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        return []  # the public functions check


class TestSortlet(OfOperator):
    operator = staticmethod(ops.log_sortlet)
    overload = torch.ops.ctorch.sortlet.default
    reference = staticmethod(reference.sortlet)

    def inputs(self, scores: Tensor) -> tuple[Tensor, ...]:
        return (scores,)

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        x = torch.ones(3)
        return [
            (lambda: ctorch.sortlet([1.0]), TypeError, "scores must be a tensor, got list"),
            (lambda: ctorch.sortlet(x.int()), TypeError, "scores must .* got torch.int32"),
            (lambda: ctorch.sortlet(x.half()), TypeError, "scores must .* got torch.float16"),
            (lambda: ctorch.sortlet(x[0]), ValueError, "scores must .* 0-dim"),
            (lambda: ctorch.sortlet(x, "log"), ValueError, "gap must .* 'log'"),
        ]

    def test_law(self) -> None:
        """Every exchange of two scores changes the sign alone, to the last bit."""
        for n in (2, 3, 7, 65):
            x = rand((n,), n, self.device)
            sign, logabs = ctorch.sortlet(x)
            pairs = [(i, j) for i in range(n) for j in range(i)]
            exchanged = torch.arange(n).repeat(len(pairs), 1)
            for row, (i, j) in enumerate(pairs):
                exchanged[row, i], exchanged[row, j] = j, i
            signs, logs = ctorch.sortlet(x[exchanged.to(x.device)])
            assert (signs == -sign).all()
            assert sign.abs() == 1
            assert (logs == logabs).all()


class TestGradient(OfOperator):
    operator = staticmethod(ops.sortlet_gradient)
    overload = torch.ops.ctorch.sortlet_gradient.default
    reference = staticmethod(reference.gradient)

    def inputs(self, scores: Tensor) -> tuple[Tensor, ...]:
        return scores, rand(tuple(scores.shape[:-1]), 2, self.device)

    def test_law(self) -> None:
        """Moving all scores changes nothing, scaling them adds N - 1 logarithms of the scale."""
        x = rand((5, 9), 1, self.device)
        g = ops.sortlet_gradient(x, torch.ones_like(x[:, 0]), 0)
        assert_close(g.sum(-1), torch.zeros_like(g[:, 0]), atol=1e-12, rtol=0)
        assert_close((g * x).sum(-1), torch.full_like(g[:, 0], 8))


class TestHessian(OfOperator):
    operator = staticmethod(ops.sortlet_hessian)
    overload = torch.ops.ctorch.sortlet_hessian.default
    reference = staticmethod(reference.hessian)

    def inputs(self, scores: Tensor) -> tuple[Tensor, ...]:
        g = rand(tuple(scores.shape[:-1]), 2, self.device)
        return scores, g, rand(tuple(scores.shape), 3, self.device)

    def test_law(self) -> None:
        """Negative semidefinite, as the Hessian of a sum of logarithms of linear functions is."""
        x, v = rand((50, 9), 1, self.device), rand((50, 9), 2, self.device)
        _, hv = ops.sortlet_hessian(x, torch.ones_like(x[:, 0]), v, 0)
        assert ((hv * v).sum(-1) < 0).all()


class TestLaplacian(OfOperator):
    operator = staticmethod(ops.sortlet_laplacian)
    overload = torch.ops.ctorch.sortlet_laplacian.default
    reference = staticmethod(reference.laplacian)

    def inputs(self, scores: Tensor) -> tuple[Tensor, ...]:
        rows = rand((3, *scores.shape), 2, self.device)
        return scores, rows, rand(tuple(scores.shape), 3, self.device)

    def test_law(self) -> None:
        """The two Laplacians differ by the squared gradient."""
        x = rand((6, 9), 1, self.device)
        for gap in (0, 1):
            slopes, of_log, of_ratio = ops.sortlet_laplacian(*self.inputs(x), gap)
            assert_close(of_log + (slopes**2).sum(0), of_ratio, rtol=1e-9, atol=1e-9)


class TestTermGradient(OfOperator):
    operator = staticmethod(ops.sortlet_term_gradient)
    overload = torch.ops.ctorch.sortlet_term_gradient.default
    reference = staticmethod(reference.term_gradient)

    def inputs(self, scores: Tensor) -> tuple[Tensor, ...]:
        lead = tuple(scores.shape[:-1])
        shift = self.normal(scores)
        return scores, shift, rand(lead, 3, self.device)

    def normal(self, scores: Tensor) -> Tensor:
        """Shifts for which terms are neither large nor small."""
        _, gaps = reference._sort(scores)
        size = torch.where(gaps < reference.SMALL, 1.0, gaps).log().sum(-1)
        return rand(tuple(scores.shape[:-1]), 2, self.device) - size

    def test_law(self) -> None:
        """A term of linear gaps is homogeneous of degree N - 1, also where scores tie."""
        x = rand((6, 5), 1, self.device)
        x[1, 2] = x[1, 4]
        x[2, 0] = x[2, 1] = x[2, 3]
        shift, g = rand((6,), 2, self.device), torch.ones_like(x[:, 0])
        of_scores, of_shift = ops.sortlet_term_gradient(x, shift, g, 0)
        assert_close((of_scores * x).sum(-1), 4 * of_shift)
        assert of_shift[1] == 0
        assert of_scores[1].abs().max() > 0.01
        assert (of_scores[2] == 0).all()


class TestTermHessian(TestTermGradient):
    operator = staticmethod(ops.sortlet_term_hessian)
    overload = torch.ops.ctorch.sortlet_term_hessian.default
    reference = staticmethod(reference.term_hessian)

    def inputs(self, scores: Tensor) -> tuple[Tensor, ...]:
        lead = tuple(scores.shape[:-1])
        more = rand(tuple(scores.shape), 4, self.device), rand(lead, 5, self.device)
        return scores, self.normal(scores), rand(lead, 3, self.device), *more

    def test_law(self) -> None:
        """Second derivatives of a homogeneous function of degree N - 1 along the scores."""
        x = rand((6, 5), 1, self.device)
        x[1, 2] = x[1, 4]
        x[2, 0] = x[2, 1] = x[2, 3]
        shift, one = rand((6,), 2, self.device), torch.ones_like(x[:, 0])
        hx, of_shift, of_g = ops.sortlet_term_hessian(x, shift, one, x, 0 * one, 0)
        gradient, value = ops.sortlet_term_gradient(x, shift, one, 0)
        assert_close(hx, 3 * gradient)
        assert_close(of_g, 4 * value)
        assert_close(of_shift, of_g)


class TestTermLaplacian(TestTermGradient):
    operator = staticmethod(ops.sortlet_term_laplacian)
    overload = torch.ops.ctorch.sortlet_term_laplacian.default
    reference = staticmethod(reference.term_laplacian)

    def inputs(self, scores: Tensor) -> tuple[Tensor, ...]:
        rows = rand((3, *scores.shape), 4, self.device)
        return scores, self.normal(scores), rows, rand(tuple(scores.shape), 5, self.device)

    def test_law(self) -> None:
        """Rows of unit vectors give the gradient and the trace of the Hessian."""
        x = rand((6, 5), 1, self.device)
        x[1, 2] = x[1, 4]
        x[2, 0] = x[2, 1] = x[2, 3]
        shift, one = rand((6,), 2, self.device), torch.ones_like(x[:, 0])
        for gap in (0, 1):
            rows = torch.eye(5, dtype=F64, device=self.device).unsqueeze(1).expand(5, 6, 5)
            out = ops.sortlet_term_laplacian(x, shift, rows, torch.zeros_like(x), gap)
            gradient, value = ops.sortlet_term_gradient(x, shift, one, gap)
            assert_close(out[0], value)
            assert_close(out[1].movedim(0, -1), gradient)
            columns = [
                ops.sortlet_term_hessian(x, shift, one, rows[i].clone(), 0 * one, gap)[0][:, i]
                for i in range(5)
            ]
            assert_close(out[2], torch.stack(columns).sum(0))


class TestSum(Obligations):
    def problem(self, scores: Tensor, c: Tensor, sign: Tensor, gap: str, name: str = "") -> Problem:
        return Problem(
            # gradcheck takes the first outputs for those that have gradients
            lambda x, c: ctorch.sum_of_sortlets(x, c, sign.to(x.dtype), gap)[::-1],
            lambda x, c: plain_sum(x, c, sign.to(x.dtype), ops.GAPS[gap])[::-1],
            (scores, c),
            name=name,
        )

    def draw(self, data: st.DataObject) -> Problem:
        batch, k = data.draw(st.integers(0, 20), "batch"), data.draw(st.integers(0, 5), "K")
        n = data.draw(st.sampled_from([0, 1, 2, 3, 6, 16, 64, 65]), "N")
        x = spaced((batch, k, n), data.draw(st.integers(0, 1000), "seed"), self.device)
        if data.draw(st.booleans(), "ties"):
            x = (x / 2).round()
        sign = torch.ones(k, dtype=F64, device=self.device)
        gap = data.draw(st.sampled_from(list(ops.GAPS)), "gap")
        return self.problem(x, 0.1 * rand((k,), 3, self.device), sign.exp(), gap)

    def problems(self) -> list[Problem]:
        x, c = spaced((2, 3, 4), 1, self.device), rand((3,), 2, self.device)
        sign = torch.tensor([1.0, -1.0, 0.5], dtype=F64, device=self.device)
        wide = rand((2, 3), 3, self.device)
        return [
            self.problem(x, c, sign, "linear", "linear"),
            self.problem(x, wide, sign, "tanh", "tanh, coefficients of their own"),
        ]

    def huge(self) -> Problem:
        x, c = rand((20_011, 5, 12), 1, self.device), rand((5,), 2, self.device)
        return self.problem(x, c, torch.ones_like(c), "linear")

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        x, shift = rand((2, 4), 1, self.device), rand((2,), 2, self.device)
        sign, logabs = ops.log_sortlet(x, 0)
        args = (x.requires_grad_(), shift.requires_grad_(), sign, logabs, 0)
        return [(torch.ops.ctorch.sortlet_term.default, args)]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        x, c = torch.ones(2, 3, 4), torch.ones(3)
        f = ctorch.sum_of_sortlets
        return [
            (lambda: f(x[0, 0], c), ValueError, r"scores must be \[..., K, N\]"),
            (lambda: f(x, c[:2]), ValueError, r"log_coeff must .*\(2, 3\).*; got \(2,\)"),
            (lambda: f(x, c.double()), TypeError, "log_coeff must .*float32.*float64"),
            (lambda: f(x, 1.0), TypeError, "log_coeff must be a tensor, got float"),
            (lambda: f(x, c, c[:2]), ValueError, "sign must"),
            (lambda: f(x, c, gap="cubic"), ValueError, "gap must"),
        ]

    def test_law(self) -> None:
        """Exchanging two particles, in all lists at once, changes the sign alone."""
        x, c = rand((7, 3, 5), 1, self.device), rand((3,), 2, self.device)
        sign, logabs = ctorch.sum_of_sortlets(x, c)
        for i in range(5):
            for j in range(i):
                at = list(range(5))
                at[i], at[j] = j, i
                signs, logs = ctorch.sum_of_sortlets(x[..., at], c)
                assert (signs == -sign).all()
                assert (logs == logabs).all()


def plain_sum(x: Tensor, c: Tensor, sign: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """The sum with references in place of operators."""
    _, logs = reference.sortlet(x.detach(), gap)
    largest = ops.largest_of(logs + c.detach())
    terms = reference.term(x, c - largest.unsqueeze(-1), logs, logs, gap)
    return ops.signed_log((terms * sign).sum(-1), largest)


class OnCuda:
    device = "cuda"
    pytestmark = needs_cuda


class TestSortletOnCuda(OnCuda, TestSortlet): ...


class TestGradientOnCuda(OnCuda, TestGradient): ...


class TestHessianOnCuda(OnCuda, TestHessian): ...


class TestLaplacianOnCuda(OnCuda, TestLaplacian): ...


class TestTermGradientOnCuda(OnCuda, TestTermGradient): ...


class TestTermHessianOnCuda(OnCuda, TestTermHessian): ...


class TestTermLaplacianOnCuda(OnCuda, TestTermLaplacian): ...


class TestSumOnCuda(OnCuda, TestSum): ...
