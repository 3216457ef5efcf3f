"""Gradients reach every tensor that the vector field uses, once, without being listed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch

from .problems import F64, Net, differences, frozen, leaf, same, times

MODES = ["backprop", "checkpoint", "adjoint"]
every_mode = pytest.mark.parametrize("gradient", MODES)
every_exact_mode = pytest.mark.parametrize("gradient", MODES[:2])
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def solve(func: Callable[..., Any], y0: Tensor, gradient: str, **how: Any) -> Tensor:
    settings: dict[str, Any] = {**TIGHT, **how}
    return ctorch.solve_ode(func, y0, times(0.0, 0.4, 1.0), gradient=gradient, **settings).y


def check(make: Callable[[], Callable[..., Any]], wanted: list[Tensor], gradient: str) -> None:
    """``make()`` builds the field anew from the tensors ``wanted``."""
    y0 = torch.tensor([0.4, -0.7], dtype=F64)

    def loss() -> Tensor:
        return solve(make(), y0, gradient).square().sum()

    got = torch.autograd.grad(loss(), wanted)
    same(got, [differences(loss, x) for x in wanted], 1e-6)


@every_mode
def test_a_closure_gives_gradients(gradient: str) -> None:
    matrix = leaf(2, 2)
    check(lambda: lambda t, y: torch.tanh(y @ matrix), [matrix], gradient)


@every_mode
def test_a_tensor_that_was_computed_gives_gradients_to_what_it_came_from(gradient: str) -> None:
    source = leaf(2, 2)

    def make() -> Callable[..., Tensor]:
        matrix = torch.sin(source) + source
        return lambda t, y: torch.tanh(y @ matrix)

    check(make, [source], gradient)


@every_mode
def test_tensors_that_depend_on_each_other_are_not_counted_twice(gradient: str) -> None:
    first = leaf(2, 2)

    def make() -> Callable[..., Tensor]:
        second = 2 * first
        third = second.exp()
        return lambda t, y: torch.tanh(y @ first + y @ second) - 0.1 * (y @ third)

    check(make, [first], gradient)


@every_mode
def test_a_non_leaf_and_its_leaf_each_get_their_own_share(gradient: str) -> None:
    """The field uses a product of a leaf; the loss asks for the gradient at both."""
    source = leaf(2, 2)
    matrix = source * 3
    y = solve(lambda t, y: torch.tanh(y @ matrix), torch.tensor([0.4, -0.7], dtype=F64), gradient)
    at_matrix, at_source = torch.autograd.grad(y.sum(), [matrix, source])
    same([at_source], [3 * at_matrix])


@every_mode
def test_state_times_and_tensors_of_the_field_may_share_a_source(gradient: str) -> None:
    """y0, t and the field's matrix all hang on one leaf."""
    source = leaf(2)

    def loss() -> Tensor:
        matrix = torch.outer(source, source.cos())
        t = torch.cat([times(0.0, 0.4), 1.0 + 0.1 * source[:1]])
        y = ctorch.solve_ode(
            lambda s, y: torch.sin(y @ matrix + s), source.exp(), t, gradient=gradient, **TIGHT
        ).y
        return y.square().sum()

    same(torch.autograd.grad(loss(), [source]), [differences(loss, source)], 1e-6)


class Holder:
    """An object that is no module."""

    def __init__(self, matrix: Tensor) -> None:
        self.inside = {"deep": [matrix]}

    def field(self, t: Tensor, y: Tensor, scale: Any = 1.0) -> Tensor:
        return torch.tanh(y @ self.inside["deep"][0]) * scale


@every_mode
@pytest.mark.parametrize("kind", ["method", "partial", "container", "buffer", "default"])
def test_wherever_the_tensor_is_held(gradient: str, kind: str) -> None:
    matrix, scale = leaf(2, 2), leaf(1, seed=4)

    def make() -> Callable[..., Any]:
        holder = Holder(matrix)
        if kind == "method":
            return holder.field
        if kind == "partial":
            return functools.partial(holder.field, scale=scale)
        if kind == "container":
            return lambda t, y: holder.inside["deep"][0].T @ torch.sin(y)
        if kind == "default":
            return lambda t, y, m=matrix: torch.sin(m @ y)
        module = nn.Module()
        module.register_buffer("matrix", matrix)
        module.forward = lambda t, y: torch.tanh(y @ module.matrix)  # type: ignore[method-assign]
        return module

    check(make, [matrix, scale] if kind == "partial" else [matrix], gradient)


class Nested(nn.Module):
    """A module that holds modules, and its matrix in the innermost."""

    def __init__(self, matrix: Tensor, depth: int) -> None:
        super().__init__()
        self.inner = Nested(matrix, depth - 1) if depth else None
        if not depth:
            self.matrix = nn.Parameter(matrix.detach())

    def innermost(self) -> Nested:
        return self if self.inner is None else self.inner.innermost()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -y if t < 0.5 else torch.tanh(y @ self.innermost().matrix)


