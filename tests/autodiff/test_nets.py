"""Real nets: derivatives of order one to six, and Laplacians, against other ways to the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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


def scalar(net: Net, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A random projection of each sample's output, [B, d] -> [B]."""
    outputs = net.fn(net.inputs()[0])[0].numel()
    w = torch.randn(outputs, generator=torch.Generator().manual_seed(6), dtype=F64)
    return lambda z: (fn(z.reshape(z.shape[0], *net.shape[1:])).reshape(z.shape[0], -1) * w).sum(-1)


def elementary_laplacian(
    net: Net, x: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = scalar(net, net.elementary)(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    trace = torch.zeros(len(x), dtype=F64)
    for i in range(x.shape[1]):
        (row,) = torch.autograd.grad(
            slope[:, i].sum(), leaf, retain_graph=True, create_graph=create_graph
        )
        trace = trace + row[:, i]
    return value, slope, trace


@every_net_of_samples
def test_laplacians(net: Net) -> None:
    x = net.inputs()[0].flatten(1)
    got = ctorch.laplacian(scalar(net, net.fn), x)
    for a, b in zip(got, elementary_laplacian(net, x), strict=True):
        assert error(a, b) < 1e-9


@every_net_of_samples
def test_laplacians_train_parameters(net: Net) -> None:
    """The gradient of a Laplacian in parameters is that of nested reverse mode."""
    x = net.inputs()[0][:1].flatten(1)
    module = net.fn
    assert isinstance(module, nn.Module)
    parameters = list(module.parameters())
    losses = (
        (laplacian**2 + laplacian).sum()
        for laplacian in (
            ctorch.laplacian(scalar(net, net.fn), x)[2],
            elementary_laplacian(net, x, create_graph=True)[2],
        )
    )
    got, want = (
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for loss in losses
    )
    largest = max(float(b.abs().max()) for b in want)
    for a, b in zip(got, want, strict=True):
        assert error(a, b, floor=1e-6 * largest) < 1e-8


def test_a_convolution_of_one_channel_that_varies() -> None:
    """The others are constants joined to it: rows that are known to be sparse stay right."""
    net = NETS["ResNet, eval"]
    x = net.inputs()[0]
    rest = x[:1, 1:]

    def build(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def joined(z: Tensor) -> Tensor:
            channel = z.unflatten(1, (1, *x.shape[2:]))
            return fn(torch.cat([channel, rest.expand(len(z), -1, -1, -1)], 1))[..., 0]

        return joined

    flat = x[:, :1].flatten(1)
    got = ctorch.laplacian(build(net.fn), flat)[2]
    leaf = flat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(build(net.elementary)(leaf).sum(), leaf, create_graph=True)
    rows = [
        torch.autograd.grad(slope[:, i].sum(), leaf, retain_graph=True)[0][:, i]
        for i in range(flat.shape[1])
    ]
    assert error(got, torch.stack(rows).sum(0)) < 1e-9
