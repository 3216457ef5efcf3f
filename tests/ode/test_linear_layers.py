"""Gradients of linear layers' parameters, gathered over evaluations, are those of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ctorch
from ctorch.ode import linear_layers
from tests.ode.problems import F64, Net, leaf, same, times

Field = Callable[[Tensor, Tensor], Tensor]
gradients_kept = pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
steps = pytest.mark.parametrize("batched", [False, True], ids=["joint", "batched"])


class Holder(nn.Module):
    """A field of y with a [2, 2], b [2], c [5, 2], d [5], e [2, 5], one [1] and f [2]."""

    def __init__(self, of: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        shapes = {"a": (2, 2), "b": (2,), "c": (5, 2), "d": (5,), "e": (2, 5), "one": (1,)}
        shapes["f"] = (2,)
        for seed, (name, shape) in enumerate(shapes.items()):
            setattr(self, name, nn.Parameter(leaf(*shape, seed=seed).detach()))
        self.of = of

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope."""
        return self.of(self, y)


def two_layers(p: Any, y: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(y, p.c, p.d)), p.e, p.b)


def transpose_used_twice(p: Any, y: Tensor) -> Tensor:
    turned = p.a.t()
    return torch.tanh(y @ turned) @ turned


def transpose_used_otherwise(p: Any, y: Tensor) -> Tensor:
    turned = p.a.t()
    return torch.tanh(y @ turned) * turned.sum()


#: field by name, and how many layers of it are to be found
FIELDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "two layers": (two_layers, 2),
    "no bias": (lambda p, y: torch.tanh(F.linear(y, p.a)), 1),
    "more dimensions": (lambda p, y: torch.tanh(F.linear(y[None, None], p.a, p.b))[0, 0], 1),
    "written out": (lambda p, y: torch.tanh(y @ p.a.T) + torch.sin(y @ p.a), 2),
    "turned back": (lambda p, y: torch.tanh(y @ p.a.permute(0, 1)), 0),
    "one weight in two layers": (lambda p, y: torch.tanh(y @ p.a) @ p.a, 2),
    "one transpose in two layers": (transpose_used_twice, 2),
    "a transpose used otherwise": (transpose_used_otherwise, 0),
    "a weight used otherwise": (lambda p, y: F.linear(y, p.a, p.b) * p.a.sum(), 0),
    "a bias used otherwise": (lambda p, y: torch.tanh(F.linear(y, p.a, p.b)) * p.b, 1),
    "a bias of two, one not a layer": (
        lambda p, y: F.linear(y, p.a, p.b) * p.a.sum() + F.linear(torch.tanh(y), p.c[:2], p.b),
        0,
    ),
    "a bias for all": (lambda p, y: torch.tanh(torch.addmm(p.one, y, p.a)), 1),
    "a bias for each row": (lambda p, y: torch.tanh(torch.addmm(p.a[: len(y)], y, p.a)), 0),
    "scaled": (lambda p, y: torch.addmm(p.b, y, p.a, alpha=0.5, beta=2.0), 0),
    "weight first": (lambda p, y: torch.tanh(p.a.mm(y.t()).t()), 0),
    "one weight with two biases": (
        lambda p, y: torch.tanh(F.linear(y, p.a, p.b)) + torch.sin(F.linear(y, p.a, p.f)),
        2,
    ),
    "computed weight": (lambda p, y: F.linear(y, p.a * 2.0, p.b), 0),
    "no layer": (lambda p, y: p.b * y + p.one, 0),
}


