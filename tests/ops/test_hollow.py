"""The operators of hollow nets meet their obligations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ctorch.ops import _hollow_reference as reference
from ctorch.ops import hollow as ops
from ctorch.ops.hollow import ACTIVATIONS, Transformer, transform
from tests.ops.obligations import Obligations, Problem, needs_cuda

F64 = torch.float64
BETA = 1.3  # of softplus
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda z: F.softplus(z, BETA),
    "exp": torch.exp,
    "sin": torch.sin,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


def rand(shape: Sequence[int], seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=F64).to(device)


def nets(
    groups: int,
    context: int,
    widths: Sequence[int],
    seed: int,
    device: str = "cpu",
    activation: str = "",
) -> list[Tensor]:
    """Weights, then biases, of G transformers; small weights where numbers grow."""
    weights, biases, inputs = [], [], 1 + context
    for at, outputs in enumerate([*widths, 1]):
        scale = (0.25 if activation == "exp" else 1) * inputs**-0.5
        weights.append(scale * rand((groups, outputs, inputs), seed + 2 * at, device))
        biases.append(0.5 * rand((groups, outputs), seed + 2 * at + 1, device))
        inputs = outputs
    return [*weights, *biases]


def made(parameters: Sequence[Tensor], activation: str) -> Transformer:
    half = len(parameters) // 2
    return Transformer(tuple(parameters[:half]), tuple(parameters[half:]), activation, BETA)


def plain(x: Tensor, h: Tensor, transformer: Transformer) -> Tensor:
    """The nets' value, written without a thought of speed."""
    y = torch.cat([x.unsqueeze(-1), h], -1)
    for at, (w, b) in enumerate(zip(transformer.weights, transformer.biases, strict=True)):
        if at:
            y = PLAIN[transformer.activation](y)
        y = (w * y.unsqueeze(-2)).sum(-1) + b
    return y.squeeze(-1)


