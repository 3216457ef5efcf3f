"""Derivative operators in torch: ctorch, torch's own ways, and torch-jet."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _measure import Case
from _operator_bench import torch_case
from torch import Tensor, nn

Function = Callable[..., Any]


class Opaque(nn.Module):
    """The same layers called from Python code, so that no plain net is recognized."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer for layer in net if isinstance(layer, nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.tanh(layer(x))
        return last(x)


@dataclass(frozen=True)
class Mlp:
    """A tanh net with a batch of points and directions.

    Attributes:
        net: nn.Sequential of Linear and Tanh.
        opaque: the same, not to be recognized.
        x, v: [B, d].
    """

    net: nn.Sequential
    opaque: Opaque
    x: Tensor
    v: Tensor

    @classmethod
    def of(cls, sizes: tuple[int, ...], dtype: torch.dtype, batch: int = 128) -> Mlp:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b, dtype=dtype), nn.Tanh()]
        net = nn.Sequential(*layers[:-1])
        x, v = (torch.randn(batch, sizes[0], dtype=dtype) for _ in range(2))
        return cls(net, Opaque(net), x, v)

    @property
    def weights(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.weight, layer.bias) for layer in self.opaque.layers]

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.net.parameters())

    def exact(self, x: Tensor) -> Tensor:
        """The net in the precision of ``x``, complex too: for references."""
        for i, (w, b) in enumerate(self.weights):
            x = (torch.tanh(x) if i else x) @ w.detach().to(x.dtype).T + b.detach().to(x.dtype)
        return x

    def double(self) -> nn.Sequential:
        return copy.deepcopy(self.net).double()


def trained(loss: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[], Tensor]:
    """The gradient of mean(y ** 2) in the parameters; the first of them is judged."""

    def run() -> Tensor:
        return torch.autograd.grad((loss() ** 2).mean(), parameters, allow_unused=True)[0]

    return run


# ---------------------------------------------------------------- torch's own ways


def tangent(f: Function) -> Function:
    return lambda t: torch.func.jvp(f, (t,), (torch.ones_like(t),))[1]


def nested_directional(problem: Mlp, order: int) -> Tensor:
    f: Function = lambda t: problem.net(problem.x + t * problem.v)  # noqa: E731
    for _ in range(order):
        f = tangent(f)
    return f(torch.zeros((), dtype=problem.x.dtype))


def nested_series(net: Function, x: Tensor, order: int) -> Tensor:
    """``d^order/dt^order`` of the solution of ``x' = net(x)``."""
    g = net
    for _ in range(order - 1):
        g = (lambda h: lambda y: torch.func.jvp(h, (y,), (net(y),))[1])(g)
    return g(x)


def hessian_trace(net: Function, x: Tensor) -> Tensor:
    hessian = torch.func.hessian(lambda y: net(y)[0])
    return torch.vmap(hessian)(x).diagonal(dim1=-2, dim2=-1).sum(-1)


def hvp_loop(f: Function, x: Tensor, *, graph: bool = False) -> Tensor:
    """Laplacian of ``f: [B, d] -> [B]`` by one Hessian-vector product for each coordinate."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        total = torch.zeros_like(g[:, 0])
        for i in range(x.shape[1]):
            (row,) = torch.autograd.grad(g[:, i].sum(), x, retain_graph=True, create_graph=graph)
            total = total + row[:, i]
    return total


def vjp_trace(net: Function, x: Tensor) -> Tensor:
    y, pull = torch.func.vjp(net, x)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    return torch.vmap(lambda e: (pull(e.expand_as(y))[0] * e).sum(-1))(eye).sum(0)


def jacrev_trace(net: Function, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.jacrev(net))(x).diagonal(dim1=-2, dim2=-1).sum(-1)


def hutchinson(net: Function, x: Tensor, probe: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return (torch.autograd.grad(net(x), x, probe)[0] * probe).sum(-1)


# ---------------------------------------------------------------- torch-jet


def torch_jet_directional(problem: Mlp, order: int) -> list[Case]:
    """Eager, and its captured graph after common subexpressions are merged."""
    from jet._jet import jet
    from jet._simplify import common_subexpression_elimination
    from jet.tracing import capture_graph

    x, v = problem.x, problem.v
    series = (x, v, *(torch.zeros_like(v) for _ in range(order - 1)))
    push = jet(problem.net, (x,))
    cases = [torch_case("torch-jet", lambda: push(series)[-1])]
    with contextlib.suppress(Exception), torch.no_grad():
        graph, _ = capture_graph(lambda s: push(s), (series,))
        common_subexpression_elimination(graph.graph)
        graph.recompile()
        cases.append(torch_case("torch-jet, graph", lambda: graph(*series)[-1]))
    return cases


def torch_jet_series(problem: Mlp, order: int) -> Callable[[], Tensor]:
    from jet._jet import jet

    push = jet(problem.net, (problem.x,))

    def run() -> Tensor:
        y = [problem.net(problem.x)]
        for _ in range(1, order):
            y = list(push((problem.x, *y)))
        return y[-1]

    return run


def torch_jet_laplacian(problem: Mlp) -> Callable[[], Tensor]:
    """Collapsed Taylor mode."""
    from jet._jet import jet

    x = problem.x
    batch, d = x.shape
    push = jet(problem.net, (x,), collapsed=True)
    basis = torch.eye(d, dtype=x.dtype)[:, None, :].expand(d, batch, d).contiguous()
    return lambda: push((x, basis, torch.zeros_like(x)))[-1][:, 0]


# ---------------------------------------------------------------- ctorch


def ours_series(net: Function, x: Tensor, order: int) -> Tensor:
    """``d^order/dt^order`` of the solution, as the peers give it; ``net`` alone says no more."""
    import ctorch

    field = (lambda t, y: net(y)) if isinstance(net, Opaque) else ctorch.autodiff.Autonomous(net)
    return ctorch.taylor_series(field, 0.0, x, order)[order] * math.factorial(order)
