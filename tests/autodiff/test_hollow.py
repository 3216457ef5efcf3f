"""Derivatives of hollow nets in each dimension, against autograd with contexts held fixed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ctorch
from ctorch.autodiff import Hollow, check_hollow
from ctorch.autodiff.hollow import as_hollow
from ctorch.nn._hollow import HollowNet
from ctorch.ops.hollow import transform
from ctorch.testing import check_gradients
from tests.nn.hollow_nets import F64, NETS, make, points

EXACT = pytest.mark.parametrize("name", NETS)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def by_autograd(net: Any, x: Tensor, order: int, t: Any) -> tuple[Tensor, Tensor]:
    """The reference: k backward passes through tau, the contexts detached."""
    hollow = as_hollow(net)
    h = hollow.conditioner(t, x).detach()
    x = x.detach().requires_grad_()
    value = last = Hollow(lambda t, x: h, hollow.transformer)(t, x)
    found = []
    for _ in range(order):
        (last,) = torch.autograd.grad(last.sum(), x, create_graph=True)
        found.append(last)
    return value, torch.stack(found)


pytestmark = pytest.mark.filterwarnings("error")


def by_full_jacobian(net: Any, x: Tensor, t: Tensor) -> Tensor:
    """``d f_i / d x_i``, and nothing is known of the net; differentiable."""

    def f(t: Tensor, x: Tensor) -> Tensor:
        if not isinstance(net, HollowNet):
            return net(t, x)
        return transform(x, net.conditioner(t, x), net.transformer())[0]

    rows = torch.func.vmap(torch.func.jacrev(f, argnums=1))(t, x)
    return rows.diagonal(dim1=-2, dim2=-1)


class Relaxation(nn.Module):
    """A hollow net of a user: ``-s (x - net(t, x)^2)``, with tau as a function."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.rates = nn.Parameter(torch.linspace(1, 2, 5, dtype=F64))

    def forward(self, t: Any, x: Tensor) -> Tensor:
        return -self.rates * (x - self.net(t, x) ** 2)

    def __ctorch_hollow__(self) -> Hollow:
        transformer = self.net.transformer()

        def tau(t: Any, x: Tensor, h: Tensor) -> Tensor:
            return -self.rates * (x - transform(x, h, transformer)[0] ** 2)

        return Hollow(self.net.conditioner, tau)


@EXACT
@pytest.mark.parametrize("d", [1, 2, 5, 20])
def test_all_orders_are_those_of_autograd(name, d):
    net = make(name, d)
    t, x = points(d)
    for order in (1, 2, 4, 7):
        value, derivatives = ctorch.dimwise_derivative(net, x, order, t)
        expected = by_autograd(net, x, order, t)
        assert derivatives.shape == (order, 3, d)
        assert_close(value, expected[0], **CLOSE)
        scale = torch.tensor([math.factorial(k) for k in range(1, order + 1)], dtype=F64)
        assert_close(
            derivatives / scale[:, None, None], expected[1] / scale[:, None, None], **CLOSE
        )


@EXACT
def test_the_first_derivative_is_the_diagonal_of_the_whole_jacobian(name):
    net = make(name)
    t, x = points()
    value, derivatives = ctorch.dimwise_derivative(net, x, t=t)
    assert_close(value, net(t, x), **CLOSE)
    assert_close(derivatives[0], by_full_jacobian(net, x, t), **CLOSE)
    as_made, div = ctorch.divergence(net, x, method="hollow", t=t)
    assert torch.equal(as_made, value)
    assert_close(div, derivatives[0].sum(-1), **CLOSE)


@EXACT
def test_general_operators_agree(name):
    net = make(name)
    t, x = points()

    def f(x: Tensor) -> Tensor:
        return net(t[: x.shape[0]] if x.ndim > 1 else t[0], x)

    _, derivatives = ctorch.dimwise_derivative(net, x, 4, t)
    assert_close(ctorch.divergence(f, x)[1], derivatives[0].sum(-1), **CLOSE)
    for i in (0, 4):
        direction = torch.eye(5, dtype=F64)[i].expand_as(x)
        for order in (1, 2, 3, 4):
            got = ctorch.derivative(f, x, direction, order)[:, i]
            assert_close(got, derivatives[order - 1, :, i], rtol=1e-10, atol=1e-10)
        # d^2 f_i / dx_i^2 is what the Laplacian of f_i in x_i alone is
        apart = torch.where(direction > 0, 1.0, 0.0)[0].diag().to(F64)
        _, _, lap = ctorch.laplacian(lambda x, i=i: f(x)[..., i], x, weight=apart)
        assert_close(lap, derivatives[1, :, i], rtol=1e-10, atol=1e-10)


@EXACT
def test_training_differentiates_through_the_contexts_too(name):
    net = make(name)
    t, x = points()
    x.requires_grad_()
    leaves = [x, *net.parameters()]
    loss = ctorch.divergence(net, x, method="hollow", t=t)[1].square().sum()
    full = by_full_jacobian(net, x, t).sum(-1).square().sum()
    got = torch.autograd.grad(loss, leaves, allow_unused=True)
    expected = torch.autograd.grad(full, leaves, allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None) or not (g if e is None else e).any()
        if g is not None and e is not None:
            assert_close(g, e, rtol=1e-11, atol=1e-11)
    assert bool((got[0] != 0).all())


