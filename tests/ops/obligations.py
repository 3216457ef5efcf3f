"""What every operator owes, as test cases to inherit.

An operator's test class gives problems; the rest comes with the class:

1. it equals its reference, on drawn inputs and dtypes;
2. a law of its field (the subclass writes it; the class does not collect without one);
3. first derivatives, reverse and forward, against finite differences;
4. second derivatives;
5. ``torch.library.opcheck``;
6. it compiles in one graph;
7. the table of transforms, each against the same transform of the reference;
8. strides, errors, degenerate and huge inputs, NaN, any number of threads.

An operator without a graph inherits ``ForwardObligations``: all but 3, 4 and 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.ops.transforms import COMPILED, TRANSFORMS, apply

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {  # of a kernel against the reference in float64 (float32 for half precision)
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-5),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}


@dataclass
class Problem:
    """An operator with everything but its differentiable inputs filled in.

    ``operator`` and ``reference`` take the inputs and return a tensor or a tuple of tensors. Inputs
    that have another dtype on purpose (float64 steps of a float32 state) are named in ``exact``.
    ``slack`` multiplies the tolerance of what amplifies rounding: a derivative near a pole.
    """

    operator: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    exact: tuple[int, ...] = ()
    name: str = ""
    slack: float = 1.0

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(x if i in self.exact else x.to(dtype) for i, x in enumerate(self.inputs))


class ForwardObligations:
    """The obligations of an operator that records no graph."""

    device = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)

    def draw(self, data: st.DataObject) -> Problem:
        """A problem in float64 with drawn shapes and numbers, degenerate ones among them."""
        raise NotImplementedError

    def problems(self) -> list[Problem]:
        """A few small fixed problems in float64 that cover the operator's modes."""
        raise NotImplementedError

    def huge(self) -> Problem:
        """One with millions of elements, in float64."""
        raise NotImplementedError

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        """Bare overloads with arguments, for opcheck."""
        raise NotImplementedError

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        """Wrong calls, the error's type, and a pattern in its message, which names the argument."""
        raise NotImplementedError

    def test_law(self) -> None:
        pytest.fail(f"{type(self).__name__} owes a law of its field")

    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
    )
    @given(data=st.data())
    def test_equals_reference(self, data: st.DataObject) -> None:
        problem = self.draw(data)
        dtype = data.draw(st.sampled_from(self.dtypes), "dtype")
        wide = torch.float64 if dtype.itemsize >= 4 else torch.float32
        rounded = problem.cast(dtype)
        expected = problem.reference(*(x.to(wide) if x.dtype == dtype else x for x in rounded))
        actual = problem.operator(*rounded)
        rtol, atol = (problem.slack * tolerance for tolerance in TOLERANCE[dtype])
        for a, e in zip(_tuple(actual), _tuple(expected), strict=True):
            assert a.dtype == dtype
            assert a.is_contiguous()
            assert_close(a, e.to(dtype), rtol=rtol, atol=atol, equal_nan=True)

    def test_huge_equals_reference(self) -> None:
        problem = self.huge()
        _assert_same(problem.operator(*problem.inputs), problem.reference(*problem.inputs))

    def test_bits_do_not_depend_on_threads(self) -> None:
        problem = self.huge()
        inputs = problem.cast(torch.float32)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(_tuple(problem.operator(*inputs)))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))

    def test_any_strides(self) -> None:
        for problem in self.problems():
            expected = problem.reference(*problem.inputs)
            for change in (_every_second, _transposed, _offset):
                _assert_same(problem.operator(*map(change, problem.inputs)), expected, problem.name)

    def test_errors_name_the_argument(self) -> None:
        for call, error, pattern in self.bad_calls():
            with pytest.raises(error, match=pattern):
                call()

    def test_opcheck(self) -> None:
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        for overload, args in self.calls():
            torch.library.opcheck(overload, args, test_utils=tests)

    def test_compiles_in_one_graph(self) -> None:
        for problem in self.problems():
            torch._dynamo.reset()
            expected = problem.reference(*problem.inputs)
            _assert_same(_compile(problem.operator)(*problem.inputs), expected, problem.name)


class Obligations(ForwardObligations):
    """The obligations of a differentiable operator."""

    def test_first_derivatives(self) -> None:
        for problem in self.problems():
            inputs = _leaves(problem)
            assert torch.autograd.gradcheck(problem.operator, inputs, check_forward_ad=True)

    def test_second_derivatives(self) -> None:
        for problem in self.problems():
            assert torch.autograd.gradgradcheck(problem.operator, _leaves(problem))

    def test_float32_derivatives_have_the_dtype_of_their_inputs(self) -> None:
        for problem in self.problems():
            inputs = [x.detach().requires_grad_() for x in problem.cast(torch.float32)]
            grads = torch.autograd.grad(_vector(problem.operator(*inputs)).sin().sum(), inputs)
            want = torch.autograd.grad(_vector(problem.reference(*inputs)).sin().sum(), inputs)
            for g, w in zip(grads, want, strict=True):
                assert_close(g, w, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_transform(self, transform: str) -> None:
        for number, problem in enumerate(self.problems()):
            for at, x in enumerate(problem.inputs):
                if transform in COMPILED and (at + number) % len(problem.inputs) != 1:
                    continue  # compiling takes long: one input of each problem, in turn
                torch._dynamo.reset()
                expected = apply(transform, _of_one(problem, problem.reference, at), x)
                actual = apply(transform, _of_one(problem, problem.operator, at), x, _compile)
                _assert_same(actual, expected, f"{problem.name}, input {at}")

    def test_opcheck(self) -> None:
        for overload, args in self.calls():
            torch.library.opcheck(overload, args)


def _compile(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _vector(out: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in _tuple(out)])


def _assert_same(actual: Any, expected: Any, what: str = "") -> None:
    for a, e in zip(_tuple(actual), _tuple(expected), strict=True):
        assert_close(
            a, e, rtol=1e-10, atol=1e-10, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )


def _of_one(problem: Problem, function: Callable[..., Any], at: int) -> Callable[[Tensor], Tensor]:
    """The problem as a function of one input, with its outputs as one vector."""
    before, after = problem.inputs[:at], problem.inputs[at + 1 :]
    return lambda x: _vector(function(*before, x, *after))


def _leaves(problem: Problem) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in problem.inputs]


def _every_second(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x


def _offset(x: Tensor) -> Tensor:
    """The same values one element after an aligned address."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].reshape(x.shape)
