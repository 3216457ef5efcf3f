"""What a trace holds on to: tensors are looked up anew, changed values trace again."""

from __future__ import annotations

import argparse
import collections
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctorch.codegen import Traced, Untraceable, clear, guards, trace

Y = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GAIN = 2.0
TABLE = {"scale": 3.0}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    clear()
    yield
    clear()


def traced(func: Callable[..., Any], *args: Any, y: Tensor = Y) -> Traced:
    return trace(func, y, 0.1, args, batched=True)


def linear() -> nn.Module:
    return nn.Linear(2, 2).double()


def test_training_does_not_trace_again() -> None:
    net = linear()
    first = traced(lambda t, y: net(y))
    with torch.no_grad():
        net.weight += 1
    net.bias.data = torch.zeros(2, dtype=torch.float64)
    second = traced(lambda t, y: net(y))
    assert second.field is not first.field  # another lambda, other code
    func = lambda t, y: net(y)  # noqa: E731
    third = traced(func)
    with torch.no_grad():
        net.weight += 1
    assert traced(func).field is third.field
    assert traced(func).shared[0] is net.weight


def test_a_replaced_parameter_is_seen() -> None:
    net = linear()
    func = lambda t, y: net(y)  # noqa: E731
    first = traced(func)
    net.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    second = traced(func)
    assert second.field is first.field
    assert second.shared[0] is net.weight
    assert first.still_valid()
    assert first.shared[0] is net.weight


def test_a_fresh_lambda_of_the_same_code_is_not_traced_again() -> None:
    def make(scale: float, weight: Tensor) -> Callable[..., Tensor]:
        return lambda t, y: scale * y * weight

    first = traced(make(2.0, torch.ones(2).double()))
    weight = torch.zeros(2).double()
    again = traced(make(2.0, weight))
    assert again.field is first.field
    assert again.shared[0] is weight
    assert traced(make(2.5, weight)).field is not first.field
    assert traced(make(2, weight)).field is not first.field


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.scale = 1.0
        self.options = {"depth": 2, "names": ["a", "b"]}
        self.act: Any = torch.tanh
        self.register_buffer("mask", torch.tensor([True, False]))
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        for _ in range(self.options["depth"]):
            y = self.act(self.layer(y)) * self.scale * GAIN * TABLE["scale"]
        y = torch.where(self.mask, y, -y)
        return y if self.training else 2 * y


def change_scale(net: Net) -> None:
    net.scale = 2.0


def change_depth(net: Net) -> None:
    net.options["depth"] = 3


def change_name(net: Net) -> None:
    net.options["names"].append("c")


def change_function(net: Net) -> None:
    net.act = torch.sin


def change_mode(net: Net) -> None:
    net.eval()


def change_layer(net: Net) -> None:
    net.layer = nn.Sequential(linear())


def change_bias(net: Net) -> None:
    net.layer.bias = None


def change_mask(net: Net) -> None:
    net.mask[1] = True


def change_mask_data(net: Net) -> None:
    net.mask = torch.tensor([False, False])


def change_method(net: Net) -> None:
    net.forward = lambda t, y: y  # type: ignore[method-assign]


def add_hook(net: Net) -> None:
    net.layer.register_forward_hook(lambda module, given, result: result + 1)


def add_backward_hook(net: Net) -> None:
    net.layer.register_full_backward_hook(lambda module, given, result: (2 * given[0],))


def add_backward_pre_hook(net: Net) -> None:
    net.layer.register_full_backward_pre_hook(lambda module, result: (2 * result[0],))


def freeze(net: Net) -> None:
    net.layer.weight.requires_grad_(False)