@pytest.mark.parametrize("name", ["mlp", "sum", "attention, sets"])
def test_twice_differentiable_in_everything(name):
    options = {"hidden": (3,), "context": 2}
    net = make(name, 3, **options)
    t, x = points(3, 2)

    def all_orders(t: Tensor, x: Tensor) -> Tensor:
        return torch.cat(ctorch.dimwise_derivative(net, x, 2, t)[1].unbind(0))

    check_gradients(all_orders, (t, x), order=2, examples=2)


@EXACT
def test_transforms_and_compilation_see_through(name):
    net = make(name)
    t, x = points()
    _, expected = ctorch.dimwise_derivative(net, x, 2, t)

    def second(t: Tensor, x: Tensor) -> Tensor:
        return ctorch.dimwise_derivative(net, x, 2, t)[1][1]

    def total(x: Tensor) -> Tensor:
        return ctorch.divergence(net, x, method="hollow", t=t)[1].square().sum()

    assert_close(torch.func.vmap(second)(t, x), expected[1], **CLOSE)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    (twice,) = torch.autograd.grad((grad * x).sum(), leaf)
    assert_close(torch.func.grad(total)(x), grad, **CLOSE)
    assert_close(torch.func.jvp(total, (x,), (x,))[1], (grad * x).sum(), **CLOSE)
    assert_close(
        torch.func.jvp(torch.func.grad(total), (x,), (x,))[1], twice, rtol=1e-10, atol=1e-10
    )
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    (again,) = torch.autograd.grad(compiled(leaf), leaf)
    assert_close(again, grad, **CLOSE)


def test_ensembles_map_over_parameters():
    nets = [NETS["mlp"](3, dtype=F64) for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(nets)
    t, x = points(3)

    class Divergence(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return ctorch.divergence(self.net, x, method="hollow", t=t)[1]

    parameters = {f"net.{key}": value for key, value in parameters.items()}
    buffers = {f"net.{key}": value for key, value in buffers.items()}
    whole = Divergence(nets[0])

    def one(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(whole, (p, b), (t, x))

    got = torch.func.vmap(one)(parameters, buffers)
    expected = torch.stack([Divergence(net)(t, x) for net in nets])
    assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "attention, sets"])
def test_a_function_in_the_place_of_a_transformer(name):
    net = Relaxation(make(name))
    t, x = points()
    check_hollow(net, x, t)
    value, derivatives = ctorch.dimwise_derivative(net, x, 4, t)
    expected = by_autograd(net, x, 4, t)
    assert_close(value, net(t, x), **CLOSE)
    assert_close(derivatives, expected[1], rtol=1e-11, atol=1e-11)
    assert_close(derivatives[0], by_full_jacobian(net, x, t), **CLOSE)
    loss = derivatives[1].square().sum()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, list(net.parameters())))


def test_a_function_of_the_context_alone_has_derivatives_zero():
    class Constant:
        def __call__(self, t: Any, x: Tensor) -> Tensor:
            return x.flip(-1)

        def __ctorch_hollow__(self) -> Hollow:
            return Hollow(lambda t, x: x.flip(-1).unsqueeze(-1), lambda t, x, h: h.squeeze(-1))

    x = torch.randn(3, 4)
    check_hollow(Constant(), x)
    value, derivatives = ctorch.dimwise_derivative(Constant(), x, 2)
    assert torch.equal(value, x.flip(-1))
    assert not derivatives.any()


@EXACT
@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (2, 3)])
def test_batches_of_any_shape(name, batch):
    net = make(name)
    x = torch.randn(*batch, 5, dtype=F64)
    value, derivatives = ctorch.dimwise_derivative(net, x, 3, 0.5)
    assert (value.shape, derivatives.shape) == (x.shape, (3, *x.shape))
    flat = ctorch.dimwise_derivative(net, x.reshape(-1, 5), 3, 0.5)[1]
    assert_close(derivatives.reshape(3, -1, 5), flat, **CLOSE)
    assert ctorch.divergence(net, x, method="hollow", t=0.5)[1].shape == batch
    none = ctorch.dimwise_derivative(net, x, 0, 0.5)[1]
    assert none.shape == (0, *x.shape)


def test_float32_is_float64_rounded():
    for name in NETS:
        net = make(name)
        t, x = points()
        expected = ctorch.dimwise_derivative(net, x, 4, t)[1]
        got = ctorch.dimwise_derivative(net.float(), x.float(), 4, t.float())[1]
        assert got.dtype == torch.float32
        assert_close(
            got.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max())
        )


