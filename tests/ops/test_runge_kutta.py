"""The Runge-Kutta operators meet their obligations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ctorch.ops import _kernels
from ctorch.ops import _runge_kutta_reference as reference
from ctorch.ops import runge_kutta as rk
from tests.ops.obligations import ForwardObligations, Obligations, Problem, needs_cuda
from tests.ops.runge_kutta_problems import (
    F64,
    HALF,
    Drawn,
    as_reference,
    coefficients,
    numbers,
    rand,
    spoil,
)


def of_kernels(*calls: Any) -> list[Any]:
    """Wrong calls of bare operators: their kernels refuse them, a reference takes what it can."""
    return list(calls) if _kernels.HAS_KERNELS else []


class TestCombine(Obligations):
    dtypes = (torch.float32, torch.float64, *HALF)

    def draw(self, data: st.DataObject) -> Problem:
        drawn = Drawn(data, self.device)
        a = coefficients(data, drawn.stages)
        return self.problem(drawn.y, spoil(drawn.k, a), a, drawn.h)

    def problem(self, y: Tensor, k: Tensor, a: Tensor, h: Tensor, name: str = "") -> Problem:
        return Problem(
            lambda y, k, h: rk.combine(y, k, a, h),
            lambda y, k, h: reference.combine(y, k, a, h),
            (y, k, h),
            exact=(2,),
            name=name,
        )

    def problems(self) -> list[Problem]:
        y, k, a = rand((3, 2), 1, self.device), rand((4, 3, 2), 2, self.device), numbers(0.5, 0, -2)
        return [
            self.problem(y, k, a, rand((), 3), "one step"),
            self.problem(y, k, a, rand((3,), 4, self.device), "a step for each sample"),
            Problem(
                lambda k: rk.combine(None, k, a, 0.3),
                lambda k: reference.combine(None, k, a, numbers(0.3)[0]),
                (k,),
                name="no state",
            ),
        ]

    def huge(self) -> Problem:
        shape = (1009, 1999)
        y, k = rand(shape, 1, self.device), rand((3, *shape), 2, self.device)
        return self.problem(y, k, numbers(0.5, 0, -2), rand((1009,), 3, self.device))

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        y, k, h = (x.requires_grad_() for x in self.problems()[1].inputs)
        op = torch.ops.ctorch.rk_combine.default
        return [(op, (y, k, numbers(1, 0, 2), h)), (op, (None, k, numbers(1), rand((), 1)))]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        y, k = torch.ones(3, 2), torch.ones(4, 3, 2)
        op = torch.ops.ctorch.rk_combine.default
        one = numbers(1)
        return [
            (lambda: rk.combine(y[:2], k, [1], 0.1), ValueError, r"y must .*\(3, 2\)"),
            (lambda: rk.combine(y.double(), k, [1], 0.1), TypeError, "y must .*float32"),
            (lambda: rk.combine(y, k, [1] * 5, 0.1), ValueError, "a must"),
            (lambda: rk.combine(y, k, one.requires_grad_(), 0.1), ValueError, "a is a constant"),
            (lambda: rk.combine(y, k, [1], torch.ones(2)), ValueError, r"h must .*\[3\]"),
            (lambda: rk.combine(y.int(), k.int(), [1], 0.1), TypeError, "k must .*float64"),
            (lambda: rk.combine(None, k[0, 0, 0], [1], 0.1), ValueError, "k must"),
            (lambda: op(y[:2], k, numbers(1), one[0]), RuntimeError, "y must|size"),
        ] + of_kernels(
            (lambda: op(y, k, numbers(1).float(), one[0]), RuntimeError, "a must"),
            (lambda: op(y, k, numbers(1), torch.ones(())), RuntimeError, "h must"),
        )

    def test_law(self) -> None:
        """Linear in the state and the slopes together."""
        y, k, h = self.problems()[1].inputs
        z, q = y.flip(0) + 1, k.flip(0) - 1
        a = numbers(0.5, 0, -2, 3)
        both = rk.combine(2 * y + z, 2 * k + q, a, h)
        assert_close(both, 2 * rk.combine(y, k, a, h) + rk.combine(z, q, a, h))

    def test_unused_stages_have_gradient_zero_whatever_comes_back(self) -> None:
        k = torch.full((3, 2), math.nan, dtype=F64, device=self.device)
        k[0] = 1
        k.requires_grad_()
        out = rk.combine(None, k, [1, 0], 0.1)
        (g,) = torch.autograd.grad(out, k, torch.full_like(out, math.inf))
        assert g[0].isinf().all()
        assert (g[1:] == 0).all()


class TestStage(ForwardObligations):
    dtypes = (torch.float32, torch.float64, *HALF)

    def draw(self, data: st.DataObject) -> Problem:
        drawn = Drawn(data, self.device)
        a = coefficients(data, drawn.stages)
        slot = data.draw(st.integers(0, drawn.stages - 1), "slot")
        k, slope = spoil(drawn.k, a), drawn.rand(drawn.shape)
        k[slot] = math.nan  # what was in the row before must not matter
        return self.problem(drawn.y, k, slope, slot, a, drawn.h)

    def problem(
        self, y: Tensor, k: Tensor, slope: Tensor, slot: int, a: Tensor, h: Tensor, name: str = ""
    ) -> Problem:
        def operator(y: Tensor, k: Tensor, slope: Tensor, h: Tensor) -> Any:
            k = k.clone(memory_format=torch.contiguous_format)
            return rk.stage_(y, k, slope, slot, a, h), k

        def expected(y: Tensor, k: Tensor, slope: Tensor, h: Tensor) -> Any:
            k = k.clone()
            return reference.stage(y, k, slope, slot, a, h), k

        return Problem(operator, expected, (y, k, slope, h), exact=(3,), name=name)

    def problems(self) -> list[Problem]:
        y, k = rand((3, 2), 1, self.device), rand((4, 3, 2), 2, self.device)
        slope, a = rand((3, 2), 5, self.device), numbers(0.5, 0, -2)
        return [
            self.problem(y, k, slope, 2, a, rand((), 3), "one step"),
            self.problem(y, k, slope, 0, a, rand((3,), 4, self.device), "a step for each"),
        ]

    def huge(self) -> Problem:
        shape = (1009, 1999)
        y, k, slope = (rand(s, 1, self.device) for s in (shape, (3, *shape), shape))
        return self.problem(y, k, slope, 1, numbers(0.5, 1, -2), rand((), 3))

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        y, k, slope, h = self.problems()[0].inputs
        op = torch.ops.ctorch.rk_stage.default
        return [
            (op, (y, k, slope, 2, numbers(1, 0, 2), h)),
            (op, (None, k, slope, 0, numbers(1), h)),
        ]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        y, k = torch.ones(3, 2), torch.ones(4, 3, 2)
        op = torch.ops.ctorch.rk_stage.default
        one, h = numbers(1), numbers(1)[0]
        loose = torch.ones(3, 2, 4).permute(2, 0, 1)
        return [
            (lambda: rk.stage_(y, k, y[:2], 0, [1], 0.1), ValueError, r"slope must .*\(3, 2\)"),
            (lambda: rk.stage_(y, k, y.double(), 0, [1], 0.1), TypeError, "slope must"),
            (lambda: rk.stage_(y, k, y, 4, [1], 0.1), ValueError, "slot must .*3.*4"),
            (lambda: rk.stage_(y, k, y, -1, [1], 0.1), ValueError, "slot must"),
            (lambda: rk.stage_(y, loose, y, 0, [1], 0.1), ValueError, "k must be contiguous"),
            (
                lambda: rk.stage_(y.clone().requires_grad_(), k, y, 0, [1], 0.1),
                RuntimeError,
                "combine",
            ),
        ] + of_kernels(
            (lambda: op(y, k, y[:2], 0, one, h), RuntimeError, "slope must"),
            (lambda: op(y, k, y, 4, one, h), RuntimeError, "slot must"),
            (lambda: op(y, loose, y, 0, one, h), RuntimeError, "k must be contiguous"),
            (lambda: op(y, k, y.double(), 0, one, h), RuntimeError, "slope must"),
        )

    def test_law(self) -> None:
        """A stage is a store and a combination."""
        y, k, slope, h = self.problems()[0].inputs
        a, stored = numbers(0.5, 0, -2), k.clone()
        stored[2] = slope
        out = rk.stage_(y, k, slope, 2, a, h)
        assert torch.equal(k, stored)
        assert torch.equal(out, rk.combine(y, stored, a, h))

    def test_expanded_slope(self) -> None:
        y, k = torch.ones(2, 600), torch.zeros(2, 2, 600)
        rk.stage_(y, k, torch.full((), 3.0).expand(2, 600), 1, [0, 1], 0.5)
        assert (k[1] == 3).all()


class TestError(ForwardObligations):
    def draw(self, data: st.DataObject) -> Problem:
        drawn = Drawn(data, self.device)
        e = coefficients(data, drawn.stages)
        slot = data.draw(st.none() | st.integers(0, drawn.stages - 1), "slot")
        slope = None if slot is None else drawn.rand(drawn.shape)
        k, y1 = spoil(drawn.k, e), drawn.rand(drawn.shape)
        rtol, atol = drawn.tolerance(data), drawn.tolerance(data)
        return self.problem(drawn.y, y1, k, slope, slot, e, drawn.h, rtol, atol, drawn.norm(data))

    def problem(
        self,
        y: Tensor,
        y1: Tensor,
        k: Tensor,
        slope: Tensor | None,
        slot: int | None,
        e: Tensor,
        h: Tensor,
        rtol: Tensor,
        atol: Tensor,
        norm: dict[str, Any],
    ) -> Problem:
        row = 0 if slot is None else slot

        def operator(y: Tensor, y1: Tensor, k: Tensor, h: Tensor, *slope: Tensor) -> Any:
            k = k.clone(memory_format=torch.contiguous_format)
            new = slope[0] if slope else None
            return rk.error_norm(y, y1, k, e, h, rtol, atol, slope=new, slot=row, **norm), k

        def expected(y: Tensor, y1: Tensor, k: Tensor, h: Tensor, *slope: Tensor) -> Any:
            k, new = k.clone(), slope[0] if slope else None
            tolerances = rtol.to(y.dtype), atol.to(y.dtype)
            mode = as_reference(norm)
            return reference.error(y, y1, k, new, row, e, h, *tolerances, *mode), k

        inputs = (y, y1, k, h) if slope is None else (y, y1, k, h, slope)
        return Problem(operator, expected, inputs, exact=(3,), name=str(norm))

    def problems(self) -> list[Problem]:
        y, y1, slope = (rand((3, 2), i, self.device) for i in (1, 5, 6))
        k, e, tolerance = rand((4, 3, 2), 2, self.device), numbers(0.5, 0, -2), numbers(0.3)[0]
        h, each = rand((), 3), rand((3,), 4, self.device)
        whole = {"segments": [4, 0, 2], "norm": "rms", "per_sample": False}
        samples = {"segments": [1, 1], "norm": "max", "per_sample": True}
        return [
            self.problem(y, y1, k, slope, 2, e, h, tolerance, tolerance, whole),
            self.problem(y, y1, k, None, None, e, each, y.abs(), tolerance, samples),
        ]

    def huge(self) -> Problem:
        shape = (1009, 1999)
        y, y1, k, slope = (rand(s, 1, self.device) for s in (shape, shape, (3, *shape), shape))
        norm = {"segments": [100_000, 1009 * 1999 - 100_000], "norm": "rms", "per_sample": False}
        tolerance, e = numbers(1e-3)[0], numbers(0.5, 1, -2)
        return self.problem(y, y1, k, slope, 1, e, rand((), 3), tolerance, tolerance, norm)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        y, y1, k, h, slope = self.problems()[0].inputs
        op, t = torch.ops.ctorch.rk_error.default, numbers(0.1)[0]
        return [
            (op, (y, y1, k, slope, 2, numbers(1, 0, 2), h, t, t, [], False, False)),
            (op, (y, y1, k, None, 0, numbers(1, 0, 2), h, t, y.abs(), [1, 1], True, True)),
        ]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        y, k = torch.ones(3, 2), torch.ones(4, 3, 2)

        def call(**changes: Any) -> Callable[[], Any]:
            args = {"y": y, "y1": y, "k": k, "e": [1.0], "h": 0.1, "rtol": 0.1, "atol": 0.1}
            return lambda: rk.error_norm(**{**args, **changes})

        return [
            (call(y1=y[:2]), ValueError, "y1 must"),
            (call(norm="l2"), ValueError, "norm must be one of .*'l2'"),
            (call(segments=[3, 2]), ValueError, "segments must partition the 6 elements"),
            (call(segments=[3, 3], per_sample=True), ValueError, "the 2 elements of a sample"),
            (call(segments=[8, -2]), ValueError, "segments must"),
            (call(rtol=torch.ones(5)), ValueError, "rtol must broadcast"),
            (call(slope=y, slot=9), ValueError, "slot must"),
            (call(k=k.clone().requires_grad_()), RuntimeError, "step_end"),
            (call(y=y[0, 0], y1=y[0, 0], k=k[:, 0, 0], per_sample=True), ValueError, "per_sample"),
        ]

    def test_law(self) -> None:
        """The norm over segments is the largest of the norms of the segments alone."""
        n, cut = 1400, 601
        y, y1, k = (rand(s, 1, self.device) for s in ((n,), (n,), (2, n)))
        e = [0.5, -1]
        for norm in rk.Norms:
            whole = rk.error_norm(y, y1, k, e, 0.1, 1e-2, 1e-3, segments=[cut, n - cut], norm=norm)
            parts = [
                rk.error_norm(y[s], y1[s], k[:, s].contiguous(), e, 0.1, 1e-2, 1e-3, norm=norm)
                for s in (slice(0, cut), slice(cut, n))
            ]
            assert_close(whole, torch.stack(parts).max())

    @pytest.mark.parametrize("norm", rk.Norms)
    @pytest.mark.parametrize("where", [0, 7, 511, 512, 1199])
    def test_nan_reaches_the_norm(self, norm: str, where: int) -> None:
        for spoiled in ("k", "y", "y1"):
            x = {"y": torch.ones(1200), "y1": torch.ones(1200), "k": torch.ones(2, 1200)}
            x[spoiled][..., where] = math.nan
            x = {name: value.to(self.device) for name, value in x.items()}
            args = {"e": [1, 1], "h": 0.1, "rtol": 0.1, "atol": 0.1, "norm": norm}
            assert rk.error_norm(**x, **args).isnan()
            assert rk.error_norm(**x, **args, segments=[600, 600]).isnan()
            each = {name: value.reshape(*value.shape[:-1], 400, 3) for name, value in x.items()}
            flags = rk.error_norm(**each, **args, per_sample=True).isnan()
            assert flags.nonzero().tolist() == [[where // 3]]


class TestStepEnd(Obligations):
    def draw(self, data: st.DataObject) -> Problem:
        drawn = Drawn(data, self.device)
        b, e = coefficients(data, drawn.stages), coefficients(data, drawn.stages)
        rtol, atol = drawn.tolerance(data), drawn.tolerance(data)
        norm = drawn.norm(data)
        return self.problem(drawn.y, spoil(drawn.k, b, e), b, e, drawn.h, rtol, atol, norm)

    def problem(
        self,
        y: Tensor,
        k: Tensor,
        b: Tensor,
        e: Tensor,
        h: Tensor,
        rtol: Tensor,
        atol: Tensor,
        norm: dict[str, Any],
    ) -> Problem:
        def expected(y: Tensor, k: Tensor, h: Tensor, rtol: Tensor, atol: Tensor) -> Any:
            return reference.step(y, k, b, e, h, rtol, atol, *as_reference(norm))

        return Problem(
            lambda y, k, h, rtol, atol: rk.step_end(y, k, b, e, h, rtol, atol, **norm),
            expected,
            (y, k, h, rtol, atol),
            exact=(2,),
            name=str(norm),
        )

    def problems(self) -> list[Problem]:
        y, k = rand((3, 2), 1, self.device), rand((4, 3, 2), 2, self.device)
        b, e, tolerance = numbers(1, 0, -2), numbers(0.5, 0, -2, 1), numbers(0.3)[0]
        each, full = rand((3,), 4, self.device), rand((3, 2), 7, self.device).abs() + 0.1
        segments = {"segments": [4, 0, 2], "norm": "rms", "per_sample": False}
        maximum = {"norm": "max", "per_sample": False, "segments": []}
        samples = {"segments": [1, 1], "norm": "rms", "per_sample": True}
        return [
            self.problem(y, k, b, e, rand((), 3), tolerance, tolerance, segments),
            self.problem(y, k, b, e, each, full, tolerance, maximum),
            self.problem(y, k, b, e, each, tolerance, full, samples),
            self.problem(y, k, b, e, rand((), 3), tolerance, tolerance, samples),
        ]

    def huge(self) -> Problem:
        shape = (1009, 1999)
        y, k, h = rand(shape, 1, self.device), rand((3, *shape), 2, self.device), rand((1009,), 3)
        norm = {"segments": [], "norm": "rms", "per_sample": True}
        t = numbers(1e-3)[0]
        b, e = numbers(0.5, 0, -2), numbers(1, 0, 3)
        return self.problem(y, k, b, e, h.to(self.device), t, t, norm)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        y, k, h, rtol, atol = (x.requires_grad_() for x in self.problems()[2].inputs)
        args = (y, k, numbers(1, 0, 2), numbers(1, 1), h, rtol, atol)
        op = torch.ops.ctorch.rk_step.default
        return [(op, (*args, [], False, True)), (op, (*args, [2, 4], True, False))]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        y, k = torch.ones(3, 2), torch.ones(4, 3, 2)
        return [
            (lambda: rk.step_end(y[:1], k, [1], [1], 1, 1, 1), ValueError, "y must"),
            (lambda: rk.step_end(y, k, [1] * 5, [1], 1, 1, 1), ValueError, "b must"),
            (lambda: rk.step_end(y, k, [1], [[1]], 1, 1, 1), ValueError, "e must"),
            (lambda: rk.step_end(y, k, [1], [1], 1, 1, torch.ones(7)), ValueError, "atol must"),
            (lambda: rk.step_end(y, k, [1], [1], 1, 1, 1, segments=[1]), ValueError, "segments"),
            (lambda: rk.step_end(y.half(), k.half(), [1], [1], 1, 1, 1), TypeError, "k must"),
        ]

    def test_law(self) -> None:
        """With an absolute tolerance alone, the norm is homogeneous in the slopes."""
        y, k, h, _, _ = self.problems()[2].inputs
        for norm in rk.Norms:
            for per_sample in (False, True):
                args = ([1, 2], [0.5, -1], h, 0.0, 0.1)
                _, one = rk.step_end(y, k, *args, norm=norm, per_sample=per_sample)
                _, three = rk.step_end(y, -3 * k, *args, norm=norm, per_sample=per_sample)
                assert_close(three, 3 * one)

    @pytest.mark.parametrize("norm", rk.Norms)
    def test_gradient_is_finite_where_the_norm_is_zero(self, norm: str) -> None:
        y = torch.ones(3, dtype=F64, requires_grad=True)
        k = torch.zeros(2, 3, dtype=F64, requires_grad=True)
        _, zero = rk.step_end(y, k, [1, 0], [1, -1], 0.1, 0.1, 0.1, norm=norm)
        assert zero == 0
        assert all(g.isfinite().all() for g in torch.autograd.grad(zero, (y, k)))


class TestInterpolate(Obligations):
    def draw(self, data: st.DataObject) -> Problem:
        of_samples = data.draw(st.booleans(), "each query of one sample")
        drawn = Drawn(data, self.device, samples=of_samples)
        count = data.draw(st.sampled_from([0, 1, 5, 40]), "queries")
        degree = data.draw(st.integers(1, 5), "degree")
        p = rand((data.draw(st.integers(1, drawn.stages), "rows of p"), degree), drawn.seed + 9)
        p[p.abs().sum(1) < degree * 0.7] = 0
        k = spoil(drawn.k, p)
        theta = rand((count,), drawn.seed).abs()
        if not of_samples:
            return self.problem(drawn.y, k, p, theta, drawn.h, None)
        sample = torch.arange(count, device=self.device) * 7 % drawn.shape[0]
        return self.problem(drawn.y, k, p, theta.to(self.device), drawn.h, sample)

    def problem(
        self, y: Tensor, k: Tensor, p: Tensor, theta: Tensor, h: Tensor, sample: Tensor | None
    ) -> Problem:
        return Problem(
            lambda y, k, theta, h: rk.interpolate(y, k, p, theta, h, sample=sample),
            lambda y, k, theta, h: reference.interpolate(y, k, p, theta, h, sample),
            (y, k, theta, h),
            exact=(2, 3),
            name=f"sample {sample}, h {tuple(h.shape)}",
        )

    def problems(self) -> list[Problem]:
        y, k = rand((3, 2), 1, self.device), rand((4, 3, 2), 2, self.device)
        p, theta, each = rand((3, 3), 5), rand((4,), 6).abs(), rand((3,), 4, self.device)
        p[1] = 0
        sample = torch.tensor([2, 0, 2, 1], device=self.device)
        on_device = theta.to(self.device)
        return [
            self.problem(y, k, p, theta, rand((), 3), None),
            self.problem(y, k, p, theta, each, None),
            self.problem(y, k, p, on_device, rand((), 3), sample),
            self.problem(y, k, p, on_device, each, sample),
        ]

    def huge(self) -> Problem:
        shape = (1009, 1999)
        y, k = rand(shape, 1, self.device), rand((3, *shape), 2, self.device)
        return self.problem(y, k, rand((3, 2), 5), rand((3,), 6), rand((), 7), None)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        y, k, theta, h = (x.requires_grad_() for x in self.problems()[3].inputs)
        op = torch.ops.ctorch.rk_interpolate.default
        sample = torch.tensor([2, 0, 2, 1], device=self.device)
        return [
            (op, (y, k, rand((3, 3), 5), theta, h, None)),
            (op, (y, k, rand((3, 3), 5), theta, h, sample)),
        ]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        y, k, p, theta = torch.ones(3, 2), torch.ones(4, 3, 2), torch.ones(4, 2), torch.ones(5)
        far = torch.full((5,), 3)
        return [
            (lambda: rk.interpolate(y[:1], k, p, theta, 1), ValueError, "y must"),
            (lambda: rk.interpolate(y, k, torch.ones(5, 2), theta, 1), ValueError, "p must"),
            (lambda: rk.interpolate(y, k, p, theta[None], 1), ValueError, "theta must"),
            (lambda: rk.interpolate(y, k, p, theta, 1, sample=far[:2]), ValueError, "sample must"),
            (
                lambda: rk.interpolate(y, k, p, theta, 1, sample=far),
                (RuntimeError, IndexError),
                "sample must|index 3",
            ),
        ]

    def test_law(self) -> None:
        """It starts at the state and ends where the weights at one lead."""
        y, k, _, h = self.problems()[1].inputs
        p = rand((3, 3), 5)
        out = rk.interpolate(y, k, p, [0.0, 1.0], h)
        assert torch.equal(out[0], y)
        assert_close(out[1], rk.combine(y, k, p.sum(1), h))

    def test_samples_are_rows_of_the_whole(self) -> None:
        y, k, theta, h = self.problems()[3].inputs
        sample = torch.tensor([2, 0, 2, 1], device=self.device)
        whole = rk.interpolate(y, k, rand((3, 3), 5), theta, h)
        picked = rk.interpolate(y, k, rand((3, 3), 5), theta, h, sample=sample)
        assert_close(picked, whole[torch.arange(4, device=self.device), sample])


class TestCombineCUDA(TestCombine):
    device, pytestmark = "cuda", needs_cuda


class TestStageCUDA(TestStage):
    device, pytestmark = "cuda", needs_cuda


class TestErrorCUDA(TestError):
    device, pytestmark = "cuda", needs_cuda


class TestStepEndCUDA(TestStepEnd):
    device, pytestmark = "cuda", needs_cuda


class TestInterpolateCUDA(TestInterpolate):
    device, pytestmark = "cuda", needs_cuda
