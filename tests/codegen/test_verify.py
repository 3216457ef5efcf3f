"""Compiled code is used where it is what func is, and only there: played by functions of Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctorch.codegen import Untraceable, trace

F64 = torch.float64
Y = torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.5]], dtype=F64)
Given = tuple[Tensor, Tensor, Tensor, list[Tensor]]
Flat = Callable[[Tensor, Tensor, Tensor, "list[Tensor]"], Tensor]


def played(flat: Flat, wrong: Flat | None = None) -> tuple[Any, Any]:
    """``evaluate`` and ``pull_back`` of a function of t [B], y [B, dim], own [B, own] and the
    shared arrays; the derivative is that of ``wrong``, where it is given.
    """

    def pull_back(*given: Any) -> list[Tensor]:
        *inputs, shared, ct = given
        leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *shared)]
        with torch.enable_grad():
            slopes = (wrong or flat)(*leaves[:3], leaves[3:])
        return list(torch.autograd.grad(slopes, leaves, ct, materialize_grads=True))

    return flat, pull_back


class Field(nn.Module):
    """y' = own tanh(y W^T + b) V^T + t c, of which V may be zero."""

    def __init__(self, last: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in {"w": (3, 2), "b": (3,), "v": (2, 3)}.items():
            numbers = torch.randn(shape, dtype=F64, generator=generator)
            setattr(self, name, nn.Parameter(numbers * (last if name == "v" else 1.0)))

    def forward(self, t: Tensor, y: Tensor, own: Tensor, c: Tensor) -> Tensor:
        return own * (torch.tanh(y @ self.w.T + self.b) @ self.v.T) + t * c


def flat(t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
    """``Field``, as compiled code is called."""
    c, w, b, v = shared
    return own * (torch.tanh(y @ w.T + b) @ v.T) + t[:, None] * c


def scaled(number: int | None, place: tuple[int, ...], by: float) -> Flat:
    """The same, with the derivative by one element of one array wrong by a factor."""

    def wrong(t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
        arrays = [t, y, own, *shared]
        factor = torch.ones_like(arrays[number])
        factor[place] = by
        x = arrays[number]
        arrays[number] = (x - x.detach()) * factor + x.detach()
        return flat(*arrays[:3], arrays[3:])

    return wrong


ARGS = (torch.tensor([[0.5], [1.5], [-1.0]], dtype=F64), torch.tensor([0.3, -2.0], dtype=F64))
ELEMENTS = {
    "t": (0, (1,)), "y": (1, (2, 1)), "own": (2, (0, 0)), "c": (3, (1,)), "w": (4, (2, 0)),
    "b": (5, (0,)), "v": (6, (1, 2)),
}  # fmt: skip
NAMES = {"own": "args", "c": "args"}


@pytest.mark.parametrize("last", [1.0, 0.0], ids=["", "last layer zero"])
@pytest.mark.parametrize("batched", [True, False])
def test_a_derivative_that_is_wrong_in_one_element_is_refused(batched: bool, last: float) -> None:
    traced = trace(Field(last), Y, 0.0, ARGS, batched=batched)
    traced.verify(*played(flat))
    for name, (number, place) in ELEMENTS.items():
        for by in (0.0, -1.0, 1.0 + 1e-7):
            evaluate, pull_back = played(flat, scaled(number, place, by))
            traced.verify(evaluate)
            with pytest.raises(Untraceable, match=rf"respect to \S*{NAMES.get(name, name)} differ"):
                traced.verify(evaluate, pull_back)


def test_two_elements_in_each_others_place_are_refused() -> None:
    traced = trace(Field(), Y, 0.0, ARGS, batched=True)
    evaluate, pull_back = played(flat)

    def turned(*given: Any) -> list[Tensor]:
        *rest, v = pull_back(*given)
        return [*rest, v.flip(0)]

    with pytest.raises(Untraceable, match=r"respect to \S*v differs"):
        traced.verify(evaluate, turned)


def test_a_derivative_that_is_no_number_is_refused() -> None:
    traced = trace(lambda t, y: y.sin(), Y, 0.0, batched=True)
    with pytest.raises(Untraceable, match=r"respect to y differs .* up to inf"):
        traced.verify(*played(lambda t, y, own, shared: y.sin(), lambda t, y, *_: y.sin() / 0))


def test_on_a_kink_compiled_code_may_go_to_either_side() -> None:
    """Where the last bit of a number decides."""

    def kinked(t: Tensor, y: Tensor, side: Any = None, shared: Any = None) -> Tensor:
        return y.sin() + torch.sign(3 * y - y - y - y) * y

    traced = trace(kinked, Y, 0.0, batched=True)
    for side in (-1, 0, 1):
        traced.verify(*played(lambda t, y, own, shared, by=side: y.sin() + by * y))
    with pytest.raises(Untraceable, match="respect to y"):
        traced.verify(*played(kinked, lambda t, y, *_: 100 * y))


def test_where_autograd_has_no_number_any_derivative_does() -> None:
    def masked(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y > 0, y.sqrt(), 0.5 * y)

    def right(t: Tensor, y: Tensor, *_: Any) -> Tensor:
        return torch.where(y > 0, y.clamp(min=1e-30).sqrt(), 0.5 * y)

    traced = trace(masked, Y, 0.0, batched=True)
    traced.verify(*played(right))
    with pytest.raises(Untraceable, match="respect to y"):
        traced.verify(*played(right, lambda t, y, *_: right(t, y) * 1.001))


def test_samples_without_a_slope_do_not_hide_the_others() -> None:
    def rooted(t: Tensor, y: Tensor, own: Any = None, shared: Any = None) -> Tensor:
        return y.sqrt()

    traced = trace(lambda t, y: y.sqrt(), Y, 0.0, batched=True)
    traced.verify(*played(rooted))
    with pytest.raises(Untraceable, match="respect to y"):
        traced.verify(*played(rooted, lambda t, y, *_: 1.001 * y.sqrt()))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_is_rounding_alone_is_not_compared(dtype: torch.dtype) -> None:
    """Terms that cancel leave what their last bits are, in another order others."""

    def cancelled(t: Tensor, y: Tensor) -> Tensor:
        return y.softmax(-1) - (y - y.logsumexp(-1, True)).exp()

    def other(t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
        e = (y - y.amax(-1, True)).exp()
        return e / e.sum(-1, True) - y.exp() / y.exp().sum(-1, True)

    traced = trace(cancelled, Y.to(dtype), 0.0, batched=True)
    traced.verify(*played(other))
    with pytest.raises(Untraceable, match="differs from func"):
        traced.verify(*played(lambda *given: other(*given) + 1e-3))


def test_zeros_are_not_where_all_points_are() -> None:
    """At a state and a time of zeros many a wrong field is right."""
    traced = trace(lambda t, y: y * y + t, torch.zeros(3, 2, dtype=F64), 0.0, batched=True)
    with pytest.raises(Untraceable, match="differs from func"):
        traced.verify(lambda t, y, own, shared: y * y * 1.5 + t[:, None])
    with pytest.raises(Untraceable, match="differs from func"):
        traced.verify(lambda t, y, own, shared: y * y + 1.5 * t[:, None])
