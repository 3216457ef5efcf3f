"""The derivative operators of plain MLPs meet their obligations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ctorch.ops import _mlp_kernels as kernels
from ctorch.ops import _mlp_reference as reference
from ctorch.ops import mlp
from tests.ops.mlp_problems import (
    F64,
    elementary,
    nested_derivative,
    nested_divergence,
    nested_laplacian,
    nested_series,
    net_of,
    net_tensors,
    rand,
)
from tests.ops.obligations import Obligations, Problem

SIZES = st.lists(st.integers(1, 19), min_size=2, max_size=4)
BATCHES = st.sampled_from([0, 1, 2, 3, 7, 33, 70])
NETS = [(3, 2), (4, 7, 3), (2, 17, 5, 3), (5, 3, 4, 2, 3)]


def strict(actual: Any, expected: Any) -> None:
    """Equal to 1e-12 of the largest element."""
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    assert_close(actual, expected, rtol=1e-12, atol=1e-12 * max(scale, 1e-3))


def normalized(y: Tensor, order: int) -> Tensor:
    """The Taylor coefficient, which does not grow with the order as a derivative does."""
    return y / math.factorial(order)


MIXED = [("tanh", "gelu_tanh"), ("gelu", "softplus"), ("relu", "sigmoid"), ("silu", "tanh")]
"""Activations of two hidden layers, which keep different numbers of series."""


def bare(sizes: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor], list[int], list[float]]:
    """A net as the bare operators take it, the second bias missing."""
    tensors = net_tensors(sizes)
    weights, biases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    biases[1] = biases[1][:0]
    kinds = [mlp.ACTIVATIONS.index(name) for name in ("silu", "tanh")[: len(sizes) - 2]]
    return weights, biases, kinds, [0.0] * len(kinds)


class MLPObligations(Obligations):
    """What the operators of an MLP share: nets and batches, and the way to try them."""

    square = False
    makers: tuple[tuple[str, dict[str, Any]], ...] = (("default", {}),)

    def problem(self, tensors: list[Tensor], name: str = "", **settings: Any) -> Problem:
        raise NotImplementedError

    def inputs(self, batch: int, inputs: int, seed: int = 0) -> list[Tensor]:
        return [rand((batch, inputs), seed, self.device)]

    def draw(self, data: st.DataObject) -> Problem:
        sizes = data.draw(SIZES, "sizes")
        if self.square:
            sizes[-1] = sizes[0]
        tame = [name for name in mlp.ACTIVATIONS if name != "exp" or len(sizes) < 4]
        kinds = st.sampled_from(tame)
        each = st.tuples(*[kinds] * (len(sizes) - 2))
        activation = data.draw(kinds | each, "activation")
        bias = data.draw(st.booleans(), "bias")
        batch, seed = data.draw(BATCHES, "batch"), data.draw(st.integers(0, 99), "seed")
        tensors = [0.5 * x for x in net_tensors(sizes, seed, self.device)]
        tensors = tensors if bias else tensors[: len(tensors) // 2]
        settings = data.draw(st.sampled_from([s for _, s in self.makers]), "settings")
        tensors = [*self.inputs(batch, sizes[0], seed), *tensors]
        return self.problem(tensors, activation=activation, bias=bias, **settings)

    def problems(self) -> list[Problem]:
        nets = [(2, 5, 2), (3, 2, 4, 3)] if self.square else [(2, 5, 2), (3, 2, 4, 1)]
        return [
            self.problem([*self.inputs(2, sizes[0]), *net_tensors(sizes)], f"{sizes} {name}", **s)
            for sizes, (name, s) in zip(nets, 2 * self.makers, strict=False)
        ]

    def huge(self) -> Problem:
        sizes = (19, 67, 61, 19)
        settings = self.makers[-1][1]
        return self.problem([*self.inputs(4001, 19), *net_tensors(sizes)], **settings)


class TestDerivative(MLPObligations):
    makers = (("order 3", {"order": 3}), ("order 1", {"order": 1}), ("order 7", {"order": 7}))

    def inputs(self, batch: int, inputs: int, seed: int = 0) -> list[Tensor]:
        return [rand((batch, inputs), seed + i, self.device) for i in (0, 1)]

    def problem(self, tensors: list[Tensor], name: str = "", **settings: Any) -> Problem:
        activation, bias = settings.get("activation", "tanh"), settings.get("bias", True)
        order = settings["order"]
        constant = tensors[-1:] if bias else []  # no derivative depends on the last bias
        tensors = tensors[: len(tensors) - len(constant)]

        def way(function: Callable[..., Any]) -> Callable[..., Any]:
            def of_inputs(x: Tensor, v: Tensor, *ws: Tensor) -> Tensor:
                ws = (*ws, *(b.to(x.dtype) for b in constant))
                return normalized(function(net_of(ws, activation, bias), x, v, order), order)

            return of_inputs

        return Problem(way(mlp.derivative), way(reference.derivative), tuple(tensors), name=name)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        x, v, net = rand((3, 2)), rand((3, 2), 1), bare((2, 5, 4, 3))
        ops, g = torch.ops.ctorch, rand((3, 3), 2)
        kept = ops.mlp_derivative.default(x, v, *net, 3, True)[1]
        return [
            (ops.mlp_derivative.default, (x, v, *net, 3, False)),
            (ops.mlp_derivative_backward.default, (g, kept, x, v, *net, 3)),
        ]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        net, x = net_of(net_tensors((3, 4, 2))), rand((5, 3))
        return [
            (lambda: mlp.derivative(net, x[:, :2], x, 1), ValueError, r"x must be \[..., 3\]"),
            (lambda: mlp.derivative(net, x, x[:, :2], 1), ValueError, r"v must be \[..., 3\]"),
            (lambda: mlp.derivative(net, x, x, -1), ValueError, "order must be an integer >= 0"),
            (lambda: mlp.derivative(net, x.float(), x, 1), TypeError, "x must have .*float64"),
        ]

    def test_law(self) -> None:
        """Homogeneous in the direction, of degree K."""
        net, x, v = net_of(net_tensors((3, 6, 5, 2))), rand((9, 3)), rand((9, 3), 1)
        for order in range(6):
            once, twice = mlp.derivative(net, x, v, order), mlp.derivative(net, x, 2 * v, order)
            assert_close(twice, 2**order * once, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
    @pytest.mark.parametrize("sizes", NETS, ids=str)
    def test_equals_nested_autograd(self, activation: str, sizes: tuple[int, ...]) -> None:
        net = net_of(net_tensors(sizes), activation)
        x, v = self.inputs(3, sizes[0])
        for order in range(5):
            expected = nested_derivative(net, x, v, order)
            for way in (mlp.derivative, reference.derivative):
                strict(way(net, x, v, order), expected)

    def test_directions_broadcast(self) -> None:
        net, x, v = net_of(net_tensors((3, 6, 2))), rand((2, 4, 3)), rand((3,), 1)
        out = mlp.derivative(net, x, v, 2)
        assert out.shape == (2, 4, 2)
        strict(out[1], mlp.derivative(net, x[1], v.expand(4, 3), 2))


class TestSeries(MLPObligations):
    square = True
    makers = (("order 3", {"order": 3}), ("order 1", {"order": 1}), ("order 7", {"order": 7}))

    def problem(self, tensors: list[Tensor], name: str = "", **settings: Any) -> Problem:
        activation, bias = settings.get("activation", "tanh"), settings.get("bias", True)
        order = settings["order"]

        def way(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda x, *ws: function(net_of(ws, activation, bias), x, order)

        return Problem(way(mlp.series), way(reference.series), tuple(tensors), name=name)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        x, net, ops, g = rand((3, 2)), bare((2, 5, 4, 2)), torch.ops.ctorch, rand((4, 3, 2), 2)
        out, kept = ops.mlp_series.default(x, *net, 3, True)
        return [
            (ops.mlp_series.default, (x, *net, 3, False)),
            (ops.mlp_series_backward.default, (g, kept, x, out, *net, 3)),
        ]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        net, x = net_of(net_tensors((3, 4, 2))), rand((5, 3))
        square = net_of(net_tensors((3, 4, 3)))
        return [
            (lambda: mlp.series(net, x, 1), ValueError, "maps 3 to 2"),
            (lambda: mlp.series(square, x[:, 1:], 1), ValueError, r"x must be \[..., 3\]"),
            (lambda: mlp.series(square, x, 1.5), ValueError, "order must"),  # type: ignore[arg-type]
        ]

    def test_law(self) -> None:
        """For a linear field x' = A x the coefficients are A^k x / k!."""
        a, x = rand((3, 3)), rand((2, 3), 1)
        net = mlp.MLP((a,), (None,), "identity")
        out, expected = mlp.series(net, x, 5), x
        for k in range(1, 6):
            expected = expected @ a.t() / k
            strict(out[k], expected)

    @pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
    @pytest.mark.parametrize("sizes", [(3,), (2, 17), (4, 3, 5)], ids=str)
    def test_equals_nested_autograd(self, activation: str, sizes: tuple[int, ...]) -> None:
        net = net_of(net_tensors((*sizes, sizes[0])), activation)
        (x,) = self.inputs(3, sizes[0])
        expected = nested_series(net, x, 5)
        for way in (mlp.series, reference.series):
            strict(way(net, x, 5), expected)