@every_mode
@pytest.mark.parametrize("listed", [False, True])
def test_parameters_deep_in_modules_are_known_before_they_are_used(
    gradient: str, listed: bool
) -> None:
    """Where the first evaluation does not show them; also in a module that is held in a list."""
    field = Nested(leaf(2, 2), 9)
    modules = [field]
    func = (lambda t, y: modules[0](t, y)) if listed else field
    y0 = leaf(2)
    how = {"options": {"jump_t": torch.tensor([0.5])}}

    def loss() -> Tensor:
        return solve(func, y0, gradient, **how).square().sum()

    matrix = field.innermost().matrix
    same(torch.autograd.grad(loss(), [matrix]), [differences(loss, matrix)], 1e-6)


@every_mode
def test_args_are_differentiated(gradient: str) -> None:
    matrix, shift = leaf(2, 2), leaf(2, seed=2)
    y0 = torch.tensor([0.4, -0.7], dtype=F64)

    def loss() -> Tensor:
        args = (matrix, {"shift": shift.exp()}, "a word")
        return solve(
            lambda t, y, m, rest, word: torch.tanh(y @ m) + rest["shift"],
            y0,
            gradient,
            args=args,
        ).sum()

    wanted = [matrix, shift]
    same(torch.autograd.grad(loss(), wanted), [differences(loss, x) for x in wanted], 1e-6)


@pytest.mark.parametrize("gradient", [*MODES, "odeint"])
def test_a_tensor_used_only_later_is_found_or_refused(gradient: str) -> None:
    """A branch on t, which the first evaluation does not show: right or an error, never silent."""
    boxes = {"early": leaf(2, 2), "late": leaf(2, 2, seed=1)}

    class Branching:
        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ fetch("early" if float(t) < 0.5 else "late"))

    def fetch(name: str) -> Tensor:
        return hidden()[name]

    hidden = _Opaque(boxes).get
    y0 = torch.tensor([0.4, -0.7], dtype=F64)
    options = {"jump_t": [0.5], **frozen(0.1)}
    late = boxes["late"]

    def loss() -> Tensor:
        if gradient == "odeint":
            return ctorch.odeint(Branching(), y0, times(0.0, 1.0), options=options).sum()
        return ctorch.solve_ode(
            Branching(), y0, times(0.0, 1.0), gradient=gradient, options=options
        ).y.sum()

    if gradient in ("checkpoint", "adjoint"):
        value = loss()
        with pytest.raises(ctorch.GradientError, match=r"\[2, 2\].*args"):
            value.backward()
        assert late.grad is None
        return
    (got,) = torch.autograd.grad(loss(), [late])
    same([got], [differences(loss, late)], 1e-8)


@pytest.mark.parametrize("gradient", MODES)
def test_a_late_tensor_is_not_lost_where_nothing_else_requires_grad(gradient: str) -> None:
    hidden, y0 = _Opaque({"late": leaf(2, 2)}).get, torch.tensor([0.4, -0.7], dtype=F64)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return -y if float(t) < 0.5 else torch.tanh(y @ hidden()["late"])

    try:
        y = ctorch.solve_ode(field, y0, times(0.0, 1.0), gradient=gradient, options=frozen(0.1)).y
    except ctorch.GradientError:
        return
    assert y.requires_grad


class _Opaque:
    """Hides its tensors from a search through attributes."""

    __slots__ = ("_boxes",)

    def __init__(self, boxes: dict[str, Tensor]) -> None:
        self._boxes = boxes

    def get(self) -> dict[str, Tensor]:
        return self._boxes


@every_exact_mode
def test_a_constant_field_and_an_unused_parameter_give_zero_or_none(gradient: str) -> None:
    unused = nn.Linear(2, 2, dtype=F64)
    y0 = leaf(2)

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = unused

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.ones_like(y) * t

    y = solve(Field(), y0, gradient)
    got = torch.autograd.grad(y.sum(), [y0, unused.weight], allow_unused=True)
    same([got[0]], [torch.full((2,), 3.0, dtype=F64)])
    assert got[1] is None or not got[1].any()


@every_mode
def test_frozen_parameters_get_nothing_and_the_others_all(gradient: str) -> None:
    net, y0 = Net(), torch.tensor([0.4, -0.7], dtype=F64)
    for p in net.inner.parameters():
        p.requires_grad_(False)
    solve(net, y0, gradient).sum().backward()
    assert net.inner.weight.grad is None
    assert net.outer.weight.grad is not None
    assert net.outer.weight.grad.abs().min() > 0


@every_mode
def test_without_anything_to_differentiate_there_is_no_graph(gradient: str) -> None:
    y0 = torch.tensor([0.4, -0.7], dtype=F64)
    assert not solve(lambda t, y: -y, y0, gradient).requires_grad
    net = Net()
    with torch.no_grad():
        y = solve(net, y0.clone().requires_grad_(), gradient)
    assert not y.requires_grad
    assert y.grad_fn is None


@every_mode
def test_solves_run_in_inference_mode(gradient: str) -> None:
    net, y0 = Net(), torch.tensor([0.4, -0.7], dtype=F64)
    with torch.inference_mode():
        y = solve(net, y0, gradient)
    torch.testing.assert_close(y.clone(), solve(net, y0, "none"))


def test_gradient_none_leaves_no_graph() -> None:
    assert not solve(Net(), leaf(2), "none").requires_grad