class TestTransform(Obligations):
    def problem(
        self,
        lead: Sequence[int],
        groups: int,
        context: int,
        widths: Sequence[int],
        activation: str,
        order: int,
        seed: int = 0,
    ) -> Problem:
        d = lead[-1]
        x, h = rand(lead, seed, self.device), rand((*lead, context), seed + 1, self.device)
        number = ACTIVATIONS.index(activation)

        def operator(x: Tensor, h: Tensor, *parameters: Tensor) -> Tensor:
            return transform(x, h, made(parameters, activation), order)

        def plainly(x: Tensor, h: Tensor, *parameters: Tensor) -> Tensor:
            rows = math.prod(lead[:-1])
            theta = ops.packed(made(parameters, activation))
            flat = x.reshape(rows, d), h.reshape(rows, d, context)
            out = reference.transform(*flat, theta, widths, number, BETA, order)
            return out.reshape(order + 1, *lead)

        inputs = (x, h, *nets(groups, context, widths, seed + 2, self.device, activation))
        name = f"{activation}, order {order}, groups {groups}, widths {list(widths)}"
        slack = 3.0 ** len(widths) * (1 + order)
        return Problem(operator, plainly, inputs, name=name, slack=slack)

    def draw(self, data: st.DataObject) -> Problem:
        lead = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 17]), max_size=2), "leading dims")
        d = data.draw(st.sampled_from([0, 1, 2, 3]), "d")
        return self.problem(
            (*lead, d),
            data.draw(st.sampled_from([1, d]), "groups") if d else 1,
            data.draw(st.sampled_from([0, 1, 3, 16, 17]), "H"),
            data.draw(
                st.lists(st.sampled_from([1, 3, 8, 15, 16, 17, 33]), max_size=3), "hidden layers"
            ),
            data.draw(st.sampled_from(ACTIVATIONS), "activation"),
            data.draw(st.integers(0, 6), "order"),
            data.draw(st.integers(0, 1000), "seed"),
        )

    def problems(self) -> list[Problem]:
        return [
            self.problem((3, 2), 2, 2, [3], "tanh", 1),
            self.problem((2,), 1, 1, [2, 3], "silu", 2),
        ]

    def huge(self) -> Problem:
        return self.problem((40_013, 5), 1, 7, [20], "tanh", 3)

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        x, h = rand((3, 2), 1, self.device), rand((3, 2, 2), 2, self.device)
        theta = ops.packed(made(nets(2, 2, [3], 3, self.device), "tanh"))
        args = (*(t.requires_grad_() for t in (x, h, theta)), [3], 2, 0.0, 1)
        return [(torch.ops.ctorch.hollow_transform.default, args)]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        x, h = rand((4, 2), 1), rand((4, 2, 3), 2)
        weights, biases, *_ = tau = made(nets(2, 3, [5], 3), "tanh")
        return [
            (lambda: transform([1.0], h, tau), TypeError, "x must be a tensor, got list"),
            (lambda: transform(x.half(), h, tau), TypeError, "x must .* got torch.float16"),
            (lambda: transform(x[0, 0], h, tau), ValueError, "x must .* 0-dim"),
            (lambda: transform(x, h[:3], tau), ValueError, r"h must be \[4, 2, H\].*\(3, 2, 3\)"),
            (lambda: transform(x, h.float(), tau), TypeError, "h must have the dtype of x"),
            (lambda: transform(x, h, tau, -1), ValueError, "order must .* -1"),
            (lambda: transform(x, h, tau, True), ValueError, "order must .* True"),
            (
                lambda: transform(x, h, tau._replace(activation="step")),
                ValueError,
                "activation must .* 'step'",
            ),
            (
                lambda: transform(x, h, Transformer(weights, biases, "softplus", 0.0)),
                ValueError,
                "param.* positive, got 0.0",
            ),
            (
                lambda: transform(x, h, tau._replace(biases=biases[:1])),
                ValueError,
                "weights and biases .* 2 and 1",
            ),
            (
                lambda: transform(x, h[..., :2], tau),
                ValueError,
                r"weights\[0\] must be \[2, 5, 3\], got \(2, 5, 4\)",
            ),
            (
                lambda: transform(x, h, tau._replace(weights=(weights[0], weights[0]))),
                ValueError,
                r"weights\[1\] must be \[2, 1, 5\]",
            ),
            (
                lambda: transform(x, h, tau._replace(biases=(biases[1], biases[1]))),
                ValueError,
                r"biases\[0\] must be \[2, 5\], got \(2, 1\)",
            ),
            (
                lambda: transform(rand((4, 3), 1), rand((4, 3, 3), 2), tau),
                ValueError,
                r"weights\[0\] must have a first dim of 1 .* or 3",
            ),
            (
                lambda: transform(x, h, tau._replace(weights=(weights[0].float(), weights[1]))),
                TypeError,
                r"weights\[0\] must have the dtype of x",
            ),
        ]

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_law(self, activation: str) -> None:
        """Coefficients are derivatives in x over factorials: against nested autograd."""
        for groups, widths in [(1, [6]), (3, [4, 5]), (3, []), (1, [3, 4, 2])]:
            x, h = rand((7, 3), 1, self.device).requires_grad_(), rand((7, 3, 2), 2, self.device)
            tau = made(nets(groups, 2, widths, 3, self.device, activation), activation)
            out = transform(x.detach(), h, tau, 6)
            derivative = plain(x, h, tau)
            for k in range(7):
                expected = derivative / math.factorial(k)
                assert_close(out[k], expected.detach(), rtol=1e-9, atol=1e-9)
                if k < 6 and derivative.requires_grad:
                    (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
                elif k < 6:
                    derivative = torch.zeros_like(x)


class TestGradient(TestTransform):
    """Of the bare operator: g, x, h and theta in, cotangents of x, h and theta out."""

    def problem(
        self,
        lead: Sequence[int],
        groups: int,
        context: int,
        widths: Sequence[int],
        activation: str,
        order: int,
        seed: int = 0,
    ) -> Problem:
        rows, d, widths = math.prod(lead[:-1]), lead[-1], widths or [4]
        rest = widths, ACTIVATIONS.index(activation), BETA, order
        x, h = rand((rows, d), seed, self.device), rand((rows, d, context), seed + 1, self.device)
        parameters = nets(groups, context, widths, seed + 2, self.device, activation)
        theta = ops.packed(made(parameters, activation))
        g = rand((order + 1, rows, d), seed + 3, self.device)
        return Problem(
            lambda *xs: ops.hollow_gradient(*xs, *rest),
            lambda *xs: reference.gradient(*xs, *rest),
            (g, x, h, theta),
            name=f"{activation}, order {order}, groups {groups}, widths {list(widths)}",
            slack=10.0 * 3.0 ** len(widths) * (1 + order) * (1 + rows) ** 0.5,
        )

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        ((_, args),) = super().calls()
        g = rand((2, 3, 2), 5, self.device).requires_grad_()
        return [(torch.ops.ctorch.hollow_gradient.default, (g, *args))]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        return []  # the public function checks

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_law(self, activation: str) -> None:
        """It is the gradient: against autograd through the nets' value and its derivative."""
        for groups, widths in [(1, [6]), (3, [4, 5])]:
            x, h = rand((7, 3), 1, self.device), rand((7, 3, 2), 2, self.device)
            parameters = nets(groups, 2, widths, 3, self.device, activation)
            leaves = [t.requires_grad_() for t in (x, h, *parameters)]
            tau, g = made(parameters, activation), rand((2, 7, 3), 4, self.device)
            value = plain(x, h, tau)
            (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            both = (g[0] * value + g[1] * slope).sum()
            expected = torch.autograd.grad(both, leaves, materialize_grads=True)
            found = torch.autograd.grad((g * transform(x, h, tau, 1)).sum(), leaves)
            for a, e in zip(found, expected, strict=True):
                assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_nan_stays_in_its_row() -> None:
    for activation in ACTIVATIONS:
        x, h = rand((40, 2), 1), rand((40, 2, 3), 2)
        x[3, 1], h[20, 0, 2] = torch.nan, torch.nan
        out = transform(x, h, made(nets(2, 3, [5], 3), activation), 1)[0]
        bad = out.isnan()
        assert bad[3, 1], activation
        assert bad[20, 0], activation
        assert bad.sum() == 2, activation


def test_infinite_rows_do_not_spread() -> None:
    x, h = rand((40, 2), 1), rand((40, 2, 3), 2)
    tau = made(nets(2, 3, [5], 3), "tanh")
    expected = transform(x, h, tau, 4)
    x[3, 1] = torch.inf
    out = transform(x, h, tau, 4)
    keep = torch.ones(40, 2, dtype=torch.bool)
    keep[3, 1] = False
    assert torch.equal(out[:, keep], expected[:, keep])
    assert out[0, 3, 1].isfinite()


def test_orders_and_depths_beyond_the_kernels_are_served_by_the_reference() -> None:
    x, h = rand((3, 2), 1), rand((3, 2, 1), 2)
    tau = made(nets(1, 1, [3], 3), "sin")
    high = transform(x, h, tau, ops.MAX_ORDER + 1)
    assert_close(high[:-1], transform(x, h, tau, ops.MAX_ORDER), rtol=1e-12, atol=1e-12)
    deep = made(nets(1, 1, [3] * (ops.MAX_HIDDEN + 1), 3), "tanh")
    assert_close(transform(x, h, deep)[0], plain(x, h, deep), rtol=1e-12, atol=1e-12)


def test_one_net_for_all_equals_its_copies() -> None:
    x, h, parameters = rand((9, 4), 1), rand((9, 4, 3), 2), nets(1, 3, [5, 6], 3)
    copies = [p.expand(4, *p.shape[1:]) for p in parameters]
    one, many = (transform(x, h, made(p, "gelu"), 3) for p in (parameters, copies))
    assert_close(one, many, rtol=1e-14, atol=1e-14)


class OnCuda:
    device = "cuda"
    pytestmark = needs_cuda


class TestTransformOnCuda(OnCuda, TestTransform): ...


class TestGradientOnCuda(OnCuda, TestGradient): ...
