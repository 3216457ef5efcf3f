"""Real nets: derivatives of order one to six, and Laplacians, against other ways to the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ctorch

from .nets import Net, nets
from .operator_list import F64
from .references import circle, error, nested_reverse

NETS = {net.name: net for net in nets()}
every_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
every_net_of_samples = pytest.mark.parametrize(
    "net", [net for net in NETS.values() if not net.mixes], ids=lambda net: net.name
)


def truth(net: Net, order: int) -> list[Tensor]:
    x, v = net.inputs()
    return circle(lambda z: net.elementary(x + z * v), order)


@every_net
def test_the_references_agree(net: Net) -> None:
    x, v = net.inputs()
    expected = truth(net, 3)
    assert error(net.fn(x), expected[0]) < 1e-12
    for got, want in zip(
        nested_reverse(lambda s: net.elementary(x + s * v), 3), expected, strict=True
    ):
        assert error(got, want) < 1e-10


@every_net
def test_jets_to_order_six(net: Net) -> None:
    x, v = net.inputs()
    value, series = ctorch.jet(net.fn, (x,), ([v] + [torch.zeros_like(v)] * 5,))
    for got, want in zip([value, *series], truth(net, 6), strict=True):
        assert error(got, want) < 1e-8


@every_net
def test_derivative_is_the_last_of_the_jet(net: Net) -> None:
    x, v = net.inputs()
    _, series = ctorch.jet(net.fn, (x,), ([v] + [torch.zeros_like(v)] * 3,))
    assert error(ctorch.derivative(net.fn, x, v, order=4), series[-1]) < 1e-12


@every_net_of_samples
def test_laplacians(net: Net) -> None:
    x, _ = net.inputs()
    flat = x.flatten(1)
    w = torch.randn(net.fn(x)[0].shape, generator=torch.Generator().manual_seed(6), dtype=F64)

    def projected(y: Tensor) -> Tensor:
        return (y * w).flatten(1).sum(-1) if y.ndim > 1 else y * w

    value, gradient, laplacian = ctorch.laplacian(
        lambda z: projected(net.fn(z.reshape(z.shape[0], *net.shape[1:]))), flat
    )
    leaf = flat.clone().requires_grad_()
    expected = projected(net.elementary(leaf.reshape(x.shape)))
    (slope,) = torch.autograd.grad(expected.sum(), leaf, create_graph=True)
    trace = torch.zeros(len(x), dtype=F64)
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(slope[:, i].sum(), leaf, retain_graph=True)
        trace = trace + row[:, i]
    for got, want in ((value, expected), (gradient, slope), (laplacian, trace)):
        assert error(got, want) < 1e-9


@every_net_of_samples
def test_laplacians_train_parameters(net: Net) -> None:
    """The gradient of a Laplacian in parameters is that of nested reverse mode."""
    x, _ = net.inputs()
    flat = x[:, :1].flatten(1) if x.ndim == 4 else x.flatten(1)
    rest = x[:, 1:]
    module = getattr(net.fn, "__self__", net.fn)
    parameters = [p for p in module.parameters() if p.requires_grad][:6]

    def build(fn, z: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        z = torch.cat([z.unflatten(1, (1, *x.shape[2:])), rest], 1) if x.ndim == 4 else z
        y = fn(z.reshape(z.shape[0], *net.shape[1:]))
        return y.flatten(1).sum(-1) if y.ndim > 1 else y

    _, _, laplacian = ctorch.laplacian(lambda z: build(net.fn, z), flat)
    got = torch.autograd.grad((laplacian**2).sum(), parameters, allow_unused=True)
    leaf = flat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(build(net.elementary, leaf).sum(), leaf, create_graph=True)
    rows = [
        torch.autograd.grad(slope[:, i].sum(), leaf, create_graph=True)[0][:, i]
        for i in range(flat.shape[1])
    ]
    trace = torch.stack(rows).sum(0)
    want = torch.autograd.grad((trace**2).sum(), parameters, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert error(a, b) < 1e-8