def gradients(field: Field, y0: Tensor, **how: Any) -> list[Tensor]:
    """Of a loss, in y0 and all parameters."""
    assert isinstance(field, nn.Module)
    y = ctorch.solve_ode(field, y0, times(0.0, 0.3, 0.8), **how).y
    loss = (y.square() + y).sum()
    found = torch.autograd.grad(loss, [y0, *field.parameters()], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def by_replay(field: Field, y0: Tensor, **how: Any) -> list[Tensor]:
    """The same by plain autograd, through the same steps."""
    assert isinstance(field, nn.Module)
    y = ctorch.solve_ode(field, y0, times(0.0, 0.3, 0.8), **how).y
    loss = (y.square() + y).sum()
    found = torch.autograd.grad(
        loss, [y0, *field.parameters()], allow_unused=True, create_graph=True
    )
    return [torch.zeros(()) if g is None else g.detach() for g in found]


@pytest.fixture
def layers_found(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every evaluation whose products are gathered, the number of its layers."""
    found: list[int] = []
    add = linear_layers.Gathered.add

    def counting(self: Any, reached: Any, cotangents: Any) -> None:
        found.append(len(reached.layers))
        add(self, reached, cotangents)

    monkeypatch.setattr(linear_layers.Gathered, "add", counting)
    return found


@pytest.mark.parametrize("size", [1, 100_000])
@gradients_kept
@steps
@pytest.mark.parametrize("name", FIELDS)
def test_every_use_of_parameters_has_its_gradient(
    name: str,
    batched: bool,
    gradient: str,
    size: int,
    layers_found: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_layers, "GATHERED", size)
    of, count = FIELDS[name]
    how: dict[str, Any] = {"gradient": gradient, "batched": batched}
    y0 = leaf(2, 2, seed=9)
    found = gradients(Holder(of), y0, **how)
    assert set(layers_found) == ({count} if count else set())
    same(found, by_replay(Holder(of), y0, **how))


def test_a_state_without_samples_has_its_layers(layers_found: list[int]) -> None:
    found = gradients(Holder(two_layers), leaf(2))
    assert set(layers_found) == {2}
    same(found, by_replay(Holder(two_layers), leaf(2)))


def test_what_is_left_when_products_are_made_is_added(
    layers_found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is left: one evaluation, or several."""
    reference = by_replay(Holder(two_layers), leaf(3, 2))
    gradients(Holder(two_layers), leaf(3, 2))
    count = len(layers_found)
    for together in (2, 3, count - 2, count - 1):
        monkeypatch.setattr(linear_layers, "GATHERED", 3 * 5 * together)
        same(gradients(Holder(two_layers), leaf(3, 2)), reference)


def test_cotangents_too_large_to_be_added_up_are_summed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_layers, "GATHERED", 1)
    monkeypatch.setattr(linear_layers, "SUMMED_LATER", 3 * 2)  # those of the second layer
    y0 = leaf(3, 2)
    same(gradients(Holder(two_layers), y0), by_replay(Holder(two_layers), y0))


def test_gradients_lie_in_memory_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way round they are added up."""
    monkeypatch.setattr(linear_layers, "GATHERED", 1)
    field, y0 = Holder(two_layers), leaf(3, 2)
    loss = ctorch.solve_ode(field, y0, times(0.0, 1.0)).y.square().sum()
    assert all(x.is_contiguous() for x in torch.autograd.grad(loss, [field.c, field.e]))


def test_some_of_the_parameters_alone() -> None:
    field, y0 = Holder(two_layers), leaf(3, 2)
    loss = ctorch.solve_ode(field, y0, times(0.0, 1.0)).y.square().sum()
    chosen = [field.c, field.b]
    some = torch.autograd.grad(loss, chosen, retain_graph=True)
    every = torch.autograd.grad(loss, [field.d, field.e, *chosen])
    same(some, every[2:])


def test_frozen_parameters_stay_without_gradient() -> None:
    field = Holder(two_layers)
    field.c.requires_grad_(False)
    field.b.requires_grad_(False)
    y0 = leaf(3, 2)
    loss = ctorch.solve_ode(field, y0, times(0.0, 1.0)).y.square().sum()
    loss.backward()
    assert field.c.grad is None
    assert field.b.grad is None
    reference = Holder(two_layers)
    replayed = by_replay_of(reference, y0, [reference.d, reference.e])
    same([field.d.grad, field.e.grad], replayed)  # type: ignore[list-item]


def by_replay_of(field: Field, y0: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    loss = ctorch.solve_ode(field, y0, times(0.0, 1.0)).y.square().sum()
    return [x.detach() for x in torch.autograd.grad(loss, tensors, create_graph=True)]


def hooked_tensor(z: Tensor) -> Tensor:
    if z.requires_grad:
        z.register_hook(lambda g: 3.0 * g)
    return z


def hooked_node(z: Tensor) -> Tensor:
    if z.grad_fn is not None:
        z.grad_fn.register_prehook(lambda grads: tuple(3.0 * g for g in grads))
    return z


@gradients_kept
@pytest.mark.parametrize("hook", [hooked_tensor, hooked_node])
def test_hooks_inside_the_field_change_the_gradients_behind_them(
    hook: Callable[[Tensor], Tensor], gradient: str
) -> None:
    def of(p: Any, y: Tensor) -> Tensor:
        return F.linear(torch.tanh(hook(F.linear(y, p.c, p.d))), p.e, p.b)

    y0 = leaf(3, 2)
    found = gradients(Holder(of), y0, gradient=gradient)
    same(found, by_replay(Holder(of), y0, gradient=gradient))
    without = gradients(Holder(two_layers), y0, gradient=gradient)
    assert (found[3] - without[3]).abs().max() > 0.1


def test_hooks_registered_after_the_solve_are_seen() -> None:
    hidden: list[Tensor] = []

    def of(p: Any, y: Tensor) -> Tensor:
        z = F.linear(y, p.c, p.d)
        hidden.append(z)
        return F.linear(torch.tanh(z), p.e, p.b)

    def gradient_of_d(factor: float | None) -> Tensor:
        hidden.clear()
        field = Holder(of)
        y = ctorch.solve_ode(field, leaf(3, 2), times(0.0, 1.0), gradient="backprop").y
        for z in hidden:
            if factor is not None and z.requires_grad:
                z.register_hook(lambda g: factor * g)
        return torch.autograd.grad(y.sum(), field.d)[0]

    same([gradient_of_d(1.0)], [gradient_of_d(None)])
    assert gradient_of_d(0.0).abs().max() == 0.0


def test_backward_hooks_of_modules_change_the_gradients_behind_them() -> None:
    def net(hook: bool) -> Net:
        made = Net()
        if hook:
            made.outer.register_full_backward_hook(lambda m, grads, _: (2.0 * grads[0],))
        return made

    y0 = leaf(3, 2)
    found = gradients(net(True), y0)
    same(found, by_replay(net(True), y0))
    assert (found[1] - gradients(net(False), y0)[1]).abs().max() > 0.01


@pytest.mark.parametrize("again", [False, True], ids=["first", "create_graph"])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("of", [two_layers, lambda p, y: p.c.sum() * y], ids=["layer", "no layer"])
def test_the_hook_of_a_parameter_sees_the_gradient_of_the_solve_once(
    of: Callable[[Any, Tensor], Tensor], gradient: str, again: bool
) -> None:
    if gradient == "adjoint" and again:
        pytest.skip("the continuous adjoint has no second derivatives")
    field, y0 = Holder(of), leaf(3, 2)

    def gradient_of_c() -> Tensor:
        y = ctorch.solve_ode(field, y0, times(0.0, 1.0), gradient=gradient).y
        return torch.autograd.grad(y.square().sum(), field.c, create_graph=again)[0].detach()

    plain, seen = gradient_of_c(), []

    def hook(g: Tensor) -> Tensor:
        seen.append(g.detach())
        return 2.0 * g

    handle = field.c.register_hook(hook)
    doubled = gradient_of_c()
    handle.remove()
    assert len(seen) == 1
    same([doubled, seen[0], gradient_of_c()], [2.0 * plain, plain, plain])


def test_a_second_backward_pass_gives_the_same() -> None:
    field, y0 = Holder(two_layers), leaf(3, 2)
    loss = ctorch.solve_ode(field, y0, times(0.0, 1.0)).y.square().sum()
    inputs = [y0, field.a, field.b, field.c, field.d, field.e]
    passes = [
        torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True) for _ in range(2)
    ]
    for first, second in zip(*passes, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)


def test_single_precision_sums_keep_their_digits() -> None:
    """Of a bias too, whose gradient is a sum over rows and evaluations that all but cancels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    y0 = torch.randn(256, 2, requires_grad=True)

    def found(replayed: bool) -> list[Tensor]:
        y = ctorch.solve_ode(lambda t, y: net(y), y0, torch.tensor([0.0, 2.0]), rtol=1e-5).y
        loss = y[-1].square().sum()
        return list(torch.autograd.grad(loss, [*net.parameters()], create_graph=replayed))

    for mine, reference in zip(found(False), found(True), strict=True):
        assert (mine - reference).norm() <= 2e-6 * reference.norm()


def test_sparse_inputs_of_a_layer() -> None:
    graph = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=F64)

    def of(adjacency: Tensor) -> Callable[[Any, Tensor], Tensor]:
        return lambda p, y: torch.tanh(torch.mm(adjacency, p.c[:3] * 1.0)) * y

    y0 = leaf(3, 2)
    same(gradients(Holder(of(graph.to_sparse())), y0), gradients(Holder(of(graph)), y0))