class TestLaplacian(MLPObligations):
    makers = (("with gradient", {"gradient": True}), ("lean", {"gradient": False}))

    def problem(self, tensors: list[Tensor], name: str = "", **settings: Any) -> Problem:
        activation, bias = settings.get("activation", "tanh"), settings.get("bias", True)
        gradient = settings["gradient"]

        def operator(x: Tensor, *ws: Tensor) -> tuple[Tensor, ...]:
            out = mlp.laplacian(net_of(ws, activation, bias), x, gradient=gradient)
            return tuple(part.contiguous() for part in out if part is not None)

        def by_reference(x: Tensor, *ws: Tensor) -> tuple[Tensor, ...]:
            net = net_of(ws, activation, bias)
            value, moved, lap = reference.laplacian(net, x, net.weights[0].t())
            return (value, moved.transpose(1, 2), lap) if gradient else (value, lap)

        return Problem(operator, by_reference, tuple(tensors), name=name)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        x, net, ops, g = rand((3, 2)), bare((2, 5, 4, 1)), torch.ops.ctorch, rand((3, 1), 2)
        rows, moved = rand((4, 5), 3), rand((3, 4, 1), 4)
        calls: list[tuple[Any, tuple[Any, ...]]] = []
        for g_moved in (None, moved):
            gradient = g_moved is not None
            kept = ops.mlp_laplacian.default(x, rows, *net, gradient, True)[3]
            calls += [
                (ops.mlp_laplacian.default, (x, rows, *net, gradient, False)),
                (ops.mlp_laplacian_backward.default, (g, g_moved, g, kept, x, rows, *net)),
            ]
        return calls

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        net, x = net_of(net_tensors((3, 4, 2))), rand((5, 3))
        return [
            (lambda: mlp.laplacian(net, x[:, 1:]), ValueError, r"x must be \[..., 3\]"),
            (lambda: mlp.laplacian(net, x, directions=x[0]), ValueError, "directions must be"),
            (lambda: mlp.laplacian(net, x, directions=x[:, 1:]), ValueError, "directions must"),
        ]

    def test_law(self) -> None:
        """Rotations of the input leave the Laplacian as it is."""
        turn, _ = torch.linalg.qr(rand((4, 4)))
        tensors, x = net_tensors((4, 9, 7, 2)), rand((5, 4))
        net, turned = net_of(tensors), net_of([tensors[0] @ turn, *tensors[1:]])
        strict(mlp.laplacian(turned, x @ turn)[2], mlp.laplacian(net, x)[2])

    @pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
    @pytest.mark.parametrize("sizes", NETS, ids=str)
    def test_equals_nested_autograd(self, activation: str, sizes: tuple[int, ...]) -> None:
        net = net_of(net_tensors(sizes), activation)
        (x,) = self.inputs(3, sizes[0])
        expected = nested_laplacian(net, x)
        for a, e in zip(mlp.laplacian(net, x), expected, strict=True):
            strict(a, e)
        value, gradient, lap = mlp.laplacian(net, x, gradient=False)
        assert gradient is None
        strict(value, expected[0])
        strict(lap, expected[2])

    def test_along_directions(self) -> None:
        net, x, v = net_of(net_tensors((4, 9, 5, 2))), rand((3, 4)), rand((2, 4), 1)
        expected = nested_laplacian(net, x, v)
        for a, e in zip(mlp.laplacian(net, x, directions=v), expected, strict=True):
            strict(a, e)

    def test_gradients_with_more_inputs_than_units(self) -> None:
        """Where the tangents behind the first layer are fewer than the inputs."""
        tensors = [t.requires_grad_() for t in (rand((3, 7)), *net_tensors((7, 2, 3, 1)))]

        def lean(x: Tensor, *ws: Tensor) -> Tensor:
            return mlp.laplacian(net_of(ws), x, gradient=False)[2]

        assert torch.autograd.gradcheck(lean, tensors)
        assert torch.autograd.gradgradcheck(lean, tensors)