class TestCheck:
    def test_a_leak_is_named_by_its_dimension(self):
        class Leaky(Relaxation):
            def __ctorch_hollow__(self) -> Hollow:
                halves = super().__ctorch_hollow__()

                def conditioner(t: Any, x: Tensor) -> Tensor:
                    h = halves.conditioner(t, x)
                    return torch.cat(
                        [h[..., :3, :], h[..., 3:4, :] + 1e-13 * x[..., 3:4, None], h[..., 4:, :]],
                        -2,
                    )

                return Hollow(conditioner, halves.transformer)

        t, x = points()
        with pytest.raises(
            ValueError, match=r"h\[\.\.\., 3, :\] depends on x\[\.\.\., 3\] .*e-1[34],"
        ):
            check_hollow(Leaky(make("mlp")), x, t)

    @pytest.mark.parametrize("of", ["x", "h"])
    def test_a_transformer_that_mixes_dimensions_is_named(self, of):
        def tau(t: Any, x: Tensor, h: Tensor) -> Tensor:
            return x * h[..., 0] + 0.1 * (x if of == "x" else h[..., 0]).roll(1, -1)

        class Mixed:
            def __call__(self, t: Any, x: Tensor) -> Tensor:
                return x

            def __ctorch_hollow__(self) -> Hollow:
                return Hollow(make("sum").conditioner, tau)

        t, x = points()
        with pytest.raises(ValueError, match=rf"value 0 depends on {of}\[\.\.\., 4"):
            check_hollow(Mixed(), x, t)

    def test_a_call_that_is_not_the_two_halves_is_named(self):
        class Scaled(Relaxation):
            def forward(self, t: Any, x: Tensor) -> Tensor:
                return 2 * super().forward(t, x)

        t, x = points()
        with pytest.raises(ValueError, match="Scaled called at x is not what"):
            check_hollow(Scaled(make("mlp")), x, t)

    def test_a_conditioner_of_a_wrong_shape_is_named(self):
        class Flat:
            def __ctorch_hollow__(self) -> Hollow:
                return Hollow(lambda t, x: x, lambda t, x, h: x)

        with pytest.raises(ValueError, match=r"must return h \(3, 5, H\), got \(3, 5\)"):
            check_hollow(Flat(), points()[1])

    def test_it_needs_a_point(self):
        with pytest.raises(ValueError, match="at least one sample"):
            check_hollow(make("mlp"), torch.zeros(0, 5), 0.0)


def test_what_is_not_hollow_is_refused_with_the_way_out():
    x = torch.zeros(2, 3)
    for f in (nn.Linear(3, 3), torch.sin, nn.Sequential(NETS["mlp"](3))):
        with pytest.raises(TypeError, match=r'expected a hollow net.*method="exact"'):
            ctorch.dimwise_derivative(f, x)
        with pytest.raises(TypeError, match="expected a hollow net"):
            ctorch.divergence(f, x, method="hollow")

    class Wrong:
        def __ctorch_hollow__(self) -> int:
            return 3

    with pytest.raises(TypeError, match=r"Wrong.__ctorch_hollow__\(\) must return .*got int"):
        ctorch.dimwise_derivative(Wrong(), x)


def test_a_net_that_is_changed_from_outside_is_not_taken_for_what_it_was():
    class Doubled(type(make("mlp"))):  # type: ignore[misc]
        def forward(self, t: Any, x: Tensor) -> Tensor:
            return 2 * super().forward(t, x)

    hooked, patched = make("mlp", 3), make("mlp", 3)
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    patched.forward = lambda t, x: x
    x = torch.zeros(2, 3, dtype=F64)
    for net in (Doubled(3, dtype=F64), hooked, patched):
        with pytest.raises(TypeError, match="says that it is not, now"):
            ctorch.divergence(net, x, method="hollow", t=0.0)


def test_wrong_arguments_are_named():
    net, x = make("mlp", 3), torch.zeros(2, 3, dtype=F64)
    for wrong, error, match in (
        ({"order": 1.0}, TypeError, "order: expected an int, got float"),
        ({"order": True}, TypeError, "order: expected an int"),
        ({"order": -1}, ValueError, "order: expected >= 0"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError, "x: expected floating point"),
        ({"x": torch.zeros(())}, ValueError, "without dims"),
        ({"t": None}, ValueError, "t: this net takes time"),
    ):
        with pytest.raises(error, match=match):
            ctorch.dimwise_derivative(net, **{"x": x, "t": 0.0, **wrong})
    with pytest.raises(ValueError, match='probes, noise: method="hollow" uses none'):
        ctorch.divergence(net, x, method="hollow", t=0.0, probes=3)
    with pytest.raises(ValueError, match=r't: method="exact".*lambda x: f\(t, x\)'):
        ctorch.divergence(lambda x: x, x, t=0.0)


def test_results_have_the_dtype_of_the_nets_value():
    """Single points and contexts of a net in double precision, say."""

    def conditioner(t: Any, x: Tensor) -> Tensor:
        return (x.sum(-1, keepdim=True) - x).double().unsqueeze(-1)

    class Mixed:
        def __ctorch_hollow__(self) -> Hollow:
            return Hollow(conditioner, lambda t, x, h: x * x * h[..., 0])

    x = torch.rand(4, 3)
    value, derivatives = ctorch.dimwise_derivative(Mixed(), x, 2)
    h = conditioner(None, x)[..., 0]
    assert (value.dtype, derivatives.dtype) == (F64, F64)
    assert_close(derivatives, torch.stack([2 * x * h, 2 * h]))
