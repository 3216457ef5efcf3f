"""What is traced, how samples are told apart, and what is refused, with its line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctorch.codegen import Untraceable, trace, trace_values

from .checks import check
from .harness import Compiled

Y = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def refused(func: Callable[..., Any], match: str, y: Tensor = Y, batched: bool = True) -> None:
    """Refused with ``match``, and with the line of ``func`` that is marked ``# here``."""
    with pytest.raises(Untraceable, match=match) as caught:
        trace(func, y, 0.1, (), batched=batched)
    lines, start = inspect.getsourcelines(func)
    marked = [start + i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
    if marked:
        assert caught.value.line.endswith(f"test_trace.py:{marked[0]}"), caught.value.line
        assert f"test_trace.py:{marked[0]}" in str(caught.value)


def branch(t: Tensor, y: Tensor) -> Tensor:
    if y.sum() > 0:  # here
        return y
    return -y


def item(t: Tensor, y: Tensor) -> Tensor:
    return y * t.flatten()[0].item()  # here


def to_numpy(t: Tensor, y: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(y.numpy()))  # here


def to_array(t: Tensor, y: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(y.detach()))  # here


def to_list(t: Tensor, y: Tensor) -> Tensor:
    return torch.tensor(y.tolist(), dtype=y.dtype)  # here


def random(t: Tensor, y: Tensor) -> Tensor:
    return y + torch.randn_like(y)  # here


def random_constant(t: Tensor, y: Tensor) -> Tensor:
    return y + torch.rand(2)  # here


def dropout(t: Tensor, y: Tensor) -> Tensor:
    return F.dropout(y, 0.5)  # here


def unsupported(t: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(y[:, :, None] * y[:, None, :])  # here


def selected(t: Tensor, y: Tensor) -> Tensor:
    return y * y[y > 0].sum()  # here


def median_values(t: Tensor, y: Tensor) -> Tensor:
    return y.median(-1, keepdim=True).values + y  # here


def writes_state(t: Tensor, y: Tensor) -> Tensor:
    y[:, 0] = 0  # here
    return y


def in_double(t: Tensor, y: Tensor) -> Tensor:
    return y.to(torch.float32).double() * y.to(torch.float32)  # here


@pytest.mark.parametrize(
    ("func", "match"),
    [
        (branch, "_local_scalar_dense|is_nonzero"),
        (item, r"item\(\)"),
        (to_numpy, "numpy"),
        (to_array, "__array__"),
        (to_list, r"tolist\(\) at"),
        (random, "randn_like.*draws random"),
        (random_constant, "rand .*draws random|rand at.*draws random"),
        (dropout, "draws random"),
        (unsupported, "_linalg_eigh"),
        (selected, "nonzero|index"),
        (median_values, "median"),
        (writes_state, "writes into"),
        (in_double, "computes in torch.float32"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_refused_with_operator_and_line(func: Callable[..., Any], match: str) -> None:
    refused(func, match)


def test_a_module_s_line_is_the_user_s() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Dropout(0.5))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.layer(y)

    with pytest.raises(Untraceable, match=re.escape("return self.layer(y)")):
        trace(Net(), Y, 0.0, batched=True)
    trace(Net().eval(), Y, 0.0, batched=True)


def test_an_operator_without_a_derivative_here_is_named_when_it_is_needed() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.lgamma(y.abs() + 1)

    traced = trace(func, Y, 0.0, batched=True)
    assert "digamma" in traced.field.derivative_error
    assert "torch.lgamma" in traced.field.derivative_error
    assert "vjp(" not in traced.source


@pytest.mark.parametrize(
    "mixing",
    [
        lambda t, y: y - y.mean(0),
        lambda t, y: y - y[:1],
        lambda t, y: y * y.sum(),
        lambda t, y: y.flip(0),
        lambda t, y: y.cumsum(0),
        lambda t, y: torch.softmax(y, 0),
        lambda t, y: y @ y.T @ y,
        lambda t, y: F.batch_norm(y, None, None, training=True),
        lambda t, y: y * t.sum(),
        lambda t, y: y + 0 * y.sum(),
    ],
)
def test_mixed_samples_are_refused_or_one_system(mixing: Callable[..., Tensor]) -> None:
    with pytest.raises(Untraceable):
        trace(mixing, Y, 0.1, batched=True)
    traced = trace(mixing, Y, 0.1, batched=False)
    if traced.field.split:  # the time is one for all
        assert "t.sum()" in inspect.getsource(mixing)
    else:
        assert traced.dim == Y.numel()


def test_one_system_is_computed_as_it_is() -> None:
    traced = check(lambda t, y: torch.tanh(y - y.mean(0)) * t, Y, batched=False)
    assert not traced.field.split
    vector = check(lambda t, y: torch.stack([y[1], -y[0]]), Y[0], batched=False)
    assert vector.dim == 2
    check(lambda t, y: torch.stack([y[1], torch.full_like(y[1], -9.81)]), Y[0], batched=False)


def test_functions_of_the_state_are_one_after_the_other() -> None:
    level = torch.tensor(0.3, dtype=Y.dtype)
    functions = [lambda t, y, z: y.sum() - z, lambda t, y, z: t * y[:, 1], lambda t, y, z: level]
    traced, sizes = trace_values(functions, Y, 0.5, (level + 1,))
    assert sizes == [1, 3, 1]
    assert not traced.field.split
    assert [float(x) for x in traced.shared] == pytest.approx([1.3, 0.3])
    z = traced.shared[0]
    traced.verify(
        lambda t, y, own, shared: torch.cat(
            [f(t[0], y.view(3, 2), shared[0]).reshape(-1) for f in functions]
        )[None]
    )
    again, _ = trace_values(functions, Y, 0.5, (z,))
    assert again.field is traced.field
    other, _ = trace_values(functions[:2], Y, 0.5, (z,))
    assert other.field is not traced.field
    with pytest.raises(Untraceable, match="int64"):
        trace_values([lambda t, y: (y > 0).sum()], Y)


def test_samples_of_a_joint_solve_are_told_apart() -> None:
    traced = check(lambda t, y: torch.tanh(y) * t, Y, batched=False)
    assert traced.field.split
    assert traced.dim == 2


def test_args_of_samples_and_shared_ones_are_told_apart() -> None:
    rates = torch.rand(3, 1, dtype=torch.float64)
    matrix = torch.randn(3, 3, dtype=torch.float64)
    y = torch.randn(3, 3, dtype=torch.float64)
    row = torch.randn(3, dtype=torch.float64)
    traced = check(lambda t, y, a, b, c: a * (y @ b) + c, y, args=(rates, matrix, row))
    assert traced.field.owned == (True, False, False)
    assert traced.own.shape == (3, 1)
    traced = check(lambda t, y, p: p["k"] * y + p["n"], y, args=({"k": rates, "n": 2},))
    assert traced.field.owned == (True,)


def test_trees_of_states() -> None:
    def func(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": y["v"].sum(-1), "v": -y["x"][:, None] * y["v"] + t}

    y = {"x": torch.randn(3, dtype=torch.float64), "v": torch.randn(3, 2, dtype=torch.float64)}
    traced = check(func, y)
    assert traced.dim == 3
    check(lambda t, y: (y[1] * t, -y[0]), (Y[0], Y[1]), batched=False)


def test_writes_in_place_and_views_are_what_they_are_in_eager() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(y)
        out[:, 0] = y[:, 1]
        out[:, 1] = -y[:, 0]
        view = out.view(-1)
        view.mul_(2)
        out[:, 0].add_(y[:, 0] ** 2)
        rows = out.clone()
        rows.zero_()
        rows += out
        rows.copy_(rows.flip(1))
        return rows

    check(func, Y)


def test_views_that_copy_in_a_decomposition() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        windows = torch.cat([y, y], 1).unfold(1, 2, 1)
        return torch.sin(windows.flatten(1).mean(1))[:, None, None] * y

    check(func, torch.randn(3, 2, 3, dtype=torch.float64), batched=False)


def test_derivatives_within_a_field() -> None:
    def energy(q: Tensor) -> Tensor:
        return (torch.sin(q[:, 0]) * q[:, 1] ** 2).sum()

    def func(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            q = y if y.requires_grad else y.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(energy(q), q, create_graph=True)
        return slope.flip(1) * torch.tensor([1.0, -1.0])

    check(func, Y)
    check(lambda t, y: torch.func.vmap(torch.func.grad(lambda q: (q**3).sum()))(y), Y)


def test_what_a_function_says_of_its_own_derivative() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 3 * g

    check(lambda t, y: Straight.apply(3 * y) * y.detach(), Y)


def test_a_tensor_that_cannot_be_found_again_is_refused() -> None:
    hidden = iter([])
    store = [torch.ones(2).double()]

    class Opaque:
        __slots__ = ()

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return y * registry(id(store))

    def registry(key: int) -> Tensor:
        import gc

        return next(x for x in gc.get_objects() if id(x) == key)[0]

    del hidden
    held = registry.__closure__
    assert held is None
    ids = id(store)
    with pytest.raises(Untraceable, match=r"not found in what it\s+holds"):
        trace(lambda t, y: y * registry(ids), Y, 0.0, batched=True)


def test_a_broken_function_says_so() -> None:
    with pytest.raises(Untraceable, match="any number of them"):
        trace(lambda t, y: y[:, :1], Y, 0.0, batched=True)
    with pytest.raises(ZeroDivisionError):
        trace(lambda t, y: y / (1 // 0), Y, 0.0, batched=True)
    with pytest.raises(Untraceable, match=r"asin .* no lowering for complex numbers"):
        trace(lambda t, y: torch.asin(torch.complex(y, y)).real, Y, 0.0, batched=True)
    with pytest.raises(Untraceable, match=r"float32 or torch\.float64"):
        trace(lambda t, y: y, Y.half(), 0.0, batched=True)


def test_verify_refuses_other_results() -> None:
    traced = trace(lambda t, y: y * 2, Y, 0.0, batched=True)
    traced.verify(lambda t, y, own, shared: y * 2)
    with pytest.raises(Untraceable, match="differs from func"):
        traced.verify(lambda t, y, own, shared: y * 2.001)


def test_tracing_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    trace(lambda t, y: y.sin(), Y, 0.0, batched=True)
    assert torch.equal(state, torch.get_rng_state())


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_tensors_that_were_computed_from_each_other() -> None:
    """The derivative by one does not go through another, nor into the graph that made it."""
    first = torch.full((2,), 0.7, dtype=torch.float64, requires_grad=True)
    second = first.exp()
    traced = trace(lambda t, y: y * first + y.sin() * second, Y, 0.0, batched=True)
    compiled, ones = Compiled(traced.source), torch.ones_like(Y)
    grads = compiled.vjp(ones[:, 0], Y, Y[:, :0], traced.shared, ones)[-1]
    wanted = {id(first): Y.sum(0), id(second): Y.sin().sum(0)}
    for held, grad in zip(traced.shared, grads, strict=True):
        torch.testing.assert_close(grad, wanted[id(held)])
    assert torch.autograd.grad(second.sum(), first)[0].isfinite().all()  # the graph is there


def test_tensors_in_functions_of_the_user() -> None:
    leaf = torch.full((2,), 0.7, dtype=torch.float64, requires_grad=True)
    check(lambda t, y: Cubed.apply(leaf) * y + leaf, Y)
    computed = leaf * 2
    traced = trace(lambda t, y: Cubed.apply(computed) * y, Y, 0.0, batched=True)
    assert "autograd.Function" in traced.field.derivative_error
