"""An operator takes the right one of its three ways at each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, func
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ctorch.ops import _op
from ctorch.ops import runge_kutta as rk

Y, K = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])


class Calls(TorchDispatchMode):
    """The names of the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def combine(y: Tensor) -> Tensor:
    return rk.combine(y, K, [0.5, 0.25], 0.1)


def kernel_is_used(call: Any) -> bool:
    with Calls() as calls:
        call()
    return "ctorch.rk_combine.default" in calls.names


def test_torch_still_has_the_private_names() -> None:
    assert _op.KNOWN_TORCH, "this torch lacks a name that ctorch/ops/_op.py needs: see its imports"


def test_fast_apply_is_torchs_own() -> None:
    """What ``Node.apply`` skips: torch's apply must be a classmethod over one in C++."""
    assert isinstance(vars(torch.autograd.Function)["apply"], classmethod)
    assert hasattr(torch.autograd.Function.__mro__[1], "apply")


def test_kernel_serves_eager_calls_and_single_transforms() -> None:
    tangent = torch.ones(2)
    assert kernel_is_used(lambda: combine(Y))
    assert kernel_is_used(lambda: combine(Y.clone().requires_grad_()))
    assert kernel_is_used(lambda: func.grad(lambda y: combine(y).sum())(Y))
    assert kernel_is_used(lambda: func.vmap(combine)(torch.stack([Y, Y])))
    assert kernel_is_used(lambda: func.jvp(combine, (Y,), (tangent,)))


def test_reference_serves_forward_over_forward() -> None:
    def push(f: Any) -> Any:
        return lambda y: func.jvp(f, (y,), (torch.ones(2),))[1]

    assert not kernel_is_used(lambda: push(push(combine))(Y))


def test_reference_serves_a_torch_that_is_not_known(monkeypatch: Any) -> None:
    monkeypatch.setattr(_op, "KNOWN_TORCH", False)

    def reference(x: Tensor) -> Tensor:
        return x

    assert _op._choose(lambda x: None, None, reference, 1) is reference


def test_compiled_graph_holds_one_operator() -> None:
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    assert_close(torch.compile(combine, fullgraph=True, backend=keep)(Y), combine(Y))
    assert "ctorch.rk_combine" in graphs[0].print_readable(print_output=False)