class TestDivergence(MLPObligations):
    square = True
    makers = (("closed or forward", {}),)

    def problem(self, tensors: list[Tensor], name: str = "", **settings: Any) -> Problem:
        activation, bias = settings.get("activation", "tanh"), settings.get("bias", True)

        def way(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda x, *ws: function(net_of(ws, activation, bias), x)

        return Problem(way(mlp.divergence), way(nested), tuple(tensors), name=name)

    def problems(self) -> list[Problem]:
        return [
            self.problem([*self.inputs(2, sizes[0]), *net_tensors(sizes)], str(sizes))
            for sizes in [(2, 3, 2), (3, 2, 4, 3), (2, 4, 3, 3, 2), (3, 2, 3, 4, 3)]
        ]

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        x, ops, g, g_trace = rand((3, 2)), torch.ops.ctorch, rand((3, 2), 2), rand((3,), 3)
        net, rows, close = bare((2, 5, 4, 2)), rand((6, 5), 4), rand((6, 4), 5)
        kept = ops.mlp_divergence.default(x, rows, close, *net, True)[2]
        of_closed = ops.mlp_closed_divergence.default(x, *net, True)[2]
        backward = ops.mlp_closed_divergence_backward.default
        return [
            (ops.mlp_divergence.default, (x, rows, close, *net, False)),
            (ops.mlp_divergence_backward.default, (g, g_trace, kept, x, rows, close, *net)),
            (ops.mlp_closed_divergence.default, (x, *net, False)),
            (backward, (g, g_trace, of_closed, x, *net, True)),
            (backward, (None, g_trace, of_closed, x, *net, False)),
        ]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        net, x = net_of(net_tensors((3, 4, 2))), rand((5, 3))
        return [(lambda: mlp.divergence(net, x), ValueError, "maps 3 to 2")]

    def test_law(self) -> None:
        """A change of basis leaves the divergence as it is."""
        a, tensors, x = rand((4, 4)), net_tensors((4, 9, 7, 6, 4)), rand((5, 4))
        inverse = torch.linalg.inv(a)
        net = net_of(tensors[:4], bias=False)
        moved = net_of([tensors[0] @ inverse, *tensors[1:3], a @ tensors[3]], bias=False)
        assert_close(mlp.divergence(moved, x @ a.t())[1], mlp.divergence(net, x)[1])

    @pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
    @pytest.mark.parametrize("hidden", [(), (5,), (2,), (9, 5), (2, 3), (8, 3, 4), (2, 7, 5, 6)])
    def test_equals_nested_autograd(self, activation: str, hidden: tuple[int, ...]) -> None:
        net = net_of([0.5 * t for t in net_tensors((4, *hidden, 4))], activation)
        (x,) = self.inputs(3, 4)
        for way in (mlp.divergence, reference.divergence):
            for a, e in zip(way(net, x), nested_divergence(net, x), strict=True):
                strict(a, e)


def nested(net: mlp.MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    return reference.divergence(net, x)


CALLS: dict[str, Callable[[mlp.MLP, Tensor], Any]] = {
    "derivative": lambda net, x: mlp.derivative(net, x, x, 3),
    "series": lambda net, x: mlp.series(net, x, 3),
    "laplacian": lambda net, x: mlp.laplacian(net, x)[2],
    "divergence": lambda net, x: mlp.divergence(net, x)[1],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("sizes", [(3, 4, 5, 3), (3, 4, 5, 4, 3)], ids=str)
def test_kernels_serve_eager_calls_and_their_gradients(
    name: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels.available("mlp_derivative"):
        pytest.skip("no kernels")

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference was called")

    for function in ("derivative", "series", "laplacian", "divergence", "closed_divergence"):
        monkeypatch.setattr(reference, function, refuse)
    tensors = [t.requires_grad_() for t in net_tensors(sizes)]
    out = CALLS[name](net_of(tensors), rand((5, 3)).requires_grad_())
    torch.autograd.grad(out.sum(), tensors[:2])
    with pytest.raises(AssertionError, match="the reference was called"):
        torch.func.vmap(lambda x: CALLS[name](net_of(tensors), x[None]))(rand((5, 3)))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("sizes", [(20, 300, 70, 20), (20, 90, 300, 70, 20)], ids=str)
def test_many_blocks_give_what_one_sample_at_a_time_gives(
    name: str, sizes: tuple[int, ...]
) -> None:
    tensors = [t.requires_grad_() for t in net_tensors(sizes)]
    net, x, call = net_of(tensors, "sigmoid"), rand((301, 20)), CALLS[name]
    together = call(net, x)
    dim = 1 if name == "series" else 0
    alone = torch.cat([call(net, one) for one in x.split(1)], dim)
    strict(together, alone)
    grads = [torch.autograd.grad(out.sin().sum(), tensors[:4]) for out in (together, alone)]
    for a, e in zip(*grads, strict=True):
        strict(a, e)


@pytest.mark.parametrize("activation", MIXED, ids=str)
def test_layers_of_different_kinds(activation: tuple[str, ...]) -> None:
    """All operators by kernels and by the reference, with gradients of both kinds' layers."""
    tensors = [t.requires_grad_() for t in net_tensors((3, 7, 5, 3))]
    net, x = net_of(tensors, activation), rand((6, 3)).requires_grad_()
    v, (_, _, lap) = rand((6, 3), 9), nested_laplacian(net, x)
    pairs = [
        (mlp.derivative(net, x, v, 3), nested_derivative(net, x, v, 3)),
        (mlp.series(net, x, 4), nested_series(net, x, 4)),
        (mlp.laplacian(net, x)[2], lap),
        (mlp.divergence(net, x)[1], nested_divergence(net, x)[1]),
        (mlp.divergence(net, x)[0], net(x)),
    ]
    for a, e in pairs:
        strict(a, e)
    rows, close = reference.trace_ends(net)
    for a, e in (
        (pairs[0][0], reference.derivative(net, x, v, 3)),
        (pairs[1][0], reference.series(net, x, 4)),
        (pairs[2][0], reference.laplacian(net, x, net.weights[0].t())[2]),
        (pairs[3][0], reference.divergence(net, x, rows, close)[1]),
    ):
        got, expected = (
            torch.autograd.grad(y.sin().sum(), (x, *tensors), materialize_grads=True)
            for y in (a, e)
        )
        for g, h in zip(got, expected, strict=True):
            strict(g, h)


@pytest.mark.parametrize("activation", [*mlp.ACTIVATIONS, *MIXED], ids=str)
def test_kernels_of_every_order_are_the_reference(activation: str | tuple[str, ...]) -> None:
    """Orders that have code of their own and others, whole vectors and what is left of a plane."""
    tensors = [0.5 * t for t in net_tensors((5, 11, 13, 3))]
    inputs = [t.requires_grad_() for t in (*tensors, rand((3, 5), 7), rand((3, 5), 8))]

    def outcome(function: Callable[..., Tensor], order: int, dtype: torch.dtype) -> list[Tensor]:
        *flat, x, v = [t.to(dtype) for t in inputs]
        out = normalized(function(net_of(flat, activation), x, v, order), order)
        found = torch.autograd.grad(out.sin().sum(), inputs, materialize_grads=True)
        return [out, *found]

    for order in range(9):
        expected = outcome(reference.derivative, order, F64)
        for a, e in zip(outcome(mlp.derivative, order, F64), expected, strict=True):
            strict(a, e)
        for a, e in zip(outcome(mlp.derivative, order, torch.float32), expected, strict=True):
            scale = max(float(e.detach().abs().max()), 1e-3)
            assert_close(a.to(F64), e, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_the_sine_of_large_numbers(dtype: torch.dtype) -> None:
    one = torch.ones((1, 1), dtype=dtype)
    net = mlp.MLP((one, one), (None, None), "sin")
    x = torch.tensor([0.5, 8.1e3, -3e4, 1.5e5, -2e6, 4.0, -1.0, 2e7], dtype=dtype)[:, None]
    for order, expected in enumerate((x.sin(), x.cos(), -x.sin())):
        assert_close(mlp.derivative(net, x, torch.ones_like(x), order), expected)


def test_a_result_may_be_changed_in_place() -> None:
    w = net_tensors((3, 4, 3))
    for t in w:
        t.requires_grad_()
    x, grads = rand((5, 3)), []
    for change in (True, False):
        out = mlp.series(net_of(w), x, 3)
        out = out.mul_(2) if change else 2 * out
        grads.append(torch.autograd.grad(out.sin().sum(), w))
    for a, e in zip(*grads, strict=True):
        strict(a, e)


def test_a_tensor_given_twice_has_one_gradient() -> None:
    net, x = net_of(net_tensors((3, 4, 2))), rand((5, 3)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: mlp.derivative(net, x, x, 2), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_go_by_the_reference(dtype: torch.dtype) -> None:
    tensors, x = [t.to(dtype) for t in net_tensors((3, 4, 3))], rand((5, 3)).to(dtype)
    for call in CALLS.values():
        found, exact = (
            call(net_of(tensors), x),
            call(net_of([t.to(F64) for t in tensors]), x.to(F64)),
        )
        assert found.dtype == dtype
        error = (found.to(F64) - exact).abs().max() / exact.abs().max()
        assert error < 30 * torch.finfo(dtype).eps


def test_autocast_is_respected() -> None:
    tensors = [t.float() for t in net_tensors((3, 4, 2))]
    given = net_of(tensors), rand((5, 3)).float(), rand((3,)).float(), 2
    exact = mlp.derivative(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mlp.derivative(*given)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 30 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_a_net_may_be_called() -> None:
    net, x = net_of(net_tensors((3, 4, 2))), rand((5, 3))
    strict(net(x), elementary(net)(x))