CHANGES = [
    value
    for name, value in list(globals().items())
    if name.startswith(("change_", "add_", "freeze"))
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_value_traces_again(change: Callable[[Net], None]) -> None:
    net = Net()
    first = traced(net)
    assert traced(net).field is first.field
    change(net)
    assert not first.still_valid()
    assert traced(net).field is not first.field


def test_changed_globals_trace_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    first = traced(net)
    monkeypatch.setitem(globals(), "GAIN", 5.0)
    second = traced(net)
    assert second.field is not first.field
    monkeypatch.setitem(TABLE, "scale", 4.0)
    assert traced(net).field is not second.field


@pytest.mark.parametrize(
    "bag", [types.SimpleNamespace(k=1.0), argparse.Namespace(k=1.0), collections.UserDict(k=1.0)]
)
def test_changed_settings_of_the_standard_library_s_objects_trace_again(bag: Any) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * (bag["k"] if isinstance(bag, collections.UserDict) else bag.k)

    first = traced(func)
    assert first.still_valid()
    (bag.data if isinstance(bag, collections.UserDict) else vars(bag))["k"] = 2.0
    assert not first.still_valid()


def test_changed_values_of_modules_within_modules_trace_again() -> None:
    package, part = types.ModuleType("package"), types.ModuleType("package.part")
    package.part, part.package, part.k = part, package, 1.0  # type: ignore[attr-defined]

    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * package.part.package.part.k

    first = traced(func)
    assert first.still_valid()
    part.k = 2.0  # type: ignore[attr-defined]
    assert not first.still_valid()


def test_a_second_module_of_equal_values_uses_the_same_trace() -> None:
    first, other = traced(Net()), Net()
    again = traced(other)
    assert again.field is first.field
    assert any(x is other.layer.weight for x in again.shared)


def test_equal_arrays_are_the_same_and_others_are_not() -> None:
    def make(table: np.ndarray) -> Callable[..., Tensor]:
        return lambda t, y: y * torch.tensor(table)

    first = traced(make(np.ones(2)))
    assert traced(make(np.ones(2))).field is first.field
    assert traced(make(np.array([1.0, 2.0]))).field is not first.field


def test_partials_methods_defaults_and_args_are_compared() -> None:
    def func(t: Tensor, y: Tensor, a: float, *, b: float = 1.0) -> Tensor:
        return a * y + b

    first = traced(functools.partial(func, a=1.0, b=2.0))
    assert traced(functools.partial(func, a=1.0, b=2.0)).field is first.field
    assert traced(functools.partial(func, a=1.0, b=3.0)).field is not first.field
    by_args = traced(func, 1.0)
    assert traced(func, 1.0).field is by_args.field
    assert traced(func, 1.5).field is not by_args.field
    net = Net()
    bound = traced(net.forward)
    assert traced(net.forward).field is bound.field
    net.scale = 7.0
    assert traced(net.forward).field is not bound.field


def test_zero_and_minus_zero_and_one_and_true_differ() -> None:
    def make(a: Any) -> Callable[..., Tensor]:
        return lambda t, y: y * a

    fields = [traced(make(a)).field for a in (0.0, -0.0, 1, True, 1.0, float("nan"))]
    assert len({id(field) for field in fields}) == len(fields)
    assert traced(make(float("nan"))).field is fields[-1]


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = linear()
            self.two = linear()
            self.two.weight = self.one.weight

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(y)))

    net = Tied()
    first = traced(net)
    assert len(first.shared) == 3
    net.two.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    second = traced(net)
    assert second.field is not first.field
    assert len(second.shared) == 4


def test_views_of_one_tensor_stay_together() -> None:
    class Views:
        def __init__(self) -> None:
            self.whole = torch.ones(4).double()
            self.part = self.whole[2:]

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return y * self.whole[:2] * self.part

    func = Views()
    first = traced(func)
    assert traced(func).field is first.field
    func.part = torch.zeros(2).double()
    again = traced(func)
    assert again.field is not first.field


@pytest.mark.parametrize("at_hand", [True, False])
def test_the_fast_test_of_tensors_lets_the_same_ones_pass(
    at_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_hand:  # in another version of PyTorch
        monkeypatch.setattr(guards, "same_form", lambda tensors: None)
    net = nn.Linear(2, 3)
    check = guards.Guards((net, ())).checker([net.weight, net.bias])

    def passes(**data: Tensor) -> bool:
        for name, value in data.items():
            getattr(net, name).data = value
        return check((net, ())) is not None

    assert passes()
    assert not passes(weight=torch.ones(3, 3))
    assert not passes(weight=torch.ones(3, 2).double())
    assert passes(weight=torch.ones(2, 3).t())  # other strides
    net.weight.requires_grad_(False)
    assert not passes()
    net.weight = nn.Parameter(torch.zeros(3, 2))
    assert passes()
    net.bias = None  # type: ignore[assignment]
    assert not passes()


def test_counting_is_no_state_but_other_changes_are() -> None:
    class Counting:
        def __init__(self, step: bool) -> None:
            self.calls = 0
            self.step = step

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return y * self.calls if self.step else y

    class Plain:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return -y

    func = Plain()
    first = traced(func)
    assert traced(func).field is first.field
    with pytest.raises(
        Untraceable, match=r"calls.* is changed by each call|mixes samples, or is random"
    ):
        traced(Counting(True))
    with pytest.raises(Untraceable, match=r"calls.* is changed by each call"):
        traced(Counting(False))


def test_another_batch_size_is_the_same_trace_and_another_sample_is_not() -> None:
    func = lambda t, y: -y  # noqa: E731
    first = traced(func)
    assert traced(func, y=Y.repeat(4, 1)).field is first.field
    assert traced(func, y=Y.repeat(1, 2)).field is not first.field
    assert traced(func, y=Y.float()).field is not first.field


def test_a_result_that_depends_on_the_batch_size_is_not_used_for_another() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * (2.0 if y.shape[0] > 10 else 1.0)

    traced(func)
    with pytest.raises(Untraceable, match="mixes samples"):
        traced(func, y=Y.repeat(10, 1))
